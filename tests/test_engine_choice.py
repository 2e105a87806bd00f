"""A conversion for an engine has the finest groups that it was measured to run well, in a form that it loads."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import moesaic
from conftest import QUICK
from moesaic import ConvertConfig, InputError, convert, plans
from moesaic.conversion.auto import candidates
from moesaic.conversion.prepare import prepare
from moesaic.formats import engines
from moesaic.formats.engines import ENGINES, EngineSpeed, choose_for, finest, good_for, loaders, measured
from moesaic.formats.export import export
from moesaic.plan import KEPT_SPEED, engine_plan

REFUSED = {
    "llama.cpp": {"gemma2", "gemma3", "olmo2"}, "sglang": {"gemma2", "gemma3", "olmo2"},
    "mlx": {"gemma2", "gemma3", "olmo2", "llama3-rope", "granite"}, "vllm": set(), "transformers": set(),
}  # fmt: skip
"""Families that an engine has no form of; so that one which it loses, or wins, is noticed."""
ROOT = Path(__file__).parent.parent
LLAMA_CPP = QUICK.model_copy(update={"engine": "llama.cpp", "active": 0.5})


@pytest.mark.parametrize(
    ("shares", "width"),
    [
        ({1216: 1.0, 128: 0.95, 64: 0.91, 32: 0.5}, 64),
        ({1216: 1.0, 128: 0.5, 64: 0.95}, 1216),  # what is finer than a slow width is not trusted
        ({1216: 0.8, 608: 1.0, 128: 0.9}, 128),
        ({1216: 1.0}, 1216),
    ],
)
def test_the_finest_groups_that_keep_the_speed_are_taken(shares, width):
    rows = [EngineSpeed(w, share, None) for w, share in shares.items()]
    assert finest(rows).width == width


def test_prefill_counts_as_decoding_does():
    rows = [EngineSpeed(1216, 1.0, 1.0), EngineSpeed(128, 1.0, KEPT_SPEED), EngineSpeed(64, 1.0, KEPT_SPEED - 0.01)]
    assert finest(rows).width == 128


@given(
    active=st.sampled_from([0.25, 0.5, 0.75]),
    size=st.sampled_from([768, 2048, 4864, 8960, 11008, 14336]),
    least=st.sampled_from([32, 64, 128, 256, 1216]),
    multiple=st.sampled_from([1, 32, 256]),
)
def test_a_plan_for_an_engine_is_the_finest_near_the_share(active, size, least, multiple):
    plan = engine_plan(active, size, least, multiple)
    assert plan.width * plan.groups == size

    def miss(groups):
        return abs(round(active * groups) / groups - active)

    able = [e for e in range(4, 129) if size % e == 0 and 2 <= round(active * e) < e]
    able = [e for e in able if size // e % multiple == 0 and size // e >= least]
    if able:
        assert plan.groups in able
        assert miss(plan.groups) <= min(map(miss, able)) + 0.02
        assert not [e for e in able if e > plan.groups and miss(e) < 0.01]
    assert plan.shared == round(active * plan.groups) // 2
    assert 0 < plan.num_experts_per_tok < plan.num_experts


@pytest.mark.parametrize("engine", ENGINES)
def test_the_committed_measurements_say_what_is_chosen(engine):
    chosen = choose_for(engine)
    rows = measured(engine, chosen.outtype or engines.TYPES.get(engine, ""))
    if not rows:
        assert chosen.least_width is None
        assert "were not compared" in chosen.reason
        assert good_for(4_096, [engine]) == []
        return
    best = max(row.decode for row in rows)
    [row] = [row for row in rows if row.width == chosen.least_width]
    assert row.decode >= KEPT_SPEED * best
    assert f"groups of {row.width} neurons" in chosen.reason
    assert good_for(row.width, [engine]) == [engine]
    assert good_for(row.width - 1, [engine]) == []
    [first, second, *_] = plans("tiny", engine=engine).choices
    assert second.plan == str(engine_plan(0.5, 768, row.width, chosen.multiple))
    assert {first.partition, second.partition} == {"specialists", "coactivation"}


def test_the_type_is_the_fastest_of_the_same_quality():
    types = {found.name: found for found in engines.measured_types()}
    chosen = types[choose_for("llama.cpp").outtype]
    assert chosen.perplexity <= engines.SAME_QUALITY
    assert all(t.speed <= chosen.speed for t in types.values() if t.perplexity <= engines.SAME_QUALITY)
    assert choose_for("llama.cpp", "f16").outtype == "f16"
    assert choose_for("llama.cpp", "q4_k_m").multiple == 256


@pytest.mark.parametrize("engine", ENGINES)
def test_every_family_has_a_form_that_the_engine_loads_or_a_clear_error(folders, family, engine):
    config = QUICK.model_copy(update={"engine": engine, "partition": "specialists", "active": 0.5})
    if family in REFUSED[engine]:
        for call in (lambda: prepare(folders(family), config), lambda: plans(str(folders(family)), engine=engine)):
            with pytest.raises(InputError, match=rf"--for {engine}: .*What loads it \(as"):
                call()
        return
    conversion = prepare(folders(family), config)
    assert conversion.engine.engine == engine
    if engine == "llama.cpp":
        assert not engines.llama_cpp_reason(conversion.model_config, False, conversion.whole_config)
    else:
        assert engine in loaders(conversion.format, conversion.whole_config)
    assert all(choice.partition for choice in plans(str(folders(family)), engine=engine).choices)


@pytest.mark.parametrize(
    ("settings", "out", "message"),
    [
        ({"engine": "llama"}, "out", "Did you mean 'llama.cpp'"),
        ({"engine": "vllm"}, "out.gguf", "loads folders; drop .gguf"),
        ({"engine": "vllm", "outtype": "q8_0"}, "out", "is a type of llama.cpp's"),
        ({"outtype": "q8_0"}, "out", "add --for llama.cpp"),
        ({"engine": "llama.cpp", "outtype": "q9"}, "out", "unknown outtype 'q9'"),
        ({"engine": "llama.cpp", "fine": True}, "out", "--fine has no say"),
        ({"engine": "llama.cpp", "outtype": "q4_k_m", "plan": "S1A2E6"}, "out", "no multiple of it"),
        ({"engine": "llama.cpp", "router": "mlp"}, "out", "What loads it"),
        ({"engine": "llama.cpp", "partition": "static"}, "out", "statically pruned"),
        ({"engine": "mlx", "format": "moesaic"}, "out", "--for mlx: it does not load this model as moesaic"),
    ],
)
def test_what_cannot_be_is_said_before_anything_costly(folders, tmp_path, settings, out, message):
    with pytest.raises(InputError, match=message):
        convert(folders("qwen2"), tmp_path / out, QUICK.model_copy(update=settings))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_lacks_is_found_before_the_work(folders, tmp_path):
    import shutil

    shutil.copytree(folders("llama"), tmp_path / "dense")
    spec = json.loads((tmp_path / "dense" / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "dense" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="rules it knows by name"):
        convert(tmp_path / "dense", tmp_path / "out", LLAMA_CPP)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`tiny` as a folder for llama.cpp, and as one file."""
    root = tmp_path_factory.mktemp("made")
    results = {name: convert("tiny", root / name, LLAMA_CPP) for name in ("folder", "file.gguf")}
    return root, results


def test_a_folder_holds_the_file_and_a_file_stands_alone(made):
    root, results = made
    assert {path.name for path in root.iterdir()} == {"folder", "file.gguf"}
    assert (root / "folder" / "model.gguf").is_file()
    assert not list((root / "folder").glob("*.read"))
    for name, result in results.items():
        assert result.gguf.outtype == choose_for("llama.cpp").outtype
        assert result.gguf.bytes == (root / name).stat().st_size or name == "folder"
        assert result.gguf.perplexity == pytest.approx(result.perplexity, rel=0.02)
        assert result.gguf.fallbacks == 0
        assert result.expert_width % result.engine.multiple == 0
        assert result.engine.reason == choose_for("llama.cpp").reason
    saved = json.loads((root / "folder" / "metrics.json").read_text())
    assert saved["gguf"] == results["folder"].to_dict()["gguf"]
    assert saved["check"]["median_difference"] < 0.05
    assert "model.gguf" in (root / "folder" / "README.md").read_text()


def test_the_file_is_what_the_folder_is(made):
    root, _ = made
    tensors = [
        {t.name: t.data for t in gguf.GGUFReader(root / name).tensors} for name in ("folder/model.gguf", "file.gguf")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"plan": "S4A2E6"}),
        ("qwen3", {"plan": "S4A2E6"}),
        ("phi3", {"plan": "S4A2E6"}),
        ("tied", {"plan": "S4A2E6"}),
        ("llama3-rope", {"plan": "S4A1E8", "partition": "specialists"}),
        ("granite", {"plan": "S4A1E8", "partition": "specialists"}),
        ("llama", {"plan": "S0A1E8", "partition": "specialists"}),
    ],
)
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_a_file_is_read_back_as_the_folder(folders, tmp_path, monkeypatch, family, settings, outtype):
    """f32 bit by bit; others as gguf itself dequantises them."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    convert(folders(family), tmp_path / "out", QUICK.model_copy(update=settings))
    export(tmp_path / "out", tmp_path / "model.gguf", "gguf", outtype=outtype)
    ours, theirs = (moesaic.load(tmp_path / name).model.state_dict() for name in ("out", "model.gguf"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        if outtype == "f32":
            assert torch.equal(theirs[name], tensor), name
        else:
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0.01 * float(tensor.abs().max() or 1))
    assert moesaic.inspect(tmp_path / "model.gguf").metrics.plan == settings["plan"]
    with pytest.raises(InputError, match="exists"):
        export(tmp_path / "model.gguf", tmp_path / "out")
    back = export(tmp_path / "model.gguf", tmp_path / "again", "moesaic")
    assert back.target == "moesaic"


def test_q4_0_is_ggufs_own(made, tmp_path, monkeypatch):
    """What is read back of a q4_0 file is `dequantize(quantize(x))` of each matrix, by gguf itself."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    root, _ = made
    facts = export(root / "folder", tmp_path / "model.gguf", "gguf", outtype="q4_0")
    assert facts.fallbacks == 0
    stock = AutoModelForCausalLM.from_pretrained(root / "folder", dtype=torch.float32)
    found, kind = moesaic.load(tmp_path / "model.gguf").model, gguf.GGMLQuantizationType.Q4_0
    for name, tensor in found.state_dict().items():
        theirs = stock.state_dict().get(name)
        if theirs is None or theirs.ndim != 2 or ".gate." in name:
            continue
        expected = gguf.quants.dequantize(gguf.quants.quantize(theirs.numpy(), kind), kind)
        assert torch.equal(tensor, torch.from_numpy(expected).to(tensor.dtype)), name


def test_a_damaged_file_of_ours_is_said_to_be(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    root, _ = made
    data = (root / "file.gguf").read_bytes()
    start = data.index(b"moesaic.config") + len("moesaic.config") + 12
    (tmp_path / "damaged.gguf").write_bytes(data[:start] + b"!" + data[start + 1 :])
    with pytest.raises(InputError, match=r"moesaic\.config is no JSON"):
        moesaic.load(tmp_path / "damaged.gguf")
    named = data.replace(b"ffn_gate_exps", b"ffn_gate_expz")
    (tmp_path / "renamed.gguf").write_bytes(named)
    with pytest.raises(InputError, match="is damaged: layer 0"):
        moesaic.load(tmp_path / "renamed.gguf")


def test_a_conversion_for_an_engine_tries_its_shapes(folders):
    names = [c.name for c in candidates("tiny", ConvertConfig(engine="llama.cpp", tokens=2_048))]
    assert names == [f"{c.partition} {c.plan}" for c in plans("tiny", engine="llama.cpp").choices[:2]]
    [only] = candidates(str(folders("llama3-rope")), ConvertConfig(engine="llama.cpp", tokens=2_048))
    assert only.config.partition == "specialists"  # the other's router has a constant that llama.cpp lacks there


def test_from_the_command_line(run, tmp_path):
    out = tmp_path / "out.gguf"
    code, text, _ = run(
        "convert", "tiny", out, "--partition", "coactivation", "--tokens", 1024, "--json", "--outtype", "q4_0"
    )
    result = json.loads(text)
    assert (code, result["gguf"]["outtype"], result["engine"]["engine"]) == (0, "q4_0", "llama.cpp")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    code, _, error = run("convert", "tiny", out, "--dry-run")
    assert code == 2
    assert "--overwrite" in error
    code, text, _ = run("convert", "tiny", tmp_path / "other.gguf", "--dry-run", "--json", "--tokens", 2048)
    assert "S" in json.loads(text)["plan"]
    code, text, _ = run("plan", "tiny", "--for", "llama.cpp", "--json")
    found = json.loads(text)
    assert found["engine"]["least_width"] == choose_for("llama.cpp").least_width
    least = found["engine"]["least_width"]
    assert all(("llama.cpp" in c["good_for"]) == (c["expert_width"] >= least) for c in found["choices"])
    code, _, shown = run("plan", "tiny", "--for", "llama.cpp")
    assert "moesaic convert tiny OUT.gguf --for llama.cpp" in shown
    assert max(map(len, shown.splitlines())) <= 80
    code, _, error = run("plan", "tiny", "--for", "tensorrt")
    assert (code, "One of: llama.cpp" in error) == (2, True)


def test_the_package_has_the_table_of_the_committed_measurements(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import engine_shapes

    assert json.loads(engines.TABLE.read_text()) == engine_shapes.table()
