"""Documentation is tested: its code and commands run, its lists match the code, its links lead somewhere."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import moesaic
from conftest import random_sample
from moesaic import Plan, cli, registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import result_tables  # noqa: E402

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
REPOSITORY = "https://github.com/moesaic/moesaic/blob/main/"
RAW = "https://raw.githubusercontent.com/moesaic/moesaic/main/"
MANUALS = sorted(DOCS.glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Every `moesaic VERB ...` of a page's code, without comments and continuation lines."""
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"(?:^|[|$&] )(moesaic \w.*)$", code, re.MULTILINE)]


def anchors(page):
    """Give the anchors of a page's headings that GitHub and mkdocs make alike (mkdocs joins a run of hyphens)."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    github = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return {anchor for anchor in github if "--" not in anchor}


WITH_PYTHON = [p for p in (ROOT / "README.md", *MANUALS) if blocks(p.read_text(), "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks(page.read_text(), "python"):
        exec(compile(code, page.name, "exec"), {})


def test_tutorials_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks((DOCS / "tutorial.md").read_text(), "sh") for line in block.splitlines()]
    assert len(lines) >= 7
    for line in lines:
        done = CliRunner().invoke(cli.app, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}\n{done.output[-2000:]}\n{done.exception!r}"
    assert (tmp_path / "model.gguf").stat().st_size > 1_000_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_their_options_exist(page):
    verbs = typer.main.get_command(cli.app).commands
    for _, verb, *words in commands(page.read_text()):
        assert verb in verbs, f"{page.name}: moesaic {verb}"
        options = {name for p in verbs[verb].params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - options
        assert not unknown, f"{page.name}: moesaic {verb} has no {unknown}"


def test_readme_shows_commands():
    assert {command[1] for command in commands(README)} >= {"convert", "generate"}


def test_options_in_manuals_tables_exist():
    """A table's first column names options of the verb that the page's first command calls."""
    verbs = typer.main.get_command(cli.app).commands
    seen = 0
    for page in MANUALS:
        if not (found := commands(page.read_text())):
            continue
        known = {name for p in verbs[found[0][1]].params for name in (*p.opts, *p.secondary_opts)}
        for cell in re.findall(r"^\| (`--[^|]*) \|", page.read_text(), re.MULTILINE):
            named = set(re.findall(r"(?<=`)--[\w-]+", cell))
            assert named <= known, f"{page.name}: {named - known}"
            seen += len(named)
    assert seen > 40


def test_every_option_is_in_a_manual():
    text = "\n".join(page.read_text() for page in MANUALS)
    verbs = typer.main.get_command(cli.app).commands
    shown = [(verb, p) for verb, c in verbs.items() for p in c.params if not getattr(p, "hidden", False)]
    options = [(verb, [*p.opts, *p.secondary_opts]) for verb, p in shown if p.opts[0].startswith("--")]
    assert len(options) > 80
    missing = {(verb, flags[0]) for verb, flags in options if not any(re.search(rf"{f}\b", text) for f in flags)}
    assert not missing


def test_readme_lists_every_method_and_no_other():
    every = sorted((stage, name) for stage in registry.STAGES for name in registry.names(stage))
    rows = re.findall(r"^\| \[(\w+)\]\([^)]*\) \|[^|]*\| (.*) \|$", README.split("## Methods")[1], re.MULTILINE)
    assert sorted((stage, name) for stage, names in rows for name in re.findall(r"`([\w-]+)`", names)) == every
    table = (DOCS / "methods.md").read_text()
    assert sorted(re.findall(r"^\| (?:\[)?(\w+)(?:\]\([^)]*\))? \| `([\w-]+)` \|", table, re.MULTILINE)) == every


@pytest.mark.parametrize("stage", registry.STAGES)
def test_a_manual_has_every_method_of_its_stage(stage):
    page = {"partition": "partition", "recovery": "recovery", "method": "finetune", "format": "formats"}
    page |= {"selection": "adaptive", "learner": "adaptive", "pruning": "pruning", "cache": "cache"}
    table = (DOCS / f"{page.get(stage, 'routing')}.md").read_text()
    listed = {name.replace("_", "-") for name in re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)}
    assert set(registry.names(stage)) <= listed


def test_pages_are_short():
    assert len(README.splitlines()) < 120
    assert not {p.name: n for p in MANUALS if (n := len(p.read_text().splitlines())) > 100}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_hold(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        for base in (REPOSITORY, RAW):
            target = str(ROOT / target.removeprefix(base)) if target.startswith(base) else target
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
    for path in re.findall(r"`((?:docs|dev|src|benchmarks|examples|scripts|recipes)/[\w./*-]+)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: {path}"


def test_every_page_is_in_the_sites_navigation():
    listed = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_api_page_has_every_public_name():
    listed = re.findall(r"^::: moesaic\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(moesaic.PUBLIC)


def test_readmes_table_is_the_measurements():
    assert result_tables.readme() in README


def test_contributings_tree_is_the_tree():
    tree = next(b for b in blocks((ROOT / "CONTRIBUTING.md").read_text(), "") if b.startswith("src/moesaic/"))
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    source = ROOT / "src" / "moesaic"
    there = {p.name + "/" * p.is_dir() for p in source.iterdir() if not p.name.startswith("_") and p.name != "py.typed"}
    assert listed == there


def test_contributings_partitioner_works():
    code = next(b for b in blocks((ROOT / "CONTRIBUTING.md").read_text(), "python") if "Partitioner" in b)
    scope = {"__package__": "moesaic.partition", "__name__": "moesaic.partition.every_other"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    partition = scope["EveryOther"]().split(random_sample(neurons=48), Plan(1, 2, 4, 12), torch.Generator())
    assert partition.is_disjoint(48)
    assert partition.experts[0].tolist() == list(range(1, 48, 4))


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_changelog_has_this_version_open():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
