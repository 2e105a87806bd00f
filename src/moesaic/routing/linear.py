"""Ridge regression onto each expert's true output norm: moesaic's own router for disjoint experts.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.activations import LayerActivations
from ..calibration.ridge import WeightedRidge
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class Linear(RouterBuilder):
    """`min_{W,b} sum_t w_t² ‖x_t W + b - n_t‖² + ridge ‖W‖²`, n the experts' output norms centred per token."""

    ridge: Annotated[float, Field(ge=0)] = 1e-2
    """Relative to the mean diagonal of the normal equations."""
    intercept: bool = True
    """Whether there is a b; of the native forms only glm4_moe has one."""

    @property
    def has_bias(self) -> bool:
        return self.intercept

    def build(self, sample: LayerActivations, partition: Partition, active: int) -> dict[str, Tensor]:
        target_TE = torch.cat(list(self._norms(sample, partition)))
        target_TE = target_TE - target_TE.mean(1, keepdim=True)
        ridge = WeightedRidge(sample.input_TD, sample.weight_T, self.ridge, self.intercept)
        weight_DE, bias_E = ridge.fit(target_TE)
        return {"weight": weight_DE.T.contiguous(), "e_score_correction_bias": bias_E}

    @staticmethod
    def _norms(sample: LayerActivations, partition: Partition):  # noqa: ANN205
        """‖h_e Wd_e‖ of each expert, [C, E] a chunk."""
        for _, h_CF in sample.chunks():
            yield torch.stack(
                [linear(h_CF[:, e], sample.ffn.down_DF[:, e]).float().norm(dim=1) for e in partition.experts], dim=1
            )
