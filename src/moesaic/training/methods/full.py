"""Everything in the layers learns: attention, norms, shared and routed experts, routers. Embeddings and head do not."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from ...models.families import decoder_layers
from ..parameters import learn
from .base import Method, learn_routers


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Plain fine-tuning; takes 16 bytes a parameter beside the model."""

    learning_rate: ClassVar[float] = 2e-5

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        model.requires_grad_(False)
        learn(p for name, p in decoder_layers(model).named_parameters() if ".gate." not in name)
        learn_routers(model)
        return model
