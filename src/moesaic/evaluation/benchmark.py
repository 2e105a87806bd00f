"""Wall-clock of a converted model against the dense one, interleaved in one process; ratios, never one number alone.

Shapes: B sequences, L prompt tokens, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..compat import experts_implementation
from ..errors import InputError
from ..machine import machine, peak_rss_bytes, versions
from ..models.devices import dtype_name
from ..models.families import decoder_layers
from ..models.moe_block import Routing, find_block
from ..models.processor import Processor
from ..progress import Progress, unheard
from ..results import BenchmarkResult, Speed
from .clock import now
from .cost import active_block_weights, active_weights, body_weights, ffn_of
from .pictures import picture_inputs, picture_speed
from .roof import roof
from .sizes import check_sizes, cut_length

if TYPE_CHECKING:
    from PIL.Image import Image

BLOCK_TOKENS = (1, 8, 32, 512)
FEW = 32
"""Tokens up to which a block is limited by the bytes that it reads, beyond by FLOPs."""
Timer = Callable[[], float]


def benchmark(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens_BL: Tensor,
    *,
    new: int = 32,
    batches: Sequence[int] = (1,),
    rounds: int = 5,
    processor: Processor | None = None,
    images: Sequence[str | Path | Image] = (),
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Time decoding and prefill in tokens a second, each as the median of alternating runs after a warm-up.

    `speedup` is the median of the ratios within a round, of two runs side by side, so that a machine that slows down
    for a while changes it little; `speedup_range` has the least and the greatest.
    `limit` is the speed-up that bytes (decode) or FLOPs (prefill) allow: everything that a step reads or a token
    multiplies with in the dense model over the same in the converted one, attention and head included; of experts those
    that the batch's tokens really chose. `share_of_limit` is the share of it that was reached, `speedup / limit`. Rows
    have `bytes` and `flops` of a step (without the cache's), `experts_touched` a layer; `roof` is what the machine
    does in one large product: `bytes_per_s` with one token, `flops_per_s` with many.

    Args:
        model: the converted model, or one with an adapter.
        dense: the model it came from, in the same dtype; of an adapted one itself without the adapter.
        tokens_BL: prompts of real text, at least as many as the largest batch; routing depends on them.
        new: tokens decoded after the prompt.
        batches: sequences decoded at once.
        rounds: timed runs of each.
        processor: of a vision-language model, from `load_processor`; with `images` a question about them is timed too.
        images: pictures or their files.
        progress: called with (finished, all) measurements, and a note.

    Raises:
        InputError: the models have different dtypes, a number is out of its limits, prompts and new tokens are beyond
            the models' context or the free memory, or pictures cannot be used.
    """
    check_sizes(model, dense, tokens_BL, new, batches, rounds)
    if model.dtype != dense.dtype:
        raise InputError(f"the models have different dtypes, {model.dtype} and {dense.dtype}; choose one with --dtype")
    shown = picture_inputs(model, processor, images, new) if images else None
    found = _measure_all(model, dense, tokens_BL, new, batches, rounds, progress or unheard)
    picture = None
    if processor and shown:
        picture = picture_speed(model, dense, shown, processor.image_token_id, new, rounds)
    return BenchmarkResult(
        picture=picture,
        decode=found["decode"],
        prefill=found["prefill"],
        block=found["block"],
        roof=roof(model.device, model.dtype),
        machine=machine(),
        threads=torch.get_num_threads(),
        dtype=dtype_name(model.dtype),
        experts=experts_implementation(model.config),
        peak_rss_bytes=peak_rss_bytes(),
        protocol=_protocol(rounds, tokens_BL.shape[1], new, batches),
        versions=versions(),
    )


def _protocol(rounds: int, prompt: int, new: int, batches: Sequence[int]) -> str:
    lengths = {size: cut_length(prompt, size) for size in batches}
    cut = "".join(f"; {size} prompts of {length}" for size, length in lengths.items() if length < prompt)
    return f"{rounds} alternating rounds after a warm-up, medians; prompt {prompt}, {new} new tokens{cut}"


def _measure_all(
    model: PreTrainedModel, dense: PreTrainedModel, tokens_BL: Tensor, new: int, batches: Sequence[int], rounds: int,
    report: Progress,
) -> dict[str, dict[str, Speed]]:  # fmt: skip
    """Measure all cases, by kind and size."""
    length = tokens_BL.shape[1]
    cases = [("decode", b) for b in batches] + [("prefill", length)]
    cases += [("block", min(t, length)) for t in BLOCK_TOKENS]
    found: dict[str, dict[str, Speed]] = {"decode": {}, "prefill": {}, "block": {}}
    for done, (kind, size) in enumerate(cases):
        report(done, len(cases), "")
        found[kind][str(size)] = CASES[kind](model, dense, tokens_BL, size, new).measure(model.dtype.itemsize, rounds)
    report(len(cases), len(cases), "")
    return found


def decode_speed(
    model: PreTrainedModel, dense: PreTrainedModel, tokens_BL: Tensor, *, new: int = 32, rounds: int = 5
) -> Speed:
    """Time what `decode["1"]` of `benchmark` has, alone: one prompt of [B, L], `new` tokens, `rounds` timed runs."""
    return _decode(model, dense, tokens_BL, 1, new).measure(model.dtype.itemsize, rounds)


@dataclass
class Case:
    """What is timed of (converted, dense), and the work in it."""

    pair: Sequence[Timer]
    tokens: int
    """Tokens of one timed run."""
    step: int
    """Tokens that go through at once."""
    touched: list[float | None]
    """Experts touched in a step, a layer."""
    read: Sequence[float]
    """Weights that a step reads."""
    multiplied: Sequence[float]
    """Weights that a token multiplies with."""
    by_bytes: bool
    """Whether bytes limit it, or FLOPs."""

    def measure(self, itemsize: int, rounds: int) -> Speed:
        """Time both, interleaved, after a warm-up; the speed-up is the median of the rounds' own ratios."""
        for timer in self.pair:
            timer()
        seconds = [[timer() for timer in self.pair] for _ in range(rounds)]
        ours, theirs = (sorted(self.tokens / row[side] for row in seconds) for side in (0, 1))
        ratios = sorted(dense / converted for converted, dense in seconds)
        work = self.read if self.by_bytes else self.multiplied
        limit, speedup = work[1] / work[0], statistics.median(ratios)
        touched = [count for count in self.touched if count is not None]
        return Speed(
            tokens_per_s=statistics.median(ours),
            tokens_per_s_range=[ours[0], ours[-1]],
            dense_tokens_per_s=statistics.median(theirs),
            dense_tokens_per_s_range=[theirs[0], theirs[-1]],
            speedup=speedup,
            speedup_range=[ratios[0], ratios[-1]],
            limit=limit,
            share_of_limit=speedup / limit,
            bytes=self.read[0] * itemsize,
            dense_bytes=self.read[1] * itemsize,
            flops=2 * self.step * self.multiplied[0],
            dense_flops=2 * self.step * self.multiplied[1],
            experts_touched=statistics.fmean(touched) if touched else None,
        )


def _decode(model: PreTrainedModel, dense: PreTrainedModel, tokens_BL: Tensor, size: int, new: int) -> Case:
    prompts_BL = tokens_BL[:size, : cut_length(tokens_BL.shape[1], size)]
    pair = [_decode_timer(m, prompts_BL, new) for m in (model, dense)]
    chosen = [experts_chosen(m, timer) for m, timer in zip((model, dense), pair, strict=True)]
    read = [active_weights(m, c.touched) for m, c in zip((model, dense), chosen, strict=True)]
    multiplied = [active_weights(m, c.per_token) for m, c in zip((model, dense), chosen, strict=True)]
    return Case(pair, size * new, size, chosen[0].touched, read, multiplied, True)


def _prefill(model: PreTrainedModel, dense: PreTrainedModel, tokens_BL: Tensor, size: int, new: int) -> Case:
    pair = [_prefill_timer(m, tokens_BL[0]) for m in (model, dense)]
    chosen = [experts_chosen(m, timer) for m, timer in zip((model, dense), pair, strict=True)]
    read = [active_weights(m, c.touched) for m, c in zip((model, dense), chosen, strict=True)]
    multiplied = [body_weights(m, c.per_token) for m, c in zip((model, dense), chosen, strict=True)]
    return Case(pair, size, size, chosen[0].touched, read, multiplied, False)


def _block(model: PreTrainedModel, dense: PreTrainedModel, tokens_BL: Tensor, size: int, new: int) -> Case:
    inputs = [x_LD[-size:] for x_LD in ffn_inputs(model, tokens_BL[0])]
    ours, theirs = ([ffn_of(layer) for layer in decoder_layers(m)] for m in (model, dense))
    pair = [_block_timer(blocks, inputs) for blocks in (ours, theirs)]
    chosen = [experts_chosen(m, timer) for m, timer in zip((model, dense), pair, strict=True)]
    both = list(zip((ours, theirs), chosen, strict=True))
    read = [statistics.fmean(map(active_block_weights, blocks, c.touched)) for blocks, c in both]
    multiplied = [statistics.fmean(map(active_block_weights, blocks, c.per_token)) for blocks, c in both]
    return Case(pair, size, size, chosen[0].touched, read, multiplied, size <= FEW)


CASES = {"decode": _decode, "prefill": _prefill, "block": _block}


def _decode_timer(model: PreTrainedModel, tokens_BL: Tensor, new: int) -> Timer:
    """Make a timer of `new` greedy steps, seconds, after the prompt, which is run once and not timed."""
    prompt = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(input_ids=tokens_BL.to(model.device), past_key_values=prompt, logits_to_keep=1).logits

    @torch.inference_mode()
    def run() -> float:
        cache, next_B1 = copy.deepcopy(prompt), logits[:, -1:].argmax(-1)
        start = now(model)
        for _ in range(new):
            next_B1 = model(input_ids=next_B1, past_key_values=cache).logits[:, -1:].argmax(-1)
        return now(model) - start

    return run


def _prefill_timer(model: PreTrainedModel, tokens_L: Tensor) -> Timer:
    @torch.inference_mode()
    def run() -> float:
        start = now(model)
        model(input_ids=tokens_L[None].to(model.device), logits_to_keep=1)
        return now(model) - start

    return run


def _block_timer(blocks: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Timer:
    """Make a timer of one layer's FFN, seconds; all layers take turns, so that no cache holds their weights."""

    @torch.inference_mode()
    def run() -> float:
        start = now(inputs[0])
        for block, x_TD in zip(blocks, inputs, strict=True):
            block(x_TD[None])
        return (now(inputs[0]) - start) / len(blocks)

    return run


class Chosen(NamedTuple):
    """The routed experts of each layer, on average over calls of its router; None where there is none."""

    touched: list[float | None]
    """Different ones in a call."""
    per_token: list[float | None]


def experts_chosen(model: PreTrainedModel, run: Timer) -> Chosen:
    """Count the experts that each layer's router chooses in `run`."""
    blocks = [find_block(layer) for layer in decoder_layers(model)]
    different: list[list[int]] = [[] for _ in blocks]
    each: list[list[float]] = [[] for _ in blocks]

    def count(number: int, experts: int) -> Callable[[Tensor, Routing], None]:
        def see(_: Tensor, routing: Routing) -> None:
            chosen_TK = routing.runs(experts)
            different[number].append(len(routing.top_k_index[chosen_TK].unique()))
            each[number].append(int(chosen_TK.sum()) / len(chosen_TK))

        return see

    handles = [b.watch(count(number, b.num_experts)) for number, b in enumerate(blocks) if b is not None]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return Chosen(*([statistics.fmean(found) if found else None for found in lists] for lists in (different, each)))


@torch.inference_mode()
def ffn_inputs(model: PreTrainedModel, tokens_L: Tensor) -> list[Tensor]:
    """Record what enters each layer's FFN for that prompt [L], [L, D] each."""
    seen: list[Tensor] = []
    blocks = [ffn_of(layer) for layer in decoder_layers(model)]
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))) for block in blocks]
    try:
        model(input_ids=tokens_L[None].to(model.device), logits_to_keep=1)
    finally:
        for handle in hooks:
            handle.remove()
    return seen
