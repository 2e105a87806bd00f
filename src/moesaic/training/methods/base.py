"""The contract of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import registry
from ...errors import InputError
from ...moe.ahead import drop_network, network_of
from ...moe.block import MoE
from ...moe.modeling import connect_gates, moe_blocks
from ...routing.base import Gate, Router, make_gate
from ..parameters import learn
from ..schedule import schedule


class RouterStep(NamedTuple):
    """What a step of a router alone gives."""

    loss: Tensor
    """Summed over tokens, nats."""
    chosen: list[Tensor]
    """By layer, the experts of each token, [T, K]."""


DenseFFN = Callable[[Tensor], Tensor]
Balance = Literal["none", "bias", "loss"]
"""How experts' load is evened out."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Says what learns; hyper-parameters are its fields."""

    learning_rate: ClassVar[float] = 1e-4
    """Learning rate of all but the routers, when none is asked for."""
    router_learning_rate: ClassVar[float] = 1e-4
    balance: ClassVar[Balance] = "none"
    """How the experts' load is evened out, when nothing is asked for."""
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
    alternates: ClassVar[bool] = False
    """Whether a router ahead of the model and all else learn in turn (`router_step`), in one process."""

    @property
    def has_layer_loss(self) -> bool:
        """Whether it has a loss of each layer's own."""
        return type(self).layer_loss is not Method.layer_loss

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Set `requires_grad`, replace gates, add adapters; returns what is trained, with the model in it."""

    def layer_loss(self, moe: MoE, x_TD: Tensor, index_TK: Tensor, dense: DenseFFN | None) -> Tensor | None:
        """Compute a loss of one layer, summed over the tokens x [T, D] that enter it, nats; None if there is none."""
        return None

    def rate(self, progress: float, warmup: float) -> float:
        """Compute the learning rate's factor where such a share of the training is over."""
        return schedule(progress, warmup)

    def router_alone(self, progress: float) -> bool:
        """Tell whether only the router learns where such a share of the training is over."""
        return False

    def router_step(
        self, model: PreTrainedModel, tokens_ML: Tensor, dense: PreTrainedModel, locality: float
    ) -> RouterStep:
        """Compute the router's own loss on some sequences, for a method that alternates.

        Args:
            model: what is trained.
            tokens_ML: sequences.
            dense: the teacher.
            locality: weight of the divergence from the token before's experts.
        """
        raise AssertionError("a method that alternates defines its router's loss")

    def finish(self, module: nn.Module) -> PreTrainedModel:
        """Take out what training added and return the model, in the dtypes that training used."""
        return module  # pyrefly: ignore[bad-return]


def learn_routers(model: PreTrainedModel) -> None:
    """Let every gate learn what its kind may, and a router ahead of the model all it has."""
    for block in moe_blocks(model):
        if block.gate is not None:
            names = (*block.gate.trainable_names, "selection_parameters.")
            learn(p for name, p in block.gate.named_parameters() if name.startswith(names))
    network = network_of(model)
    if network is not None:
        learn(network.parameters())


def check_parts(model: PreTrainedModel, why: str) -> None:
    """Check that a model's experts are parts of an FFN, for a method that works with no others.

    Raises:
        InputError: they are whole FFNs.
    """
    name: str = model.config.get_text_config().router
    router: type[Router] = registry.method_class("router", name, imported_only=True)
    if router.averages:
        raise InputError(
            f"this model's experts are whole FFNs that router '{name}' averages, and this method is for parts of one: "
            f"{why}; take --method moe-llava, lora, full or router"
        )


def replace_gates(model: PreTrainedModel, router: str, **fields: object) -> None:
    """Give every block the gate of another router; what the old one has of the same name and shape goes along.

    Args:
        model: in moesaic's own format; its configuration is told.
        router: its name.
        fields: of the configuration, such as `selection`.

    Raises:
        InputError: experts are whole FFNs, and no other router averages them.
    """
    check_parts(model, f"router '{router}', which it trains, adds experts up")
    drop_network(model)
    config = model.config.get_text_config()
    config.update({"router": router, **fields})
    for block in moe_blocks(model):
        if block.gate is not None:
            with torch.device(block.gate.e_score_correction_bias.device):
                block.gate = _successor(block.gate, make_gate(config))  # pyrefly: ignore[bad-argument-type]
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
