"""NAEE: the set of experts with which the block says most nearly what it said (Lu et al., arXiv 2402.14800, §3.1).

Shapes: T tokens, E routed experts, N experts that are kept, C tokens of one chunk, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..sample import BlockSample
from .base import Kept, Pruner

CHUNK_TOKENS = 256
Error = Callable[[Sequence[int]], float]
"""Of a set of kept experts: `sum_t ‖block(x_t) - block restricted to the set(x_t)‖²`."""


@dataclass(frozen=True, kw_only=True)
class Naee(Pruner):
    """`argmin_C ‖block(x) - block_C(x)‖_F` over sets C of `keep` experts; block_C has a router without the others.

    All sets are tried where there are at most `sets` of them, as in the paper. Where there are more, experts are
    removed one by one, the one that costs least each time, and then exchanged while that helps.
    """

    knows_groups: ClassVar[bool] = False

    sets: Annotated[int, Field(ge=0)] = 2_000
    """Sets that are tried at most."""
    tokens: Annotated[int, Field(gt=0)] = 2_048
    """Calibration tokens that errors are measured on at most; E² numbers are kept of each."""
    swaps: Annotated[int, Field(ge=0)] = 1
    """Rounds of exchanges after the removals, each over all pairs of a kept and a removed expert."""

    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        sample = sample.subsample(self.tokens, generator)
        error, count = set_error(sample), sample.num_experts
        if math.comb(count, keep) <= self.sets:
            found = min(combinations(range(count), keep), key=error)
        else:
            found = exchange(error, remove(error, range(count), keep), range(count), self.swaps)
        return Kept(experts=torch.tensor(sorted(found)))


def set_error(sample: BlockSample) -> Error:
    """Make the error of a set: `sum_t a_t.T G_t a_t` with a what the set changes in the experts' weights.

    G_t [E, E] holds the inner products of all experts' outputs on token t, so that an error costs nothing of size D.
    """
    full_TE = sample.weights()
    gram_TEE = torch.cat([gram(sample, part) for part in torch.arange(len(full_TE)).split(CHUNK_TOKENS)])

    def error(kept: Sequence[int]) -> float:
        change_TE = sample.weights(torch.tensor(kept)) - full_TE
        moved_TE = (gram_TEE @ change_TE[..., None]).squeeze(-1)
        return (change_TE * moved_TE).sum().item()

    return error


def gram(sample: BlockSample, token_C: Tensor) -> Tensor:
    """Compute the inner products of the experts' outputs on each token, float32 [C, E, E]."""
    output_CED = torch.stack([sample.output(e, token_C).float() for e in range(sample.num_experts)], dim=1)
    return output_CED @ output_CED.mT


def remove(error: Error, experts: Iterable[int], keep: int) -> list[int]:
    """Remove the expert without which the error is least, again and again, until `keep` are left."""
    kept = list(experts)
    while len(kept) > keep:
        kept = min(([e for e in kept if e != gone] for gone in kept), key=error)
    return kept


def exchange(error: Error, kept: Sequence[int], experts: Iterable[int], rounds: int) -> list[int]:
    """Make the best exchange of a kept expert for a removed one, at most `rounds` times, as long as one helps."""
    kept, everyone = sorted(kept), list(experts)
    for _ in range(rounds):
        removed = [e for e in everyone if e not in kept]
        tried = [sorted({*kept, new} - {old}) for old, new in product(kept, removed)]
        found = min(tried, key=error, default=kept)
        if not error(found) < error(kept):
            break
        kept = found
    return kept
