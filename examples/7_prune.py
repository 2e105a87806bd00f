"""Fewer experts in memory: what a Mixture-of-Experts loses, and what solving the rest again wins back."""

import tempfile
from pathlib import Path

import moesaic

folder = Path(tempfile.mkdtemp())
whole, tokenizer = moesaic.load("tiny-moe")
print("16 experts:", moesaic.evaluate(whole, tokenizer, window=256, max_tokens=4_096).perplexity)

for recovery in ("none", "closed-form"):
    config = moesaic.PruneConfig(experts=12, method="reap", recovery=recovery, tokens=2_048, held_out_tokens=1_024)
    result = moesaic.prune("tiny-moe", folder / recovery, config)
    print(f"12 experts, recovery {recovery}:", result.perplexity, "with", result.total_parameters, "parameters")

model, tokenizer = moesaic.load(folder / "closed-form")  # or AutoModelForCausalLM: it is a stock Qwen3-MoE
print(moesaic.complete(model, tokenizer, "The first", max_new_tokens=20))
