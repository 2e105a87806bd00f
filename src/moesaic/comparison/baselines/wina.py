"""WINA: inputs of each matrix that are small beside their column's norm are skipped (arXiv 2505.19427); FFNs alone.

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
from .sparse import SparseFFN, Sparsity, Tensors, largest


class WinaFFN(SparseFFN):
    """Each matrix W keeps the inputs of largest `|x_i| ‖W_:,i‖` of each token; gate and up choose for themselves."""

    def __init__(self, ffn: GatedFFN, tensors: Tensors, density: float) -> None:
        super().__init__(ffn, tensors, density)
        self.norms = [w.float().norm(dim=0) for w in (self.ffn.gate_FD, self.ffn.up_FD, self.ffn.down_DF)]

    def hidden(self, x_TD: Tensor) -> Tensor:
        gate_D, up_D, down_F = self.norms
        kept = [largest(x_TD.abs().float() * norm_D, self.density) for norm_D in (gate_D, up_D)]
        gate_TF, up_TF = (
            linear(torch.where(kept_TD, x_TD, 0), weight_FD)
            for kept_TD, weight_FD in zip(kept, (self.ffn.gate_FD, self.ffn.up_FD), strict=True)
        )
        h_TF = self.ffn.act_fn(gate_TF) * up_TF
        kept_TF = largest(h_TF.abs().float() * down_F, self.density)
        self.count(*kept, kept_TF)
        return torch.where(kept_TF, h_TF, 0)


@dataclass(frozen=True, kw_only=True)
class Wina(Sparsity):
    """The share of largest `|x_i| ‖W_:,i‖` of every token, for each matrix; nothing is learnt from text.

    The paper first turns some matrices so that their columns are orthogonal, spreads densities as TEAL does, and
    sparsifies attention too.
    """

    ffn_class: ClassVar[type[SparseFFN]] = WinaFFN

    @property
    def calibrated(self) -> bool:
        return False

    def fit(self, sample: LayerActivations, density: float) -> Tensors:
        return {}
