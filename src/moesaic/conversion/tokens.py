"""The text of a conversion, as tokens.

Shapes: N sequences, L tokens in one, M opening tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import registry
from ..calibration.chat import default_sources
from ..calibration.documents import Document
from ..calibration.files import local
from ..calibration.prompts import own_text, sources_for
from ..calibration.sinks import opening_tokens
from ..calibration.text import bundled, text_hash
from ..calibration.windows import labelled_windows, token_windows
from ..config import ConvertConfig
from ..errors import InputError
from ..models.layerwise import LayerwiseModel
from ..models.pictured import Pictured
from ..models.tokenizer import load_tokenizer
from ..plan import Plan
from ..progress import Progress
from ..serving.own_text import Bundle, bundled_text, count_domains, documents_of

VALIDATION = 16


@dataclass(frozen=True, kw_only=True)
class ConversionTokens:
    """The text of a conversion, as tokens; int64."""

    calibration_NL: Tensor
    """What layers are fitted to."""
    domain_N: Tensor
    """The number of each calibration window's domain."""
    opening_M1: Tensor
    """Tokens that open a text, which become attention sinks: a window has one, too few to learn from."""
    validation_NL: Tensor
    """Every `VALIDATION`-th calibration window: nothing is fitted to it but the temperature of the whole model."""
    held_out_NL: Tensor
    """Bundled text on which the converted model is compared with the dense one."""
    text_sha256: str
    """Of the calibration text."""
    pictured: Mapping[str, Pictured] = field(default_factory=dict)
    """What comes with `calibration`, `validation` and `held_out`, by these names, in a vision-language model."""

    held_out_pictures: str = ""
    """The name of the bundled ones in `held_out_NL`; empty for a model of text."""

    def all(self) -> Tensor:
        """Put all tokens in one row."""
        parts = (self.calibration_NL, self.validation_NL, self.held_out_NL, self.opening_M1)
        return torch.cat([part.flatten() for part in parts])

    def fingerprint(self) -> str:
        """Hash all tokens: SHA-256."""
        digest = hashlib.sha256(self.all().numpy().data)
        for pictured in self.pictured.values():
            for tensor in pictured.tensors():
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def scored(self, text: str, tokens_NL: Tensor) -> Tensor:
        """Tell which of a text's tokens count in a loss when they are predicted, bool [N, L - 1]: all, or answers."""
        found = self.pictured.get(text)
        return torch.ones_like(tokens_NL[:, 1:], dtype=torch.bool) if found is None else found.is_scored_NL[:, 1:]

    def count(self) -> int:
        """Count the tokens whose hidden states are kept, on both paths where there are two."""
        once = self.calibration_NL.numel() + self.validation_NL.numel()
        return once + 2 * self.held_out_NL.numel() + 2 * self.opening_M1.numel()


def with_text(config: ConvertConfig, layerwise: LayerwiseModel, tokenizer: PreTrainedTokenizerBase) -> ConvertConfig:
    """Name the calibration text where a configuration says only what the model is for, or nothing.

    Raises:
        InputError: it says both.
    """
    if config.calibration and config.for_use:
        raise InputError(
            f"--for-use {config.for_use} chooses the calibration text where none is named, and --calibration "
            f"{config.calibration[0]} names it; drop one"
        )
    default = sources_for(config.for_use, chats=False)
    if not layerwise.takes_pictures:
        default = default_sources(tokenizer, layerwise.config.vocab_size, config.for_use)
    sources = config.calibration or default
    return config.model_copy(update={"calibration": sources, "for_use": None})  # as it can be read again


def check_domains(config: ConvertConfig, plan: Plan) -> None:
    """Check that the calibration text has a domain for each expert.

    Raises:
        InputError: the partition needs more domains.
    """
    domains = count_domains(config.calibration)
    if domains < plan.num_experts:
        raise InputError(
            f"partition '{registry.text('partition', config.partition)}' needs a domain of text for each expert: "
            f"{plan.num_experts}, found {domains}; give each domain a file of its own with --calibration, or ask for "
            "fewer experts"
        )


def tokenise(source: Path, config: ConvertConfig, window: int) -> ConversionTokens:
    """Cut calibration and held-out text into windows of tokens; the same text is not tokenised twice in a process.

    Raises:
        InputError: a file that is missing or not text, or less text than is asked for.
    """
    opening = config.first_tokens if registry.text("recovery", config.recovery) != "none" else 0
    return _tokenise(source, CalibrationText.of(config), window, opening, config.held_out_tokens)


class CalibrationText(NamedTuple):
    """What text a conversion is calibrated on."""

    sources: tuple[str, ...]
    stamps: tuple[int, ...]
    """When each file was changed last, ns."""
    tokens: int
    window: int
    seed: int
    """Of text that the model writes."""
    device: str
    """Where it writes that."""

    @classmethod
    def of(cls, config: ConvertConfig) -> CalibrationText:
        """Find what a configuration asks for."""
        sources = config.calibration
        own = [own_text(name) for name in sources]
        paths = [found.file if found else local(name) for name, found in zip(sources, own, strict=True)]
        stamps = tuple(path.stat().st_mtime_ns if path and isfile(path) else 0 for path in paths)
        return cls(sources, stamps, config.tokens, config.window, config.seed if any(own) else 0, config.device)

    def read(self, source: Path, bundle: Bundle = bundled_text, progress: Progress | None = None) -> list[Document]:
        """Read the documents, those that the model writes after it has written them."""
        return documents_of(self.sources, source, self.tokens, self.seed, self.device, bundle, progress, self.window)


@lru_cache(maxsize=4)
def _tokenise(
    source: Path,
    text: CalibrationText,
    window: int,
    opening: int | None,
    held_out: int,
) -> ConversionTokens:
    tokenizer, documents = load_tokenizer(source), text.read(source)
    tokens_NL, domain_N = labelled_windows(documents, tokenizer, text.tokens, window)
    spare = torch.arange(len(tokens_NL)) % VALIDATION == VALIDATION - 1
    return ConversionTokens(
        calibration_NL=tokens_NL[~spare],
        domain_N=domain_N[~spare],
        opening_M1=opening_tokens(tokens_NL[~spare], tokenizer, opening),
        validation_NL=tokens_NL[spare],
        held_out_NL=token_windows(bundled("heldout"), tokenizer, held_out, window),
        text_sha256=text_hash(documents),
    )
