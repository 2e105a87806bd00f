"""CATS: the gate in full, up and down only for neurons whose gate is large (Lee et al., arXiv 2404.08763).

Shapes: T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...calibration.activations import LayerActivations
from ...models.families import GatedFFN
from .base import UndefinedBudget
from .sparse import SparseFFN, Sparsity, Tensors, few, largest, threshold

GATE = "gate"


class CatsFFN(SparseFFN):
    """`down((a * up(x)) where |a| >= t)`, `a = act(gate(x))`; without a threshold t the largest of each token."""

    def __init__(self, ffn: GatedFFN, tensors: Tensors, density: float) -> None:
        super().__init__(ffn, tensors, density)
        self.threshold = tensors.get(GATE)

    def hidden(self, x_TD: Tensor) -> Tensor:
        a_TF = self.ffn.act_fn(linear(x_TD, self.ffn.gate_FD))
        size_TF = a_TF.abs()
        kept_TF = largest(size_TF, self.density) if self.threshold is None else size_TF.float() >= self.threshold
        self.count(torch.ones_like(kept_TF[..., :1]), kept_TF, kept_TF)
        return torch.where(kept_TF, a_TF * linear(x_TD, self.ffn.up_FD), 0)


@dataclass(frozen=True, kw_only=True)
class Cats(Sparsity):
    """Neurons whose `|act(gate(x))|` reaches a threshold, one a layer, that a share s of calibration values reaches.

    A token reads (1 + 2 s) / 3 of the FFN, so at the ffn share `active` s is (3 active - 1) / 2. With `top_k` each
    token keeps exactly the share s of its largest.
    """

    ffn_class: ClassVar[type[SparseFFN]] = CatsFFN

    top_k: bool = False

    @property
    def calibrated(self) -> bool:
        return not self.top_k or self.recovery != "none"

    def density(self, active: float) -> float:
        if active <= 1 / 3:
            raise UndefinedBudget(
                f"CATS computes every gate, a third of the FFN, so it does not exist at {active:.0%} of the FFN's "
                "bytes; give --active above 33.3"
            )
        return (3 * active - 1) / 2

    def fit(self, sample: LayerActivations, density: float) -> Tensors:
        if self.top_k:
            return {}
        ffn = sample.ffn
        parts = few(sample, ffn.intermediate_size).parts()
        return {GATE: threshold((ffn.act_fn(linear(p.input_TD, ffn.gate_FD)).abs() for p in parts), density)}
