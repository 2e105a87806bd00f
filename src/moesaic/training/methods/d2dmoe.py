"""D2DMoE (arXiv 2310.04361): routers predict each expert's output norm, and all near the largest run."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...moe.block import MoE
from .base import DenseFFN, Method, learn_routers, replace_gates


@dataclass(frozen=True, kw_only=True)
class D2DMoE(Method):
    """`|MLP(x)| ≈ ‖E_i(x)‖` by squared error; expert i runs where its prediction reaches `threshold` x the largest.

    Of the paper's steps this is the routers' training; the sparsity tuning before it is not done.
    """

    router_learning_rate: ClassVar[float] = 1e-3
    dynamic_top_k: ClassVar[bool] = True
    uses_objective: ClassVar[bool] = False

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The paper's τ: fewer experts run as it rises; 0 runs all."""
    width: Annotated[int, Field(gt=0)] = 512
    """Neurons of each router's hidden layer."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        model.requires_grad_(False)
        replace_gates(model, "norm", selection=f"relative:threshold={self.threshold}", router_hidden_size=self.width)
        learn_routers(model)
        return model

    def layer_loss(self, moe: MoE, x_TD: Tensor, index_TK: Tensor, dense: DenseFFN | None) -> Tensor | None:
        gate, experts = moe.routed
        x_TD = x_TD.detach()
        with torch.no_grad():
            norm_TE = experts.output_norms(x_TD)
        return (gate.exact_scores(x_TD, experts) - norm_TE).square().mean(-1).sum()
