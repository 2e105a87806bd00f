"""Any Mixture-of-Experts with a number of experts that varies by token: stock or ours, its weights untouched.

Shapes: T tokens, D hidden size, E routed experts, N ranks of experts in a token's order, K slots for a token's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..errors import InputError
from ..models.modality import tell_modality
from ..models.moe_block import MoEBlock, Routing, find_blocks, read_routing, write_routing
from ..models.router_scores import RouterScores, keep_default, router_scores
from ..routing.base import Gate
from ..routing.selection.base import Counting, Parameters, Ranking, first_ranks, rank
from .block import SKIPPING

EMPTY = "may_have_empty_slots"
"""The attribute of experts that `moe/kernels.py` reads."""


ATTACHED = "attached_selection"
"""The attribute of a model that holds the selection at work in it."""


class Decision(NamedTuple):
    """How many experts run for each token."""

    count_T: Tensor
    """int64."""
    keep_TN: Tensor | None = None
    """Factors on the ranks' weights, which may carry a gradient; None: 1 for those that run."""


DecideCount = Callable[[int, Ranking, Tensor], Decision]
"""Called with the number of the block among the model's blocks, its tokens' ranking, and what enters it [T, D]."""


class Ranked(NamedTuple):
    """A router's ranking, and what makes a routing of it."""

    ranking: Ranking
    route: Callable[[Decision], Routing]


class BlockRanker:
    """Ranks the experts of one block, and weighs those that run as its router would."""

    def __init__(self, block: MoEBlock) -> None:
        self.block = block
        self.scores: RouterScores | None = None if isinstance(block.router, Gate) else router_scores(block)

    @property
    def ranks(self) -> int:
        """How many experts can run for a token."""
        own_only = self.scores is not None and self.scores.own_only
        return self.block.num_experts_per_tok if own_only else self.block.num_experts

    def weights(self, ranking: Ranking, count: int) -> Tensor:
        """Weigh the first `count` ranks as the router would if it took no others, float32 [T, count]."""
        shares_TN = ranking.shares_TN.float()
        router = self.block.router
        if isinstance(router, Gate):
            return router.rank_weights(shares_TN[:, :count])
        assert self.scores is not None
        return self.scores.weigh(shares_TN, torch.ones_like(shares_TN[:, :count]))

    def rank(
        self, hidden_TD: Tensor, output: tuple[Tensor, ...], reorder: Callable[[Ranking], Tensor] | None = None
    ) -> Ranked:
        """Rank experts for the tokens that enter the router.

        Args:
            hidden_TD: the tokens.
            output: the router's.
            reorder: gives the ranks in the order in which experts are to run, int64 [T, N]; None: the router's.
        """
        if self.scores is None:
            return self._ours(hidden_TD, reorder)
        return self._stock(self.scores, output, reorder)

    def _ours(self, hidden_TD: Tensor, reorder: Callable[[Ranking], Tensor] | None) -> Ranked:
        gate, experts = self.block.router, self.block.experts
        assert isinstance(gate, Gate)
        scores_TE = gate.exact_scores(hidden_TD, experts)  # pyrefly: ignore[bad-argument-type]
        ranking = _reordered(rank(scores_TE, gate), reorder)

        def route(decision: Decision) -> Routing:
            index_TK = first_ranks(ranking.index_TN, decision.count_T, self.block.num_experts)
            _, weights_TK = gate.weigh(scores_TE, index_TK, hidden_TD.dtype)
            weights_TK = weights_TK * (index_TK < self.block.num_experts)
            if decision.keep_TN is not None:
                weights_TK = weights_TK * decision.keep_TN[:, : index_TK.shape[1]].to(weights_TK.dtype)
            return Routing(index_TK, weights_TK)

        return Ranked(ranking, route)

    def _stock(
        self, scores: RouterScores, output: tuple[Tensor, ...], reorder: Callable[[Ranking], Tensor] | None
    ) -> Ranked:
        own = read_routing(output)
        ranking = _reordered(Ranking(**scores.rank(output)._asdict(), logarithmic=scores.bias_E is None), reorder)

        def route(decision: Decision) -> Routing:
            index_TK = first_ranks(ranking.index_TN, decision.count_T, self.block.num_experts)
            slots = index_TK.shape[1]
            runs_TK = (index_TK < self.block.num_experts).float()
            keep_TK = runs_TK if decision.keep_TN is None else decision.keep_TN[:, :slots] * runs_TK
            weights_TK = scores.weigh(ranking.shares_TN, keep_TK)
            ours = Routing(index_TK, weights_TK.to(own.top_k_weights.dtype))
            if decision.keep_TN is not None or reorder is not None:
                return ours
            return keep_default(own, ours, decision.count_T == own.top_k_index.shape[1], self.block.num_experts)

        return Ranked(ranking, route)


def _reordered(ranking: Ranking, reorder: Callable[[Ranking], Tensor] | None) -> Ranking:
    if reorder is None:
        return ranking
    order_TN = reorder(ranking)
    return ranking.each(lambda part: part.gather(1, order_TN))


def moe_blocks_of(model: PreTrainedModel) -> list[MoEBlock]:
    """Find a model's Mixture-of-Experts blocks.

    Raises:
        InputError: it has none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise InputError(
            f"'{model.config.model_type}' is dense: there are no experts to choose from; convert it first: "
            "moesaic convert MODEL OUT"
        )
    return blocks


@contextmanager
def decided_by(rankers: Sequence[BlockRanker], decide: DecideCount) -> Iterator[None]:
    """Let `decide` say how many experts run in each block, while the context lasts."""
    with ExitStack() as stack:
        for number, ranker in enumerate(rankers):
            handle = ranker.block.router.register_forward_hook(_hook(number, ranker, decide))
            stack.callback(handle.remove)
            stack.enter_context(_empty_slots(ranker.block.experts))
        yield


def _hook(number: int, ranker: BlockRanker, decide: DecideCount) -> Callable[..., tuple[Tensor, ...]]:
    def hook(router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_TD = inputs[0].flatten(0, -2)
        ranked = ranker.rank(hidden_TD, output)
        routing = ranked.route(decide(number, ranked.ranking, hidden_TD))
        if len(output) != 2 and not knows_empty_slots(ranker.block):  # Llama-4 has a column for each expert, no slots
            routing = without_empty_slots(routing, ranker.block.num_experts)
        return write_routing(routing, output)

    return hook


def knows_empty_slots(block: MoEBlock) -> bool:
    """Tell whether a block's experts, as they run now, leave out slots of no expert."""
    name = compat.experts_implementation(getattr(block.experts, "config", None))
    return name in SKIPPING and not (name == "eager" and block.is_transposed)  # gpt-oss's own loop does not


def without_empty_slots(routing: Routing, num_experts: int) -> Routing:
    """Name an expert, of weight 0, in slots that none has, for implementations that know no empty ones."""
    index, weights = routing
    return Routing(index.clamp(max=num_experts - 1), weights.where(index < num_experts, 0))


@contextmanager
def _empty_slots(experts: nn.Module) -> Iterator[None]:
    """Tell the experts' implementation that slots may have no expert."""
    before = vars(experts).get(EMPTY)
    setattr(experts, EMPTY, True)
    try:
        yield
    finally:
        if before is None:
            delattr(experts, EMPTY)
        else:
            setattr(experts, EMPTY, before)


@dataclass
class Attached:
    """A selection at work in a model; `detach` leaves no trace of it."""

    model: PreTrainedModel
    selection: Counting
    parameters: list[Parameters]
    """Of each block."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def detach(self) -> None:
        """Let the model's routers decide alone again."""
        self._stack.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: PreTrainedModel, selection: Counting, parameters: Sequence[Parameters] | None = None) -> Attached:
    """Let a selection say how many experts run in each block of a model; which ones remains the routers' choice.

    With a count equal to the model's own the output is bit for bit what it was. Shared experts always run; where a
    layer has none, a token runs one expert at least.

    Args:
        model: stock or ours.
        selection: the rule.
        parameters: what was learnt or calibrated, of each block; None: as the rule starts.

    Raises:
        InputError: the model is dense, or has fewer experts than the rule says.
    """
    blocks = moe_blocks_of(model)
    _check_enough(selection, min(block.num_experts for block in blocks))
    if not all(block.shared_experts for block in blocks):
        selection = replace(selection, at_least=max(1, selection.at_least))  # or a layer would say nothing at all
    made = parameters or [selection.parameters(block) for block in blocks]
    placed: list[Parameters] = [
        {name: value.to(next(block.router.parameters()).device) for name, value in values.items()}
        for block, values in zip(blocks, made, strict=True)
    ]
    if isinstance(before := getattr(model, ATTACHED, None), Attached):
        before.detach()
    attached = Attached(model, selection, placed)
    setattr(model, ATTACHED, attached)  # which keeps it as long as the model
    attached._stack.callback(delattr, model, ATTACHED)
    if selection.by_modality:
        attached._stack.enter_context(tell_modality(model))
    stock = []
    for block, values in zip(blocks, placed, strict=True):
        if isinstance(block.router, Gate):
            attached._stack.enter_context(_own_gate(block.router, selection, values))
            attached._stack.enter_context(_empty_slots(block.experts))
        else:
            stock.append((BlockRanker(block), values))

    def decide(number: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
        ranker, values = stock[number]
        return Decision(selection.counts(ranking, hidden_TD, values, ranker.block.num_experts_per_tok))

    attached._stack.enter_context(decided_by([ranker for ranker, _ in stock], decide))
    return attached


def _check_enough(selection: Counting, experts: int) -> None:
    for name in ("k", "at_least"):
        if (wanted := getattr(selection, name, 0)) > experts:
            raise InputError(
                f"{name}={wanted} is more than the {experts} routed experts of a layer; give {experts} or less"
            )


@contextmanager
def _own_gate(gate: Gate, selection: Counting, parameters: Parameters) -> Iterator[None]:
    """Put a selection in the place of one of our gates' own; its scores are computed once, as before."""
    before = gate.selection, gate.selection_parameters
    gate.selection = selection
    gate.selection_parameters = nn.ParameterDict(
        {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    )
    try:
        yield
    finally:
        gate.selection, gate.selection_parameters = before
