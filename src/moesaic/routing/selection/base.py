"""The contract of a selection: which and how many experts run, by their scores.

Shapes: T tokens, D hidden size, E routed experts, N ranks of experts in a token's order, K slots for a token's experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]
"""What a selection learnt or calibrated for one layer, by name."""
BISECTIONS = 60


class GateConfig(Protocol):
    """What a gate needs to know of a model's configuration."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    router: str
    router_hidden_size: int
    norm_topk_prob: bool
    """Whether a router whose weights are shares of the token divides them by their sum over the experts that run."""
    selection: str


class SelectionSizes(Protocol):
    """What a selection needs to know of a model to make its parameters."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...


class _Smallest(NamedTuple):
    hidden_size: int = 1
    num_experts: int = 1
    num_experts_per_tok: int = 1


SMALLEST: SelectionSizes = _Smallest()
"""To ask a selection whether it has parameters at all."""


class ScoringGate(Protocol):
    """What a selection may ask of the gate that it belongs to."""

    num_experts_per_tok: int
    e_score_correction_bias: nn.Parameter
    selection_parameters: nn.ParameterDict
    """What `Selection.parameters` made, if anything."""

    def shares(self, scores_TE: Tensor) -> Tensor:
        """Say how much of each token goes to each expert, none negative, [T, E]; they need not sum to 1."""
        ...


class Ranking(NamedTuple):
    """The experts of each token from the best on, as the router has them."""

    index_TN: Tensor
    """Experts, int64."""
    scores_TN: Tensor
    """What they were ranked by, float32, falling: a stock router's probabilities, with its bias if it has one, or our
    routers' predicted norms."""
    shares_TN: Tensor
    """How much of the token goes to each, none negative; they need not sum to 1."""
    logarithmic: bool
    """Whether ratios of scores mean the same everywhere (probabilities) rather than differences (predicted norms)."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Ranking:
        """Change each of the tensors alike, e.g. take some of the tokens."""
        return Ranking(change(self.index_TN), change(self.scores_TN), change(self.shares_TN), self.logarithmic)

    @property
    def levels_TN(self) -> Tensor:
        """Scores on a scale where differences mean the same everywhere, falling: logarithms of probabilities."""
        return self.shares_TN.clamp(min=1e-12).log() if self.logarithmic else self.scores_TN


class LayerSample(NamedTuple):
    """One layer's calibration tokens, for a selection that is to meet a budget."""

    ranking: Ranking
    evidence_TN: Tensor
    """What the selection made of it."""
    default: int
    """Routed experts that the router takes for a token by itself."""
    parameters: Parameters
    errors_K: Tensor | None = None
    """Mean squared distance of the output of the first 1, 2, ... ranks from that of the default number."""
    is_image_T: Tensor | None = None
    """Which tokens are parts of pictures; None where nothing tells."""


@dataclass(frozen=True, kw_only=True)
class Selection(ABC):
    """A rule that says which and how many experts run; hyper-parameters are its fields."""

    dynamic_top_k: ClassVar[bool] = False
    """Whether the number of experts varies by token; slots that are not used have the index E."""

    @abstractmethod
    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        """Choose experts, int64 [T, K], by their scores (float32) and, for a rule that learns, by the tokens."""

    def parameters(self, config: SelectionSizes) -> Mapping[str, Tensor]:
        """Make what the rule learns, by name, as it is at first; found again in `gate.selection_parameters`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Counting(Selection):
    """A rule that says how many experts run; which ones is the router's order, best first.

    `count = number of ranks whose evidence is above the budget field`, within `at_least` and `at_most`. It works on any
    router of transformers and on ours.
    """

    dynamic_top_k: ClassVar[bool] = True
    budget: ClassVar[str] = "threshold"
    """The field that calibration steers so that a wanted number of experts runs on average."""
    falling: ClassVar[bool] = True
    """Whether fewer experts run as that field rises."""
    only_fewer: ClassVar[bool] = False
    """Whether never more than the router's own number run."""
    needs_errors: ClassVar[bool] = False
    """Whether calibration needs `LayerSample.errors_K`, which runs the experts once for each number of them."""

    by_modality: ClassVar[bool] = False
    """Whether it goes by which tokens are parts of pictures, which the model then tells."""
    reaches_zero: ClassVar[bool] = False
    """Whether a token may run no expert at all."""

    at_least: Annotated[int, Field(ge=0)] = 1
    """Experts that run for every token."""
    at_most: Annotated[int, Field(ge=0)] = 0
    """Experts that run for any token; 0: all."""

    @abstractmethod
    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        """Compute what speaks for running each rank, float32 [T, N]."""

    def count(self, evidence_TN: Tensor) -> Tensor:
        """Count the experts that run by the evidence, int64 [T], before `at_least` and `at_most`."""
        return (evidence_TN > getattr(self, self.budget)).sum(-1)

    def within(self, count_T: Tensor, ranks: int, default: int) -> Tensor:
        """Keep a count within what may run of so many ranks."""
        most = self.most(ranks, default)
        return count_T.clamp(min(self.at_least, most), most)

    def most(self, ranks: int, default: int) -> int:
        """Say how many experts any token may run of so many ranks."""
        return min(ranks, self.at_most or ranks, default if self.only_fewer else ranks)

    def counts(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters, default: int) -> Tensor:
        """Say how many experts run for each token, int64 [T].

        Args:
            ranking: of all experts, or of those that the router allows.
            hidden_TD: what enters the router.
            parameters: what was learnt or calibrated for the layer.
            default: experts that the router takes by itself.
        """
        count_T = self.count(self.evidence(ranking, hidden_TD, parameters))
        return self.within(count_T, ranking.index_TN.shape[1], default)

    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        ranking = rank(scores_TE, gate)
        parameters = dict(gate.selection_parameters.items())
        count_T = self.counts(ranking, hidden_TD, parameters, gate.num_experts_per_tok)
        most = self.most(ranking.index_TN.shape[1], gate.num_experts_per_tok)
        return first_ranks(ranking.index_TN[:, :most], count_T, scores_TE.shape[-1])

    def with_budget(self, value: float) -> Self:
        """Give the same rule with another value of its budget field."""
        return replace(self, **{self.budget: value})  # pyrefly: ignore[bad-argument-type]

    def bounds(self, evidence: Sequence[Tensor]) -> tuple[float, float]:
        """Say between which values of the budget field all numbers of experts are reached, by all layers' evidence."""
        ends = [torch.aminmax(part) for part in evidence]
        return min(float(end.min) for end in ends) - 1e-6, max(float(end.max) for end in ends)

    def fit(self, layers: Sequence[LayerSample], mean: float) -> tuple[Self, list[Parameters]]:
        """Find the value of the budget field at which `mean` experts run on average over tokens and layers.

        Returns:
            The selection, and each layer's parameters.
        """

        def is_low(budget: float) -> bool:
            return (mean_count(self.with_budget(budget), layers) > mean) == self.falling

        ends = [self.with_budget(value) for value in bisected(*self.bounds([s.evidence_TN for s in layers]), is_low)]
        best = min(ends, key=lambda tried: abs(mean_count(tried, layers) - mean))
        return best, [s.parameters for s in layers]


def bisected(low: float, high: float, is_low: Callable[[float], bool], steps: int = BISECTIONS) -> tuple[float, float]:
    """Halve an interval, of whose ends the lower one `is_low` and the upper one is not, so many times."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


@dataclass(frozen=True, kw_only=True)
class Learning(Counting):
    """A rule with parameters of its own in each layer, which `moesaic adapt` trains."""

    default_learner: ClassVar[str] = "distill"
    """What trains it, of `moesaic.adaptation.learners`, when none is asked for."""

    @abstractmethod
    def keep(self, evidence_TN: Tensor, temperature: float) -> Tensor:
        """Give each rank's probability to run, differentiable and falling in the rank, float32 [T, N].

        `temperature` makes a rule that is sure smooth; a rule that is a distribution has no need of it.
        """

    def looser(self, evidence_TN: Tensor) -> Tensor:
        """Say how evidence moves as the budget field lets more experts run: all ranks alike, [T, N]."""
        return torch.ones_like(evidence_TN)


def mean_count(selection: Counting, layers: Sequence[LayerSample]) -> float:
    """Average the number of experts that run over tokens and layers."""
    counts = [
        selection.within(selection.count(s.evidence_TN), s.evidence_TN.shape[1], s.default).double().mean()
        for s in layers
    ]
    return float(torch.stack(counts).mean())


def rank(scores_TE: Tensor, gate: ScoringGate) -> Ranking:
    """Rank experts as one of our gates does, by `scores + e_score_correction_bias`."""
    scores_TN, index_TN = (scores_TE + gate.e_score_correction_bias.float()).sort(-1, descending=True)
    return Ranking(index_TN, scores_TN, gate.shares(scores_TN), logarithmic=False)


def first_ranks(index_TN: Tensor, count_T: Tensor, num_experts: int) -> Tensor:
    """Take the first `count` ranks of each token, int64 [T, K]; slots beyond have the index `num_experts`.

    K is the largest count; in compiled code, whose shapes are fixed, all ranks that are given.
    """
    most = index_TN.shape[1] if torch.compiler.is_compiling() else int(count_T.max()) if len(count_T) else 0
    slot_K = torch.arange(most, device=index_TN.device)
    return index_TN[:, :most].where(slot_K < count_T[:, None], num_experts)
