"""llama.cpp's side of `llama_cpp.py`: REQUEST (JSON) ANSWER (a file); needs xllamacpp alone, in any Python."""

import json
import resource
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


def ask_for(server: xllamacpp.Server, new: int) -> dict[str, float]:
    """Let a server read the prompt and write so many tokens; llama.cpp's own timings."""
    body = {"prompt": ask["tokens"], "max_tokens": new, "temperature": 0}
    return server.handle_completions(body | {"cache_prompt": False, "ignore_eos": True})["timings"]


def cpu_seconds(server: xllamacpp.Server, new: int) -> float:
    """Of this process, while a server does that."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    ask_for(server, new)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def once(server: xllamacpp.Server) -> dict[str, float]:
    """Measure tokens a second of the prompt and of what follows, or tokens a second of one thread's CPU time."""
    if ask["clock"] == "cpu":
        short, long = cpu_seconds(server, 1), cpu_seconds(server, 1 + ask["new"])
        return {"prefill": len(ask["tokens"]) / short, "decode": ask["new"] / max(long - short, 1e-9)}
    timings = ask_for(server, ask["new"])
    return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}


servers = [serve(path) for path in ask["models"]]
rates = [{"prefill": [], "decode": []} for _ in servers]
for number in range(ask["rounds"] + 1):
    for server, mine in zip(servers, rates, strict=True):
        for name, value in once(server).items():
            if number:  # the first round warms up
                mine[name].append(value)
answer.write_text(json.dumps({"version": f"xllamacpp {version('xllamacpp')}", "rates": rates}))
