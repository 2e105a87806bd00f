"""Gates: modules that score the experts for each token and pick those to run. One class a kind.

Shapes: T tokens, D hidden size, E routed experts, K active experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from .moe import Experts


class GateConfig(Protocol):
    """What a gate needs to know of a model's configuration."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int


class Gate(nn.Module):
    """Base: `top_k(scores + e_score_correction_bias)`; subclasses give the scores and, if not 1, the weights.

    The bias serves selection only (an intercept, or auxiliary-loss-free load balancing as in CMoE and DeepSeek-V3).
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        """How much each expert matters to each token, shape [T, E], float32."""
        raise AssertionError("a gate defines its scores")

    def weights(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """The factors on the chosen experts' outputs, shape [T, K]: all 1."""
        return scores_TE.new_ones(index_TK.shape, dtype=dtype)

    def forward(self, hidden_TD: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
        """(expert indices [T, K] int64, weights [T, K] in the input's dtype)."""
        scores_TE = self.scores(hidden_TD, experts)
        index_TK = (scores_TE + self.e_score_correction_bias.float()).topk(self.num_experts_per_tok, dim=-1).indices
        return index_TK, self.weights(scores_TE, index_TK, hidden_TD.dtype)


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

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.hidden_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.num_experts))

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return linear(linear(hidden_TD.float(), self.hidden_proj.float()).tanh(), self.weight.float())


class OracleGate(Gate):
    """`‖h_e Wd_e‖`, the true norm of each expert's output: runs every expert, so it is for analysis only."""

    def scores(self, hidden_TD: Tensor, experts: Experts) -> Tensor:
        return experts.output_norms(hidden_TD)


GATES: dict[str, type[Gate]] = {
    "linear": LinearGate,
    "representative": RepresentativeGate,
    "mlp": MLPGate,
    "oracle": OracleGate,
}
