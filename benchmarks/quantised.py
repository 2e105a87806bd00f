"""Fewer bits, fewer neurons, or a smaller model: dense, siblings and ours in llama.cpp's types, speed and perplexity.

    python benchmarks/quantised.py out50 out75 --siblings demo --text wiki.test.raw \
        --llama-cpp .venv-engines/llama.cpp/bin/python --out benchmarks/results/quantised-demo-1.5b.json

`moesaic benchmark OUT --for llama.cpp` does it for one conversion. Beside FILE.json goes FILE.png.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

import moesaic
from moesaic.comparison.llama_cpp import find_llama_cpp
from moesaic.report.console import plain_console
from moesaic.report.quantised import show_quantised, write_quantised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted", nargs="+", type=Path)
    parser.add_argument("--against")
    parser.add_argument("--siblings", nargs="*", default=[])
    parser.add_argument("--outtypes", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=2_048)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    python = find_llama_cpp(a.llama_cpp)
    assert python, "give --llama-cpp"
    load = os.getloadavg()[0]
    console = plain_console()
    result = moesaic.compare_quantised(
        a.converted, python, against=a.against, siblings=a.siblings, outtypes=a.outtypes, text=a.text,
        window=a.window, max_tokens=a.max_tokens, prompt=a.prompt, new=a.new, rounds=a.rounds, clock=a.clock,
        scratch=a.scratch,
        progress=lambda done, count, note: console.print(f"{done} of {count}: {note}"),
    )  # fmt: skip
    a.out.write_text(json.dumps(result.to_dict() | {"load_before": load}, indent=2) + "\n")
    write_quantised(result, a.out.with_suffix(".png"))
    show_quantised(console, result)


if __name__ == "__main__":
    main()
