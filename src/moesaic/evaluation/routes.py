"""Which experts each token of some requests runs, prompt and answer, written as a trace for the cache simulator.

Shapes: T tokens of a forward pass, K slots for experts in a token, N requests, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, WorkError
from ..given import check, file_to_write, path
from ..models.families import context_length
from ..models.moe_block import MoEBlock, Routing
from ..moe.adaptive import moe_blocks_of
from ..progress import Progress, unheard
from ..results import RoutesInspection
from ..store.hits import cache_hits
from ..store.routes import DECODE, PREFILL, Route, RouteTrace
from ..store.traces import is_trace, write_trace
from .experts import inspected_text, make_windows


def inspect_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    *,
    text: str | Path | None = None,
    requests: int = 8,
    prompt: int = 64,
    new: int = 64,
    name: str = "",
    progress: Progress | None = None,
) -> RoutesInspection:
    """Trace the experts of each token while a model reads prompts and continues them, and write them to a file.

    Each request is a prompt cut from a text and its greedy continuation, which does not stop at an end-of-text token.

    Args:
        model: any Mixture-of-Experts, as `load` gives it, with an adapter or a selection at work or not.
        tokenizer: the model's.
        file: the trace to write: CSV, compressed if the name ends in `.gz`. A trace that is there is replaced.
        text: a file of text or rows; None is the bundled held-out text of six domains.
        requests: how many, taken from all domains in turn.
        prompt: tokens of each prompt.
        new: forward passes of one token that follow; 0 is the prompt alone.
        name: what the trace calls the model.
        progress: called with (finished, all) requests, then simulations of caches, and which of them.

    Raises:
        InputError: the model is dense, no such text, too little of it, or a file that cannot or must not be written.
        WorkError: logits are not finite.
    """
    place = trace_file(file)
    check(requests=requests, prompt=prompt, new=new or None)
    read = inspected_text(text, requests * prompt, prompt)
    blocks = moe_blocks_of(model)
    if prompt + new > (longest := context_length(model.config)):
        raise InputError(f"--prompt {prompt} and --new {new} are more than the model's longest, {longest} tokens")
    cut = make_windows(model, tokenizer, read, prompt)
    routes: list[Route] = []
    tick = progress or unheard
    for number, tokens_L in enumerate(cut.tokens_NL):
        routes += trace_request(model, blocks, tokens_L, new, number)
        tick(number + 1, len(cut.tokens_NL), "requests")
    trace = RouteTrace(
        routes=routes, num_layers=len(blocks), num_experts=max(block.num_experts for block in blocks),
        model=name or str(model.config.model_type), expert_bytes=expert_bytes(blocks[0]),
    )  # fmt: skip
    write_trace(place, trace)
    caches = cache_hits(trace, tick)
    found = summary(trace, place, [block.layer for block in blocks], cut.name, cut.data_sha256, prompt, new)
    return replace(found, caches=caches)


def trace_file(file: str | Path) -> Path:
    """Check that a trace can be written at a path.

    Raises:
        InputError: no such folder, or something else than a trace is there.
    """
    place = file_to_write("--trace", path(file))
    if place.exists() and place.stat().st_size and not is_trace(place):
        raise InputError(f"--trace {place} exists and is no route trace; give another name, such as routes.csv.gz")
    return place


def expert_bytes(block: MoEBlock) -> int:
    """Count the bytes of one routed expert's weights."""
    own = block.experts.parameters()
    return sum(p.numel() * p.element_size() for p in own if p.shape[0] == block.num_experts) // block.num_experts


@torch.no_grad()
def trace_request(
    model: PreTrainedModel, blocks: Sequence[MoEBlock], tokens_L: Tensor, new: int, request: int
) -> list[Route]:
    """Run one prompt and its greedy continuation, and see what each router decides.

    Raises:
        WorkError: logits are not finite.
    """
    seen: list[list[Routing]] = [[] for _ in blocks]
    routes: list[Route] = []
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.watch(lambda _, routing, number=number: seen[number].append(routing)).remove)
        ids, cache, first = tokens_L[None].to(model.device), None, 0
        for step in range(new + 1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            routes += _routes(seen, blocks, request, step, first)
            for decisions in seen:
                decisions.clear()
            if not output.logits.isfinite().all():
                raise WorkError(f"logits are not finite in {model.dtype}; try --dtype float32")
            first, cache = first + ids.shape[1], output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
    return routes


def _routes(
    seen: Sequence[Sequence[Routing]], blocks: Sequence[MoEBlock], request: int, step: int, first: int
) -> list[Route]:
    """Turn the decisions of one forward pass into lines; empty slots are left out."""
    found = []
    for layer, (decisions, block) in enumerate(zip(seen, blocks, strict=True)):
        index_TK = torch.cat([routing.top_k_index for routing in decisions]).tolist()
        weights_TK = torch.cat([routing.top_k_weights for routing in decisions]).float().tolist()
        for token, (experts, weights) in enumerate(zip(index_TK, weights_TK, strict=True), first):
            pairs = [(e, w) for e, w in zip(experts, weights, strict=True) if e < block.num_experts and w != 0]
            chosen, factors = tuple(e for e, _ in pairs), tuple(w for _, w in pairs)
            found.append(Route(request, step, DECODE if step else PREFILL, token, layer, chosen, factors))
    return found


def summary(
    trace: RouteTrace, place: Path, layers: list[int], text: str, data_sha256: str, prompt: int, new: int
) -> RoutesInspection:
    """Say how much a trace holds, and how far tokens use the experts of those before them."""
    experts = {(r.request, r.token, r.layer): set(r.experts) for r in trace.routes}
    shares = [
        len(own & experts[r, t - 1, layer]) / len(own)
        for (r, t, layer), own in experts.items()
        if own and (r, t - 1, layer) in experts
    ]
    used = {(route.layer, e) for route in trace.routes for e in route.experts}
    count = len(experts) // len(layers)
    return RoutesInspection(
        file=str(place),
        text=text,
        data_sha256=data_sha256,
        requests=trace.routes[-1].request + 1,
        prompt=prompt,
        new=new,
        tokens=count,
        layers=layers,
        num_experts=trace.num_experts,
        expert_bytes=trace.expert_bytes or 0,
        experts_per_token=sum(map(len, experts.values())) / max(1, len(experts)),
        kept=sum(shares) / max(1, len(shares)),
        used=len(used) / (trace.num_layers * trace.num_experts),
        caches=[],
    )
