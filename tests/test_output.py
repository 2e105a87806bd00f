"""Output folders: nothing of the user's is touched, one process at a time, and damage is found before a resume."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import QUICK
from moesaic.checkpoint.claim import LOCK, claim
from moesaic.checkpoint.facts import front_matter, saved_result, saved_settings
from moesaic.config import FinetuneConfig
from moesaic.conversion import prepare
from moesaic.conversion.convert import convert
from moesaic.errors import InputError
from moesaic.evaluation.inspect import inspect
from moesaic.files import read_json, to_json, write_json
from moesaic.formats.converted import dense_origin
from moesaic.formats.export import export
from moesaic.training.finetune import finetune
from moesaic.training.state import training_folder

SHARD, HIDDEN = "model-layer-00000.safetensors", "hidden-00001.safetensors"


class Killed(BaseException):
    pass


def kill_at(layer):
    def report(done, count, note):
        if done == layer:
            raise Killed

    return report


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(folders("llama"), out, QUICK)
    return out


def same_weights(one, other):
    files = sorted(path.name for path in one.glob("*.safetensors"))
    return files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


@pytest.mark.parametrize("name", ["out.replaced", "out.failed", "out.partial", "out.training", "out.replaced1"])
def test_a_users_own_files_beside_the_output_are_kept(folders, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("years of work")
    if name == "out.partial":
        with pytest.raises(InputError, match="in the way and was not made by moesaic"):
            convert(folders("llama"), tmp_path / "out", QUICK)
    else:
        convert(folders("llama"), tmp_path / "out", QUICK)
        convert(folders("llama"), tmp_path / "out", QUICK, overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} == {"out", name}
    assert (tmp_path / name / "mine.txt").read_text() == "years of work"


def test_a_link_as_output_stays_a_link(folders, tmp_path, made):
    shutil.copytree(made, tmp_path / "disk" / "target")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "target")
    (tmp_path / "disk" / "target" / SHARD).write_bytes(b"")
    convert(folders("llama"), tmp_path / "out", QUICK, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert same_weights(made, tmp_path / "disk" / "target")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]


def test_a_link_to_nowhere_is_refused_before_work(folders, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"is a link to '.*gone', where nothing is; remove it"):
        convert(folders("llama"), tmp_path / "out", QUICK, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def hold(folder):
    """Start a process that holds a folder until its standard input ends."""
    code = (
        "import sys; sys.argv[0] = 'moesaic'  # so that torch is not imported\n"
        "from pathlib import Path; from moesaic.checkpoint.claim import claim\n"
        f"with claim(Path({str(folder)!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_at_once_and_by_number(folders, tmp_path, made):
    doors = {
        ".partial": lambda out: convert(folders("llama"), out, QUICK, resume=False),
        ".gguf.partial": lambda out: export(made, f"{out}.gguf"),
        ".training": lambda out: finetune(made, out, FinetuneConfig(objective="lm", steps=1, window=32, samples=8)),
    }
    for ending, door in doors.items():
        process = hold(tmp_path / f"out{ending}")
        with pytest.raises(InputError, match=rf"is in use by process {process.pid}, which writes the same output"):
            door(tmp_path / "out")
        process.communicate("")
        assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process(tmp_path):
    process = hold(tmp_path / "out.partial")
    process.kill()
    process.wait()
    with claim(tmp_path / "out.partial"):
        assert (tmp_path / "out.partial" / LOCK).read_text() == str(os.getpid())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_files_are_for_those_whom_the_umask_says(folders, tmp_path, umask):
    before = os.umask(umask)
    try:
        convert(folders("llama"), tmp_path / "out", QUICK)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "state cut": lambda partial: (partial / "state.json").write_text('{"fingerprint"'),
    "state of other types": lambda partial: (partial / "state.json").write_text('{"fingerprint": {}, "layers": 5}'),
    "state a list": lambda partial: (partial / "state.json").write_text("[]"),
    "shard flipped": lambda partial: spoil(partial / SHARD),
    "shard cut": lambda partial: (partial / SHARD).write_bytes((partial / SHARD).read_bytes()[:100]),
    "shard gone": lambda partial: (partial / SHARD).unlink(),
    "hidden flipped": lambda partial: spoil(partial / HIDDEN),
    "hidden gone": lambda partial: (partial / HIDDEN).unlink(),
    "only a half-written state": lambda partial: [
        path.rename(partial / "state.json.writing") if path.name == "state.json" else path.unlink()
        for path in list(partial.iterdir())
    ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_unfinished_work_starts_anew_and_says_so(folders, tmp_path, made, damage, caplog):
    with pytest.raises(Killed):
        convert(folders("llama"), tmp_path / "out", QUICK, progress=kill_at(1))
    DAMAGES[damage](tmp_path / "out.partial")
    convert(folders("llama"), tmp_path / "out", QUICK)
    assert same_weights(made, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ("starts anew" in caplog.text) != damage.startswith("only")


def test_what_was_begun_in_one_dtype_goes_on_in_it(folders, tmp_path, monkeypatch):
    config = QUICK.model_copy(update={"dtype": "bfloat16"})
    for name, kill in (("whole", None), ("out", 1)):
        monkeypatch.setattr(prepare, "compute_dtype", lambda dtype, device: torch.bfloat16)
        if kill is None:
            convert(folders("llama"), tmp_path / name, config)
        else:
            with pytest.raises(Killed):
                convert(folders("llama"), tmp_path / name, config, progress=kill_at(kill))
    monkeypatch.setattr(prepare, "compute_dtype", lambda dtype, device: torch.float32)
    assert convert(folders("llama"), tmp_path / "out", config).compute_dtype == "bfloat16"
    assert same_weights(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("name", ["version", "device", "tokens", "model", "format"])
def test_all_that_decides_numbers_is_compared_on_resume(folders, tmp_path, name):
    with pytest.raises(Killed):
        convert(folders("llama"), tmp_path / "out", QUICK, progress=kill_at(1))
    state = read_json(tmp_path / "out.partial" / "state.json")
    state["fingerprint"][name] = "another"
    write_json(tmp_path / "out.partial" / "state.json", state)
    with pytest.raises(InputError, match=f"holds unfinished work with another {name}; repeat"):
        convert(folders("llama"), tmp_path / "out", QUICK)


@pytest.mark.parametrize("plan", ["S1A1E2", "S1A1E16", "S2A2E32"])
def test_what_stock_engines_cannot_run_is_known_before_work(folders, tmp_path, plan):
    config = QUICK.model_copy(update={"plan": plan, "dtype": "bfloat16"})
    conversion = prepare.prepare(folders("llama"), config)
    assert (conversion.format.name, bool(conversion.format_reason)) == ("moesaic", True)
    assert convert(folders("llama"), tmp_path / "out", config).format == "moesaic"
    with pytest.raises(InputError, match="cannot be written as glm4_moe"):
        convert(folders("llama"), tmp_path / "other", config.model_copy(update={"format": "glm4_moe"}))


SIDE_FILES = {
    "moesaic.yaml": [
        "",
        "a: [1",
        "5",
        "model: 5\nconfig: {}",
        "config: {}",
        "model: x\nconfig: {tokens: many}",
        "\x00",
    ],
    "metrics.json": ["", "{}", "[]", '{"plan": 5}', "[" * 10_000, '{"a": 1' + "0" * 5_000 + "}"],
    "config.json": [
        "",
        "[]",
        '{"model_type": "glm4_moe"}',
        '{"moesaic": {}}',
        '{"moesaic": {"model_type": "moesaic"}}',
    ],
    "model.safetensors.index.json": ["", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}'],
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_damaged_side_files_are_one_line_before_any_work(made, tmp_path, name):
    folder = shutil.copytree(made, tmp_path / "made")
    for content in SIDE_FILES[name]:
        (folder / name).write_text(content)
        for door in (
            inspect,
            lambda model: export(model, tmp_path / "other", "moesaic"),
            lambda model: finetune(model, tmp_path / "tuned", FinetuneConfig(objective="lm", steps=1)),
        ):
            with pytest.raises(InputError) as raised:
                door(folder)
            assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_damaged_teacher_cache_is_made_again(made, folders, tmp_path):
    config = FinetuneConfig(steps=2, window=32, samples=8, held_out=2, teacher=str(folders("llama")))
    cache = tmp_path / "cache"
    finetune(made, tmp_path / "one", config, teacher_cache=cache)
    kept = sorted(cache.rglob("*.safetensors"))
    whole = [path.read_bytes() for path in kept]
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    finetune(made, tmp_path / "two", config, teacher_cache=cache)
    assert [path.read_bytes() for path in kept] == whole
    assert same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("damage", ["state", "best", "fingerprint"])
def test_a_damaged_training_starts_anew_and_says_so(made, tmp_path, damage, caplog):
    config = FinetuneConfig(
        objective="lm", method="full", steps=6, window=32, samples=16, held_out=2, learning_rate=1e-3
    )
    finetune(made, tmp_path / "whole", config)

    def kill(done, count, note):
        if done >= 60:
            raise Killed

    with pytest.raises(Killed):
        finetune(made, tmp_path / "out", config, progress=kill)
    folder = training_folder(tmp_path / "out")
    [best] = folder.glob("best-*")
    spoil({"state": folder / "state.pt", "best": best, "fingerprint": folder / "fingerprint.json"}[damage])
    if damage == "fingerprint":
        (folder / "fingerprint.json").write_text("{")
    finetune(made, tmp_path / "out", config)
    assert "starts anew" in caplog.text
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert not folder.exists()


def test_a_training_that_leaves_the_numbers_stops_and_keeps_the_start(made, tmp_path, caplog):
    config = FinetuneConfig(
        objective="lm", method="full", steps=20, window=32, samples=16, held_out=2, learning_rate=1.0, warmup=0.0
    )
    for weights in (made,):
        result = finetune(weights, tmp_path / "out", config)
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert result.held_out_loss <= result.held_out_loss_before


def test_json_never_holds_what_is_no_number():
    assert to_json({"a": [1, {"b": 2.5}]}) == '{"a": [1, {"b": 2.5}]}'
    with pytest.raises(Exception, match=r"not finite: a\.1\.b nan, c -inf"):
        to_json({"a": [1, {"b": float("nan")}], "c": -float("inf")})


def test_what_belongs_to_a_model_comes_along(folders, tmp_path):
    dense = shutil.copytree(folders("llama"), tmp_path / "dense")
    terms = ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "tokenizer.model")
    for name in terms:
        (dense / name).write_text(name)
    (dense / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.org/l\n---\n# Mine\n"
    )
    convert(dense, tmp_path / "out", QUICK)
    finetune(tmp_path / "out", tmp_path / "tuned", FinetuneConfig(objective="lm", steps=1, window=32, samples=8))
    export(tmp_path / "tuned", tmp_path / "ours", "moesaic")
    for folder in ("out", "tuned", "ours"):
        assert [(tmp_path / folder / name).read_text() for name in terms] == list(terms)
        card = front_matter(tmp_path / folder / "README.md")
        assert {name: card[name] for name in ("base_model", "license", "license_name", "license_link")} == {
            "base_model": "dense", "license": "other", "license_name": "mine", "license_link": "https://x.org/l"
        }  # fmt: skip
        assert card["library_name"] == ("moesaic" if folder == "ours" else "transformers")


def test_saved_facts_are_what_was_given(made, folders):
    assert saved_settings(made)["config"]["tokens"] == QUICK.tokens
    assert saved_result(made).plan == saved_settings(made)["plan"]
    with pytest.raises(InputError, match="was converted from the local"):
        dense_origin(str(made))
    assert load_file(made / SHARD)
