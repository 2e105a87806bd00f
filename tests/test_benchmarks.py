"""Benchmarks that nobody has run on their real model yet: they run from end to end at a small shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import save_smaller
from moesaic.calibration.text import bundled

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def web(tmp_path):
    file = tmp_path / "web.jsonl"
    file.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in bundled("calibration")[:40]))
    return file


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_large_model_in_one_go(web, tmp_path):
    task = {"task": "t", "id": 0, "ctx": "A cat is", "choices": ["an animal", "a stone"], "gold": 0}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    (tmp_path / "text.txt").write_text(" ".join(document.text for document in bundled("heldout"))[:20_000])
    arguments = (
        "tiny", "--calibration", web, "--text", tmp_path / "text.txt", "--tasks", tmp_path / "tasks.jsonl", "--active",
        0.5, "--tokens", 2_048, "--minutes", 0.02, "--max-tokens", 2_048, "--window", 128, "--work", tmp_path / "work",
        "--out", tmp_path / "out",
    )  # fmt: skip
    said = run("seven_b.py", *arguments)
    assert {"DOT-MoE", "this one"} <= {word for line in said.splitlines() for word in map(str.strip, line.split("│"))}
    found = json.loads((tmp_path / "out" / "seven_b.json").read_text())
    converted, trained = found["rows"]
    assert converted["training"] is None
    assert trained["training"]["tokens"] > 0
    assert converted["perplexity"] > 0
    assert converted["accuracy"] in (0, 1)
    assert not any((tmp_path / "work").iterdir())
    again = run("seven_b.py", *arguments)
    assert "layer error" not in again  # rows that are there are not made again


def test_blocks_of_every_plan_run():
    sys.path.insert(0, str(SCRIPTS))
    import runtime

    x_TD = torch.randn(3, 64)
    for shared, active, groups in runtime.PLANS.values():
        block = runtime.block(64, 96 * groups, (shared, active, groups))
        assert block(x_TD).shape == x_TD.shape
        assert block.experts.num_experts == groups - shared


def test_light_training_of_the_dense_model_and_with_other_settings(web, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(document.text for document in bundled("heldout"))[:20_000])
    recipe = "both+method=full+learning_rate=3.0e-5+window=128"
    run(
        "recovery.py", "tiny", "--web", web, "--text", tmp_path / "text.txt", "--plans", "S8A0E8", "--recipes", recipe,
        "--steps", 1, "--tokens", 2_048, "--max-tokens", 2_048, "--work", tmp_path / "work", "--out", tmp_path / "out",
        "--siblings", save_smaller(tmp_path / "small"),
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "recovery.json").read_text())["rows"]
    assert rows["S8A0E8-ours-0"]["ratio"]["wikitext2"] == pytest.approx(1, abs=1e-3)  # all neurons run: the dense model
    assert rows["S8A0E8-ours-0"]["over_line"]["web"] == pytest.approx(1, rel=1e-3)
    assert rows["sibling-small"]["active_parameters"] < rows["dense"]["active_parameters"]
    found = rows[f"S8A0E8-{recipe}-1-steps"]["finetune"]
    assert (found["method"], found["steps"]) == ("full", 1)


def test_rules_beside_fixed_numbers_and_the_oracle(web, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(document.text for document in bundled("heldout"))[:20_000])
    common = (
        "adaptive.py", "--model", "tiny-moe", "--web", web, "--text", tmp_path / "text.txt", "--methods", "top-p",
        "--shares", 0.5, "--seeds", 0, "--tokens", 512, "--samples", 24, "--window", 64, "--max-tokens", 1_024,
        "--expert-memory", "60%", "--out", tmp_path / "out",
    )  # fmt: skip
    run(*common)
    found = json.loads((tmp_path / "out" / "adaptive.json").read_text())
    assert {(row["method"], row["share"]) for row in found["summary"]} == {
        ("top-p", 0.5), ("fixed", 0.5), ("fixed", 1.0),
    }  # fmt: skip
    run(*common, "--oracle", "--oracle-tokens", 128)
    [row] = json.loads((tmp_path / "out" / "oracle.json").read_text())["rows"]
    assert row["oracle_loss"] <= row["fixed_loss"]
