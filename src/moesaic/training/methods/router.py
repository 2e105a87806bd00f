"""Only the routers learn; all weights of the dense model stay as the conversion left them."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .base import Method, learn_routers


@dataclass(frozen=True, kw_only=True)
class Router(Method):
    """Routers by the straight-through gradient of the objective."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        model.requires_grad_(False)
        learn_routers(model)
        return model
