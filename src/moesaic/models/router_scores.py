"""How the router of any stock Mixture-of-Experts makes weights of its logits, found by asking it.

Shapes: T tokens, D hidden size, E routed experts, N ranks of experts, K experts that the router takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .moe_block import MoEBlock, Routing, read_routing, routing_groups

PROBE_TOKENS, TOLERANCE, SMALLEST = 64, 0.02, 1e-6
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}


class RankedExperts(NamedTuple):
    """The experts of each token, best first."""

    index_TN: Tensor
    """int64."""
    scores_TN: Tensor
    """What they are ranked by, float32."""
    shares_TN: Tensor
    """Their weights before they are renormalised, float32."""


@dataclass(frozen=True)
class RouterScores:
    """How a router's weights follow from its logits: `scale × f(logits)`, renormalised over the chosen or not."""

    function: Callable[[Tensor], Tensor]
    renormalised: bool
    scale: float
    bias_E: Tensor | None
    """What is added for the choice only."""
    own_only: bool
    """Whether experts that the router does not take cannot be weighed: it takes them in groups, or has its own rule."""

    def rank(self, output: tuple[Tensor, ...]) -> RankedExperts:
        """Rank experts by a router's output, best first: all, or the router's own where others cannot be weighed."""
        share_TE = self.function(router_logits(output).float())
        score_TE = share_TE if self.bias_E is None else share_TE + self.bias_E.float()
        if self.own_only:
            index_TK, weights_TK = read_routing(output)
            scores_TK = score_TE.gather(-1, index_TK)
            order_TK = scores_TK.argsort(-1, descending=True)
            return RankedExperts(*(part.gather(-1, order_TK) for part in (index_TK, scores_TK, weights_TK.float())))
        scores_TN, index_TN = score_TE.sort(-1, descending=True)
        return RankedExperts(index_TN, scores_TN, share_TE.gather(-1, index_TN) * self.scale)

    def weigh(self, shares_TN: Tensor, keep_TK: Tensor) -> Tensor:
        """Weigh the first K ranks as the router would if it took those alone, times `keep`, float32 [T, K]."""
        kept_TK = shares_TN[:, : keep_TK.shape[1]] * keep_TK
        if not self.renormalised:
            return kept_TK
        total = shares_TN.sum(-1, keepdim=True) if self.own_only else self.scale
        # where none runs, the first one's weight keeps the gradient finite
        return kept_TK * (total / kept_TK.sum(-1, keepdim=True).clamp(min=shares_TN[:, :1]))


def router_logits(output: tuple[Tensor, ...]) -> Tensor:
    """Take the logits of all experts, [T, E], from a stock router's output."""
    return output[0] if len(output) == 3 else output[1]


@torch.no_grad()
def router_scores(block: MoEBlock) -> RouterScores:
    """Find out how a stock router makes weights of its logits, by random tokens.

    A router that none of `FUNCTIONS` explains keeps the weights that it gives to its own experts.
    """
    router = block.router
    weight = next(router.parameters())
    x_TD = torch.randn(PROBE_TOKENS, block.hidden_size, generator=torch.Generator().manual_seed(0))
    output = router.forward(x_TD.to(weight.device, weight.dtype))  # as it is, whatever rule is attached to it
    index_TK, weights_TK = read_routing(output)
    bias_E = getattr(router, "e_score_correction_bias", None)
    grouped = routing_groups(router) > 1
    for function in FUNCTIONS.values():
        share_TK = function(router_logits(output).float()).gather(-1, index_TK)
        for renormalised in (True, False) if block.num_experts_per_tok > 1 else (False, True):
            expected_TK = share_TK / share_TK.sum(-1, keepdim=True) if renormalised else share_TK
            seen_TK = expected_TK > SMALLEST
            ratio = weights_TK.float()[seen_TK] / expected_TK[seen_TK]
            scale = float(ratio.median())
            if scale > 0 and (ratio / scale - 1).abs().max() < TOLERANCE:
                return RouterScores(function, renormalised, _rounded(scale), bias_E, grouped)
    return RouterScores(FUNCTIONS["softmax"], block.norm_topk_prob(), 1.0, bias_E, own_only=True)


def _rounded(scale: float) -> float:
    """Take a scale that is 1 but for rounding as 1."""
    return 1.0 if abs(scale - 1) < TOLERANCE else scale


def keep_default(own: Routing, ours: Routing, default_T: Tensor, num_experts: int) -> Routing:
    """Give the tokens of `default_T` the router's own decision, bit by bit, and the others ours."""
    if bool(default_T.all()):
        return own
    if not bool(default_T.any()):
        return ours
    width = max(own.top_k_index.shape[1], ours.top_k_index.shape[1])
    index, weights = own.top_k_index, own.top_k_weights
    wide_index = pad(index, (0, width - index.shape[1]), value=num_experts)
    wide_weights = pad(weights, (0, width - weights.shape[1]))
    our_index = pad(ours.top_k_index, (0, width - ours.top_k_index.shape[1]), value=num_experts)
    our_weights = pad(ours.top_k_weights, (0, width - ours.top_k_weights.shape[1]))
    rows = default_T[:, None]
    return Routing(wide_index.where(rows, our_index), wide_weights.where(rows, our_weights.to(weights.dtype)))
