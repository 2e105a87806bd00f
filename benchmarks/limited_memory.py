"""Decoding in less memory than the model needs: the expert store beside llama.cpp's memory map, in the same container.

    python benchmarks/limited_memory.py --model MODEL --gguf MODEL.gguf --limits 1400 1000 800 \\
        --llama-cpp .venv-engines/llama.cpp/bin/python --out DIR/limited.json

Each run is a process in a control group of `--limits` megabytes (cgroup version 1, as root), to which the page cache
counts too, so that what does not fit is read from the disk again. The expert store gets what the limit leaves beside
the dense part and the Python process. Caches are dropped before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.machine import machine, versions

GROUP = Path("/sys/fs/cgroup/memory/moesaic-benchmark")
OURS = """
import json, sys, time
import torch, moesaic, psutil
torch.set_num_threads(int(sys.argv[3]))
model, tokenizer = moesaic.load(sys.argv[1], store=moesaic.StoreOptions(sys.argv[2], cache=sys.argv[5]))
ids = torch.tensor([[int(i) for i in sys.argv[4].split(",")]])
with torch.inference_mode():
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    begin = time.perf_counter()
    out = model.generate(ids, max_new_tokens=66, min_new_tokens=66, do_sample=False, pad_token_id=0)
    prefill = time.perf_counter()
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    once = time.perf_counter() - prefill
rate = 64 / (prefill - begin - once)
print(json.dumps({"decode": rate, "rss": psutil.Process().memory_info().rss, **model.expert_store.report()}))
"""
WHOLE = OURS.replace("store=moesaic.StoreOptions(sys.argv[2], cache=sys.argv[5])", "store=None").replace(
    ", **model.expert_store.report()", ""
)
LLAMA = """
import json, sys, resource
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.verbosity = 512, 1, -1
modes = xllamacpp.llama_load_mode
params.load_mode = modes.LLAMA_LOAD_MODE_MMAP if sys.argv[2] == "mmap" else modes.LLAMA_LOAD_MODE_NONE
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(params)
ids = [int(i) for i in sys.argv[4].split(",")]
for _ in range(2):
    body = {"prompt": ids, "max_tokens": 64, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    timings = server.handle_completions(body)["timings"]
print(json.dumps({"decode": timings["predicted_per_second"],
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--called")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--limits", type=int, nargs="+", required=True, help="megabytes; 0 is none")
    parser.add_argument("--process", type=int, default=420, help="megabytes that Python and torch take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = resolve(given.model)
    head = {
        "model": given.called or given.model, "fingerprint": Checkpoint(folder).fingerprint(), "threads": given.threads,
        "gguf_bytes": given.gguf.stat().st_size, "checkpoint_bytes": Checkpoint(folder).size(), "versions": versions(),
        "machine": machine(),
    }  # fmt: skip
    found = json.loads(given.out.read_text()) if given.out.is_file() else head | {"rows": []}
    ids = ",".join(str(1_000 + 37 * i) for i in range(48))
    dense = weights_beside_experts(folder)
    for limit in given.limits:
        room = limit - given.process - dense / 1e6
        memory = "100%" if not limit else f"{max(room, 1):.0f}MB"
        rest = [str(given.threads), ids]
        runs = {
            "llama.cpp, mmap": [str(given.llama_cpp), "-c", LLAMA, str(given.gguf), "mmap", *rest],
            "llama.cpp, no mmap": [str(given.llama_cpp), "-c", LLAMA, str(given.gguf), "read", *rest],
            "moesaic, all in memory": [sys.executable, "-c", WHOLE, str(folder), memory, *rest, ""],
            "moesaic, look-ahead": [sys.executable, "-c", OURS, str(folder), memory, *rest, "look-ahead"],
            "moesaic, lru": [sys.executable, "-c", OURS, str(folder), memory, *rest, "lru"],
        }
        for name, command in runs.items():
            if not any(row["limit_mb"] == limit and row["engine"] == name for row in found["rows"]):
                row = {"limit_mb": limit, "engine": name, "expert_memory": memory, **run(command, limit, given.timeout)}
                found["rows"].append(row)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(found, indent=1) + "\n")
                print(json.dumps(row), flush=True)


def weights_beside_experts(folder: Path) -> int:
    """Count the bytes of all weights but the experts'."""
    import moesaic

    model, _ = moesaic.load(folder, store=moesaic.StoreOptions("100%"))
    return sum(p.nbytes for p in model.parameters() if not p.is_meta)


def run(command: list[str], limit: int, timeout: int) -> dict[str, object]:
    """Run a process within a limit; what went wrong is a result too."""
    if limit:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit * 10**6))
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")

    def enter() -> None:
        if limit:
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, preexec_fn=enter, env={**os.environ}
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {timeout} s"}
    if done.returncode:
        return {"failed": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1][-200:]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
