"""The contract of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...moe.block import MoE
from ...moe.modeling import connect_gates, moe_blocks
from ...routing.base import Gate, make_gate
from ..parameters import learn

DenseFFN = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Says what learns; hyper-parameters are its fields."""

    learning_rate: ClassVar[float] = 1e-4
    """Of all but routers, when none is asked for."""
    router_learning_rate: ClassVar[float] = 1e-4
    needs_dense: ClassVar[bool] = False
    """Whether `layer_loss` looks at the teacher's FFNs."""

    copies_experts: ClassVar[bool] = False
    """Whether a second copy of the routed experts is in memory while a step runs."""
    dynamic_top_k: ClassVar[bool] = False
    """Whether the number of experts varies by token."""
    uses_objective: ClassVar[bool] = True
    """Whether the objective's gradient reaches what learns; where only `layer_loss` does, DDP would not see it."""
    shards: ClassVar[bool] = True
    """Whether parameters can be cut over processes."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Set `requires_grad`, replace gates, add adapters; returns what is trained, with the model in it."""

    def layer_loss(self, moe: MoE, x_TD: Tensor, index_TK: Tensor, dense: DenseFFN | None) -> Tensor | None:
        """Compute a loss of one layer, summed over the tokens x [T, D] that enter it, nats; None if there is none."""
        return None

    def finish(self, module: nn.Module) -> PreTrainedModel:
        """Take out what training added and return the model, in the dtypes that training used."""
        return module  # pyrefly: ignore[bad-return]


def learn_routers(model: PreTrainedModel) -> None:
    """Let every gate learn what its kind may."""
    for block in moe_blocks(model):
        if block.gate is not None:
            names = (*block.gate.trainable_names, "selection_parameters.")
            learn(p for name, p in block.gate.named_parameters() if name.startswith(names))


def replace_gates(model: PreTrainedModel, router: str, **fields: object) -> None:
    """Give every block the gate of another router; what the old one has of the same name and shape goes along.

    Args:
        model: in moesaic's own format; its configuration is told.
        router: its name.
        fields: of the configuration, such as `selection`.
    """
    model.config.update({"router": router, **fields})
    for block in moe_blocks(model):
        if block.gate is not None:
            with torch.device(block.gate.e_score_correction_bias.device):
                block.gate = _successor(block.gate, make_gate(model.config))  # pyrefly: ignore[bad-argument-type]
    connect_gates(model)


@torch.no_grad()
def _successor(old: Gate, new: Gate) -> Gate:
    kept = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in kept and kept[name].shape == parameter.shape:
            parameter.copy_(kept[name])
        elif name != "recurrent" and parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, device="cpu") / parameter.shape[1] ** 0.5)
    return new
