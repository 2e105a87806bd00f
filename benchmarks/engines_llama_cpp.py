"""llama.cpp's side of `engines.py`: REQUEST (JSON) ANSWER; all models in one process, taking turns."""

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp

ask, answer = json.loads(sys.argv[1]), Path(sys.argv[2])


def serve(path: str) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = ask["prompt"] + ask["new"] + 8, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = ask["threads"]
    return xllamacpp.Server(params)


def once(server: xllamacpp.Server, ids: list[int]) -> dict[str, float]:
    body = {"prompt": ids, "max_tokens": ask["new"], "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    timings = server.handle_completions(body)["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (len(ids), ask["new"]), timings
    return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}


servers = [serve(path) for path in ask["models"]]
rates = [{"prefill": [], "decode": []} for _ in servers]
ids = [random.Random(0).randrange(1_000, 50_000) for _ in range(ask["prompt"])]
for number in range(ask["rounds"] + 1):
    for server, mine in zip(servers, rates, strict=True):
        for name, value in once(server, ids).items():
            if number:  # the first round warms up
                mine[name].append(value)
answer.write_text(json.dumps({"version": f"xllamacpp {version('xllamacpp')}", "rates": rates}))
