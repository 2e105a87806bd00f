"""Ridge regression onto each expert's true output norm: moesaic's own router for disjoint experts.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.sample import CHUNK_TOKENS, LayerSample
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

    def build(self, sample: LayerSample, partition: Partition, active: int) -> dict[str, Tensor]:
        target_TE = torch.cat(list(self._norms(sample, partition)))
        target_TE = target_TE - target_TE.mean(1, keepdim=True)
        weight_DE, bias_E = weighted_ridge(sample.input_TD, target_TE, sample.weight_T, self.ridge, self.intercept)
        return {"weight": weight_DE.T.contiguous(), "e_score_correction_bias": bias_E}

    @staticmethod
    def _norms(sample: LayerSample, partition: Partition):  # noqa: ANN205
        """‖h_e Wd_e‖ of each expert, [C, E] a chunk."""
        for _, h_CF in sample.chunks():
            yield torch.stack(
                [linear(h_CF[:, e], sample.ffn.down_DF[:, e]).float().norm(dim=1) for e in partition.experts], dim=1
            )


def weighted_ridge(
    x_TD: Tensor, target_TE: Tensor, weight_T: Tensor, ridge: float, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """(W [D, E], b [E]) of the least squares weighted by `weight_T²`; the intercept b is not penalised, or 0.

    Summed over chunks of tokens, in float32 each and float64 together.
    """
    chunks = list(zip(*(v.split(CHUNK_TOKENS) for v in (x_TD, target_TE, weight_T)), strict=True))
    share = intercept / weight_T.double().square().sum()
    mean_x = torch.stack([w_C.double().square() * share @ x_CD.double() for x_CD, _, w_C in chunks]).sum(0)
    mean_y = torch.stack([w_C.double().square() * share @ y_CE.double() for _, y_CE, w_C in chunks]).sum(0)
    gram_DD, right_DE = (torch.zeros(len(mean_x), len(m), device=m.device, dtype=m.dtype) for m in (mean_x, mean_y))
    for x_CD, y_CE, w_C in chunks:
        scaled_CD = (x_CD - mean_x).float() * w_C[:, None]
        gram_DD += scaled_CD.T @ scaled_CD
        right_DE += scaled_CD.T @ ((y_CE - mean_y).float() * w_C[:, None])
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
    weight_DE = torch.linalg.solve(gram_DD, right_DE)
    return weight_DE.float(), (mean_y - mean_x @ weight_DE).float()
