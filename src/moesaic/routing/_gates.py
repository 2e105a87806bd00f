"""Gates: modules that score the experts for each token and pick those to run. One class a kind.

Shapes: T tokens, D hidden size, E routed experts, K active experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu

if TYPE_CHECKING:
    from ..moe.block import Experts


class GateConfig(Protocol):
    """What a gate needs to know of a model's configuration."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    router_hidden_size: int
    router_threshold: float


class Gate(nn.Module):
    """Base: `top_k(scores + e_score_correction_bias)`; subclasses give the scores and, if not 1, the weights.

    The bias serves selection only (an intercept, or auxiliary-loss-free load balancing as in CMoE and DeepSeek-V3).
    """

    trainable_names: ClassVar[tuple[str, ...]] = ("weight",)
    """The parameters that training may change."""

    dynamic_top_k: ClassVar[bool] = False
    """Whether the number of chosen experts varies by token; what is left of the indices is E, with weight 0."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        """How much each expert matters to each token, shape [T, E], float32."""
        raise AssertionError("a gate defines its scores")

    def weights(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """The factors on the chosen experts' outputs, shape [T, K]: all 1.

        In training they are 1 with the gradient of the softmax (straight-through), or no gradient would reach a router.
        """
        ones_TK = scores_TE.new_ones(index_TK.shape, dtype=dtype)
        if not (self.training and torch.is_grad_enabled()):
            return ones_TK
        share_TK = scores_TE.softmax(-1).gather(-1, index_TK)
        return ones_TK + (share_TK - share_TK.detach()).to(dtype)

    def select(self, scores_TE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(expert indices [T, K] int64, weights [T, K]); an index of E stands for no expert."""
        index_TK = (scores_TE + self.e_score_correction_bias.float()).topk(self.num_experts_per_tok, dim=-1).indices
        return index_TK, self.weights(scores_TE, index_TK, dtype)

    def forward(self, hidden_TD: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
        """(expert indices [T, K] int64, weights [T, K] in the input's dtype)."""
        return self.select(self.exact_scores(hidden_TD, experts), hidden_TD.dtype)

    def exact_scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        """`scores` in float32 under autocast too."""
        if not torch.is_autocast_enabled(hidden_TD.device.type):  # entering it takes as long as a small product
            return self.scores(hidden_TD, experts)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return self.scores(hidden_TD, experts)

    def connect(self, previous: Gate | None) -> None:
        """Told the gate of the layer before, once the model is built; only a recurrent gate cares."""


class LinearGate(Gate):
    """`x W.T`: ridge routers and centroids."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return linear(hidden_TD.float(), self.weight.float())


class RepresentativeGate(Gate):
    """`|SiLU(x g.T) * (x u.T)|` of one representative neuron an expert (CMoE, arXiv 2502.04416, §3.3).

    The chosen experts are weighted by `1 + softmax(scores) * scale` with the learnable `scale` (CMoE's u) 0 at first.
    """

    trainable_names: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.up_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.scale = nn.Parameter(torch.zeros(config.num_experts))

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        x_TD = hidden_TD.float()
        return (silu(linear(x_TD, self.gate_proj.float())) * linear(x_TD, self.up_proj.float())).abs()

    def weights(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Tensor:
        return (1 + scores_TE.softmax(-1) * self.scale.float()).gather(-1, index_TK).to(dtype)


class MLPGate(Gate):
    """`tanh(x W1.T) W2.T`, a small network that predicts how much each expert will say (MoEfication)."""

    trainable_names: ClassVar[tuple[str, ...]] = ("hidden_proj", "weight")

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.hidden_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.num_experts))

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return linear(linear(hidden_TD.float(), self.hidden_proj.float()).tanh(), self.weight.float())


class OracleGate(Gate):
    """`‖h_e Wd_e‖`, the true norm of each expert's output: runs every expert, so it is for analysis only."""

    trainable_names: ClassVar[tuple[str, ...]] = ()

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return experts.output_norms(hidden_TD)


class SigmoidGate(LinearGate):
    """Experts with `z = sigmoid(x W.T) > threshold`, weighted by `z E / (number that run)` (DSMoE, 2502.12455, §3).

    In training all experts run, with the weight of those that should not 0 and the gradient of z (straight-through).
    """

    dynamic_top_k: ClassVar[bool] = True

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.threshold = config.router_threshold

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return super().scores(hidden_TD, experts).sigmoid()

    def select(self, scores_TE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        count = scores_TE.shape[-1]
        runs_TE = scores_TE > self.threshold
        weight_TE = scores_TE * runs_TE
        index_TE = torch.arange(count, device=scores_TE.device).expand_as(scores_TE)
        if self.training and torch.is_grad_enabled():
            weight_TE = weight_TE.detach() + scores_TE - scores_TE.detach()
        else:
            index_TE = index_TE.where(runs_TE, count)
        return index_TE, (weight_TE * count / runs_TE.sum(-1, keepdim=True).clamp(min=1)).to(dtype)


class NormGate(Gate):
    """`|relu(x W1.T) W2.T|` predicts experts' output norms; those run that reach `threshold` x the largest (D2DMoE)."""

    trainable_names: ClassVar[tuple[str, ...]] = ("hidden_proj", "weight")
    dynamic_top_k: ClassVar[bool] = True

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.threshold = config.router_threshold
        self.hidden_proj = nn.Parameter(torch.zeros(config.router_hidden_size, config.hidden_size))
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.router_hidden_size))

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return linear(relu(linear(hidden_TD.float(), self.hidden_proj.float())), self.weight.float()).abs()

    def select(self, scores_TE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        count = scores_TE.shape[-1]
        runs_TE = scores_TE >= self.threshold * scores_TE.amax(-1, keepdim=True)
        index_TE = torch.arange(count, device=scores_TE.device).where(runs_TE, count)
        return index_TE, runs_TE.to(dtype)


class RecurrentGate(LinearGate):
    """`x W.T + h_l R.T` with `h_l = GRU(x P.T, h_(l-1))`, the GRU one for all layers (RMoE, arXiv 2408.06793, §3).

    RMoE's router has the second term only; with R = 0 at first, training starts from the converted model's.
    """

    trainable_names: ClassVar[tuple[str, ...]] = ("weight", "proj", "recurrent", "gru.")

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
        """The GRU of all layers."""
        gate = self
        while gate.before:
            gate = gate.before[0]
        assert gate.gru is not None
        return gate.gru

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        cell = self.cell()
        x_TP = linear(hidden_TD.float(), self.proj.float())
        state_TP = self.before[0].state if self.before else torch.zeros_like(x_TP)
        parameters = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        self.state = torch.gru_cell(x_TP, state_TP, *(p.float() for p in parameters))
        return super().scores(hidden_TD, experts) + linear(self.state, self.recurrent.float())


GATES: dict[str, type[Gate]] = {
    "linear": LinearGate,
    "representative": RepresentativeGate,
    "mlp": MLPGate,
    "oracle": OracleGate,
    "sigmoid": SigmoidGate,
    "norm": NormGate,
    "recurrent": RecurrentGate,
}
