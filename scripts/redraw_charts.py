"""Draw the frontier's charts anew from finished results, without measuring anything.

    python scripts/redraw_charts.py benchmarks/results/quality-demo            # frontier.png and frontier.svg
    python scripts/redraw_charts.py --html benchmarks/results/quality-demo     # and frontier.html

Each folder holds a `frontier.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moesaic.checkpoint.builtin import known_as
from moesaic.comparison.rows import read_frontier
from moesaic.report.frontier_page import write_frontier_page
from moesaic.report.frontier_plot import write_frontier

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="with a frontier.json in each")
    parser.add_argument("--html", action="store_true", help="write the interactive page too")
    a = parser.parse_args()
    for folder in a.folders:
        result = read_frontier(folder / "frontier.json")
        name = known_as(result.setting["model"])
        write_frontier(result.summary, name, folder, result.siblings)
        if a.html:
            write_frontier_page(result, folder / "frontier.html", name)
        print(folder)
