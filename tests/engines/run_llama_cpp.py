"""llama.cpp's side of `tests/test_engines.py`: MODEL.gguf REQUEST.json ANSWER.json; needs xllamacpp alone."""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

model, request, answer = sys.argv[1:]
ask = json.loads(Path(request).read_text())
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = ask.get("threads", 1)
# in its defaults (half-precision cache, flash attention) even a dense model is off by a hundredth
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)


def post(path, body):
    data = json.dumps(body).encode()
    sent = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(sent))


def next_token(ids, size):
    """Log-probabilities of the token after `ids`, by id."""
    body = {"prompt": ids, "max_tokens": 1, "temperature": 1.0, "logprobs": size, "cache_prompt": False}
    choice = {"logprobs": None}
    while choice["logprobs"] is None:  # as after an end of text
        body["seed"] = body.get("seed", 0) + 1
        [choice] = server.handle_completions(body)["choices"]
    found = {e["id"]: e["logprob"] for e in choice["logprobs"]["content"][0]["top_logprobs"]}
    return [found.get(i, -1e9) for i in range(size)]


result = {"logprobs": [next_token(ids, ask["vocab_size"]) for ids in ask.get("tokens", [])]}
result["ids"] = [
    post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    for text in ask.get("texts", [])
]
if "prompt" in ask:
    body = {"prompt": ask["prompt"], "max_tokens": ask["new"], "temperature": 0.0, "cache_prompt": False}
    result["text"] = server.handle_completions(body)["choices"][0]["text"]
Path(answer).write_text(json.dumps(result))
