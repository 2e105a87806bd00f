"""MLX's side of `tests/test_engines.py`: FOLDER REQUEST.json ANSWER.json; needs mlx-lm."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load, stream_generate

folder, request, answer = sys.argv[1:]
ask = json.loads(Path(request).read_text())
model, tokenizer = load(folder)
model.set_dtype(mx.float32)


def next_token(ids):
    """Log-probabilities of the token after `ids`, by id."""
    logits = model(mx.array(ids)[None])[0, -1].astype(mx.float32)
    return (logits - mx.logsumexp(logits)).tolist()


result = {"logprobs": [next_token(ids) for ids in ask.get("tokens", [])]}
if "prompt" in ask:
    steps = stream_generate(model, tokenizer, prompt=ask["prompt"], max_tokens=ask["new"])
    # decoded at once: its streaming detokenizer drops a first space
    result["text"] = tokenizer.decode([step.token for step in steps])
Path(answer).write_text(json.dumps(result))
