"""Routers that remember what the layers before chose, by one GRU across layers: RMoE's (arXiv 2408.06793, §3).

Shapes: T tokens, D hidden size, E routed experts, P width of the GRU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from .base import Gate, RoutedExperts
from .linear import Linear, LinearGate
from .selection.base import GateConfig


class RecurrentGate(LinearGate):
    """`x W.T + h_l R.T` with `h_l = GRU(x P.T, h_(l-1))`, the GRU one for all layers.

    RMoE's router has the second term only; with R = 0 at first, training starts from the converted model's.
    """

    trainable_names: ClassVar[tuple[str, ...]] = ("weight", "proj", "recurrent", "gru.")
    first_layer_names: ClassVar[tuple[str, ...]] = ("gru.",)

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        size = config.router_hidden_size
        self.proj = nn.Parameter(torch.zeros(size, config.hidden_size))
        self.recurrent = nn.Parameter(torch.zeros(config.num_experts, size))
        self.gru: nn.GRUCell | None = nn.GRUCell(size, size)
        self.before: tuple[RecurrentGate, ...] = ()
        self.state = torch.zeros(1, size)

    def connect(self, previous: Gate | None) -> None:
        if isinstance(previous, RecurrentGate):
            self.gru = None  # the first layer's serves all; a tuple keeps `before` from becoming a submodule
            self.before = (previous,)

    def cell(self) -> nn.GRUCell:
        """Find the GRU of all layers."""
        gate = self
        while gate.before:
            gate = gate.before[0]
        assert gate.gru is not None
        return gate.gru

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        cell = self.cell()
        x_TP = linear(hidden_TD.float(), self.proj.float())
        state_TP = self.before[0].state if self.before else torch.zeros_like(x_TP)
        parameters = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        self.state = torch.gru_cell(x_TP, state_TP, *(p.float() for p in parameters))
        return super().scores(hidden_TD, experts) + linear(self.state, self.recurrent.float())


@dataclass(frozen=True, kw_only=True)
class Recurrent(Linear):
    """The ridge regression of `linear`, with nothing remembered yet; `finetune --method rmoe` trains the GRU."""

    gate_class: ClassVar[type[Gate]] = RecurrentGate

    width: Annotated[int, Field(gt=0)] = 128
    """Width of the GRU's state (the paper's p)."""

    @property
    def router_hidden_size(self) -> int:
        return self.width
