"""The command line as scripts see it: exit codes, one JSON object on standard output, one line on bad input."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.reader import Checkpoint
from moesaic.report.frontier_table import show_frontier
from moesaic.results import EvaluationResult, FrontierResult, FrontierSummary

SMALL = ["--tokens", "1024", "--plan", "S1A2E8"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    import moesaic

    out = tmp_path_factory.mktemp("cli") / "out"
    moesaic.convert("tiny", out, moesaic.ConvertConfig(tokens=1_024, plan="S1A2E8"))
    return out


def test_convert_prints_one_object(run, tmp_path):
    code, out, err = run("convert", "tiny", tmp_path / "out", *SMALL, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["plan"] == "S1A2E8"
    assert result["output"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_convert_shows_a_table(run, tmp_path):
    code, out, err = run("convert", "tiny", tmp_path / "out", *SMALL)
    assert code == 0
    assert out == ""
    assert "active per token" in err
    assert "moesaic generate" in err
    code, _, err = run("convert", "tiny", tmp_path / "working", *SMALL, "--format", "moesaic")
    assert code == 0
    assert "written as moesaic: transformers loads it after import moesaic" in " ".join(err.split())


def test_dry_run_writes_nothing(run, tmp_path):
    code, out, _ = run("convert", "tiny", tmp_path / "out", "--active", "0.25", "--dry-run", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["plan"] == "S1A1E8 or S1A2E12"
    assert facts["partition"] == "specialists or coactivation"
    assert facts["layers"] == 4
    code, out, _ = run("convert", "tiny", tmp_path / "out", "--active", "0.25", "--fine", "--dry-run", "--json")
    facts = json.loads(out)
    assert (code, facts["plan"]) == (0, "S1A1E8 or S1A2E12 or S6A6E48")
    assert facts["partition"] == "specialists or coactivation"
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_read_and_overridden(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("active: 0.5\npartition: random\ntokens: 1024\n")
    code, out, _ = run(
        "convert", "tiny", tmp_path / "out", "--recipe", recipe, "--plan", "S1A1E4", "--dry-run", "--json"
    )
    assert code == 0
    facts = json.loads(out)
    assert (facts["plan"], facts["partition"], facts["calibration_tokens"]) == ("S1A1E4", "random", 1024)
    recipe.write_text("partitoin: random\n")
    code, _, err = run("convert", "tiny", tmp_path / "out", "--recipe", recipe)
    assert code == 2
    assert "Did you mean 'partition'" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demmo", "OUT"], "Did you mean 'demo'"),
        (["tiny", "OUT", "--partition", "cmo"], "Did you mean 'cmoe'"),
        (["tiny", "OUT", "--router", "linaer"], "Did you mean 'linear'"),
        (["tiny", "OUT", "--recovery", "lora?"], "Choose from: closed-form, none"),
        (["tiny", "OUT", "--plan", "S3A3E7"], "nearest count that does is"),
        (["tiny", "OUT", "--active", "1.5"], "at most 1"),
        (["tiny", "OUT", "--tokens", "-3"], "--tokens is -3"),
        (["tiny", "OUT", "--format", "gguf"], "--format gguf"),
        (["tiny", "OUT", "--format", "glm4"], "Did you mean 'glm4-moe'"),
        (["tiny", "OUT", "--calibration", "missing.txt"], "no text file 'missing.txt'"),
        (["tiny", "OUT", "--fine", "--plan", "S3A3E8"], "--fine asks for about 64 disjoint groups"),
        (["tiny", "OUT", "--memory-factor", "0.3"], "leaves no room for specialists"),
        (["tiny", "/proc/out"], "choose another folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, says):
    arguments = [tmp_path / "out" if a == "OUT" else a for a in arguments]
    code, out, err = run("convert", *arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_collapse_is_exit_code_1(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("collapse_ratio: 0.1\n")
    code, _, err = run("convert", "tiny", tmp_path / "out", *SMALL, "--recipe", recipe)
    assert code == 1
    assert "collapsed" in err
    code, _, err = run("convert", "tiny", tmp_path / "out", *SMALL, "--recipe", recipe, "--force")
    assert code == 0
    assert "collapsed" in err


def test_generate_evaluate_benchmark_inspect(run, converted):
    code, out, _ = run("generate", converted, "The first", "--max-new-tokens", "4")
    assert code == 0
    assert out.startswith("The first")
    code, out, _ = run("evaluate", converted, "--window", "64", "--max-tokens", "256", "--json")
    assert code == 0
    assert json.loads(out).keys() >= {"perplexity", "tokens", "protocol", "window", "data_sha256", "tasks"}
    plot = converted.with_name("roofline.png")
    few = ("--prompt", "16", "--new", "2", "--rounds", "1")
    code, out, _ = run("benchmark", converted, *few, "--plot", plot, "--json")
    assert code == 0
    assert json.loads(out)["experts"] == "moesaic"
    assert plot.stat().st_size > 10_000
    code, out, _ = run("benchmark", converted, *few, "--experts", "eager", "--json")
    assert code == 0
    assert json.loads(out)["experts"] == "eager"
    code, _, err = run("generate", "owner/not-downloaded", "The first", "--experts", "eagre")
    assert code == 2
    assert "--experts eagre is not one of eager" in err
    code, _, err = run("benchmark", converted, *few, "--plot", converted / "missing" / "roofline.png")
    assert code == 2
    assert "there is no folder" in err.replace("\n", " ")
    assert json.loads(out).keys() >= {"decode", "prefill", "block", "machine", "threads", "dtype"}
    code, out, _ = run("inspect", converted, "--json")
    assert code == 0
    assert len(json.loads(out)["layers"]) == 4
    for verb in (["inspect"], ["benchmark", "--prompt", "16", "--new", "2", "--rounds", "1"]):
        code, _, err = run(verb[0], converted, *verb[1:])
        assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "tiny", ""], "prompt is empty"),
        (["evaluate", "tiny", "--protocol", "x"], "choose from: gptq"),
        (["evaluate", "tiny", "--tasks", "missing.jsonl"], "no task file"),
        (["benchmark", "tiny", "--batch", "1,x"], "list of numbers from 1 to 4,096"),
        (["benchmark", "tiny"], "holds no moesaic.yaml"),
        (["inspect", "nowhere"], "holds no moesaic.yaml"),
    ],
)
def test_other_verbs_refuse_too(run, arguments, says):
    code, _, err = run(*arguments)
    assert code == 2
    assert says in err


def test_frontier_prints_rows_and_keeps_them(run, tmp_path):
    small = ["--out", tmp_path / "f", "--active", "50", "--tokens", "1024", "--max-tokens", "2048", "--no-speed"]
    code, out, err = run("frontier", "tiny", *small, "--methods", "static+closed-form,flap", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["static+closed-form", "flap"]
    assert rows[0].keys() >= {"method", "ffn_active", "perplexity_ratio", "speedup"}
    code, out, err = run("frontier", "tiny", *small, "--methods", "static+closed-form,flap")
    assert (code, out) == (0, "")
    assert "static+closed-form" in err


def test_a_frontier_fits_eighty_columns_and_shows_only_what_was_measured():
    row = FrontierSummary(
        method="static+closed-form", active=0.25, ffn_active=0.25, memory_factor=1.0, memory=1.0, plan="S1A1E8",
        partition=None, speedup=None, perplexity_ratio=17.7, perplexity_ratio_deviation=0.1, seeds=1,
    )  # fmt: skip
    full = replace(row, seeds=3, speedup=1.5, tasks_mean=0.4, tasks_stderr=0.02)
    placed = replace(full, seeds=1, over_line=1.234, line=14.4, line_by="parameters", extrapolated=True)
    bound = replace(row, method="neurons", plan=None, memory=None)
    dense = EvaluationResult(
        perplexity=32.1, protocol="gptq", tokens=40_960, window=2_048, text="wiki.test.raw", data_sha256="", tasks={},
        dtype="float32", versions={},
    )  # fmt: skip

    def shown(*rows):
        console = Console(width=200, file=io.StringIO())
        found = FrontierResult(
            setting={"model": "demo"}, versions={}, machine="", rows=[], dense=dense, unfit={}, speeds=[],
            summary=list(rows),
        )  # fmt: skip
        show_frontier(console, found, "out")
        return console.file.getvalue()

    text = shown(full, bound)
    assert max(map(len, text.splitlines())) <= 80
    assert all(part in text for part in ("decode", "1.50x", "zero-shot", "0.400 ±.020", "17.700 ±.100"))
    text = shown(placed, bound)
    assert max(len(line) for line in text.splitlines() if "│" in line) <= 80
    assert all(part in text for part in ("1.50x", "0.400 ±.020", "17.700", "ours/line", "1.234p*"))
    alone = shown(bound)
    assert not any(part in alone for part in ("decode", "zero-shot", "±", "ours/line"))


@pytest.mark.parametrize(("asked", "used"), [([], None), (["--dtype", "float32"], "float32")])
def test_texts_are_scored_in_the_checkpoints_dtype_unless_one_is_asked_for(run, monkeypatch, asked, used):
    own = str(Checkpoint(tiny_folder()).dtype()).removeprefix("torch.")
    monkeypatch.setattr("moesaic.models.products.compute_dtype", lambda dtype, device: torch.float32)
    code, out, err = run("evaluate", "tiny", "--window", "64", "--max-tokens", "64", *asked, "--json")
    assert code == 0, err
    assert json.loads(out)["dtype"] == (used or own)
    assert own != "float32"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--active", "half"], "--active 'half' is not a list of numbers"),
        (["--active", "150"], "from 1 to 100, such as"),
        (["--methods", "flapp"], "Did you mean 'flap'"),
        (["--tasks", "missing.jsonl"], "no task file"),
        (["--methods", "read-me", "--calibration", "pyproject.toml"], "needs a domain of text for each expert"),
    ],
)
def test_frontier_refuses_bad_input(run, tmp_path, arguments, says):
    code, out, err = run("frontier", "tiny", "--out", tmp_path / "f", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert not (tmp_path / "f").exists()


TRAINING = ["--window", "64", "--samples", "24", "--batch", "4", "--steps", "4", "--device", "cpu"]


def test_finetune_prints_one_object_and_a_table(run, converted, tmp_path):
    code, out, err = run("finetune", converted, tmp_path / "one", *TRAINING, "--rank", "4", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["held_out_loss"] <= facts["held_out_loss_before"]
    assert facts["method"] == "lora:rank=4"
    code, out, err = run("finetune", converted, tmp_path / "two", *TRAINING, "--objective", "lm")
    assert (code, out) == (0, "")
    assert "held-out loss" in err
    assert "learned: " in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny",), "tiny"),
        (("OUT", "--objective", "guess"), "--objective is 'guess'"),
        (("OUT", "--method", "lorra"), "Did you mean 'lora'"),
        (("OUT", "--window", "100000"), "--window 100000 is more than the model's longest"),
        (("OUT", "--data", "missing.jsonl"), "no text file 'missing.jsonl'"),
        (("OUT", "--teacher", "nosuch"), "no model 'nosuch'"),
        (("OUT", "--minutes", "-1"), "--minutes is -1"),
    ],
)
def test_finetune_refuses_bad_input(run, converted, tmp_path, arguments, says):
    model = converted if arguments[0] == "OUT" else arguments[0]
    code, out, err = run("finetune", model, tmp_path / "out", *arguments[1:])
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
