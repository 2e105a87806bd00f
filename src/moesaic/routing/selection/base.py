"""The contract of a selection.

Shapes: T tokens, D hidden size, E routed experts, K slots for experts in a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn


class GateConfig(Protocol):
    """What a gate needs to know of a model's configuration."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    router: str
    router_hidden_size: int
    selection: str


class ScoringGate(Protocol):
    """What a selection may ask of the gate that it belongs to."""

    num_experts_per_tok: int
    e_score_correction_bias: nn.Parameter
    selection_parameters: nn.ParameterDict
    """What `Selection.parameters` made, if anything."""


@dataclass(frozen=True, kw_only=True)
class Selection(ABC):
    """A rule that says which and how many experts run; hyper-parameters are its fields."""

    dynamic_top_k: ClassVar[bool] = False
    """Whether the number of experts varies by token; slots that are not used have the index E."""

    @abstractmethod
    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        """Choose experts, int64 [T, K], by their scores (float32) and, for a rule that learns, by the tokens."""

    def parameters(self, config: GateConfig) -> Mapping[str, Tensor]:
        """Make what the rule learns, by name, as it is at first; found again in `gate.selection_parameters`."""
        return {}


def where_runs(runs_TE: Tensor) -> Tensor:
    """Write a mask as indices: e where expert e runs, E where it does not, int64 [T, E]."""
    count = runs_TE.shape[-1]
    return torch.arange(count, device=runs_TE.device).where(runs_TE, count)
