"""The quality table: every method at every budget on real models, from nothing; shown in docs/results/quality.md.

    python benchmarks/quality.py demo gemma-270m --text wiki.test.raw --calibration c4.jsonl --tasks pack_200.jsonl
    python benchmarks/quality.py gemma-270m --text wiki.test.raw --calibration c4.jsonl --quick     # ten minutes

Perplexity is `gptq` on the first 40,960 tokens of the text. Resumable: a finished row is kept in
`<out>/quality-<model>/frontier.json` and not measured again, so more methods, budgets or seeds can be added later.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from moesaic import Measurement, frontier
from moesaic.comparison.recipes import METHODS, NEURONS
from moesaic.report.frontier_table import show_frontier

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True, help="WikiText-2's raw test split")
    parser.add_argument("--calibration", nargs="+", required=True, help="web text, not the test's own domain")
    parser.add_argument("--tasks", help="zero-shot items")
    parser.add_argument("--items", type=int, help="of each task, at most [default: all]")
    parser.add_argument("--active", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--memory-factor", type=float, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=[name for name in METHODS if name != "read-me"] + [NEURONS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--siblings", nargs="+", default=[], help="smaller dense models of the family")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--max-tokens", type=int, default=40_960)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--quick", action="store_true", help="half active, four methods, one seed, fewer tokens")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = parser.parse_args()
    if a.quick:
        a.active, a.memory_factor, a.seeds, a.tokens, a.max_tokens, a.tasks = [0.5], [1], [0], 8_192, 8_192, None
        a.methods, a.out, a.no_speed = ["coactivation", "static+closed-form", "flap", "cmoe"], a.out / "quick", True
    measurement = Measurement(
        text=a.text, max_tokens=a.max_tokens, tasks=a.tasks, items=a.items, calibration=tuple(a.calibration),
        tokens=a.tokens, speed=not a.no_speed,
    )  # fmt: skip
    for model in a.models:
        out = a.out / f"quality-{model}"
        result = frontier(
            model, out, active=a.active, memory_factors=a.memory_factor, methods=a.methods, seeds=a.seeds,
            siblings=a.siblings, measurement=measurement,
            progress=lambda done, count, note: print(f"{time.strftime('%H:%M')} {done} of {count} {note}", flush=True),
        )  # fmt: skip
        show_frontier(Console(), result, str(out))
