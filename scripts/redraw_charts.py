"""Draw the frontier's charts anew from finished results, without measuring anything.

    python scripts/redraw_charts.py benchmarks/results/quality-demo            # frontier.png and frontier.svg
    python scripts/redraw_charts.py --html benchmarks/results/quality-demo     # and frontier.html

Folders without a `frontier.json` are an error; give as many folders as you like.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moesaic.report.html import write_frontier_page
from moesaic.report.plots import write_frontier

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--html", action="store_true", help="write the interactive page too")
    a = parser.parse_args()
    for folder in a.folders:
        result = json.loads((folder / "frontier.json").read_text())
        write_frontier(result["summary"], result["setting"]["model"], folder)
        if a.html:
            write_frontier_page(result, folder / "frontier.html")
        print(folder)
