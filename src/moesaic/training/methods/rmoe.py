"""RMoE (arXiv 2408.06793): routers that remember what the layers before chose, by one GRU across layers."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from .base import replace_gates
from .lora import Lora


@dataclass(frozen=True, kw_only=True)
class RMoE(Lora):
    """`scores = x W.T + h_l R.T`, `h_l = GRU(x P.T, h_(l-1))`, beside low-rank adapters on all projections."""

    shards: ClassVar[bool] = False  # the first layer's GRU would be cut again before the others have run

    width: Annotated[int, Field(gt=0)] = 128
    """Width of the GRU's state (the paper's p)."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        replace_gates(model, "recurrent", router_hidden_size=self.width)
        return super().prepare(model)
