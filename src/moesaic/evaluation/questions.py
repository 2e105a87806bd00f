"""Questions that a model is asked by its chat template, with pictures or without: the likelihood of choices, answers.

Sequences whose inputs have the same shapes run together, so that nothing is padded, and a batch gives the numbers that
its sequences give one by one.

Shapes: B sequences, L tokens of one, C tokens of a choice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..calibration.chat import rendered
from ..calibration.documents import Message
from ..errors import InputError
from ..models.families import context_length
from ..models.processor import open_picture
from ..serving.generate import check_length, new_tokens
from ..serving.questions import Words, asked, inputs_of, on_model, tokenizer_of
from .perplexity import check_losses

AT_ONCE = 8
"""Items whose pictures are in memory together."""
BATCH_TOKENS = 4_096
"""Of a batch, if one sequence has no more."""
ANSWER_TOKENS = 16
"""Of an answer, at most."""
SAID = "\N{SNOWMAN}"
"""Stands for an answer where only what follows it matters."""
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
"""Said in full, as a model's own generation settings may have a penalty."""
Inputs = Mapping[str, Tensor]


class Question(NamedTuple):
    """What is asked, what is or might be answered, and the pictures that it is about."""

    text: str
    answer: str
    pictures: tuple[Path, ...] = ()


class Encoded(NamedTuple):
    """A question as its model is called with it, for a batch of one."""

    inputs: Inputs
    start: int
    """Where the answer begins."""


@torch.inference_mode()
def score_choices(model: PreTrainedModel, words: Words, questions: Sequence[Question]) -> list[float]:
    """Compute the log-likelihood of each question's answer, nats; the end of the turn does not count.

    Raises:
        InputError: a picture that cannot be read, or a question that is longer than the model's context.
    """
    encoded = [_encode(words, one) for one in questions]
    longest = context_length(model.config)
    for one, asked_one in zip(encoded, questions, strict=True):
        if (length := one.inputs["input_ids"].shape[1]) > longest:
            raise InputError(
                f"the item {asked_one.text[:40]!r} has {length:,} tokens, more than the model's context of "
                f"{longest:,}; leave it out, or give smaller pictures"
            )
    losses = [torch.zeros(())] * len(encoded)
    for rows in alike([one.inputs for one in encoded]):
        batch = on_model(model, together([encoded[row].inputs for row in rows]), words)
        tokens_BL, length = batch["input_ids"], batch["input_ids"].shape[1]
        keep = length - min(encoded[row].start for row in rows) + 1
        output = model(**batch, use_cache=False, logits_to_keep=keep)
        for row, logits_KV, tokens_L in zip(rows, output.logits, tokens_BL, strict=True):
            count = length - encoded[row].start
            losses[row] = cross_entropy(logits_KV[-count - 1 : -1].float(), tokens_L[-count:], reduction="sum")
    if losses:
        check_losses(torch.stack([loss.cpu() for loss in losses]), "a task item", model.dtype)
    return [-loss.item() for loss in losses]


@torch.inference_mode()
def answers(model: PreTrainedModel, words: Words, questions: Sequence[Question], most: int) -> list[str]:
    """Answer questions greedily with at most so many tokens, cut at the end of the model's turn.

    Raises:
        InputError: a picture that cannot be read, or a question that is longer than the model's context allows.
    """
    encoded = [_prompt(words, one) for one in questions]
    for one in encoded:
        check_length(model, one["input_ids"].shape[1], most, "--answer-tokens")
    found = [""] * len(encoded)
    if not encoded:
        return found
    tokenizer, end = tokenizer_of(words), end_of_turn(words)
    ends = ending_tokens(model, words, end)
    for rows in alike(encoded):
        batch = on_model(model, together([encoded[row] for row in rows]), words)
        made_BL = new_tokens(model, batch, words, max_new_tokens=most, eos_token_id=ends or None, **GREEDY)
        for row, tokens in zip(rows, made_BL.tolist(), strict=True):
            cut = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            text = str(tokenizer.decode(tokens[:cut], skip_special_tokens=True))
            found[row] = text.partition(end)[0] if end else text
    return found


def same(said: str, answer: str) -> bool:
    """Tell whether two answers are the same but for blanks around them, case and a full stop at the end."""
    one, other = (text.strip().removesuffix(".").strip().casefold() for text in (said, answer))
    return one == other


def end_of_turn(words: Words) -> str:
    """Find what the chat template writes after an answer; nothing where it writes blanks or refuses."""
    chat = [Message("user", "?"), Message("assistant", SAID)]
    try:
        return rendered(chat, words, "").rpartition(SAID)[2].strip()
    except Exception:  # some templates want more than a question and its answer
        return ""


def ending_tokens(model: PreTrainedModel, words: Words, end: str) -> list[int]:
    """List the tokens that end an answer: those of the model's generation, the tokenizer's, the template's."""
    tokenizer = tokenizer_of(words)
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    of_turn = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    found = [*own, tokenizer.eos_token_id, *(of_turn if len(of_turn) == 1 else ())]
    return sorted({int(token) for token in found if token is not None})


def alike(inputs: Sequence[Inputs]) -> list[list[int]]:
    """Group inputs, by number, that can run together: all shapes are the same, of no more than `BATCH_TOKENS`."""
    groups: dict[object, list[int]] = {}
    for number, one in enumerate(inputs):
        groups.setdefault(tuple(sorted((name, tensor.shape) for name, tensor in one.items())), []).append(number)
    found = []
    for rows in groups.values():
        size = max(1, BATCH_TOKENS // inputs[rows[0]]["input_ids"].shape[1])
        found += [rows[i : i + size] for i in range(0, len(rows), size)]
    return found


def together(inputs: Sequence[Inputs]) -> dict[str, Tensor]:
    """Put inputs of the same shapes, each of a batch of one, into one batch."""
    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


def _prompt(words: Words, question: Question) -> Inputs:
    pictures = [open_picture(path) for path in question.pictures]
    return inputs_of(words, asked(words, question.text, len(pictures)), pictures)


def _encode(words: Words, question: Question) -> Encoded:
    """Encode a question with its answer, which begins with the first token that the question alone has not."""
    pictures = [open_picture(path) for path in question.pictures]
    prompt = asked(words, question.text, len(pictures))
    before_L = inputs_of(words, prompt, pictures)["input_ids"][0]
    inputs = inputs_of(words, prompt + question.answer, pictures)
    tokens_L = inputs["input_ids"][0]
    if len(tokens_L) < 2:
        raise InputError(f"the item {question.text[:40]!r} has no tokens; give a question and its choices")
    least = min(len(before_L), len(tokens_L))
    differs = (before_L[:least] != tokens_L[:least]).nonzero()
    start = int(differs[0]) if len(differs) else least
    return Encoded(inputs, max(1, min(start, len(tokens_L) - 1)))
