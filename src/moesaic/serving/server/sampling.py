"""Each request's own sampling inside one batch.

transformers' continuous batching has one `do_sample` for all requests, and drops most logits processors. Here it always
takes the most likely token (`do_sample=False`), and a request that wants more has its row of logits changed before: a
token is drawn by adding Gumbel noise of the request's own generator, which is the same distribution. So a greedy
request's row is left alone, whatever runs beside it, and a seed gives the same text again in any company.

Shapes: N rows, one a request; V tokens of the vocabulary; L tokens so far.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

COLDEST = 0.01
"""Below that temperature the most likely token is taken."""


class TokenChoice(NamedTuple):
    """A chosen token, and natural logarithms of the probabilities that the model gave."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens."""


@dataclass
class Sampling:
    """How the tokens of one request are chosen."""

    prompt_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    """How many most likely tokens are noted beside the chosen one; None: nothing is noted."""
    choices: list[TokenChoice] = field(default_factory=list)
    """What was noted, a token each."""

    def __post_init__(self) -> None:
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        self._generator = torch.Generator().manual_seed(seed)
        self._biased, self._biases = torch.tensor([*self.logit_bias]), torch.tensor([*self.logit_bias.values()])

    def __deepcopy__(self, memo: object) -> Self:
        """Stay the same: transformers copies a request's settings when it starts the request again with its text."""
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the row can be left alone."""
        penalties = self.frequency_penalty or self.presence_penalty or self.logit_bias
        return self.temperature < COLDEST and not penalties and self.top_logprobs is None

    def choose(self, row_V: Tensor, tokens: Callable[[], list[int]], processors: LogitsProcessorList) -> Tensor:
        """Change logits so that the most likely token is the chosen one.

        Args:
            row_V: of the next token.
            tokens: lists those of the prompt and the answer so far, which takes long where they are many.
            processors: the model's own, of its `generation_config.json`.
        """
        logits_V, row_V, device = row_V, row_V.clone(), row_V.device
        if processors:
            ids_1L = torch.tensor([tokens()], device=device)
            row_V = processors(ids_1L, row_V[None])[0]  # pyrefly: ignore[bad-argument-type]
        if self.frequency_penalty or self.presence_penalty:
            answer = torch.tensor(tokens()[self.prompt_tokens :], dtype=torch.int64, device=device)
            counts_V = torch.bincount(answer, minlength=len(row_V))
            row_V = row_V - self.frequency_penalty * counts_V - self.presence_penalty * (counts_V > 0)
        if self.logit_bias:
            row_V[self._biased.to(row_V.device)] += self._biases.to(row_V)
        if self.temperature >= COLDEST:
            row_V = row_V / self.temperature
            if self.top_p < 1:
                none = torch.empty(1, 0, dtype=torch.int64)  # it goes by scores alone
                row_V = TopPLogitsWarper(self.top_p)(none, row_V[None])[0]  # pyrefly: ignore[bad-argument-type]
            noise_V = torch.empty(len(row_V)).exponential_(generator=self._generator)
            row_V = row_V - noise_V.log().to(device)
        if self.top_logprobs is not None:
            self.choices.append(note(logits_V, int(row_V.argmax()), self.top_logprobs))
        return row_V


def note(logits_V: Tensor, token: int, count: int) -> TokenChoice:
    """Note a token's logarithm of probability, and the most likely tokens'."""
    logprobs_V = logits_V.float().log_softmax(-1)
    top = logprobs_V.topk(min(count, len(logprobs_V)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenChoice(token, float(logprobs_V[token]), list(pairs))


def all_tokens(state: RequestState) -> list[int]:
    """List the tokens of a request's prompt and of its answer so far."""
    return [*state.initial_tokens, *state.generated_tokens]


class OwnRows(ContinuousBatchingLogitsProcessor):
    """Changes the rows of those requests in a batch that ask for it."""

    supported_kwargs: dict[str, type] = {"sampling": Sampling}  # noqa: RUF012  as its base class has it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._processors = processors
        self._states: list[RequestState] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)  # there must be some

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        scores_NV = scores
        for row, state in enumerate(self._states):
            sampling = state.logit_processor_kwargs.get("sampling")
            if isinstance(sampling, Sampling) and (self._processors or not sampling.is_plain):
                scores_NV[row] = sampling.choose(scores_NV[row], partial(all_tokens, state), self._processors)
        return scores_NV
