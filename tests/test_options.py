"""What no option can be: refused with the value, the limits and exit code 2, from recipes and Python too."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import moesaic
from moesaic import ConvertConfig, FinetuneConfig, InputError, Measurement, cli, registry
from moesaic.cli.options import expand
from moesaic.given import LIMITS, check, number, path, place
from moesaic.machine import cores
from moesaic.models.devices import choose_device, choose_dtype
from moesaic.partition.cmoe import CMoE
from moesaic.plan import parse_plan

HUGE = 10**18


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("options") / "out"
    moesaic.convert("tiny", out, ConvertConfig(tokens=512, partition="random", recovery="none"), force=True)
    return out


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_takes_its_ends_and_no_more(name):
    limit = LIMITS[name]
    check(**{name: limit.most})
    for bad in (math.nan, math.inf, -math.inf, 1e300, HUGE, -1, "x", "nan", True, [1], limit.most * 2):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is .*give"):
            check(**{name: bad})
    if limit.whole:
        with pytest.raises(InputError, match="a whole number"):
            check(**{name: limit.least + 0.5})


def test_recipes_may_write_numbers_as_text():
    assert number("learning_rate", "1e-4") == 1e-4
    assert number("tokens", "1e3") == 1_000


@pytest.mark.parametrize("config", [ConvertConfig, FinetuneConfig])
def test_every_number_of_a_configuration_has_limits(config):
    numbers = {n for n, f in config.model_fields.items() if f.annotation in (int, float, int | None, float | None)}
    assert numbers <= LIMITS.keys()
    for name in numbers:
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is nan"):
            config(**{name: math.nan})


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (ConvertConfig, {"tokns": 3}, "Did you mean 'tokens'"),
        (ConvertConfig, {"partition": 5}, "--partition is 5; give a name, one of cmoe"),
        (ConvertConfig, {"partition": CMoE(top_k=HUGE)}, "option top_k of partition 'cmoe' is 1000"),
        (ConvertConfig, {"calibration": ("~nobody-of-that-name/x",)}, "no such home folder"),
        (ConvertConfig, {"plan": 5}, "--plan is 5: input should be a valid string"),
        (FinetuneConfig, {"teacher": "~nobody-of-that-name/x"}, "no such home folder"),
        (FinetuneConfig, {"method": {"lora": 1}}, "give a name, one of"),
    ],
)
def test_python_refuses_what_the_command_line_refuses(config, settings, says):
    with pytest.raises(InputError, match=says):
        config(**settings)


def test_options_of_methods_are_finite():
    for spec in ("cmoe:top_k=1e999", f"cmoe:top_k={HUGE}", "coactivation:ridge=1e300", f"cmoe:top_k={'(' * 3_000}"):
        with pytest.raises(InputError, match="of partition '"):
            registry.build("partition", spec)
    with pytest.raises(InputError, match="option rank of method 'lora'"):
        registry.build("method", "lora:rank=1000000000")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"partition: 5", "--partition is 5"),
        (b"[" * 5_000 + b"]" * 5_000, "nested deeper"),
        (b"a: &a [1]\nb: [*a, *a]", "has an alias, *a"),
        (b"\xff\xfe\x00", "not YAML in UTF-8"),
        (b"a: b: c", "not YAML in UTF-8"),
        (b"- a", "it holds ['a']"),
        (b"config: 5", "it holds 5"),
        (b"tokens: yes", "--tokens is True"),
        (b"seed: 2001-01-01", "--seed is datetime.date"),
        (b"tokens: " + b"9" * 5_000, "not YAML in UTF-8"),
        (b"x" * 1_000_001, "more than 1,000,000 bytes"),
    ],
)
def test_recipes_of_any_shape_are_refused_in_a_line(run, tmp_path, content, says):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(content)
    code, out, err = run("convert", "tiny", tmp_path / "out", "--recipe", recipe, "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_recipe_may_have_a_byte_order_mark_and_is_no_folder(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(b"\xef\xbb\xbftokens: 1024")
    assert ConvertConfig.read(recipe, {}).tokens == 1_024
    with pytest.raises(InputError, match="it is a folder"):
        ConvertConfig.read(tmp_path, {})


@pytest.mark.parametrize(
    "words",
    [
        "convert tiny OUT --active nan", "convert tiny OUT --memory-factor inf", "convert tiny OUT --seed -1",
        f"convert tiny OUT --tokens {HUGE}", f"convert tiny OUT --window {HUGE}", f"convert tiny OUT --seed {HUGE}",
        f"convert tiny OUT --first-tokens {HUGE}", f"convert tiny OUT --expert-width {HUGE}",
        "convert tiny OUT --dtype float8_e4m3fn", "convert tiny OUT --device meta",
        f"convert tiny OUT --plan S1A1E{'9' * 5_000}",
        f"convert tiny OUT --partition specialists --plan S1A1E{HUGE} --expert-width 8",
        "convert tiny OUT --partition specialists --plan S1A1E99999999 --expert-width 8",
        "plan tiny --active nan", "plan tiny --memory-factor nan", "plan tiny --memory-factor 1e300",
        "finetune MODEL OUT --minutes nan", "finetune MODEL OUT --minutes inf",
        "finetune MODEL OUT --learning-rate nan", "finetune MODEL OUT --learning-rate 1e300",
        f"finetune MODEL OUT --rank {HUGE}",
        f"finetune MODEL OUT --samples {HUGE}", f"finetune MODEL OUT --batch {HUGE}",
        "finetune MODEL OUT --device meta",
        "generate MODEL hi --temperature nan", "generate MODEL hi --temperature inf", "generate MODEL hi --seed -1",
        f"generate MODEL hi --max-new-tokens {HUGE}", "generate MODEL hi --max-new-tokens 0",
        "generate MODEL hi --threads 100000", "generate MODEL hi --threads 0", "generate MODEL hi --device meta",
        "generate MODEL hi --device cpu:7", "generate MODEL hi --device abacus", "generate MODEL hi --dtype int8",
        "generate MODEL hi --dtype float8_e4m3fn", "generate MODEL hi --experts deepgemm",
        "generate MODEL hi --experts sonicmoe",
        f"evaluate MODEL --window {HUGE}", f"evaluate MODEL --max-tokens {HUGE}",
        f"evaluate MODEL --items {HUGE}", f"benchmark MODEL --prompt {HUGE}", f"benchmark MODEL --new {HUGE}",
        f"benchmark MODEL --rounds {HUGE}", f"benchmark MODEL --batch {HUGE}", "benchmark MODEL --batch nan",
        "frontier tiny --out OUT --active nan", "frontier tiny --out OUT --memory-factor nan",
        "frontier tiny --out OUT --memory-factor 1e300", f"frontier tiny --out OUT --seeds {HUGE}",
        f"frontier tiny --out OUT --tokens {HUGE}", f"frontier tiny --out OUT --items {HUGE}",
        "demo --model tiny --out OUT --active nan",
    ],
)  # fmt: skip
def test_extreme_options_are_bad_input(run, converted, tmp_path, words):
    places = {"OUT": tmp_path / "out", "MODEL": converted}
    code, out, err = run(*(places.get(word, word) for word in words.split()))
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_threads_say_how_many_there_may_be(run):
    _, _, err = run("generate", "tiny", "hi", "--threads", "100000")
    assert f"--threads is 100000; give a whole number from 1 to {4 * cores()}" in err


def test_our_kernels_need_a_gpu_or_the_interpreter(run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, err = run("generate", "owner/not-downloaded", "hi", "--experts", "moesaic_triton", "--device", "cpu")
    assert code == 2
    assert "needs a GPU" in err or "is not one of" in err


def test_beyond_the_context_is_refused_with_both_numbers(run, converted):
    code, out, err = run("generate", "tiny", "word " * 6_000, "--max-new-tokens", "2")
    assert (code, out) == (2, "")
    assert "--max-new-tokens 2 adds" in err
    assert "context of 2,048; give a shorter one" in err
    code, _, err = run("generate", "tiny", "word", "--max-new-tokens", "2048")
    assert code == 2
    assert "at most" in err
    code, _, err = run("benchmark", converted, "--prompt", "2040", "--new", "16")
    assert code == 2
    assert "give --new 8 at most" in err


def test_python_functions_have_the_same_doors():
    model, tokenizer = moesaic.load("tiny", dtype=torch.float32)
    tokens_BL = torch.zeros(2, 8, dtype=torch.long)
    for call in (
        lambda: moesaic.complete(model, tokenizer, "word " * 6_000),
        lambda: moesaic.complete(model, tokenizer, "hi", temperature=math.nan),
        lambda: moesaic.complete(model, tokenizer, "hi", max_new_tokens=HUGE),
        lambda: moesaic.complete(model, tokenizer, "hi", seed=-1),
        lambda: moesaic.complete(model, tokenizer, " \n"),
        lambda: moesaic.complete(model, tokenizer, "\udcff"),
        lambda: moesaic.plans("tiny", active=math.nan),
        lambda: moesaic.plans("tiny", memory_factor=math.inf),
        lambda: moesaic.frontier("tiny", "nowhere", active=[math.nan]),
        lambda: moesaic.frontier("tiny", "nowhere", active=[]),
        lambda: moesaic.frontier("tiny", "nowhere", memory_factors=[1e300]),
        lambda: moesaic.frontier("tiny", "nowhere", seeds=[-1]),
        lambda: moesaic.benchmark(model, model, tokens_BL, rounds=0),
        lambda: moesaic.benchmark(model, model, tokens_BL, new=HUGE),
        lambda: moesaic.benchmark(model, model, tokens_BL, new=2_041),
        lambda: moesaic.benchmark(model, model, tokens_BL, batches=[3]),
        lambda: moesaic.benchmark(model, model, tokens_BL, batches=[]),
        lambda: moesaic.evaluate(model, tokenizer, window=HUGE),
        lambda: moesaic.evaluate(model, tokenizer, items=0),
        lambda: Measurement(tokens=math.nan),
        lambda: Measurement(max_tokens=-1),
        lambda: parse_plan("S1A1E99999999", 768, 8, overlapping=True),
    ):
        with pytest.raises(InputError):
            call()


def test_a_batch_beyond_the_memory_is_refused(monkeypatch):
    model, _ = moesaic.load("tiny", dtype=torch.float32)
    monkeypatch.setattr("moesaic.evaluation.sizes.free_memory", lambda device: 1_000_000)
    with pytest.raises(InputError, match=r"--batch 64 with prompts of 32 and --new 32 needs .* are free"):
        moesaic.benchmark(model, model, torch.zeros(64, 64, dtype=torch.long), batches=[1, 64])


def test_dtypes_and_devices_are_those_that_models_run_in(tmp_path):
    assert choose_dtype("bf16", tmp_path) == torch.bfloat16
    assert choose_dtype("float64", tmp_path) == torch.float64
    assert choose_device("cpu").type == "cpu"


def test_tilde_is_home_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/x") == tmp_path / "x"
    assert place("~/x") == str(tmp_path / "x")
    assert place("owner/name") == "owner/name"
    assert ConvertConfig(calibration=("~/a.txt",)).calibration == (str(tmp_path / "a.txt"),)
    for bad in ("~nobody-of-that-name/x", "\udcff", "a\0b"):
        with pytest.raises(InputError):
            path(bad)


def test_every_option_that_names_a_place_expands_it(monkeypatch, tmp_path):
    """Those are of type Path, and the names of models and texts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    named, seen = {"model", "teacher", "data", "calibration", "against"}, 0
    for verb in cli.app.registered_commands:
        for name, hint in get_type_hints(verb.callback, include_extras=True).items():
            kind, *metadata = get_args(hint) or (hint,)
            if name in named or Path in (kind, *get_args(kind)):
                assert [option.callback for option in metadata] == [expand], f"{verb.callback.__name__}: {name}"
                seen += 1
    assert seen >= 25
    assert expand(Path("~/x")) == tmp_path / "x"
    assert expand(["~/x", "owner/name"]) == [str(tmp_path / "x"), "owner/name"]


def test_python_expands_it_too(run, converted, monkeypatch):
    monkeypatch.setenv("HOME", str(converted.parent))
    assert moesaic.inspect("~/out").folder == str(converted)
    assert moesaic.load("~/out").model is not None
    code, _, err = run("inspect", "~/out", "--json")
    assert code == 0, err
    code, _, err = run("finetune", converted, converted.parent / "t", "--data", "~nobody-of-that-name/x.txt")
    assert code == 2
    assert "no such home folder" in err


def test_a_prompt_on_standard_input_is_utf8(converted):
    command = [sys.executable, "-m", "moesaic.cli", "generate", converted, "-", "--max-new-tokens", "2"]
    for given, code, says in ((b"\xff\xfe hello", 2, b"not UTF-8"), ("\ufeffThé".encode(), 0, "Thé".encode())):
        done = subprocess.run(command, input=given, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert says in done.stderr + done.stdout
        assert b"Traceback" not in done.stderr


def test_measurements_stay_frozen_records():
    assert dataclasses.replace(Measurement(), tokens=64).tokens == 64
