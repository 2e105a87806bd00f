"""Low-rank adapters by PEFT on every projection, the recovery of CMoE (arXiv 2502.04416, §3.4; LoRA: 2106.09685)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from ...models.families import layers_prefix
from .base import Method, learn_routers

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """`W + alpha / rank B A` for attention, shared and each routed expert; routers learn whole."""

    learning_rate: ClassVar[float] = 5e-4
    copies_experts: ClassVar[bool] = True

    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of the adapters."""
    alpha: Annotated[int, Field(gt=0)] = 32
    """The adapters' product counts alpha / rank."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        from peft import LoraConfig, get_peft_model  # slow to import

        routed = bool(model.config.get_text_config().num_experts)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=linear_layers(model),
            target_parameters=EXPERTS if routed else None, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = get_peft_model(model, config)
        learn_routers(model)
        return adapted

    def finish(self, module: nn.Module) -> PreTrainedModel:
        return module.merge_and_unload()  # pyrefly: ignore[not-callable]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Name the linear layers of the decoder layers; those of a vision tower stay as they are."""
    prefix = layers_prefix(model)
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name.startswith(prefix)]
