"""The text and pictures of a vision-language model's conversion, as tokens."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch

from .. import registry
from ..calibration.mixture import beside, bundled_both, held_out_name, held_out_pictures, mixed
from ..calibration.pictured import spread
from ..calibration.sinks import opening_tokens
from ..calibration.text import bundled, text_hash
from ..calibration.windows import token_windows
from ..config import ConvertConfig
from ..models.integrity import read_config
from ..models.processor import Processor
from .tokens import VALIDATION, CalibrationText, ConversionTokens

PICTURES_SHARE = 2
"""One in so many tokens of held-out data is in a sequence with a picture."""
log = logging.getLogger("moesaic")


def tokenise_pictures(source: Path, config: ConvertConfig, window: int) -> ConversionTokens:
    """Encode calibration and held-out data, text and pictures; the same is not encoded twice in a process.

    Where nothing is named, half of the tokens are of the bundled pictures and half of the bundled text. Held-out data
    are bundled text and bundled pictures, whatever is named.

    Raises:
        InputError: a file or picture that is missing or cannot be read, less text than is asked for, or no processor.
    """
    opening = config.first_tokens if registry.text("recovery", config.recovery) != "none" else 0
    return _tokenise(source, CalibrationText.of(config), window, opening, config.held_out_tokens)


@lru_cache(maxsize=2)
def _tokenise(
    source: Path,
    text: CalibrationText,
    window: int,
    opening: int | None,
    held_out: int,
) -> ConversionTokens:
    config = read_config(source)
    processor, longest = Processor(source, config), config.get_text_config().max_position_embeddings
    named = text.read(source, bundle=bundled_both)
    if not any(one.pictures for one in named):
        log.warning("calibrated on text alone: the errors by modality say what that costs on held-out pictures")
    found = mixed(named, processor, text.tokens, window, longest)
    spare = torch.arange(len(found.tokens_NL)) % VALIDATION == VALIDATION - 1
    half = held_out // PICTURES_SHARE
    held_name = held_out_name(config, processor, longest)
    held_parts = spread(held_out_pictures(held_name, processor, longest), processor, half, longest)
    length = max(window, *(len(part.tokens_L) for part in held_parts))
    held_text_NL = token_windows(bundled("heldout"), processor.tokenizer, max(length, half), length)
    held_NL, held_pictured = beside(held_text_NL, held_parts, processor, length)
    fitted_NL, fitted = found.tokens_NL[~spare], found.pictured.take(~spare)
    words_1T = fitted_NL[~fitted.is_padding_NL & ~fitted.is_image_NL][None]
    return ConversionTokens(
        calibration_NL=fitted_NL,
        domain_N=found.domain_N[~spare],
        opening_M1=opening_tokens(words_1T, processor.tokenizer, opening),
        validation_NL=found.tokens_NL[spare],
        held_out_NL=held_NL,
        text_sha256=text_hash(named),
        held_out_pictures=held_name,
        pictured={"calibration": fitted, "validation": found.pictured.take(spare), "held_out": held_pictured},
    )
