"""The text of each token, and what kind of text it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..models.tokenizer import REPLACEMENT

KINDS = ("word start", "word continuation", "number", "punctuation", "whitespace", "other")
JOINS = "'\u2019"
"""Letters after them go on with the word before: `don't`."""


class TokenText(NamedTuple):
    """What one token adds to the text."""

    text: str
    """Empty where its bytes are only the beginning of a character; that comes with the token that ends it."""
    kind: str


def token_kind(text: str, before: str = "") -> str:
    """Say what kind of text a token is, one of `KINDS`, by its first letter or digit.

    - `word start`: a letter that no letter stands before, as in ` the`, `(self`, `The`.
    - `word continuation`: a letter right after a letter of this or an earlier token, an apostrophe between them or not.
    - `number`: a digit, as in `3`, ` 1984`, `.5`.
    - `punctuation`: neither; any other visible sign, as in `,`, ` ==`, `});`.
    - `whitespace`: blanks, tabs and line ends alone.
    - `other`: nothing (part of a character's bytes), signs that are none of these, and special tokens, which
      `token_texts` knows by their numbers.

    Args:
        text: what the token adds.
        before: the text before it, at least two characters if there are.
    """
    if text.isspace():
        return "whitespace"
    first = next((i for i, sign in enumerate(text) if sign.isalpha() or sign.isnumeric()), None)
    if first is None:
        visible = any(sign.isprintable() and not sign.isspace() and sign != REPLACEMENT for sign in text)
        return "punctuation" if visible else "other"
    if not text[first].isalpha():
        return "number"
    earlier = (before + text[:first]).rstrip(JOINS)[-1:]
    return "word continuation" if earlier.isalpha() else "word start"


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[TokenText]:
    """Split a text by its tokens: each one's own part, joined they are the text.

    A token is decoded behind those before it, as blanks and characters of several bytes need.
    """
    special, found, said = set(tokenizer.all_special_ids), [], ""
    prefix = read = 0
    for i, token in enumerate(ids):
        before, now = (_decode(tokenizer, ids[prefix:end]) for end in (read, i + 1))
        text = "" if now.endswith(REPLACEMENT) else now[len(before) :]
        if text:
            prefix, read = read, i + 1
        kind = "other" if token in special else token_kind(text, said)
        found.append(TokenText(text, kind))
        said = (said + text)[-2:] if kind != "other" else said
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""
