"""Documents with pictures as a vision-language model sees them.

Shapes: N sequences, L tokens in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..models.pictured import Pictured
from ..models.processor import Processor, open_picture
from .chat import Piece, pieces
from .documents import Document
from .windows import bos, encode

ENOUGH = 0.9
"""Of the tokens that documents are to give: they are taken whole, so that few give just so many."""


GOLDEN = 0.6180339887498949
"""Of whose multiples, without their whole parts, any first few are spread evenly."""


class Encoded(NamedTuple):
    """One document as its model is called with it."""

    tokens_L: Tensor
    is_scored_L: Tensor
    inputs: Mapping[str, Tensor]
    """Beside the tokens; a batch of one."""


def encoded(document: Document, processor: Processor) -> Encoded:
    """Encode a chat with pictures; answers after the last picture count in a loss, up to the end of the turn.

    Raises:
        InputError: no chat template, which says where pictures stand, or one that refuses the chat; a picture that is
            missing or broken.
    """
    check_template(processor)
    opening = processor.tokenizer.bos_token if bos(processor.tokenizer) else ""
    cut = pieces(document, processor, opening)
    pictures = [open_picture(path, f"'{document.domain}'") for path in document.pictures]
    inputs = processor.inputs("".join(piece.text for piece in cut), pictures)
    tokens_L = inputs.pop("input_ids")[0]
    inputs.pop("attention_mask", None)
    ids, counts = counted(cut, processor.tokenizer)
    is_scored_L = aligned(tokens_L, torch.tensor(ids), torch.tensor(counts))
    # what a template writes after the end of a turn no model ever says
    is_scored_L[1:] &= tokens_L[:-1] != processor.tokenizer.eos_token_id
    return Encoded(tokens_L, is_scored_L, inputs)


def counted(cut: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """List the tokens of pieces as one text, and whether each has a character that counts in a loss.

    A token may begin in the prompt and end in the answer: the blank before it and its first word often are one. Of a
    tokenizer that does not tell where tokens are, pieces are encoded apart.
    """
    if not tokenizer.is_fast:
        parts = [(encode(piece.text, tokenizer), piece.scored) for piece in cut]
        return [i for ids, _ in parts for i in ids], [scored for ids, scored in parts for _ in ids]
    ends = list(accumulate(len(piece.text) for piece in cut))
    spans = [(end - len(piece.text), end) for piece, end in zip(cut, ends, strict=True) if piece.scored]
    text = "".join(piece.text for piece in cut)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places: list[tuple[int, int]] = found["offset_mapping"]  # pyrefly: ignore[bad-assignment]
    counts = [any(first < end and last > start for start, end in spans) for first, last in places]
    return list(found["input_ids"]), counts  # pyrefly: ignore[bad-argument-type]


def aligned(tokens_L: Tensor, ids_M: Tensor, counts_M: Tensor) -> Tensor:
    """Say which tokens count in a text in which pictures have their tokens, from the one in which they have marks.

    Both are the same from their end back to the last picture, and only there tokens count.
    """
    least = min(len(tokens_L), len(ids_M))
    differs = (tokens_L.flip(0)[:least] != ids_M.flip(0)[:least]).nonzero()
    same = int(differs[0]) if len(differs) else least
    is_scored_L = torch.zeros(len(tokens_L), dtype=torch.bool)
    if same:
        is_scored_L[-same:] = counts_M[-same:]
    return is_scored_L


def check_template(processor: Processor) -> None:
    """Check that a processor says where pictures stand in a text.

    Raises:
        InputError: it does not.
    """
    if not processor.has_template:
        raise InputError("the model's processor has no chat template, which says where pictures stand in a text")


def together(parts: Sequence[Encoded], processor: Processor, length: int) -> tuple[Tensor, Pictured]:
    """Pad documents at their end to one length: tokens [N, length], and what comes with them."""
    filler = processor.tokenizer.pad_token_id
    filler = processor.tokenizer.eos_token_id if filler is None else filler
    tokens_NL = torch.full((len(parts), length), filler or 0)
    is_scored_NL = torch.zeros_like(tokens_NL, dtype=torch.bool)
    is_padding_NL = torch.ones_like(is_scored_NL)
    for row, part in enumerate(parts):
        size = len(part.tokens_L)
        tokens_NL[row, :size], is_scored_NL[row, :size] = part.tokens_L, part.is_scored_L
        is_padding_NL[row, :size] = False
    inputs = tuple({name: widened(tensor, part, length) for name, tensor in part.inputs.items()} for part in parts)
    is_image_NL = (tokens_NL == processor.image_token_id) & ~is_padding_NL
    return tokens_NL, Pictured(inputs, is_image_NL, is_padding_NL, is_scored_NL)


def widened(tensor: Tensor, part: Encoded, length: int) -> Tensor:
    """Pad what has a value for each token, such as the kinds of tokens."""
    size = len(part.tokens_L)
    return pad(tensor, (0, length - size)) if tensor.shape == (1, size) else tensor


def spread(documents: Sequence[Document], processor: Processor, tokens: int, longest: int) -> list[Encoded]:
    """Encode documents evenly spaced over all, of so many tokens in all if there are as many, at least one.

    Raises:
        InputError: a document is longer than `longest` tokens.
    """
    first = checked(documents[0], processor, longest)
    wanted = min(len(documents), max(1, round(tokens / len(first.tokens_L))))
    found: list[Encoded] = []
    count = 0
    even = [number * len(documents) // wanted for number in range(wanted)]
    others = sorted(range(len(documents)), key=lambda n: n * GOLDEN % 1)  # needed where the first is longer than most
    for place, number in enumerate(dict.fromkeys([*even, *others])):
        if count >= (tokens if place < wanted else ENOUGH * tokens):
            break
        one = checked(documents[number], processor, longest)
        found.append(one)
        count += len(one.tokens_L)
    return found


def checked(document: Document, processor: Processor, longest: int) -> Encoded:
    """Encode a document that may not be longer than so many tokens.

    Raises:
        InputError: it is.
    """
    one = encoded(document, processor)
    if len(one.tokens_L) > longest:
        raise InputError(
            f"'{document.pictures[0]}' and what is said of it are {len(one.tokens_L):,} tokens, more than the "
            f"{longest:,} that the model takes; give smaller pictures"
        )
    return one
