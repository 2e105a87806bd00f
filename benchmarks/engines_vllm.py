"""vLLM's side of `engines.py`: REQUEST (JSON) ANSWER; a process for each model and round, taking turns."""

import json
import os
import random
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

ask, answer = json.loads(sys.argv[1]), Path(sys.argv[2])


def measure(model: str) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    length = ask["prompt"] + ask["new"] + 8
    llm = LLM(model, dtype="bfloat16", max_model_len=length, enforce_eager=True, enable_prefix_caching=False)

    def seconds(new: int) -> float:
        ids = [random.randrange(1_000, 50_000) for _ in range(ask["prompt"])]
        options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = time.monotonic()
        llm.generate([{"prompt_token_ids": ids}], options, use_tqdm=False)
        return time.monotonic() - start

    seconds(ask["new"])
    first, all_ = min(seconds(1) for _ in range(2)), min(seconds(ask["new"]) for _ in range(2))
    return {"prefill": ask["prompt"] / first, "decode": (ask["new"] - 1) / (all_ - first)}


if "model" in ask:
    answer.write_text(json.dumps(measure(ask["model"])))
    sys.exit()
environment = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(ask["threads"]),
}  # fmt: skip
rates = [{"prefill": [], "decode": []} for _ in ask["models"]]
for _ in range(min(3, ask["rounds"])):
    for model, mine in zip(ask["models"], rates, strict=True):
        request = json.dumps({name: ask[name] for name in ("prompt", "new")} | {"model": model})
        subprocess.run([sys.executable, __file__, request, answer], check=True, env=os.environ | environment)
        for name, value in json.loads(answer.read_text()).items():
            mine[name].append(value)
[version] = {d.version for d in distributions() if d.metadata["Name"].startswith("vllm")}
answer.write_text(json.dumps({"version": f"vllm {version}", "rates": rates}))
