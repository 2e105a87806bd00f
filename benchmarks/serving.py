"""Serving: latency, distinct experts in a batch and hits of schedulers, under requests that arrive at random.

    python benchmarks/serving.py schedulers --model MODEL --prompts instruct.jsonl --domains DIR --out DIR
    python benchmarks/serving.py load --model tiny-moe --prompts instruct.jsonl --out DIR

`schedulers`: requests arrive by a Poisson process (one seed for all schedulers) at shares of what the server can do
with all of them at once; each batch has `--max-batch-tokens` tokens, so that the order matters, and experts come over a
link of `--bandwidth` bytes a second into a fast tier of `--expert-memory`. Latency is a request's whole time over its
tokens.
`load`: `--requests` at once, all texts compared with those of the model alone; clients that go away; overload.
Resumable: a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

import moesaic
from moesaic import ServeConfig, StoreOptions, find_blocks
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.machine import machine, versions
from moesaic.registry import build
from moesaic.store.opening import give_store
from moesaic.store.source import ThrottledSource
from moesaic.store.store import ExpertStore

SCHEDULERS = ("fifo", "prefill-first", "expert-aware")
LOADS = (0.5, 0.8, 1.1)


class Answer(NamedTuple):
    """What a client saw."""

    text: str
    tokens: int
    seconds: float
    status: int


def main() -> None:
    """Measure what is missing of one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("schedulers", "load"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--called", help="what the results call the model; by default as --model")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a field prompt")
    parser.add_argument("--domains", type=Path, help="a folder of JSON lines with a field text, one file a domain")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--max-batch-tokens", type=int, default=24)
    parser.add_argument("--expert-memory", default="30%")
    parser.add_argument("--cache", default="look-ahead")
    parser.add_argument("--bandwidth", type=float, default=200e6)
    parser.add_argument("--loads", nargs="+", type=float, default=LOADS)
    parser.add_argument("--schedulers", nargs="+", default=SCHEDULERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    {"schedulers": schedulers, "load": load}[given.part](given)


class Rows:
    """Results in a file, a row a line."""

    def __init__(self, path: Path, head: dict[str, object]) -> None:
        self.path = path
        self.found = json.loads(path.read_text()) if path.is_file() else {**head, "rows": []}

    def find(self, **key: object) -> dict | None:
        """Find a row."""
        return next((row for row in self.found["rows"] if key.items() <= row.items()), None)

    def add(self, **row: object) -> None:
        """Write a row."""
        self.found["rows"].append(row)
        head = json.dumps({**self.found, "rows": []}, indent=1).removesuffix("[]\n}")
        self.path.write_text(head + "[\n" + ",\n".join(map(json.dumps, self.found["rows"])) + "\n]}\n")
        print(json.dumps(row), flush=True)


def about(given: argparse.Namespace) -> dict[str, object]:
    """Say what all rows have in common."""
    return {
        "model": given.called or given.model, "fingerprint": Checkpoint(resolve(given.model)).fingerprint(),
        "prompts_sha256": hashlib.sha256(given.prompts.read_bytes()).hexdigest(), "new": given.new,
        "max_batch_tokens": given.max_batch_tokens, "expert_memory": given.expert_memory, "cache": given.cache,
        "bandwidth": given.bandwidth, "dtype": "float32", "threads": 1, "versions": versions(), "machine": machine(),
    }  # fmt: skip


def prompts_of(given: argparse.Namespace, seed: int) -> list[str]:
    """Mix instructions and text of the domains, 200 characters of each."""
    drawn = random.Random(seed)
    texts = [json.loads(line)["prompt"][-200:] for line in given.prompts.read_text().splitlines()]
    pools = [texts]
    for path in sorted(given.domains.glob("*.jsonl")) if given.domains else ():
        pools.append([json.loads(line)["text"][:200] for line in path.read_text().splitlines()])
    return [drawn.choice(drawn.choice(pools)) for _ in range(given.requests)]


class Distinct:
    """Counts how many distinct experts a batch runs in a layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts: list[int] = []
        for block in find_blocks(model):
            block.watch(self._see(block.num_experts))

    def _see(self, experts: int):  # noqa: ANN202
        def see(hidden: torch.Tensor, routing: object) -> None:
            self.counts.append(int((routing.top_k_index.unique() < experts).sum()))

        return see


async def ask(client: httpx.AsyncClient, name: str, prompt: str, new: int, delay: float) -> Answer:
    """Send one request at its time, and wait for the answer."""
    await asyncio.sleep(delay)
    begin = time.perf_counter()
    body = {"model": name, "prompt": prompt, "max_tokens": new, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - begin
    if answer.status_code != 200:
        return Answer("", 0, seconds, answer.status_code)
    found = answer.json()
    return Answer(found["choices"][0]["text"], found["usage"]["completion_tokens"], seconds, 200)


def answers(server: moesaic.serving.server.serve.Server, prompts: Sequence[str], new: int, delays: Sequence[float]):  # noqa: ANN201
    """Ask everything, each at its time."""

    async def all_of_them() -> list[Answer]:
        limits = httpx.Limits(max_connections=1_000)
        async with httpx.AsyncClient(base_url=server.url, timeout=900, limits=limits) as client:
            return await asyncio.gather(
                *(ask(client, server.name, p, new, d) for p, d in zip(prompts, delays, strict=True))
            )

    return asyncio.run(all_of_them())


def slow_model(given: argparse.Namespace):  # noqa: ANN201
    """Load the model with a store over a slow link."""
    options = StoreOptions(given.expert_memory, given.cache)
    model, tokenizer = moesaic.load(given.model, store=options, dtype=torch.float32)
    old = model.expert_store
    slow = ThrottledSource(old.source, given.bandwidth, 1e-4)
    give_store(model, ExpertStore(slow, old.like, old.size.capacity, build("cache", given.cache), old.device))
    return model, tokenizer


def measure(given: argparse.Namespace, scheduler: str, prompts: Sequence[str], delays: Sequence[float]) -> dict:
    """Serve all requests with a scheduler."""
    model, tokenizer = slow_model(given)
    config = ServeConfig(port=0, scheduler=scheduler, max_batch_tokens=given.max_batch_tokens, max_queue=10_000)
    with moesaic.serve(model, tokenizer, config) as server:
        distinct = Distinct(model)
        begin = time.perf_counter()
        found = answers(server, prompts, given.new, delays)
        seconds = time.perf_counter() - begin
    report = model.expert_store.report()
    model.expert_store.close()
    each = sorted(a.seconds / max(1, a.tokens) for a in found)
    tokens = sum(a.tokens for a in found)
    return {
        "seconds": seconds, "tokens_per_s": tokens / seconds, "mean_latency": statistics.mean(each),
        "median_latency": statistics.median(each), "p95_latency": each[int(0.95 * (len(each) - 1))],
        "largest_over_median": each[-1] / statistics.median(each), "lost": sum(a.status != 200 for a in found),
        "distinct_experts": statistics.mean(distinct.counts), "batches": len(distinct.counts),
        "hit_ratio": report["hit_ratio"], "bytes_read": report["bytes_read"],
    }  # fmt: skip


def schedulers(given: argparse.Namespace) -> None:
    """Latency and distinct experts by scheduler and load."""
    rows = Rows(given.out / "schedulers.json", about(given) | {"requests": given.requests})
    for seed in given.seeds:
        prompts = prompts_of(given, seed)
        drawn = random.Random(1_000 + seed)
        gaps = [drawn.expovariate(1.0) for _ in prompts]
        full = rows.find(scheduler="fifo", load="all at once", seed=seed)
        if full is None:
            rows.add(
                scheduler="fifo", load="all at once", seed=seed, **measure(given, "fifo", prompts, [0.0] * len(gaps))
            )
            full = rows.find(scheduler="fifo", load="all at once", seed=seed)
        for share in given.loads:
            mean_gap = full["seconds"] / len(prompts) / share
            delays = [mean_gap * sum(gaps[: n + 1]) for n in range(len(gaps))]
            for scheduler in given.schedulers:
                if rows.find(scheduler=scheduler, load=share, seed=seed) is None:
                    row = measure(given, scheduler, prompts, delays)
                    rows.add(scheduler=scheduler, load=share, seed=seed, **row)
    draw(rows.found["rows"], given.out / "latency.png")


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw latency against load: the mean as a line, 95 % of requests below the dashed one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for color, scheduler in zip(("#888888", "#c58a2b", "#1f5fa8"), SCHEDULERS, strict=True):
        mine = [row for row in rows if row["scheduler"] == scheduler and not isinstance(row["load"], str)]
        loads = sorted({row["load"] for row in mine})
        for key, line, label in (("mean_latency", "-o", scheduler), ("p95_latency", "--", None)):
            means = [1e3 * statistics.mean(row[key] for row in mine if row["load"] == load) for load in loads]
            axes.plot(loads, means, line, color=color, label=label)
    axes.set(xlabel="arrivals over what the server answers at once", ylabel="ms a token", ylim=(0, None))
    axes.set_title("Latency: mean, and 95 % of requests (dashed)", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def load(given: argparse.Namespace) -> None:
    """Many at once, clients that go away, and overload."""
    rows = Rows(given.out / "load.json", about(given))
    prompts = prompts_of(given, 0)
    plain, tokenizer = moesaic.load(given.model, dtype=torch.float32)
    distinct = list(dict.fromkeys(prompts))
    expected = {p: moesaic.complete(plain, tokenizer, p, max_new_tokens=given.new) for p in distinct}
    del plain
    model, tokenizer = moesaic.load(given.model, store=StoreOptions(given.expert_memory), dtype=torch.float32)
    for scheduler in given.schedulers:
        if rows.find(scheduler=scheduler, requests=len(prompts)):
            continue
        config = ServeConfig(
            port=0, scheduler=scheduler, max_queue=given.requests, max_batch_tokens=given.max_batch_tokens
        )
        with moesaic.serve(model, tokenizer, config) as server:
            begin = time.perf_counter()
            found = answers(server, prompts, given.new, [0.0] * len(prompts))
            seconds = time.perf_counter() - begin
            same = sum(a.text == expected[p] for a, p in zip(found, prompts, strict=True))
            twice = answers(server, prompts * 2, 4, [0.0] * 2 * len(prompts))
            again = answers(server, prompts[:8], given.new, [0.0] * 8)
            gone = asyncio.run(go_away(server, prompts[:16]))
        rows.add(scheduler=scheduler, requests=len(prompts), seconds=seconds, same_text=same,
                 lost=sum(a.status != 200 for a in found), tokens_per_s=sum(a.tokens for a in found) / seconds,
                 refused_at_twice_as_many=sum(a.status == 429 for a in twice),
                 other_failures_then=sum(a.status not in (200, 429) for a in twice),
                 same_text_after=sum(a.text == expected[p] for a, p in zip(again, prompts[:8], strict=True)),
                 places_held_by_clients_gone=gone)  # fmt: skip


async def go_away(server: moesaic.serving.server.serve.Server, prompts: Sequence[str]) -> int:
    """Begin long answers, leave after the first piece, and count the places that are held a while later."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for prompt in prompts:
            body = {"model": server.name, "prompt": prompt, "max_tokens": 400, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as stream:
                async for _ in stream.aiter_lines():
                    break
    await asyncio.sleep(2.0)
    return len(server.app.batcher.running)


if __name__ == "__main__":
    main()
