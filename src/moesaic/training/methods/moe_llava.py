"""MoE-LLaVA's third stage (arXiv 2401.15947, §3.3): routers and experts learn, evenly used, and all else is frozen."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from ...models.families import decoder_layers
from ..parameters import learn, part
from .base import Balance, Method, learn_routers


@dataclass(frozen=True, kw_only=True)
class MoELLaVA(Method):
    """The blocks learn whole, attention, norms and embeddings not; with `α E sum_i F_i G_i`, α = 0.01, in each layer.

    Meant for `--partition upcycle`, whose router gives soft weights. A model that was cut into parts keeps its own
    router: there weights that sum to 1 would shrink the experts' sum, which weights of 1 make the dense FFN's.
    """

    learning_rate: ClassVar[float] = 1e-4
    router_learning_rate: ClassVar[float] = 1e-4
    balance: ClassVar[Balance] = "loss"

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        model.requires_grad_(False)
        learn(p for name, p in decoder_layers(model).named_parameters() if part(name) in ("shared", "routed"))
        learn_routers(model)
        return model
