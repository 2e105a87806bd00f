"""A run that is killed at any file operation is finished by the same call, byte by byte, and leaves nothing behind.

`kills.py` says how all points are found. Here some of them are tried; with MOESAIC_ALL_KILLS=1 all are (many minutes).
"""

import os
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import moesaic
from conftest import QUICK
from kills import moments, put, tree
from moesaic import FinetuneConfig, InputError, WorkError

ALL = os.environ.get("MOESAIC_ALL_KILLS") == "1"
FEW = 6
"""Points tried of each case, beside those at OUT itself, where not all are."""
SMALL = QUICK.model_copy(update={"plan": "S1A2E8", "tokens": 512, "partition": "random"})
TRAINING = FinetuneConfig(window=32, samples=8, batch=2, held_out=4, steps=3, evaluations=2, device="cpu")


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """Let no time pass and no memory be used, so that equal runs write equal bytes; and draw no plots."""
    for name in ("conversion.convert", "conversion.layer", "training.finetune"):
        module = import_module(f"moesaic.{name}")
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))
        if hasattr(module, "peak_rss_bytes"):
            monkeypatch.setattr(module, "peak_rss_bytes", lambda: 1 << 30)
    convert, finetune = (import_module(f"moesaic.{name}") for name in ("conversion.convert", "training.finetune"))
    monkeypatch.setattr(convert, "write_plots", lambda facts, folder: (folder / "expert_load.png").write_text("plot"))
    monkeypatch.setattr(finetune, "write_training", lambda rows, facts, path: path.write_text("plot"))


@pytest.fixture(scope="module")
def sources(folders, tmp_path_factory):
    """Models to start from: dense, converted, and another one converted, all of them small."""
    root = tmp_path_factory.mktemp("sources")
    moesaic.convert(folders("llama"), root / "converted", SMALL)
    moesaic.convert(folders("llama"), root / "older", SMALL.model_copy(update={"seed": 1}))
    moesaic.export(root / "older", root / "older.gguf")
    return SimpleNamespace(dense=folders("llama"), root=root)


def fails_as_stock(monkeypatch):
    def fail(source, made):
        raise WorkError("not what was asked for")

    monkeypatch.setattr(import_module("moesaic.conversion.convert"), "check", fail)


def verbs(sources, root):
    """What is called, by verb: a function of OUT and `overwrite`."""
    converted, cache = sources.root / "converted", root / "cache"
    config = TRAINING.model_copy(update={"teacher": str(sources.dense)})
    return {
        "convert": lambda out, overwrite: moesaic.convert(sources.dense, out, SMALL, overwrite=overwrite),
        "export stock": lambda out, overwrite: moesaic.export(converted, out, overwrite=overwrite),
        "export moesaic": lambda out, overwrite: moesaic.export(converted, out, "moesaic", overwrite=overwrite),
        "export gguf": lambda out, overwrite: moesaic.export(converted, out, "gguf", overwrite=overwrite),
        "finetune": lambda out, overwrite: moesaic.finetune(
            converted, out, config, overwrite=overwrite, clock=lambda: 0.0
        ),
        "finetune cached": lambda out, overwrite: moesaic.finetune(
            converted, out, config, overwrite=overwrite, clock=lambda: 0.0, teacher_cache=cache
        ),
    }


CASES = [
    "convert", "convert over", "convert unstock", "convert unstock over", "export stock", "export stock over",
    "export moesaic", "export moesaic over", "export gguf", "export gguf over", "finetune", "finetune over",
    "finetune cached",
]  # fmt: skip


def chosen(points):
    """All points, or some: those at OUT itself, and others evenly spread."""
    if ALL:
        return points
    return [p for i, p in enumerate(points) if p.at_the_top or i % max(1, len(points) // FEW) == 0]


def part(state, name):
    """What a state says of a file or folder."""
    return {key: value for key, value in state.items() if Path(key).parts[0] == name}


@pytest.mark.parametrize("case", CASES)
def test_what_was_killed_is_finished_by_the_same_call(sources, tmp_path, monkeypatch, case):
    root = tmp_path / "root"
    verb, over = case.replace(" over", "").replace(" unstock", ""), case.endswith(" over")
    if "unstock" in case:
        fails_as_stock(monkeypatch)
    call = verbs(sources, root)[verb]
    name = "out.gguf" if "gguf" in case else "out"
    for ending in (".replaced", ".failed"):
        folder = root / f"{name}{ending}"
        folder.mkdir(parents=True)
        (folder / "mine.txt").write_text("years of work")
    mine = tree(root)
    old = {}
    if over:
        older = tree(sources.root)
        source = "older.gguf" if "gguf" in case else "older"
        old = {key.replace(source, name, 1): value for key, value in older.items() if Path(key).parts[0] == source}
    start = mine | old
    put(root, start)
    points, operations = moments(root, lambda: call(root / name, over))
    expected = points[-1].state
    new = part(expected, name)
    assert {Path(key).parts[0] for key in expected} - {Path(key).parts[0] for key in mine} <= {name, "cache"}
    assert expected | mine == expected
    wrong = Counter()
    for point in chosen(points):
        put(root, point.state)
        says = ""
        if over:
            says = says or refused(call, root / name, old, new)
        says = says or resumed(call, root / name, over, expected, new)
        if says:
            wrong[f"{point.before}: {says}"] += 1
    print(f"\n{case}: {operations} operations, {len(points)} points, {len(chosen(points))} tried, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


def refused(call, out, old, new):
    """Call without `overwrite`, which is refused and leaves OUT whole, old or new; say what is wrong."""
    try:
        call(out, False)
    except InputError as error:
        if "exists" not in str(error):
            return f"refused: {error}"
    except Exception as error:
        return f"failed without --overwrite: {error!r}"
    else:
        return "was made though OUT existed"
    found = part(tree(out.parent), out.name)
    return "" if found in (old, new) else f"OUT is neither old nor new: {differences(found, new)}"


def resumed(call, out, over, expected, new):
    """Call again; say what is then not as expected."""
    try:
        call(out, over)
    except InputError as error:
        if over or "exists" not in str(error):
            return f"refused: {error}"
    except Exception as error:
        return f"failed: {error!r}"
    return differences(tree(out.parent), expected)


def differences(found, expected):
    names = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
    return ", ".join(f"{key} {'other' if key in found and key in expected else 'left' if key in found else 'missing'}" for key in sorted(names)[:6])
