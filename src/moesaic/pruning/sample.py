"""One layer's Mixture-of-Experts and the calibration tokens that reach it; what it does without some of its experts.

Shapes: T tokens, E routed experts, N experts that are kept, K slots for experts in a token, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..models.layerwise import BATCH_TOKENS
from ..models.moe_block import Decide, MoEBlock, Routing
from ..routing.base import Gate

Axes = Mapping[str, int]
"""By a parameter's name, its dimension that has one entry an expert."""


@dataclass(frozen=True)
class BlockSample:
    """What a pruning method sees of a layer."""

    block: MoEBlock
    """With all experts."""
    input_TD: Tensor
    """What enters the router and the experts, on the path of pruned layers."""
    axes: Axes
    """Of the router's parameters."""
    groups: int = 1
    """Groups of the router, each of which keeps as many experts."""

    @property
    def num_experts(self) -> int:
        """Routed experts of the source."""
        return self.block.num_experts

    def weights(self, kept_N: Tensor | None = None) -> Tensor:
        """Compute the factor on each expert's output, float32 [T, E], 0 where it does not run.

        With `kept_N` the router has no other experts.
        """
        decide = self.block.route if kept_N is None else self.masked(kept_N)
        return torch.cat([decide(x_TD).weights_of_all(self.num_experts) for x_TD in self.input_TD.split(BATCH_TOKENS)])

    def output(self, expert: int, token: Tensor) -> Tensor:
        """Compute what one expert says to some of the tokens, without the router's factor."""
        x_TD = self.input_TD[token]
        if not len(x_TD):
            return x_TD
        index_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        return self.block.experts(x_TD, index_T1, torch.ones_like(index_T1, dtype=x_TD.dtype))

    def expert_tokens(self) -> Tensor:
        """Count the tokens that run each expert, int64 [E] on the CPU."""
        return (self.weights() != 0).sum(0).cpu()

    def logits(self) -> Tensor:
        """Compute the router's logits, or the scores of moesaic's own, float32 [T, E]."""
        router = self.block.router
        if isinstance(router, Gate):
            return router.exact_scores(self.input_TD, self.block.experts)  # pyrefly: ignore[bad-argument-type]
        return torch.cat([router(x_TD)[0].float() for x_TD in self.input_TD.split(BATCH_TOKENS)])

    def router_rows(self) -> Tensor:
        """Read what the router has for each expert in its matrices, float32 [E, X]."""
        named = dict(self.block.router.named_parameters())
        rows = [named[name].movedim(axis, 0).float() for name, axis in self.axes.items() if named.get(name) is not None
                and named[name].ndim > 1]  # fmt: skip
        return torch.cat([row.flatten(1) for row in rows], dim=1)

    def subsample(self, tokens: int, generator: torch.Generator) -> BlockSample:
        """Take at most `tokens` of the tokens, drawn without replacement."""
        if tokens >= len(self.input_TD):
            return self
        pick = torch.randperm(len(self.input_TD), generator=generator)[:tokens].sort().values
        return replace(self, input_TD=self.input_TD[pick.to(self.input_TD.device)])

    def masked(self, kept_N: Tensor) -> Decide:
        """Make the decision of the router without the other experts, by the source's numbers."""
        block = replace(self.block, router=cut(self.block.router, kept_N, self.axes))
        none = torch.tensor([self.num_experts])
        number_N = torch.cat([kept_N.cpu(), none]).to(self.input_TD.device)

        def decide(hidden_TD: Tensor) -> Routing:
            index_TK, weight_TK = block.route(hidden_TD)
            return Routing(number_N[index_TK], weight_TK)

        return decide


@torch.no_grad()
def cut(router: nn.Module, kept_N: Tensor, axes: Axes) -> nn.Module:
    """Copy a router and leave some of its experts out."""
    made = copy.deepcopy(router)
    for name, axis in axes.items():
        holder, _, own = name.rpartition(".")
        module = made.get_submodule(holder)
        old = getattr(module, own)
        new = old.data.index_select(axis, kept_N.to(old.device))
        setattr(module, own, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    made.num_experts = len(kept_N)  # pyrefly: ignore[bad-argument-type]
    return made
