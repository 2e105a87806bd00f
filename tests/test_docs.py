"""Documentation is tested: README's code runs, its tables and tree match the code, CONTRIBUTING's example works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import random_sample
from moesaic import Plan, cli, registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out" / "config.json").is_file()


def test_readme_commands_exist():
    named = set(re.findall(r"^moesaic (\w+)", README, re.MULTILINE))
    assert named
    assert named <= {command.callback.__name__ for command in cli.app.registered_commands}


def test_readme_lists_every_method_and_no_other():
    table = README.split("## Methods")[1].split("## The tree")[0]
    listed = re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)
    assert sorted(listed) == sorted(name for stage in registry.STAGES for name in registry.names(stage))


def test_readme_tree_is_the_tree():
    tree = blocks(README.split("## The tree")[1], "")[0]
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    source = ROOT / "src" / "moesaic"
    there = {p.name + "/" * p.is_dir() for p in source.iterdir() if not p.name.startswith("_") and p.name != "py.typed"}
    assert listed == there
    assert all((ROOT / name).exists() for name in re.findall(r"^(\S+)", tree, re.MULTILINE))


def test_links_to_files_hold():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"`((?:docs|dev|src|benchmarks|examples|scripts|evaluation|models|calibration)/[\w./*-]+)`",
            page.read_text(),
        ):
            places = (ROOT, ROOT / "src" / "moesaic")
            assert any(list(place.glob(path.rstrip("/"))) for place in places), f"{page.name}: {path}"
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_contributings_partitioner_works():
    [code] = blocks((ROOT / "CONTRIBUTING.md").read_text(), "python")
    scope = {"__package__": "moesaic.partition", "__name__": "moesaic.partition.every_other"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    partition = scope["EveryOther"]().split(random_sample(neurons=48), Plan(1, 2, 4, 12), torch.Generator())
    assert partition.is_disjoint(48)
    assert partition.experts[0].tolist() == list(range(1, 48, 4))


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example):
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_changelog_has_this_version_open():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
