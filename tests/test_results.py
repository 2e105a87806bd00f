"""Tables of results are what the committed measurements say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import result_tables  # noqa: E402

QUALITY = ROOT / "docs" / "results" / "quality.md"


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
    summary = json.loads((result_tables.RESULTS / "quality-gemma-270m" / "frontier.json").read_text())["summary"]
    quarter = next(r for r in summary if r["method"] == "specialists" and r["active"] == 0.25)
    words = " ".join(readme.split())
    assert f"Gemma 3 270M: {quarter['speedup']:.2f} x at a quarter" in words
    prefill = json.loads((result_tables.RESULTS / "demo.json").read_text())["prefill"]["512"]
    assert f"`make demo`: {prefill['speedup']:.2f} x" in words
