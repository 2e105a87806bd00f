"""Windows of tokens, cut from documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .chat import pieces
from .documents import BLANK_LINE, Document
from .text import by_domain

SPARE = 8
CHARACTERS_PER_TOKEN = 6
LONG, SHORT = 100_000, 4_096
"""Characters: of a text that is tokenised in one piece at most, of a part of a longer one at least."""
Window = tuple[list[int], list[bool]]
"""Tokens, and whether each counts in a loss."""


def bos(tokenizer: Any) -> list[int]:
    """List the tokens that the tokenizer puts before any text: its BOS where the model expects one, else nothing."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def check_tokens(ids: Tensor, rows: int, tokenizer: Any) -> None:
    """Check that a model has embeddings for all tokens of a text.

    Args:
        ids: the tokens, of any shape.
        rows: of the model's embeddings.
        tokenizer: the model's, which may know more tokens than the model.

    Raises:
        InputError: a token is beyond them.
    """
    if ids.numel() and (last := int(ids.max())) >= rows:
        token = tokenizer.convert_ids_to_tokens(last)
        if token is None:
            raise InputError(f"{last} is no token of this model; they are 0 to {rows - 1:,}")
        raise InputError(
            f"the text has the token {token!r} ({last}), but the model's embeddings have {rows:,} rows: tokens were "
            "added to the tokenizer and not to the model. Resize the model (resize_token_embeddings) and train them, "
            "or leave them out of the text and of the chat template"
        )


def token_windows(documents: Sequence[Document], tokenizer: Any, tokens: int | None, window: int) -> Tensor:
    """Cut documents into windows as `labelled_windows` does, without their domains: int64 [N, window]."""
    return labelled_windows(documents, tokenizer, tokens, window)[0]


def labelled_windows(
    documents: Sequence[Document], tokenizer: Any, tokens: int | None, window: int
) -> tuple[Tensor, Tensor]:
    """Cut documents into windows of packed text, and tell the domain of each.

    Every domain gives the same number of windows, in turn; domains are numbered as they first appear.

    A domain's windows are spread evenly over its text: many documents say more about a model than long ones. Every
    window opens with the tokenizer's BOS where the model expects one, so that attention sinks are where they will be
    in use.

    Args:
        documents: the text.
        tokenizer: the model's.
        tokens: how many in all, `tokens // window` windows; None: as many windows as every domain has.
        window: tokens in a window.

    Returns:
        Windows, int64 [N, window], and the number of each one's domain, int64 [N].

    Raises:
        InputError: fewer tokens are asked for than one window holds, or than the text has.
    """
    check_text(documents)
    if tokens is not None and tokens < window:
        raise InputError(f"{tokens} tokens are less than one window of {window}; raise --tokens or lower --window")
    start = bos(tokenizer)
    wanted = sys.maxsize if tokens is None else tokens // window
    domains = by_domain(documents)
    cut = [packed_windows(texts, tokenizer, start, window - len(start), wanted) for texts in domains]
    if tokens is None:
        domains = [texts for texts, windows in zip(domains, cut, strict=True) if windows]
        cut = [windows for windows in cut if windows]
        wanted = max(1, min(map(len, cut), default=0) * len(cut))
    weights = [texts[0].share for texts in domains]
    share = shares(list(map(len, cut)), wanted, weights)
    if sum(share) < wanted:
        have = sum(map(len, cut)) * window
        raise InputError(
            f"the text holds {have} tokens in windows of {window}, {tokens or window} are needed; give more text or "
            "ask for fewer or shorter windows"
        )
    even = [[w[i * len(w) // n] for i in range(n)] for w, n in zip(cut, share, strict=True)]
    turns = [(d, window) for turn in zip_longest(*even) for d, window in enumerate(turn) if window is not None]
    if len(set(weights)) > 1:  # spread, or the last windows would all be of the largest
        turns = [
            (d, w)
            for _, d, w in sorted(((i + 0.5) / len(own), d, w) for d, own in enumerate(even) for i, w in enumerate(own))
        ]
    return torch.tensor([ids for _, (ids, _) in turns]), torch.tensor([d for d, _ in turns])


def check_text(documents: Sequence[Document]) -> None:
    """Check that documents are text alone.

    Raises:
        InputError: one has a picture.
    """
    for document in documents:
        if document.pictures:
            raise InputError(f"'{document.pictures[0]}': this model takes text only; leave rows with pictures out")


def shares(available: list[int], wanted: int, weights: list[float]) -> list[int]:
    """Choose how many windows each domain gives: by weight (Sainte-Laguë) as far as they allow, `wanted` or all."""
    share = [0] * len(available)
    for _ in range(min(wanted, sum(available))):
        open_ = [i for i, most in enumerate(available) if share[i] < most]
        share[min(open_, key=lambda i: (share[i] + 0.5) / weights[i])] += 1
    return share


def packed_windows(
    documents: Sequence[Document], tokenizer: Any, start: list[int], body: int, wanted: int
) -> list[Window]:
    """Cut documents, one after the other, into windows of `start` + `body` tokens; `pieces` says what counts in a loss.

    Of much text only evenly spaced documents are tokenised, one for each window at least and several times what is
    wanted; a document of more than `LONG` characters is as many as it has parts.
    """
    enough = SPARE * wanted * body * CHARACTERS_PER_TOKEN
    size = min(LONG - len(BLANK_LINE), max(SHORT, enough // wanted))
    documents = [part for document in documents for part in parts(document, size)]
    step = max(1, min(sum(len(document.text) for document in documents) // enough, len(documents) // wanted))
    while step > 1 and sum(len(document.text) for document in documents[::step]) < enough:
        step //= 2  # those that are met are the short ones
    ids: list[int] = []
    counts: list[bool] = []
    end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    opening = tokenizer.bos_token if start else ""
    for document in documents[::step]:
        for piece in pieces(document, tokenizer, opening):
            found = [*encode(piece.text, tokenizer), *(end_of_text if piece.ends else ())]
            ids.extend(found)
            counts.extend([piece.scored] * len(found))
    cut = range(0, len(ids) // body * body, body)
    return [(start + ids[i : i + body], [False] * len(start) + counts[i : i + body]) for i in cut]


def parts(document: Document, size: int) -> list[Document]:
    """Cut a long text into documents of about `size` characters; chats, and prompts with responses, stay whole."""
    if document.messages or document.prompt_characters or len(document.text) <= LONG - len(BLANK_LINE):
        return [document]
    return [Document(text, document.domain) for text in cut_text(document.text, size)]


def encode(text: str, tokenizer: Any) -> list[int]:
    """List a text's tokens; one of more than `LONG` characters is cut, as a tokenizer takes kilobytes a character."""
    cut = cut_text(text, LONG)
    return [i for part in cut for i in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]]


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of `size` characters or, before a line's end or at least a blank, half as many."""
    start = 0
    while len(text) - start > size:
        end = start + size
        found = (text.rfind(space, end - size // 2, end) for space in "\n ")
        end = next((at for at in found if at > 0), end)
        yield text[start:end]
        start = end
    yield text[start:]
