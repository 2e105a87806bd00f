"""Prefer experts that are in the fast tier: cache-conditional experts (Qualcomm, arXiv 2412.00099, §3.3).

Nothing is trained. What runs is no longer what the router would have chosen, so texts change: this is the one option of
the store that trades quality for speed.

Shapes: T tokens, E routed experts, N ranks of experts in a token's order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.moe_block import find_blocks, write_routing
from ..moe.adaptive import BlockRanker, Decision
from ..moe.ahead import network_of
from ..routing.selection.base import Ranking
from .store import ExpertStore


def prefer(ranking: Ranking, resident_E: Tensor, bias: float) -> Tensor:
    """Order a token's experts anew, those that are resident being lifted by a share of the range of its levels.

    `argsort(level + bias × (level of the first - level of the last) × resident)`; the first one stays the first.

    Args:
        ranking: the router's.
        resident_E: which experts are in the fast tier, bool.
        bias: 0 changes nothing, 1 puts every resident expert before all others but the first.

    Returns:
        The ranks in their new order, int64 [T, N].
    """
    level_TN = ranking.levels_TN
    range_T1 = level_TN[:, :1] - level_TN[:, -1:]
    lifted_TN = level_TN + bias * range_T1 * resident_E[ranking.index_TN]
    lifted_TN[:, 0] = torch.inf
    return lifted_TN.argsort(dim=-1, descending=True, stable=True)


def prefer_resident(model: PreTrainedModel, store: ExpertStore, bias: float) -> None:
    """Have a model's routers prefer experts that are in the fast tier, as long as the model lives.

    Raises:
        InputError: routers whose other experts cannot be weighed, as those that choose groups of experts first, a
            number of experts that varies by token, or a router ahead of the model.
    """
    if network_of(model) is not None:
        raise InputError(
            f"--cache-bias {bias}: this model is routed ahead of its layers, when nobody knows what will be in memory; "
            "leave it out"
        )
    for layer, block in enumerate(find_blocks(model)):
        ranker = BlockRanker(block)
        if ranker.ranks < block.num_experts:
            raise InputError(
                f"--cache-bias {bias}: {type(block.router).__name__} takes its experts in groups or by a rule of its "
                "own, so that others have no weight; leave it out"
            )
        if getattr(getattr(block.router, "selection", None), "dynamic_top_k", False):
            raise InputError(
                f"--cache-bias {bias}: how many experts run varies by token in this model, and the two do not go "
                "together; leave it out"
            )
        block.router.register_forward_hook(_hook(ranker, store, layer, bias))
    store.cache_bias = bias


def _hook(ranker: BlockRanker, store: ExpertStore, layer: int, bias: float) -> Callable[..., tuple[Tensor, ...]]:
    chosen = ranker.block.num_experts_per_tok

    def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_TD = inputs[0].flatten(0, -2)
        resident_E = torch.zeros(ranker.block.num_experts, dtype=torch.bool, device=hidden_TD.device)
        resident_E[store.resident(layer)] = True
        ranked = ranker.rank(hidden_TD, output, lambda ranking: prefer(ranking, resident_E, bias))
        count_T = torch.full((len(hidden_TD),), chosen, device=hidden_TD.device)
        return write_routing(ranked.route(Decision(count_T)), output)

    return hook
