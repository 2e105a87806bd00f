"""Fails unless a demo output is whole and its numbers make sense; how fast a machine is says nothing about the code."""

import json
import math
import sys
from pathlib import Path

from moesaic.evaluation.code_runner import run_program

out = Path(sys.argv[1])
metrics = json.loads((out / "metrics.json").read_text())
convert = {
    "output", "format", "plan", "ffn_active", "total_parameters", "active_parameters", "perplexity_dense", "perplexity",
    "seconds", "peak_rss_bytes", "layers",
}  # fmt: skip
benchmark = {"decode", "prefill", "block", "machine", "threads", "dtype"}
missing = (convert | benchmark) - metrics.keys()
assert not missing, f"metrics.json lacks {missing}"
files = {"config.json", "README.md", "moesaic.yaml", "layer_error.png", "expert_load.png", "speed.png", "report.html"}
assert not files - {p.name for p in out.iterdir()}, "files are missing"
assert all(text["dense"].strip() and text["converted"].strip() for text in metrics["typed"]), "somebody typed nothing"
first = [[0, 1, 1, 2, 3, 5, 8, 13, 21, 34], [1, 1, 2, 3, 5, 8, 13, 21, 34, 55]]
asked = metrics["typed"][0]["prompt"]
assert "fibonacci" in asked
for who in ("dense", "converted"):
    typed = metrics["typed"][0][who]
    done = run_program(f"{asked}{typed}\n\nassert list(fibonacci(10)) in {first}, fibonacci(10)\n")
    assert done.passed, f"the {who} model's Fibonacci numbers are wrong ({done.reason}):\n{typed}"
assert metrics["llama_cpp"] or metrics["llama_cpp_missing"], "llama.cpp is neither measured nor is said why not"
ratio = metrics["perplexity"] / metrics["perplexity_dense"]
assert 1 < ratio < 2.5, f"perplexity ratio {ratio}"
assert metrics["peak_rss_bytes"] < 6e9, f"peak memory {metrics['peak_rss_bytes'] / 1e9:.2f} GB"
shape = json.loads((out / "config.json").read_text())
groups = int(metrics["plan"].split("E")[1])
ffn = 3 * shape["num_hidden_layers"] * shape["hidden_size"] * shape["moe_intermediate_size"] * groups
spared = (metrics["dense_parameters"] - metrics["active_parameters"]) / ffn  # but for the routers
assert abs(spared - (1 - metrics["ffn_active"])) < 0.005, f"a token is spared {spared:.1%} of the FFNs' parameters"
numbers = {"tokens_per_s", "dense_tokens_per_s", "speedup", "limit", "share_of_limit"}
for kind in ("decode", "prefill", "block"):
    assert metrics[kind], f"no speed of {kind}"
    for size, row in metrics[kind].items():
        wrong = {n: row.get(n) for n in numbers if not (math.isfinite(row.get(n, math.nan)) and row[n] > 0)}
        assert not wrong, f"{kind} of {size}: {wrong}"
block, decode = (metrics[kind]["1"]["speedup"] for kind in ("block", "decode"))
print(
    f"demo: {metrics['plan']}, ratio {ratio:.3f}, decode {decode:.2f}x, block {block:.2f}x, {metrics['seconds']:.0f} s"
)
print({kind: metrics[kind]["1"] for kind in ("decode", "block")}, metrics["machine"])
