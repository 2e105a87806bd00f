"""Bytes of text that tokens stand for: models with different tokenizers share no token, but the text's bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from ..models.tokenizer import BYTE

METASPACE = "\u2581"
"""What SentencePiece writes for a blank."""


def text_bytes(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the UTF-8 bytes of the text that tokens stand for, parts of characters too; special tokens have none.

    `len(tokenizer.decode(ids).encode())` where every character lies within the tokens.
    """
    counts = Counter(ids)
    for special in tokenizer.all_special_ids:
        counts.pop(special, None)
    kinds = _decoders(tokenizer)
    if "ByteLevel" not in kinds and not kinds & {"ByteFallback", "Metaspace"}:
        return sum(count * len(str(tokenizer.decode([i])).encode()) for i, count in counts.items())
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    size = _byte_level if "ByteLevel" in kinds else _sentence_piece
    return sum(
        count * (len(added[i].encode()) if i in added else size(str(tokenizer.convert_ids_to_tokens(i))))
        for i, count in counts.items()
    )


def _byte_level(token: str) -> int:
    return len(token)  # one visible sign stands for each byte


def _sentence_piece(token: str) -> int:
    return 1 if BYTE.fullmatch(token) else len(token.replace(METASPACE, " ").encode())


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Name the kinds of what a fast tokenizer makes text with; of others nothing is known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    told = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in [told, *told.get("decoders", [])]}
