"""A run that is killed at any file operation is finished by the same call, byte by byte, and leaves nothing behind.

`kills.py` says how all points are found, some 1,600. Here some of them are tried; with MOESAIC_ALL_KILLS=1 all are,
which takes a quarter of an hour.
"""

import gc
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import conftest
import moesaic
from kills import moments, put, tree
from moesaic import AdaptConfig, FinetuneConfig, InputError, WorkError
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.checkpoint.sources import resolve
from moesaic.comparison.frontier import frontier
from moesaic.comparison.rows import Measurement
from moesaic.results import Check, EvaluationResult
from test_sources import write_gguf

ALL = os.environ.get("MOESAIC_ALL_KILLS") == "1"
FEW = 3
"""Points tried of each case, beside those at the renames of OUT, where not all are."""
SMALL = conftest.QUICK.model_copy(update={"plan": "S1A2E8", "tokens": 512, "partition": "random"})
TEXT = "The first of many words is followed by the second, and so on to the last of them. "
FOUND = Check(max_abs_logit_error=0.0, median_difference=0.0, agreement=1.0, tokens=1, layers=1)
EVALUATION = EvaluationResult(
    perplexity=9.0, tokens=1, protocol="gptq", window=1, text="text", data_sha256="", tasks={}, versions={}
)  # fmt: skip
CASES = [
    f"{verb}{over}" for over in ("", ", overwrite")
    for verb in (
        "convert", "convert, not stock", "convert gguf", "convert for llama.cpp", "export", "export moesaic",
        "export gguf", "finetune", "adapt", "adapt, calibrated", "adapt, inside",
    )
] + ["finetune, cache"]  # fmt: skip


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """Let no time pass and no memory be used, so that equal runs write equal bytes; leave out what only reads."""
    names = ("conversion.convert", "conversion.layer", "formats.export", "training.finetune", "adaptation.adapt")
    convert, layer, export, finetune, adapt = (import_module(f"moesaic.{name}") for name in names)
    for module in (convert, layer):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    for module in (convert, layer, finetune, adapt):
        monkeypatch.setattr(module, "peak_rss_bytes", lambda: 1 << 30)
    for module in (convert, export):
        monkeypatch.setattr(module, "check", lambda source, made: FOUND)
    monkeypatch.setattr(finetune, "perplexity", lambda run, model, protocol: 9.0)
    monkeypatch.setattr(convert, "write_plots", lambda facts, folder: (folder / "expert_load.png").write_text("plot"))
    monkeypatch.setattr(
        adapt, "picture", lambda run, policy, found, folder: (folder / "experts.png").write_text("plot")
    )
    monkeypatch.setattr(adapt, "write_adaptation", lambda rows, facts, path: path.write_text("plot"))
    monkeypatch.setattr(finetune, "write_training", lambda rows, facts, path: path.write_text("plot"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with what calls start from: `dense`, `converted`, text, and `older` and `older.gguf` to overwrite."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**conftest.SMALL | {"num_hidden_layers": 2})).save_pretrained(root / "dense")
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(root / "dense")
    moesaic.convert(root / "dense", root / "converted", SMALL)
    moesaic.convert(root / "dense", root / "older", SMALL.model_copy(update={"seed": 1}))
    moesaic.export(root / "older", root / "older.gguf")
    (root / "text.txt").write_text("\n\n".join(f"{number}. {TEXT}" * 8 for number in range(60)))
    gc.freeze()  # or each training's collection looks through all that tests before left
    yield root
    gc.unfreeze()


def calls(models, root):
    """What is called, by verb, with OUT and `overwrite`."""
    dense, source = models / "dense", models / "converted"
    training = FinetuneConfig(
        window=32, samples=8, batch=2, held_out=4, steps=3, evaluations=2, device="cpu", method="router",
        learning_rate=1e-2, teacher=str(dense),
        data=(str(models / "text.txt"),),
    )  # fmt: skip

    def finetune(cache=None):
        return lambda out, overwrite: moesaic.finetune(
            source, out, training, overwrite=overwrite, clock=lambda: 0.0, teacher_cache=cache
        )

    def adapt(method, **changes):
        config = AdaptConfig(
            method=method, window=32, samples=8, batch=2, held_out=4, tokens=256, evaluations=2, device="cpu",
            target_active=0.5, data=(str(models / "text.txt"),), **changes,
        )  # fmt: skip
        return lambda out, overwrite: moesaic.adapt(source, out, config, overwrite=overwrite, clock=lambda: 0.0)

    return {
        "adapt": adapt("learned-threshold", steps=3),
        "adapt, calibrated": adapt("top-p"),
        "adapt, inside": adapt("learned-threshold", steps=3, inside=True),
        "convert": lambda out, overwrite: moesaic.convert(dense, out, SMALL, overwrite=overwrite),
        "convert gguf": lambda out, overwrite: moesaic.convert(dense, out, SMALL, overwrite=overwrite),
        "convert for llama.cpp": lambda out, overwrite: moesaic.convert(
            dense, out, SMALL.model_copy(update={"engine": "llama.cpp", "outtype": "f16"}), overwrite=overwrite
        ),
        "export": lambda out, overwrite: moesaic.export(source, out, overwrite=overwrite),
        "export moesaic": lambda out, overwrite: moesaic.export(source, out, "moesaic", overwrite=overwrite),
        "export gguf": lambda out, overwrite: moesaic.export(source, out, "gguf", overwrite=overwrite),
        "finetune": finetune(),
        "finetune, cache": finetune(root / "cache"),
    }


def fail(source, made):
    raise WorkError("not what was asked for")


@pytest.mark.parametrize("case", CASES)
def test_what_was_killed_is_finished_by_the_same_call(models, tmp_path, monkeypatch, case):
    root, over = tmp_path / "root", case.endswith(", overwrite")
    call = calls(models, root)[case.removesuffix(", overwrite").removesuffix(", not stock")]
    if "not stock" in case:
        monkeypatch.setattr(import_module("moesaic.conversion.convert"), "check", fail)
    out, older = (root / "out.gguf", "older.gguf") if "gguf" in case else (root / "out", "older")
    for name in (f"{out.name}.replaced", f"{out.name}.failed"):
        (root / name).mkdir(parents=True)
        (root / name / "mine.txt").write_text("years of work")
    mine = tree(root)
    old = {key.replace(older, out.name, 1): value for key, value in part(tree(models), older).items()} if over else {}
    put(root, mine | old)
    check_all(case, root, lambda over=over: call(out, over), out.name, mine, old)


def check_all(case, root, call, name, mine, old=None):
    """Kill a call at all points or at some, and see that the same call ends where one that was not killed ends."""
    points, operations = moments(root, call)
    expected = points[-1].state
    assert part(expected, name) != old
    assert part(expected, name) | part(expected, "cache") | mine == expected  # nothing is left beside OUT
    some = [p for i, p in enumerate(points) if ALL or p.at_the_top or i % max(1, len(points) // FEW) == 0]
    wrong = [f"{p.before}: {said}" for p in some if (said := after(p.state, call, root, name, old, expected))]
    print(f"\n{case}: {operations} operations, {len(points)} points, {len(some)} tried, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


def test_a_killed_frontier_goes_on(models, tmp_path, monkeypatch):
    module = import_module("moesaic.comparison.frontier")
    monkeypatch.setattr(
        module, "write_frontier", lambda summary, name, folder, siblings: (folder / "frontier.svg").write_text("")
    )
    monkeypatch.setattr(module, "evaluate", lambda *model, **asked: EVALUATION)
    measurement = Measurement(tokens=2_048, speed=False)
    (tmp_path / "root").mkdir()
    check_all("frontier", tmp_path / "root", lambda: frontier(
        str(models / "dense"), tmp_path / "root" / "out", active=[0.5], methods=["cmoe"], measurement=measurement
    ), "out", {})  # fmt: skip


def test_a_killed_dequantising_starts_anew(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    root.mkdir()
    monkeypatch.setenv("MOESAIC_CACHE", str(root))
    write_gguf(tmp_path / "m.gguf", conftest.small_model("qwen2"), AutoTokenizer.from_pretrained(tiny_folder()))
    check_all("gguf as source", root, lambda: resolve(str(tmp_path / "m.gguf")), "dequantised", {})


def after(state, call, root, name, old, expected):
    """Call again after a kill, first without `overwrite` where an old OUT was; say what is then wrong."""
    put(root, state)
    new = part(expected, name)
    if old:
        try:
            call(over=False)
            return "made, though OUT existed"
        except Exception as error:
            if not isinstance(error, InputError) or "exists" not in str(error):
                return f"without --overwrite: {error!r}"
        found = part(tree(root), name)
        if found not in (old, new):
            return f"OUT is neither old nor new: {differences(found, new)}"
    try:
        call()
    except Exception as error:
        if old or not isinstance(error, InputError) or "exists" not in str(error):
            return repr(error)
    return differences(tree(root), expected)


def part(state, name):
    """What a state says of a file or folder and of what is in it."""
    return {key: value for key, value in state.items() if Path(key).parts[0] == name}


def differences(found, expected):
    names = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    return ", ".join(
        f"{key} {'is missing' if key not in found else 'is other' if key in expected else 'is left'}"
        for key in names[:6]
    )
