"""One dial: how much calibration and training a conversion gets."""

import json

import pytest
import torch

import moesaic
from moesaic import ConvertConfig, InputError, effort
from moesaic.effort import EFFORTS, Effort, at_effort, estimate
from moesaic.given import LIMITS


@pytest.fixture
def short(monkeypatch):
    """Good is a second of training on little text."""
    monkeypatch.setitem(EFFORTS, "good", Effort(2_048, 2_048, 1 / 60))


CONFIG = ConvertConfig(partition="coactivation", window=64)


def test_efforts_ask_for_more_and_more():
    fast, good, best = EFFORTS.values()
    assert (fast.tokens, fast.minutes) == (ConvertConfig().tokens, 0)
    assert fast.tokens < good.tokens < best.tokens
    assert fast.minutes < good.minutes < best.minutes
    assert all(one.gpu_tokens >= one.tokens for one in EFFORTS.values())
    assert all(LIMITS["tokens"].holds(one.gpu_tokens) for one in EFFORTS.values())


def test_what_is_given_stays():
    assert at_effort(ConvertConfig(), "fast") == ConvertConfig()
    assert at_effort(ConvertConfig(seed=3, device="cpu"), "good") == ConvertConfig(seed=3, device="cpu", tokens=65_536)
    assert at_effort(ConvertConfig(tokens=512), "best") == ConvertConfig(tokens=512)


def test_an_unknown_effort_is_refused(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'good'"):
        moesaic.convert("tiny", tmp_path / "out", effort="goood")
    assert not list(tmp_path.iterdir())


def test_good_converts_and_trains(short, tmp_path):
    said = []
    made = moesaic.convert(
        "tiny", tmp_path / "out", CONFIG, effort="good", progress=lambda done, count, note: said.append((count, note))
    )
    assert made.finetune is not None
    assert made.finetune.steps
    assert made.finetune.perplexity == made.perplexity
    assert made.finetune.held_out_loss <= made.finetune.held_out_loss_before
    assert made.output == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["finetune"]["steps"] == made.finetune.steps
    assert {count for count, _ in said} >= {5, 100} or len({count for count, _ in said}) > 1
    moesaic.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_good_ends_in_a_gguf_of_the_trained_model(short, name, tmp_path):
    config = CONFIG.model_copy(update={"engine": "llama.cpp", "outtype": "f32"})
    made = moesaic.convert("tiny", tmp_path / name, config, effort="good")
    file = tmp_path / name if name == "out.gguf" else tmp_path / "out" / "model.gguf"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert made.finetune is not None
    assert made.gguf is not None
    assert (made.output, made.gguf.output, made.gguf.bytes) == (str(tmp_path / name), str(file), file.stat().st_size)
    assert made.gguf.perplexity == pytest.approx(made.perplexity, rel=0.02)  # the latter in the dtype of the folder
    tokens = torch.arange(40)[None]
    logits = moesaic.load(file, dtype=torch.float32).model(tokens).logits
    if name == "out":
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["gguf"]["perplexity"] == made.gguf.perplexity
        folder, _ = moesaic.load(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(folder(tokens).logits, logits, rtol=1e-4, atol=1e-4)
        assert "llama-server -m" in (tmp_path / "out" / "README.md").read_text()


class Stop(BaseException):
    """As Ctrl-C."""


def stop(done, count, note):
    """Stop in the first step of the training."""
    if "step" in note:
        raise Stop


def full(*args, **options):
    raise OSError("disk full")


def test_what_is_trained_is_gone_on_with_in_the_type_that_is_asked_for(short, tmp_path, monkeypatch):
    config, out = CONFIG.model_copy(update={"engine": "llama.cpp", "outtype": "f32"}), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(effort, "write_checked_gguf", full)
        with pytest.raises(OSError, match="disk full"):
            moesaic.convert("tiny", out, config, effort="good")
    assert {path.name for path in tmp_path.iterdir()} == {"out.effort"}  # OUT is whole or absent
    (trained,) = (tmp_path / "out.effort").glob("trained-*/metrics.json")
    steps = json.loads(trained.read_text())["finetune"]["steps"]
    made = moesaic.convert("tiny", out, config.model_copy(update={"outtype": "f16"}), effort="good")
    assert made.gguf is not None
    assert (made.gguf.outtype, made.engine and made.engine.outtype) == ("f16", "f16")
    assert made.finetune is not None
    assert (made.finetune.steps, made.finetune.output) == (steps, str(out))  # not trained again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_minutes_are_trained_anew_and_an_old_out_stays_until_then(short, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = moesaic.convert("tiny", out, CONFIG, effort="good")
    monkeypatch.setitem(EFFORTS, "good", Effort(2_048, 2_048, 2 / 60))
    with monkeypatch.context() as patch:
        patch.setattr(effort, "take_place", full)
        with pytest.raises(OSError, match="disk full"):
            moesaic.convert("tiny", out, CONFIG, effort="good", overwrite=True)
    assert json.loads((out / "metrics.json").read_text())["seconds"] == before.seconds
    monkeypatch.setitem(EFFORTS, "good", Effort(2_048, 2_048, 3 / 60))
    made = moesaic.convert("tiny", out, CONFIG, effort="good", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "minutes: 0.05" in (out / "moesaic.yaml").read_text()
    assert made.output == str(out)


def test_unfinished_work_of_another_command_is_not_dropped(short, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(effort.converting, "convert_layers", full)
        with pytest.raises(OSError, match="disk full"):
            moesaic.convert("tiny", out, CONFIG)
    assert (tmp_path / "out.partial" / "state.json").is_file()
    with pytest.raises(InputError, match="an unfinished conversion without --effort"):
        moesaic.convert("tiny", out, CONFIG, effort="good")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    moesaic.convert("tiny", out, CONFIG, effort="good", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_of_the_name_that_the_work_needs_is_kept(short, tmp_path, monkeypatch):
    moesaic.convert("tiny", tmp_path / "out.effort", CONFIG.model_copy(update={"tokens": 1_024}))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.effort").iterdir()}
    monkeypatch.setattr(effort.converting, "convert", full)
    with pytest.raises(InputError, match="is in the way"):
        moesaic.convert("tiny", tmp_path / "out", CONFIG, effort="good", overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.effort").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.effort"]


def test_what_fails_before_any_work_leaves_nothing(short, tmp_path):
    with pytest.raises(InputError):
        moesaic.convert("tiny", tmp_path / "out", CONFIG.model_copy(update={"partition": "nothing"}), effort="good")
    assert not list(tmp_path.iterdir())


def test_the_command_takes_a_type_with_a_gguf_and_an_effort(short, tmp_path):
    from typer.testing import CliRunner

    from moesaic.cli import app

    out = tmp_path / "out.gguf"
    arguments = ["convert", "tiny", str(out), "--effort", "good", "--outtype", "q8_0", "--partition", "coactivation"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["output"], found["finetune"]["output"]) == (str(out), str(out))
    assert found["gguf"]["outtype"] == "q8_0"


def test_fast_is_the_conversion_alone(tmp_path):
    config = CONFIG.model_copy(update={"tokens": 1_024})
    made = moesaic.convert("tiny", tmp_path / "out", config)
    assert made.finetune is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_goes_on_where_it_stopped(short, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        moesaic.convert("tiny", tmp_path / "out", CONFIG, effort="good", progress=stop)
    assert (tmp_path / "out.effort" / "converted" / "metrics.json").is_file()
    before = (tmp_path / "out.effort" / "converted" / "metrics.json").read_text()

    def no(*args, **options):
        raise AssertionError("converted twice")

    with monkeypatch.context() as patch:
        patch.setattr(effort.converting, "convert", no)
        with pytest.raises(AssertionError, match="twice"):  # another configuration is converted anew
            moesaic.convert("tiny", tmp_path / "out", CONFIG.model_copy(update={"seed": 1}), effort="good")
        assert (tmp_path / "out.effort" / "converted" / "metrics.json").read_text() == before
        made = moesaic.convert("tiny", tmp_path / "out", CONFIG, effort="good")
    assert made.finetune is not None
    assert not (tmp_path / "out.effort").exists()


@pytest.mark.parametrize(("name", "seed"), [("best", 0), ("good", 1)])
def test_another_effort_or_model_than_the_one_that_stopped_begins_anew(short, tmp_path, monkeypatch, name, seed):
    monkeypatch.setitem(EFFORTS, "best", Effort(2_048, 2_048, 2 / 60))

    with pytest.raises(Stop):
        moesaic.convert("tiny", tmp_path / "out", CONFIG, effort="good", progress=stop)
    made = moesaic.convert("tiny", tmp_path / "out", CONFIG.model_copy(update={"seed": seed}), effort=name)
    assert made.finetune is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_training_that_will_not_fit_is_refused_before_the_conversion(short, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.training.prepare.free_memory", lambda device: 1e6)
    monkeypatch.setattr(effort.converting, "convert", full)
    with pytest.raises(InputError, match="training would need about"):
        moesaic.convert("tiny", tmp_path / "out", CONFIG, effort="good")
    with pytest.raises(InputError, match="training would need about"):
        estimate("tiny", CONFIG, "good")
    assert not list(tmp_path.iterdir())
    estimate("tiny", CONFIG)  # which trains nothing


def test_what_exists_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError):
        moesaic.convert("tiny", tmp_path / "out", CONFIG, effort="good", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_estimate_grows_with_what_is_asked():
    few, many = (estimate("tiny", CONFIG.model_copy(update={"tokens": n})).convert_minutes for n in (2_048, 65_536))
    assert 3 * few < many < 200 * few
    assert estimate("tiny", CONFIG, "best").train_minutes == 60
    assert str(estimate("tiny", CONFIG, "good")).endswith("15 min to train")
    assert "train" not in str(estimate("tiny", CONFIG))
