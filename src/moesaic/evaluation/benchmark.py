"""Wall-clock of a converted model against the dense one, interleaved in one process; ratios, never one number alone.

Shapes: B sequences, L prompt tokens, T tokens, D hidden size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import InputError
from ..models.families import decoder_layers
from ..models.moe import MoE
from .machine import machine, peak_rss_bytes, versions

BLOCK_TOKENS = (1, 512)
Timer = Callable[[], float]


def benchmark(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens_BL: Tensor,
    *,
    new: int = 32,
    batches: Sequence[int] = (1,),
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Decode and prefill speed in tokens a second, each as the median of alternating runs after a warm-up.

    `limit` is the speed-up that bytes (decode) or FLOPs (prefill) allow: everything that a token reads or multiplies
    with in the dense model over the same in the converted one, attention and head included. `share_of_limit` is the
    share of it that was reached, `speedup / limit`.

    Args:
        model: the converted model.
        dense: the model it came from, in the same dtype.
        tokens_BL: prompts of real text, at least as many as the largest batch; routing depends on them.
        new: tokens decoded after the prompt.
        batches: sequences decoded at once.
        rounds: timed runs of each.
        progress: called with (finished, all) measurements.
    """
    if model.dtype != dense.dtype:
        raise InputError(f"the models have different dtypes, {model.dtype} and {dense.dtype}; choose one with --dtype")
    tokens_L = tokens_BL[0]
    jobs: list[tuple[str, int]] = [("decode", b) for b in batches] + [("prefill", len(tokens_L))]
    jobs += [("block", min(t, len(tokens_L))) for t in BLOCK_TOKENS]
    result: dict[str, Any] = {"decode": {}, "prefill": {}, "block": {}}
    for done, (kind, size) in enumerate(jobs):
        if progress:
            progress(done, len(jobs))
        if kind == "decode":
            pair = [_decode_timer(m, tokens_BL[:size], new) for m in (model, dense)]
            limit, work = active_weights(dense, size) / active_weights(model, size), size * new
        elif kind == "prefill":
            pair = [_prefill_timer(m, tokens_L) for m in (model, dense)]
            limit, work = body_weights(dense) / body_weights(model), size
        else:
            blocks, x_TD = middle_blocks(model, dense, tokens_L, size)
            pair = [_block_timer(block, x_TD) for block in blocks]
            shares = [active_block_weights(block, 1) for block in blocks]
            limit, work = shares[1] / shares[0], size
        result[kind][str(size)] = _compare(pair, work, limit, rounds)
    if progress:
        progress(len(jobs), len(jobs))
    return result | {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "peak_rss_bytes": peak_rss_bytes(),
        "protocol": f"{rounds} alternating rounds after a warm-up, medians; prompt {len(tokens_L)}, {new} new tokens",
        "versions": versions(),
    }


def _compare(pair: Sequence[Timer], work: int, limit: float, rounds: int) -> dict[str, float | list[float]]:
    """Speeds of (converted, dense) in `work` per second; medians with their range."""
    for timer in pair:
        timer()
    seconds = [[timer() for timer in pair] for _ in range(rounds)]
    ours, theirs = (sorted(work / row[side] for row in seconds) for side in (0, 1))
    speedup = statistics.median(ours) / statistics.median(theirs)
    return {
        "tokens_per_s": statistics.median(ours),
        "tokens_per_s_range": [ours[0], ours[-1]],
        "dense_tokens_per_s": statistics.median(theirs),
        "dense_tokens_per_s_range": [theirs[0], theirs[-1]],
        "speedup": speedup,
        "limit": limit,
        "share_of_limit": speedup / limit,
    }


def _decode_timer(model: PreTrainedModel, tokens_BL: Tensor, new: int) -> Timer:
    """Seconds for `new` greedy steps after the prompt; the prompt itself is not timed."""

    @torch.inference_mode()
    def run() -> float:
        cache = DynamicCache(config=model.config)
        out = model(input_ids=tokens_BL.to(model.device), past_key_values=cache, logits_to_keep=1)
        start = _now(model)
        for _ in range(new):
            next_B1 = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=next_B1, past_key_values=cache)
        return _now(model) - start

    return run


def _prefill_timer(model: PreTrainedModel, tokens_L: Tensor) -> Timer:
    @torch.inference_mode()
    def run() -> float:
        start = _now(model)
        model(input_ids=tokens_L[None].to(model.device), logits_to_keep=1)
        return _now(model) - start

    return run


def _block_timer(block: nn.Module, x_TD: Tensor) -> Timer:
    repeats = max(1, 64 // len(x_TD))

    @torch.inference_mode()
    def run() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            block(x_TD)
        if x_TD.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    return run


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ffn_of(layer: nn.Module) -> nn.Module:
    """The FFN of a decoder layer, dense or converted: the child with a down-projection or an MoE."""
    return next(c for c in layer.children() if isinstance(c, MoE) or hasattr(c, "down_proj"))


def middle_blocks(
    model: PreTrainedModel, dense: PreTrainedModel, tokens_L: Tensor, tokens: int
) -> tuple[tuple[nn.Module, nn.Module], Tensor]:
    """The (converted, dense) FFN of the middle layer, and real inputs [tokens, D] of it."""
    middle = len(decoder_layers(model)) // 2
    ours, theirs = (ffn_of(decoder_layers(m)[middle]) for m in (model, dense))
    seen: list[Tensor] = []
    handle = ours.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.inference_mode():
            model(input_ids=tokens_L[None].to(model.device), logits_to_keep=1)
    finally:
        handle.remove()
    x_TD = seen[0].flatten(0, 1)[-tokens:]
    return (ours, theirs), x_TD


def active_block_weights(block: nn.Module, batch: int) -> float:
    """Weights of an FFN that `batch` tokens touch; experts are taken as chosen independently by each token."""
    routed = block.experts if isinstance(block, MoE) else None
    total = sum(p.numel() for p in block.parameters())
    if routed is None or not isinstance(block, MoE) or block.gate is None:
        return total
    idle = (1 - block.gate.num_experts_per_tok / routed.num_experts) ** batch
    return total - idle * sum(p.numel() for p in routed.parameters())


def body_weights(model: PreTrainedModel) -> float:
    """Weights that one prompt token multiplies with; the head runs on the last token only."""
    head: Any = model.get_output_embeddings()
    return active_weights(model, 1) - head.weight.numel()


def active_weights(model: PreTrainedModel, batch: int) -> float:
    """Weights that one decoding step of `batch` tokens reads; the input embedding is a look-up and not counted."""
    total = float(sum(p.numel() for p in model.parameters()))
    ends: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (end.weight for end in ends)
    if embedding is not head:
        total -= embedding.numel()
    for layer in decoder_layers(model):
        block = ffn_of(layer)
        total += active_block_weights(block, batch) - sum(p.numel() for p in block.parameters())
    return total
