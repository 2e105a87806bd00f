"""Sequences of text and pictures to train a vision-language model on, and those held out.

Shapes: N sequences, L tokens in one, S tokens of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..calibration.documents import Document
from ..calibration.mixture import held_out_pictures, mixed
from ..calibration.pictured import spread, together
from ..conversion.pictures import PICTURES_SHARE
from ..errors import InputError
from ..models.families import context_length
from ..models.processor import Processor
from ..results import PictureResult
from ..results.evaluation import perplexity_of
from .data import Samples

HELD_OUT = 8
"""One picture in so many, and one document of text, is held out at most."""


def make_pictured_samples(
    documents: Sequence[Document], processor: Processor, samples: int, window: int, held_out: int, seed: int,
    longest: int,
) -> tuple[Samples, Samples]:  # fmt: skip
    """Encode documents, text and pictures, half of the tokens each where there are both, in a random order of the seed.

    At most `samples` and about `held_out` sequences; no picture and no text is in both.

    Returns:
        Samples to train on, and those held out.

    Raises:
        InputError: fewer than two pictures, or a document with pictures of more than `longest` tokens.
    """
    text, shown = ([one for one in documents if bool(one.pictures) == has] for has in (False, True))
    names = list(dict.fromkeys(one.pictures[0] for one in shown))
    if len(names) < 2 and not text:
        raise InputError(f"{len(names)} picture(s) to train on; one at least is held out, so give two or more")
    apart = {names[-1], *names[HELD_OUT - 1 :: HELD_OUT]} if shown else set()
    others = [one for number, one in enumerate(text) if number % HELD_OUT != HELD_OUT - 1]
    seen = [one for one in shown if one.pictures[0] not in apart]
    train = _samples([*others, *seen], processor, samples, window, longest)
    unseen = [one for one in shown if one.pictures[0] in apart]
    held = _samples([*text[HELD_OUT - 1 :: HELD_OUT], *unseen], processor, held_out, window, longest)
    order_N = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.take(order_N), held


def _samples(documents: Sequence[Document], processor: Processor, samples: int, window: int, longest: int) -> Samples:
    """Encode about so many sequences of the kind of the first with a picture, or of `window` tokens of text."""
    shown = [one for one in documents if one.pictures]
    size = len(spread(shown[:1], processor, 1, longest)[0].tokens_L) if shown else window
    found = mixed(documents, processor, samples * size, window, longest, enough=False)
    made = Samples(found.tokens_NL, found.pictured.is_scored_NL, found.pictured)
    if not made.scored():
        raise InputError("no token of the data counts in the loss: pictures have no answers; give answers too")
    return made


@torch.no_grad()
def remeasured(model: PreTrainedModel, processor: Processor, known: PictureResult, held_out: int) -> PictureResult:
    """Measure a trained model's answers on the bundled held-out pictures, as the conversion measured them."""
    longest = context_length(model.config)
    parts = spread(
        held_out_pictures(known.held_out, processor, longest), processor, held_out // PICTURES_SHARE, longest
    )
    losses = []
    for part in parts:
        tokens_1L, pictured = together([part], processor, len(part.tokens_L))
        inputs = Samples(tokens_1L, pictured.is_scored_NL, pictured).inputs(model.device, model.dtype)
        logits_LV = model(input_ids=tokens_1L.to(model.device), **inputs, use_cache=False).logits[0, :-1]
        scored_L = part.is_scored_L[1:]
        target_S = part.tokens_L[1:][scored_L].to(model.device)
        losses.append(cross_entropy(logits_LV[scored_L].float(), target_S, reduction="none"))
    loss = torch.cat(losses).mean().item()
    return replace(known, perplexity=perplexity_of(loss), agreement=None)
