"""The expert store: hits, speed and memory of a model whose experts do not all fit, by policy and size.

    python benchmarks/expert_store.py policies --model tiny-moe --prompts instruct.jsonl --out DIR
    python benchmarks/expert_store.py memory --model MODEL --out DIR
    python benchmarks/expert_store.py bias --model MODEL --text c4.jsonl --out DIR
    python benchmarks/expert_store.py queue --model PREGATED --prompts instruct.jsonl --out DIR

`policies` continues the same prompts one after the other, greedily, with every policy and size; texts are compared with
those of the model in memory, hits with those of a replay of its trace. Experts come over a link of `--bandwidth` bytes
a second, slower than the page cache of the machine that measures. `memory` measures the resident set and the time to
the first token in processes of their own. `bias` reads a text a token at a time, so that each token's experts are those
that a decoding model would have. `queue` decodes `--requests` requests in turn, a token a pass, on a model with a
router ahead of it, so that what the next passes need is known; it asks how much of the way from an LRU for each layer
to Belady's optimum that knowledge goes. Resumable: a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import moesaic
from moesaic import StoreOptions, find_blocks
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.machine import machine, versions
from moesaic.registry import build
from moesaic.store.experts import run_expert
from moesaic.store.opening import give_store
from moesaic.store.replay import LayerStep, replay
from moesaic.store.source import ThrottledSource
from moesaic.store.store import ExpertStore
from moesaic.store.timing import StepTimes, predict_time

POLICIES = ("random", "lru", "lru:per_layer=True", "lfu", "static", "look-ahead")
SHARES = (0.15, 0.3, 0.5, 0.7)
BIASES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
FIRST_TOKEN = """
import json, sys, time
begin = time.perf_counter()
import torch
import moesaic, psutil
from moesaic import StoreOptions
imported = time.perf_counter()
def resident():
    return psutil.Process().memory_full_info()
store = None if sys.argv[2] == "all" else StoreOptions(sys.argv[2])
before = resident()
model, tokenizer = moesaic.load(sys.argv[1], store=store)
ids = tokenizer("The first thing to know about", return_tensors="pt").input_ids
loaded = time.perf_counter()
with torch.inference_mode():
    model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    first = time.perf_counter()
    model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
end = time.perf_counter()
dense = sum(p.nbytes for p in model.parameters() if not p.is_meta)
report = model.expert_store.report() if store else {"all_bytes": 0, "memory_bytes": 0}
print(json.dumps({"import_seconds": imported - begin, "load_seconds": loaded - imported,
                  "first_token_seconds": first - loaded, "tokens_per_s": 32 / (end - first),
                  "rss_before": before.rss, "rss": resident().rss, "uss": resident().uss, "weights_in_memory": dense,
                  "expert_memory": report["memory_bytes"], "all_experts": report["all_bytes"]}))
"""


def main() -> None:
    """Measure what is missing of one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("policies", "memory", "bias", "queue"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--called", help="what the results call the model; by default as --model")
    parser.add_argument("--prompts", type=Path, help="JSON lines with a field prompt")
    parser.add_argument(
        "--domains", type=Path, help="a folder of JSON lines with a field text: prompts of each in turn"
    )
    parser.add_argument("--text", type=Path, help="JSON lines with a field text")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=1_024)
    parser.add_argument("--bandwidth", type=float, default=500e6)
    parser.add_argument("--latency", type=float, default=1e-4)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--biases", nargs="+", type=float, default=BIASES)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    {"policies": policies, "memory": memory, "bias": bias, "queue": queue}[given.part](given)


class Rows:
    """Results of one part in a file, a row a line."""

    def __init__(self, given: argparse.Namespace, **protocol: object) -> None:
        self.path = given.out / f"{given.part}.json"
        folder = resolve(given.model)
        head = {
            "model": given.called or given.model, "fingerprint": Checkpoint(folder).fingerprint(), **protocol,
            "threads": 1, "versions": versions(), "machine": machine(),
        }  # fmt: skip
        self.found = json.loads(self.path.read_text()) if self.path.is_file() else {**head, "rows": []}

    def has(self, **key: object) -> bool:
        """Tell whether a row is there."""
        return any(key.items() <= row.items() for row in self.found["rows"])

    def add(self, **row: object) -> None:
        """Write a row."""
        self.found["rows"].append(row)
        head = json.dumps({**self.found, "rows": []}, indent=1).removesuffix("[]\n}")
        self.path.write_text(head + "[\n" + ",\n".join(map(json.dumps, self.found["rows"])) + "\n]}\n")
        print(json.dumps(row), flush=True)


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prompts_of(given: argparse.Namespace, tokenizer: object) -> list[torch.Tensor]:
    """Read the prompts, of 256 tokens at most."""
    pools = [[json.loads(line)["prompt"] for line in given.prompts.read_text().splitlines()[: given.requests]]]
    for path in sorted(given.domains.glob("*.jsonl")) if given.domains else ():
        pools.append([json.loads(line)["text"][:400] for line in path.read_text().splitlines()[: given.requests]])
    lines = [pools[number % len(pools)][number // len(pools)] for number in range(given.requests)]
    return [tokenizer(line, return_tensors="pt").input_ids[:, :256] for line in lines]


@torch.inference_mode()
def answers(model: torch.nn.Module, prompts: list[torch.Tensor], new: int) -> tuple[list[list[int]], float]:
    """Continue all prompts; returns the tokens, and seconds for each new one, prompts included."""
    begin = time.perf_counter()
    texts = [
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)[0].tolist()
        for prompt in prompts
    ]
    return texts, (time.perf_counter() - begin) / (new * len(prompts))


def slow_store(model: torch.nn.Module, given: argparse.Namespace, capacity: int, policy: str) -> ExpertStore:
    """Make a store of a model's experts over a slow link."""
    old = model.expert_store
    source = old.source.source if isinstance(old.source, ThrottledSource) else old.source
    slow = ThrottledSource(source, given.bandwidth, given.latency)
    return ExpertStore(slow, old.like, capacity, build("cache", policy), old.device)


def policies(given: argparse.Namespace) -> None:
    """Hits and speed by policy, size and prefetching."""
    rows = Rows(given, prompts_sha256=sha256(given.prompts), requests=given.requests, new=given.new,
                bandwidth=given.bandwidth, latency_seconds=given.latency)  # fmt: skip
    whole, tokenizer = moesaic.load(given.model)
    prompts = prompts_of(given, tokenizer)
    expected, seconds = answers(whole, prompts, given.new)
    if not rows.has(policy="all in memory"):
        rows.add(policy="all in memory", seconds_per_token=seconds)
    del whole
    model, _ = moesaic.load(given.model, store=StoreOptions("100%", "lru", prefetch=False))
    store = model.expert_store
    store.trace = []
    answers(model, prompts, given.new)
    trace = [LayerStep(layer, experts) for layer, experts in store.trace]
    _, base = answers(model, prompts, given.new)  # now all experts are there
    size, times = store.size, step_times(model, given, base * given.new * len(prompts) / len(trace))
    if not rows.has(policy="store, all in memory"):
        rows.add(policy="store, all in memory", seconds_per_token=base)
    for share in given.shares:
        capacity = math.floor(share * size.num_layers * size.num_experts)
        at = size._replace(capacity=capacity)
        if not rows.has(policy="belady", share=share):
            best = replay(trace, build("cache", "belady"), at, in_flight=model.expert_store.readers)
            rows.add(policy="belady", share=share, hit_ratio=best.hit_ratio)
        for policy in given.policies:
            for prefetch in (False, True):
                if rows.has(policy=policy, share=share, prefetch=prefetch):
                    continue
                give_store(model, slow_store(model, given, capacity, policy), prefetch)
                texts, seconds = answers(model, prompts, given.new)
                replayed = predict_time(trace, build("cache", policy), at, times)
                predicted = base + replayed.waited / (given.new * len(prompts))
                rows.add(policy=policy, share=share, prefetch=prefetch, seconds_per_token=seconds,
                         same_text=texts == expected, replayed_hit_ratio=replayed.hit_ratio,
                         predicted_seconds=None if prefetch else predicted,
                         **model.expert_store.report())  # fmt: skip


@torch.inference_mode()
def step_times(model: torch.nn.Module, given: argparse.Namespace, step: float) -> StepTimes:
    """Say what parts of a layer step take: loading an expert and running one, by doing it, and the rest."""
    store, module = model.expert_store, find_blocks(model)[0].experts
    [expert] = store.visit(0, [0])
    x = torch.randn(1, model.config.hidden_size, dtype=expert.weights.down.dtype)
    begin = time.perf_counter()
    for _ in range(200):
        run_expert(module, 0, x, expert.weights)
    one = (time.perf_counter() - begin) / 200
    active = find_blocks(model)[0].num_experts_per_tok
    one_place, loads = slow_store(model, given, 1, "lru"), []
    for number in range(48):
        begin = time.perf_counter()
        list(one_place.visit(0, [number % store.size.num_experts]))
        loads.append(time.perf_counter() - begin)
    one_place.close()
    return StepTimes(
        load=statistics.median(loads), expert=one, layer=max(0.0, step - active * one), in_flight=store.readers
    )


def memory(given: argparse.Namespace) -> None:
    """Resident set and time to the first token, each in a process of its own."""
    rows = Rows(given)
    for share in ("all", "100%", "50%", "30%", "15%"):
        if not rows.has(expert_memory_option=share):
            command = [sys.executable, "-c", FIRST_TOKEN, str(resolve(given.model)), share]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.add(expert_memory_option=share, **json.loads(done.stdout.splitlines()[-1]))


@torch.inference_mode()
def bias(given: argparse.Namespace) -> None:
    """Misses and perplexity of routers that prefer experts in memory, a token at a time."""
    rows = Rows(given, text_sha256=sha256(given.text), tokens=given.tokens, policy="lru", prefetch=False)
    _, tokenizer = moesaic.load(given.model, store=StoreOptions("50%"))
    text = "\n\n".join(json.loads(line)["text"] for line in given.text.read_text().splitlines()[-40:])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : given.tokens + 1]
    for share in given.shares:
        for lift in given.biases:
            if rows.has(share=share, bias=lift):
                continue
            model, _ = moesaic.load(
                given.model, store=StoreOptions(f"{share:.0%}", "lru", prefetch=False, cache_bias=lift)
            )
            cache, loss, window = None, 0.0, 256
            for place in range(given.tokens):
                if place % window == 0:
                    cache = None
                out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                loss += float(cross_entropy(out.logits[0].float(), ids[0, place + 1 : place + 2]))
            report = model.expert_store.report()
            rows.add(share=share, bias=lift, perplexity=math.exp(loss / given.tokens), misses=report["misses"],
                     hit_ratio=report["hit_ratio"])  # fmt: skip
            model.expert_store.close()


class InTurn:
    """Requests that decode one after the other, a token each, their routes known as soon as their token is."""

    def __init__(self, model: torch.nn.Module, prompts: list[torch.Tensor]) -> None:
        self.model, self.network, self.prompts = model, model.pregate, prompts
        self.caches = [None] * len(prompts)
        self.next = list(prompts)
        self.routes = [self.network.route_tokens(number, prompt[0]) for number, prompt in enumerate(prompts)]
        self.texts = [[] for _ in prompts]
        self.turn = 0

    def waiting(self) -> list[torch.Tensor]:
        """Give the decisions of those whose turn comes, the next one first."""
        count = len(self.prompts)
        return [self.routes[(self.turn + step) % count] for step in range(1, count)]

    @torch.inference_mode()
    def run(self, new: int) -> None:
        """Decode `new` tokens of each."""
        for number in range(new * len(self.prompts)):
            self.turn = one = number % len(self.prompts)
            with self.network.decisions(self.routes[one]):
                out = self.model(self.next[one], past_key_values=self.caches[one], use_cache=True)
            self.caches[one] = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            self.texts[one].append(token)
            self.next[one] = torch.tensor([[token]])
            self.routes[one] = self.network.route_tokens(one, [token])
        for number in range(len(self.prompts)):
            self.network.forget(number)


def queue(given: argparse.Namespace) -> None:
    """Hits of a model that routes ahead, with requests waiting."""
    rows = Rows(given, prompts_sha256=sha256(given.prompts), new=given.new)
    model, tokenizer = moesaic.load(given.model, store=StoreOptions("100%", "lru", prefetch=False))
    prompts = [prompt[:, :64] for prompt in prompts_of(given, tokenizer)]
    model.expert_store.trace = []
    InTurn(model, prompts).run(given.new)
    trace = [LayerStep(layer, experts) for layer, experts in model.expert_store.trace]
    size, source = model.expert_store.size, model.expert_store.source
    known = size.num_layers * len(prompts) - 1
    for share in given.shares:
        if rows.has(share=share, requests=len(prompts)):
            continue
        at = size._replace(capacity=math.floor(share * size.num_layers * size.num_experts))
        names = {"random": 0, "lru": 0, "lru:per_layer=True": 0, "look-ahead": known, "belady": 0}
        found = {
            name: replay(trace, build("cache", name), at, depth, in_flight=model.expert_store.readers).hit_ratio
            for name, depth in names.items()
        }
        store = ExpertStore(
            source, model.expert_store.like, at.capacity, build("cache", "look-ahead"), torch.device("cpu")
        )
        give_store(model, store, prefetch=False)
        requests = InTurn(model, prompts)
        next(iter(find_blocks(model))).experts.stored_block.predictor.queue = requests.waiting
        requests.run(given.new)
        rows.add(share=share, requests=len(prompts), **found, measured_look_ahead=store.counts.hit_ratio,
                 gap_closed=(found["look-ahead"] - found["lru:per_layer=True"])
                 / max(1e-9, found["belady"] - found["lru:per_layer=True"]))  # fmt: skip


if __name__ == "__main__":
    main()
