"""Convert a model in ten lines: half of each FFN runs, and the result is an ordinary transformers model."""

import sys
import tempfile
from pathlib import Path

import moesaic

model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch) / "out"
    result = moesaic.convert(model, out, moesaic.ConvertConfig(active=0.5))
    print(f"perplexity {result.perplexity_dense:.2f} dense, {result.perplexity:.2f} with {result.plan}")
    converted, tokenizer = moesaic.load(out)
    print(moesaic.complete(converted, tokenizer, "The first", max_new_tokens=20))
