"""Text and pictures together: sequences of one length, half of the tokens each.

Shapes: N sequences, L tokens in one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import InputError
from ..models.pictured import Pictured, joined, plain
from ..models.processor import Processor
from .documents import Document
from .pictured import ENOUGH, Encoded, encoded, spread, together
from .text import bundled, by_domain, read_file
from .windows import labelled_windows

SMALL_PICTURE = 128
"""Pixels of a side, up to which a model is shown shapes."""
log = logging.getLogger(__name__)
LEAST_WINDOW = 128
"""Tokens of a window of text beside pictures, at least: sequences with small pictures are shorter."""


def bundled_pictures(name: str) -> list[Document]:
    """Read bundled questions about pictures: `calibration`, `photos`, `heldout`, `natural`; no picture is in two."""
    return read_file(Path(str(files("moesaic"))) / "data" / "pictures" / f"{name}.jsonl")


def held_out_name(config: PretrainedConfig, processor: Processor, longest: int) -> str:
    """Choose the bundled held-out pictures for a model: `natural`, photographs and pages, or `heldout`, shapes.

    Shapes are for models whose own pictures are small, and where no photograph fits into `longest` tokens.
    """
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if size is not None and max(size if isinstance(size, list | tuple) else [size]) <= SMALL_PICTURE:
        return "heldout"
    return "natural" if held_out_pictures("natural", processor, longest) else "heldout"


def held_out_pictures(name: str, processor: Processor, longest: int) -> list[Document]:
    """Read the held-out pictures that `held_out_name` chose, those of the photographs that fit."""
    found = bundled_pictures(name)
    return found if name == "heldout" else [one for one in found if len(encoded(one, processor).tokens_L) <= longest]


def bundled_both() -> list[Document]:
    """Read the bundled text, shapes and photographs for calibration."""
    shown = (document for name in ("calibration", "photos") for document in bundled_pictures(name))
    return [*bundled("calibration"), *shown]


class Mixed(NamedTuple):
    """Sequences of text and of pictures, domains in turn."""

    tokens_NL: Tensor
    pictured: Pictured
    domain_N: Tensor


def mixed(
    documents: Sequence[Document], processor: Processor, tokens: int, window: int, longest: int, enough: bool = True
) -> Mixed:
    """Cut text into windows beside documents with pictures, half of the tokens each where there are both.

    All sequences are as long as the longest with a picture, or as `window` where there is none. With `enough` False
    there may be less text than is asked for.

    Raises:
        InputError: less text than is asked for, or a document with pictures of more than `longest` tokens.
    """
    text, shown = ([one for one in documents if bool(one.pictures) == has] for has in (False, True))
    share = tokens // 2 if text and shown else tokens
    of_domain = by_domain(shown)
    parts = [
        (number, part)
        for number, domain in enumerate(of_domain)
        for part in spread(domain, processor, share // len(of_domain), longest)
    ]
    given = sum(len(part.tokens_L) for _, part in parts)
    if shown and enough and given < ENOUGH * share:
        log.warning("documents with pictures give %s of the %s tokens that are theirs; name more of them",
                    f"{given:,}", f"{share:,}")  # fmt: skip
    length = max((len(part.tokens_L) for _, part in parts), default=window)
    if not text:
        tokens_NL, pictured = together([part for _, part in parts], processor, length)
        return in_turn(Mixed(tokens_NL, pictured, torch.tensor([number for number, _ in parts])))
    length = max(length, min(window, LEAST_WINDOW))
    wanted = max(length, share)
    try:
        text_NL, domain_N = labelled_windows(text, processor.tokenizer, wanted if enough else None, length)
    except InputError as error:
        if not shown:
            raise
        raise InputError(
            f"{len(text)} of {len(documents)} rows have no picture, and are to give half of the tokens: {error}; or "
            "leave those rows out"
        ) from error
    if not enough and len(text_NL) > wanted // length:
        even_N = torch.arange(wanted // length) * len(text_NL) // (wanted // length)
        text_NL, domain_N = text_NL[even_N], domain_N[even_N]
    tokens_NL, pictured = beside(text_NL, [part for _, part in parts], processor, length)
    others_N = torch.tensor([number for number, _ in parts], dtype=torch.int64) + int(domain_N.max()) + 1
    return in_turn(Mixed(tokens_NL, pictured, torch.cat([domain_N, others_N])))


def in_turn(found: Mixed) -> Mixed:
    """Spread each domain's sequences evenly over all, so that what is held out has some of each."""
    place_N = torch.empty(len(found.domain_N))
    for domain in found.domain_N.unique():
        own = found.domain_N == domain
        count = int(own.sum())
        place_N[own] = (torch.arange(count) + 0.5) / count
    order_N = place_N.argsort(stable=True)
    return Mixed(found.tokens_NL[order_N], found.pictured.take(order_N), found.domain_N[order_N])


def beside(text_NL: Tensor, parts: Sequence[Encoded], processor: Processor, length: int) -> tuple[Tensor, Pictured]:
    """Put windows of text and documents with pictures into sequences of one length, text first."""
    if not parts:
        return text_NL, plain(text_NL)
    shown_NL, pictured = together(parts, processor, length)
    return torch.cat([text_NL, shown_NL]), joined([plain(text_NL), pictured])
