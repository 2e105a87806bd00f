"""Greedy continuations of many prompts in batches, and what a model predicts of continuations that it is given.

Shapes: B sequences, L tokens of one, C tokens of a continuation, K tokens whose logits are kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..serving.generate import left_padded, new_tokens
from ..serving.questions import Words, on_model, tokenizer_of
from .questions import GREEDY, end_of_turn, ending_tokens

LOOK_BACK = 12
"""Tokens at the end of a text in which a stop sequence is looked for: more than any of ours has."""


class Scored(NamedTuple):
    """The tokens of a prompt with its continuation."""

    tokens: list[int]
    start: int
    """Where the continuation begins, at least 1."""


class Prediction(NamedTuple):
    """What a model predicts where a continuation stands."""

    logits_CV: Tensor
    tokens_C: Tensor
    """What stands there."""


class Continued(NamedTuple):
    """A greedy continuation."""

    tokens: list[int]
    """Up to the end-of-text token, which is the last where there is one."""
    ended: bool
    """Whether it came to its end, by that token or by a stop sequence, before the limit of tokens."""


def predictions(model: PreTrainedModel, sequences: Sequence[Scored]) -> Iterator[Prediction]:
    """Predict each token of the continuations from those before it, in one batch (teacher forcing)."""
    # padding on the left, so that continuations end together and few logits are kept
    batch = {name: tensor.to(model.device) for name, tensor in left_padded([s.tokens for s in sequences]).items()}
    keep = max(len(tokens) - start for tokens, start in sequences) + 1
    output = model(**batch, use_cache=False, logits_to_keep=keep)
    for logits_KV, tokens_L, (tokens, start) in zip(output.logits, batch["input_ids"], sequences, strict=True):
        count = len(tokens) - start
        yield Prediction(logits_KV[-count - 1 : -1].float(), tokens_L[len(tokens_L) - count :])


@torch.inference_mode()
def continued(
    model: PreTrainedModel,
    words: Words,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    batch: int,
    stops: Sequence[str] = (),
    asked: bool = False,
    tick: Callable[[int, int], None] | None = None,
) -> list[Continued]:
    """Continue prompts greedily by transformers' generate, the longest first, those of like length together.

    Padding is on the left and masked, so that a batch gives what its prompts give one by one, but for rounding.

    Args:
        model: a dense or converted model.
        words: its tokenizer or processor.
        prompts: tokens of each.
        most: tokens to add to one, at most.
        batch: prompts that run together.
        stops: texts that end a continuation, beside the end-of-text token.
        asked: whether the prompts are questions by the chat template, whose end of a turn ends an answer.
        tick: called with (finished prompts, tokens of the batch that runs).
    """
    turn = end_of_turn(words) if asked else ""
    ends, stops = ending_tokens(model, words, turn), (*stops, turn) if turn else stops
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    found = [Continued([], False)] * len(prompts)
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        inputs = on_model(model, left_padded([prompts[row] for row in rows]), words)
        watch = _Watch(
            tokenizer_of(words), inputs["input_ids"].shape[1], stops, lambda n, at=first: tick and tick(at, n)
        )
        made_BC = new_tokens(
            model, inputs, words, max_new_tokens=most, eos_token_id=ends or None,
            stopping_criteria=StoppingCriteriaList([watch]), **GREEDY,
        )  # fmt: skip
        for row, tokens, stopped in zip(rows, made_BC.tolist(), watch.stopped.tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens) if token in ends), None)
            found[row] = Continued(tokens if end is None else tokens[: end + 1], end is not None or stopped)
        if tick:
            tick(first + len(rows), 0)
    return found


class _Watch(StoppingCriteria):
    """Ends a row at a stop sequence, and says how many tokens there are."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: int, stops: Sequence[str], tick: Callable[[int], object]
    ) -> None:
        self.tokenizer, self.prompt, self.stops, self.tick = tokenizer, prompt, tuple(stops), tick
        self.stopped = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        length = input_ids.shape[1]
        self.tick(length - self.prompt)
        if not len(self.stopped):
            self.stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.stops:
            ends = self.tokenizer.batch_decode(input_ids[:, max(self.prompt, length - LOOK_BACK) :])
            self.stopped |= torch.tensor([any(stop in text for stop in self.stops) for text in ends]).to(
                input_ids.device
            )
        return self.stopped
