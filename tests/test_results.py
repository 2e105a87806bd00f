"""Tables of results are what the committed measurements say."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from moesaic.results.base import Result

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import generation_tables  # noqa: E402
import result_tables  # noqa: E402

QUALITY = ROOT / "docs" / "results" / "quality.md"


def records(kind=Result):
    return [found for one in kind.__subclasses__() for found in (one, *records(one))]


def test_what_a_record_leaves_out_can_be_read_back():
    """A field that JSON leaves out where it is None is None where it is missing."""
    assert len(records()) > 20
    for kind in records():
        defaults = {field.name: field.default for field in fields(kind)}
        assert all(defaults[name] is None for name in kind.omitted_when_none), kind


def test_no_page_is_stale():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "result_tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_number_is_seen(tmp_path, monkeypatch, capsys):
    page, text = tmp_path / "quality.md", QUALITY.read_text()
    assert "| 17.7 |" in text
    page.write_text(text.replace("| 17.7 |", "| 1.7 |"))
    monkeypatch.setattr(result_tables, "ROOT", tmp_path)
    monkeypatch.setattr(result_tables, "PAGES", [page])
    assert result_tables.main(check=True) == 1
    assert "quality.md is stale" in capsys.readouterr().out
    assert result_tables.main(check=False) == 0
    assert page.read_text() == text


def test_every_table_has_a_place_and_fits():
    pages = "\n".join(page.read_text() for page in result_tables.PAGES)
    assert sorted(match[1] for match in result_tables.MARKED.findall(pages)) == sorted(result_tables.TABLES)
    for page in result_tables.PAGES:
        rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
        assert all(row.replace("\\|", "").count("|") <= 9 for row in rows), page


def test_every_measurement_is_shown():
    """Each JSON of results is the source of some table, or a row of a file that is."""
    pages = "\n".join(page.read_text() for page in result_tables.PAGES)
    files = [path.relative_to(ROOT).as_posix() for path in result_tables.RESULTS.rglob("*.json")]
    assert files
    assert not [file for file in files if file not in pages and "/rows/" not in file]


def test_readmes_numbers_are_the_files():
    summary = json.loads((result_tables.RESULTS / "quality-demo" / "frontier.json").read_text())["summary"]
    shown = next(row for row in result_tables.readme().splitlines() if row.startswith("| CMoE"))
    wanted = {r["active"]: r["perplexity_ratio"] for r in summary if r["method"] == "cmoe"}
    for cell, (_, value) in zip(shown.split("|")[2:5], sorted(wanted.items()), strict=True):
        assert abs(float(cell) - value) <= 0.005 * max(value, 1)


def test_readmes_words_are_the_numbers():
    readme = (ROOT / "README.md").read_text()
    gemma = json.loads((result_tables.RESULTS / "quality-gemma-270m" / "frontier.json").read_text())
    words = " ".join(readme.split())
    assert f"Gemma 3 270M: {result_tables.on_machines(gemma, 'S1A1E8')} at a quarter" in words
    found = json.loads((result_tables.RESULTS / "quality-demo-1.5b" / "frontier.json").read_text())
    over = [
        (r["active"], r["perplexity_ratio"] * found["dense"]["perplexity"] / r["line_by_parameters"])
        for r in found["summary"]
    ]
    best = [min(value for active, value in over if active == budget) for budget in (0.25, 0.5, 0.75)]
    assert "1.5B has {:.2f}, {:.2f} and {:.2f} times the perplexity of the line".format(*best) in words
    prefill = json.loads((result_tables.RESULTS / "demo.json").read_text())["prefill"]["512"]
    assert f"`make demo`: {prefill['speedup']:.2f} x" in words


def test_what_models_write_is_a_line_for_each_label(tmp_path, monkeypatch):
    """Seeds of a label are their mean and deviation; a single one has the error of its exercises."""
    code = {"n": 4, "data_sha256": "ab", "stderr": 0.25, "ended": 1.0}

    def row(label, active, passed, **more):
        return {
            "label": label, "plan": None if active == 1 else "S2A2E8", "ffn_active": active, "dtype": "float32",
            "generation": {"HumanEval": code | {"pass_at_1": passed} | more},
        }  # fmt: skip

    rows = [row("half", 0.5, 0.25, loss=1.25), row("half", 0.5, 0.5, loss=1.75), row("tiny", 1.0, 0.75)]
    setting = {
        "reference": "tiny", "reference_tokens": 64, "files": {"humaneval": "H.jsonl"}, "items": 4, "threads": 1,
        "max_new_tokens": 9, "batch": 2, "max_tokens": 512, "protocol": "greedy",
    }  # fmt: skip
    monkeypatch.setattr(generation_tables, "RESULTS", tmp_path)
    assert generation_tables.generation() == "Nothing has been measured yet."
    (tmp_path / "generation-tiny").mkdir()
    (tmp_path / "generation-tiny" / "generation.json").write_text("")
    monkeypatch.setattr(generation_tables, "read", lambda file: {"setting": setting, "rows": rows})
    monkeypatch.setattr(generation_tables, "measured", lambda file, *facts: "\n".join(facts))
    page = generation_tables.generation()
    assert "| `tiny` | dense | 100% | 75.0% ± 25.0 |  |" in page
    assert "| `half` | S2A2E8 | 50% | 37.5% ± 17.7 | 1.50 ± 0.35 |" in page
    assert page.index("`tiny` | dense") < page.index("`half`")
    assert "--humaneval H.jsonl --reference tiny --reference-tokens 64 --items 4 --max-new-tokens 9 --batch 2" in page
