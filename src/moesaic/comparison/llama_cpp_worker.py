"""llama.cpp's side of `llama_cpp.py`: REQUEST (JSON) ANSWER (a file); needs xllamacpp alone, in any Python."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp  # pyrefly: ignore[missing-import]

ask, answer = json.loads(sys.argv[1]), Path(sys.argv[2])


def serve(path: str) -> xllamacpp.Server:
    """Start a server of one model for one sequence."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = len(ask["tokens"]) + ask["new"] + 8, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = ask["threads"]
    return xllamacpp.Server(params)


def once(server: xllamacpp.Server) -> dict[str, float]:
    """Measure tokens a second of the prompt and of what follows."""
    body = {"prompt": ask["tokens"], "max_tokens": ask["new"], "temperature": 0}
    timings = server.handle_completions(body | {"cache_prompt": False, "ignore_eos": True})["timings"]
    return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}


servers = [serve(path) for path in ask["models"]]
rates = [{"prefill": [], "decode": []} for _ in servers]
for number in range(ask["rounds"] + 1):
    for server, mine in zip(servers, rates, strict=True):
        for name, value in once(server).items():
            if number:  # the first round warms up
                mine[name].append(value)
answer.write_text(json.dumps({"version": f"xllamacpp {version('xllamacpp')}", "rates": rates}))
