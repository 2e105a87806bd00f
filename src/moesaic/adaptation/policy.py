"""A selection that is being trained: its parameters in each layer, and what it decides while it learns.

Shapes: T tokens, D hidden size, N ranks of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..moe.adaptive import BlockRanker, DecideCount, Decision, decided_by, moe_blocks_of
from ..routing.selection.base import Counting, Parameters, Ranking


@dataclass
class Policy:
    """A selection at work in a frozen model."""

    model: PreTrainedModel
    rankers: list[BlockRanker]
    selection: Counting
    parameters: list[dict[str, nn.Parameter]]
    """Of each block, float32."""

    @property
    def default(self) -> int:
        """Routed experts that the model takes for a token by itself, the most of all layers."""
        return max(ranker.block.num_experts_per_tok for ranker in self.rankers)

    def named(self) -> dict[str, nn.Parameter]:
        """Name all parameters as an adapter does."""
        return {
            f"layers.{number}.{name}": parameter
            for number, values in enumerate(self.parameters)
            for name, parameter in values.items()
        }

    def values(self) -> list[Parameters]:
        """Copy the parameters, of each block."""
        return [{name: p.detach().clone() for name, p in values.items()} for values in self.parameters]

    @torch.no_grad()
    def put(self, values: Sequence[Parameters]) -> None:
        """Put parameters back."""
        for own, given in zip(self.parameters, values, strict=True):
            for name, parameter in own.items():
                parameter.copy_(given[name])

    def logits(self, tokens_NL: Tensor, decide: DecideCount | None) -> Tensor:
        """Compute logits [N, L, V] where `decide` says how many experts run; None: the model's own number."""
        if decide is None:
            return self.model(input_ids=tokens_NL, use_cache=False).logits
        with decided_by(self.rankers, decide):
            return self.model(input_ids=tokens_NL, use_cache=False).logits

    def watch(self, see: Callable[[int, Ranking, Tensor], None]) -> DecideCount:
        """Show `see` each layer's ranking and hidden states [T, D], while the model's own number of experts runs."""

        def decide(number: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
            see(number, ranking, hidden_TD)
            default = self.rankers[number].block.num_experts_per_tok
            return Decision(torch.full((len(hidden_TD),), default, device=hidden_TD.device))

        return decide


def make_policy(model: PreTrainedModel, selection: Counting) -> Policy:
    """Freeze a model and put a selection, as it starts, beside it."""
    model.requires_grad_(False).eval()
    blocks = moe_blocks_of(model)
    parameters = [
        {
            name: nn.Parameter(
                value.float().to(next(block.router.parameters()).device), requires_grad=value.is_floating_point()
            )
            for name, value in selection.parameters(block).items()
        }
        for block in blocks
    ]
    return Policy(model, [BlockRanker(block) for block in blocks], selection, parameters)
