"""The contract of a router: how it scores experts (`Gate`), and how it is fitted to calibration tokens (`Router`).

Shapes: T tokens, D hidden size, E routed experts, K slots for experts in a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import registry
from ..calibration.activations import LayerActivations
from ..models.moe_block import Routing
from ..partition import Partition
from .selection.base import GateConfig, Selection


class RoutedExperts(Protocol):
    """What a gate may ask of the experts."""

    num_experts: int

    def output_norms(self, x_TD: Tensor) -> Tensor:
        """Compute `‖h_e Wd_e‖` of every expert, float32 [T, E]; runs all of them."""
        ...


class DenseConfig(Protocol):
    """What a router may ask of the dense model's configuration."""

    hidden_size: int
    num_hidden_layers: int


class Gate(nn.Module):
    """Scores the experts of one layer; the selection says which run. Saved as the block's `gate`.

    Subclasses give the scores and, if they are not 1, the weights. `e_score_correction_bias` serves the selection only
    (an intercept, or load balancing without a loss as in CMoE and DeepSeek-V3).
    """

    trainable_names: ClassVar[tuple[str, ...]] = ("weight",)
    """How the names of the parameters begin that training may change."""
    learns_by_objective: ClassVar[bool] = True
    """Whether a gradient of the model's own loss reaches it; if not, a method with a loss of each layer trains it."""
    first_layer_names: ClassVar[tuple[str, ...]] = ()
    """How the names of the parameters begin that the first layer has for all."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        self.selection: Selection = registry.build("selection", config.selection, imported_only=True)
        self.selection_parameters = nn.ParameterDict(dict(self.selection.parameters(config)))

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        """Score each expert for each token, [T, E] float32."""
        raise AssertionError("a gate defines its scores")

    def shares(self, scores_TE: Tensor) -> Tensor:
        """Say how much of each token goes to each expert, none negative: the softmax of the scores, [T, E]."""
        return scores_TE.softmax(-1)

    def weigh(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Routing:
        """Give the chosen experts their weights, [T, K]: 1.

        In training they are 1 with the gradient of the softmax (straight-through), or no gradient would reach a router.
        """
        dynamic = self.selection.dynamic_top_k
        weights_TK = (
            (index_TK < self.num_experts).to(dtype) if dynamic else scores_TE.new_ones(index_TK.shape, dtype=dtype)
        )
        if self.training and torch.is_grad_enabled():
            share_TK = gather(scores_TE.softmax(-1), index_TK, dynamic)
            weights_TK = weights_TK + (share_TK - share_TK.detach()).to(dtype)
        return Routing(index_TK, weights_TK)

    def rank_weights(self, shares_TK: Tensor) -> Tensor:
        """Weigh experts in use, [T, K], by their shares of the token if no others ran: 1."""
        return torch.ones_like(shares_TK)

    def forward(self, hidden_TD: Tensor, experts: RoutedExperts) -> Routing:
        """Choose and weigh experts for the tokens [T, D]; weights are in the tokens' dtype."""
        scores_TE = self.exact_scores(hidden_TD, experts)
        return self.weigh(scores_TE, self.selection.select(scores_TE, hidden_TD, self), hidden_TD.dtype)

    def fixed(self, index_TK: Tensor, dtype: torch.dtype) -> Routing:
        """Give experts that are decided already their weights, 1; an index of E stands for none."""
        return Routing(index_TK, (index_TK < self.num_experts).to(dtype))

    def exact_scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        """Compute `scores` in float32 under autocast too, [T, E]."""
        if not torch.is_autocast_enabled(hidden_TD.device.type):  # entering it takes as long as a small product
            return self.scores(hidden_TD, experts)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return self.scores(hidden_TD, experts)

    def connect(self, previous: Gate | None) -> None:
        """Keep the gate of the layer before, once the model is built; only a recurrent gate needs it."""


def gather(values_TE: Tensor, index_TK: Tensor, dynamic: bool) -> Tensor:
    """Gather the values of the chosen experts, [T, K]; with a dynamic selection 0 where there is none."""
    if not dynamic:
        return values_TE.gather(-1, index_TK)
    count = values_TE.shape[-1]
    return values_TE.gather(-1, index_TK.clamp(max=count - 1)) * (index_TK < count)


@dataclass(frozen=True, kw_only=True)
class Router(ABC):
    """A method that routes tokens to experts; hyper-parameters of its fit are its fields."""

    gate_class: ClassVar[type[Gate]]
    """What scores the experts in use."""
    scope: ClassVar[Literal["layer", "model"]] = "layer"
    """What one router decides for: its layer, or all layers of the model, ahead of them (Read-ME)."""
    default_selection: ClassVar[str] = "top-k"
    token_clusters: ClassVar[bool] = False
    """Whether it needs a partition made from clusters of tokens."""
    averages: ClassVar[bool] = False
    """Whether a token's weights are shares of 1, for experts that are whole FFNs, not 1 each, for parts of one."""
    runs_all_experts: ClassVar[bool] = False
    """Whether it looks at what all experts say, so that it saves nothing and is for analysis only."""

    @property
    def has_bias(self) -> bool:
        """Whether the gate adds a constant to each expert's score, which few architectures can say."""
        return False

    @property
    def router_hidden_size(self) -> int:
        """Width of what the gate has between the tokens and its scores, if it has a layer there."""
        return 128

    def model_fields(self, config: DenseConfig) -> dict[str, int]:
        """Say what the converted model's configuration holds of the router beside its name.

        Raises:
            InputError: a router that does not fit the model.
        """
        return {"router_hidden_size": self.router_hidden_size}

    @property
    def gate_name(self) -> str:
        """What `config.json` calls the gate: the router whose file has it, e.g. `linear` for `centroid`."""
        package, _, module = self.gate_class.__module__.rpartition(".")
        if package == registry.STAGES["router"].package:
            return module.replace("_", "-")
        return registry.spec_name(type(self))

    @abstractmethod
    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        """Fit the gate's parameters to calibration tokens.

        Args:
            sample: one layer's FFN and its calibration tokens.
            partition: the neurons of each expert.
            num_experts_per_tok: routed experts that run for one token.

        Returns:
            The parameters by name; others stay as the gate has them.
        """


def make_gate(config: GateConfig) -> Gate:
    """Make the gate that a configuration names.

    Raises:
        InputError: an unknown router, or one of a module that has not been imported.
    """
    router: type[Router] = registry.method_class("router", config.router, imported_only=True)
    return router.gate_class(config)


def unit_scores(parameters: dict[str, Tensor], x_TD: Tensor) -> dict[str, Tensor]:
    """Scale a linear gate's scores `x W.T + b` to mean 0 over the experts and a root mean square near 1.

    Its choices stay the same. So a format knows how far to scale them down; the factor is a power of two.

    Args:
        parameters: `weight` [E, D] and, if there is one, `e_score_correction_bias` [E].
        x_TD: the FFN's input.
    """
    weight_ED = parameters["weight"].float()
    bias_E = parameters.get("e_score_correction_bias", weight_ED.new_zeros(len(weight_ED))).float()
    weight_ED, bias_E = weight_ED - weight_ED.mean(0), bias_E - bias_E.mean()
    scale = linear(x_TD.float(), weight_ED, bias_E).square().mean().sqrt()
    factor = 2.0 ** -scale.log2().round().item() if scale > 0 else 1.0
    return {"weight": weight_ED * factor, "e_score_correction_bias": bias_E * factor}
