"""Sequences to train on, and those held out.

Shapes: N sequences, L tokens in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..calibration.text import Document, bos, shares
from ..errors import InputError


@dataclass(frozen=True)
class Samples:
    """Token sequences, and which of their tokens count in the loss (a prompt's do not)."""

    tokens_NL: Tensor
    scored_NL: Tensor

    def __len__(self) -> int:
        return len(self.tokens_NL)

    def take(self, index_N: Tensor) -> Samples:
        """Some of the sequences."""
        return Samples(self.tokens_NL[index_N], self.scored_NL[index_N])

    def scored(self) -> int:
        """Tokens that are predicted and count."""
        return int(self.scored_NL[:, 1:].sum())


def make_samples(
    documents: Sequence[Document], tokenizer: Any, samples: int, window: int, held_out: int, seed: int
) -> tuple[Samples, Samples]:
    """(to train on, held out): packed documents in windows, domains in equal shares, in a random order of the seed.

    At most `samples` and `held_out` windows; held-out ones are spread evenly over what there is, and no window holds
    text of another.

    Raises:
        InputError: the text holds fewer than two windows, or nothing that counts in the loss.
    """
    domains: dict[str, list[Document]] = {}
    for document in documents:
        domains.setdefault(document.domain, []).append(document)
    start = bos(tokenizer)
    cut = [windows(texts, tokenizer, start, window, samples + held_out) for texts in domains.values()]
    share = shares(list(map(len, cut)), samples + held_out)
    even = [[w[i * len(w) // n] for i in range(n)] for w, n in zip(cut, share, strict=True) if n]
    turns = [window for turn in zip_longest(*even) for window in turn if window is not None]
    if len(turns) < 2:
        raise InputError(
            f"the text holds {len(turns)} windows of {window} tokens; two are needed, one of them held out: give more "
            "text or a shorter --window"
        )
    tokens_NL, scored_NL = (torch.tensor(part) for part in zip(*turns, strict=True))
    found = Samples(tokens_NL, scored_NL.bool())
    spare = torch.linspace(0, len(found) - 1, min(held_out, len(found) // 2)).long()
    rest = torch.ones(len(found), dtype=torch.bool)
    rest[spare] = False
    order_N = torch.randperm(int(rest.sum()), generator=torch.Generator().manual_seed(seed))
    train, held = found.take(rest.nonzero()[:, 0][order_N]), found.take(spare)
    if not train.scored() or not held.scored():
        raise InputError("no token of the text counts in the loss: prompts have no responses; give responses too")
    return train, held


def windows(
    documents: Sequence[Document], tokenizer: Any, start: list[int], window: int, most: int
) -> list[tuple[list[int], list[bool]]]:
    """At most `most` windows of `start` and packed documents: (tokens, whether each counts).

    A response ends with the end-of-text token, which counts too; other documents are joined by blank lines.
    """
    ids: list[int] = []
    counts: list[bool] = []
    body = window - len(start)

    def add(text: str, scored: bool) -> None:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(found)
        counts.extend([scored] * len(found))

    for document in documents:
        if len(ids) >= most * body:
            break
        prompt = document.prompt_characters
        if prompt:
            add(document.text[:prompt], False)
            add(document.text[prompt:], True)
            ids.append(tokenizer.eos_token_id)
            counts.append(True)
        else:
            add(document.text + "\n\n", True)
    return [
        (start + ids[i : i + body], [False] * len(start) + counts[i : i + body])
        for i in range(0, len(ids) // body * body, body)
    ][:most]
