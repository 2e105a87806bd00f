"""TEAL: inputs of each matrix that are small are skipped (Liu et al., arXiv 2408.14690); here of FFNs alone.

Shapes: T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...calibration.activations import LayerActivations
from ...models.families import GatedFFN
from .sparse import SparseFFN, Sparsity, Tensors, few, largest, threshold

INPUT, HIDDEN = "input", "hidden"


class TealFFN(SparseFFN):
    """`down(h where |h| >= t_h)` of `h = act(gate(z)) * up(z)`, `z = x where |x| >= t_x`; or the largest of a token."""

    def __init__(self, ffn: GatedFFN, tensors: Tensors, density: float) -> None:
        super().__init__(ffn, tensors, density)
        self.thresholds = tensors if INPUT in tensors else None

    def kept(self, value_TX: Tensor, name: str) -> Tensor:
        """Tell which inputs of a matrix a token keeps."""
        size_TX = value_TX.abs()
        if self.thresholds is None:
            return largest(size_TX, self.density)
        return size_TX.float() >= self.thresholds[name]

    def hidden(self, x_TD: Tensor) -> Tensor:
        kept_TD = self.kept(x_TD, INPUT)
        h_TF = self.ffn.hidden(torch.where(kept_TD, x_TD, 0))
        kept_TF = self.kept(h_TF, HIDDEN)
        self.count(kept_TD, kept_TD, kept_TF)
        return torch.where(kept_TF, h_TF, 0)


@dataclass(frozen=True, kw_only=True)
class Teal(Sparsity):
    """Inputs whose size reaches a threshold: one for x and one for h in each layer, the same density in all.

    The paper finds each matrix's density by a greedy search over a block, and sparsifies attention too. With `top_k`
    each token keeps its largest.
    """

    ffn_class: ClassVar[type[SparseFFN]] = TealFFN

    top_k: bool = False

    @property
    def calibrated(self) -> bool:
        return not self.top_k or self.recovery != "none"

    def fit(self, sample: LayerActivations, density: float) -> Tensors:
        if self.top_k:
            return {}
        ffn = sample.ffn
        small = few(sample, ffn.intermediate_size)
        t_x = threshold([small.input_TD.abs()], density)
        skipped = (torch.where(p.input_TD.abs().float() >= t_x, p.input_TD, 0) for p in small.parts())
        return {INPUT: t_x, HIDDEN: threshold((ffn.hidden(x_CD).abs() for x_CD in skipped), density)}
