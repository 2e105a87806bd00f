"""Results of `inspect --adaptive`, `--oracle` and `--trace`: which experts run, how many, how many are best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Result


@dataclass(frozen=True, kw_only=True)
class ExpertGroup(Result):
    """Tokens that have something in common."""

    tokens: int
    experts_per_token: float
    """Routed experts that run, mean over tokens and layers."""
    loss: float
    """Mean loss of predicting the token after each, nats."""


@dataclass(frozen=True, kw_only=True)
class PassageToken(Result):
    """One token of a passage."""

    text: str
    """Empty where its bytes are only the beginning of a character."""
    kind: str
    """One of `evaluation.tokens.KINDS`."""
    experts: list[int]
    """Routed experts that run in each layer."""
    loss: float
    """Loss of predicting the next token, nats."""


@dataclass(frozen=True, kw_only=True)
class Passage(Result):
    """A text, and how many experts each of its tokens runs in each layer."""

    layers: list[int]
    """Numbers of the decoder layers that have experts."""
    default_experts_per_token: int
    tokens: list[PassageToken]


@dataclass(frozen=True, kw_only=True)
class ExpertsInspection(Result):
    """How many experts run for which tokens."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"model", "rule"})

    text: str
    data_sha256: str
    tokens: int
    """That were counted: all of a window but the last, which predicts nothing that is known."""
    window: int
    default_experts_per_token: int
    """That the routers take by themselves, the most of all layers."""
    num_experts: int
    varies: bool
    """Whether the number differs between tokens of one layer."""
    experts_per_token: float
    loss: float
    """Next-token loss, nats a token."""
    layers: list[int]
    """Numbers of the decoder layers that have experts."""
    experts_by_layer: list[float]
    by_kind: dict[str, ExpertGroup]
    """By the token's text (`evaluation.tokens.token_kind`)."""
    by_domain: dict[str, ExpertGroup]
    by_difficulty: dict[str, ExpertGroup]
    """By quarters of the tokens, in the order of their next-token loss."""
    passage: Passage
    """The first tokens of the text."""
    model: str | None = None
    rule: str | None = None
    """The adapter or selection that was asked for; None: the model's own."""


@dataclass(frozen=True, kw_only=True)
class OracleInspection(Result):
    """How far a policy is from the best number of experts for each token, found by enumeration."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"model", "rule", "by_layer_loss", "experts_by_layer"})

    text: str
    data_sha256: str
    tokens: int
    window: int
    default_experts_per_token: int
    counts: list[int]
    """The numbers of experts that were tried, in all layers alike."""
    loss_by_count: list[float]
    """Next-token loss with each of them for all tokens, nats a token."""
    experts_per_token: float
    """What the policy runs, mean over tokens and layers: the budget of the others."""
    loss: float
    """The policy's loss."""
    fixed_loss: float
    """Loss of one number for all tokens, interpolated linearly to the policy's mean."""
    oracle_experts_per_token: float
    """Less than the budget where more experts help no token."""
    oracle_loss: float
    """Each token's loss from the run with the number chosen for it, where the tokens before it had that number too."""
    oracle_loss_together: float
    """Measured in one run in which every token has its own chosen number."""
    policy_tokens: list[int]
    """Tokens whose mean over layers rounds to each of `counts`."""
    oracle_tokens: list[int]
    same: float
    """Share of tokens for which policy, rounded, and oracle agree."""
    mean_distance: float
    """Mean of |policy - oracle|, experts, the policy's mean over layers not rounded."""
    gap_closed: float | None
    """(fixed - policy) / (fixed - oracle); None where the oracle wins nothing over a fixed number."""
    model: str | None = None
    rule: str | None = None
    by_layer_loss: float | None = None
    """With a number for each token and layer, found one layer after the other and measured in one run."""
    experts_by_layer: list[float] | None = None
    """That these are on average."""


@dataclass(frozen=True, kw_only=True)
class CacheHits(Result):
    """How many uses of experts find theirs in a fast tier of some size, where requests decode one after the other."""

    share: float
    """Share of all experts that the fast tier holds."""
    capacity: int
    """Experts that it holds."""
    hit_ratio: dict[str, float]
    """By policy."""
    bytes_read_per_token: int | None
    """From the slow tier, by the first policy; None where the bytes of an expert are not known."""


@dataclass(frozen=True, kw_only=True)
class RoutesInspection(Result):
    """What a route trace holds."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"model", "rule"})

    file: str
    text: str
    data_sha256: str
    requests: int
    prompt: int
    """Tokens of each prompt."""
    new: int
    """Tokens that were decoded after it."""
    tokens: int
    """That ran, of all requests."""
    layers: list[int]
    """Numbers of the decoder layers that have experts; the trace counts them from 0."""
    num_experts: int
    expert_bytes: int
    """Bytes of one expert's weights, as they are in memory."""
    experts_per_token: float
    kept: float
    """Share of a token's experts that the token before it used too, mean over layers."""
    used: float
    """Share of all experts that any token used."""
    caches: list[CacheHits]
    """What would be found in memory, simulated on the decoding; nothing without any."""
    model: str | None = None
    rule: str | None = None
