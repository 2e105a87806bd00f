"""DSMoE (arXiv 2502.12455): each expert opens by its own sigmoid, and a loss keeps few of them open.

Meant for `--partition contiguous` without a shared expert, and works with any disjoint one.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...moe.block import MoE
from .base import DenseFFN, replace_gates
from .full import Full


@dataclass(frozen=True, kw_only=True)
class DSMoE(Full):
    """`sum_i o_i G(sigmoid(x Y_i)) E / #open`, `G(z) = z if z > threshold else 0`, straight-through; loss `mean G`."""

    learning_rate: ClassVar[float] = 2e-5
    dynamic_top_k: ClassVar[bool] = True

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Sigmoid above which an expert opens."""
    sparsity: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the sparsity loss, in nats a token, over layers and experts alike (the paper's has 1)."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        replace_gates(model, "sigmoid", selection=f"threshold:threshold={self.threshold}")
        return super().prepare(model)

    def layer_loss(self, moe: MoE, x_TD: Tensor, index_TK: Tensor, dense: DenseFFN | None) -> Tensor | None:
        gate, experts = moe.routed
        z_TE = gate.exact_scores(x_TD, experts)
        return self.sparsity * (z_TE * (z_TE > self.threshold)).mean(-1).sum()
