"""The tokenizer in a model's folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import InputError, first_line

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that is one byte, in SentencePiece's vocabularies."""
REPLACEMENT = "\ufffd"
"""What a part of a character is decoded to."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder.

    Raises:
        InputError: there is none, or transformers cannot read it.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # pyrefly: ignore[bad-assignment]
        return found
    except Exception as error:  # transformers and tokenizers raise many unrelated types for what a file may hold
        raise InputError(
            f"no usable tokenizer in '{folder}' ({first_line(error)}); put the model's tokenizer files there"
        ) from error


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bytes | None:
    """Give the bytes of a token, that may be a part of a character only; None where the tokenizer does not tell."""
    if REPLACEMENT not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token))
    if BYTE.fullmatch(name):
        return bytes.fromhex(name[3:5])
    signs = byte_signs()
    return bytes(signs[sign] for sign in name) if set(name) <= signs.keys() else None


@cache
def byte_signs() -> dict[str, int]:
    """Give the byte for each sign of byte-level tokenizers."""
    return {sign: byte for byte, sign in bytes_to_unicode().items()}


def decoded(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Decode what tokens add to the text of a prompt: its first blank too, which some decoders drop alone."""
    whole, before = (
        str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in ([*prompt, *tokens], prompt)
    )
    return whole[len(before) :]
