"""Documents as a model sees them: prompts, answers, and chats by the model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import InputError, first_line
from .documents import BLANK_LINE, Document, Message
from .prompts import sources_for

FIXED_DATE = "{%- macro strftime_now(format) -%}01 January 2025{%- endmacro -%}"
"""Before a template that writes today's date: the same text gives the same tokens on every day."""


class Piece(NamedTuple):
    """A piece of a text."""

    text: str
    scored: bool
    """Whether it counts in a loss: no prompt does."""
    ends: bool = False
    """Whether the end-of-text token follows."""


def pieces(document: Document, tokenizer: Any, opening: str) -> list[Piece]:
    """Cut a document where that which counts in a loss begins and ends.

    A text counts whole, and a blank line ends it. Of a prompt and its response the latter counts, and so does the
    end-of-text token after it. Of a chat the assistant's turns count; where the model has no chat template its turns
    are joined by blank lines, and the end-of-text token follows an answer that is the last.

    Args:
        document: what to cut.
        tokenizer: the model's.
        opening: what the tokenizer puts before any text, which a chat template may write too: it is taken off.

    Raises:
        InputError: the chat template refuses the chat.
    """
    if document.messages:
        return templated(document, tokenizer, opening) if tokenizer.chat_template else joined(document.messages)
    if prompt := document.prompt_characters:
        return [Piece(document.text[:prompt], False), Piece(document.text[prompt:], True, ends=True)]
    return [Piece(document.text + BLANK_LINE, True)]


def joined(messages: Sequence[Message]) -> list[Piece]:
    """Join the turns of a chat by blank lines."""
    found = [Piece(message.content + BLANK_LINE, message.role == "assistant") for message in messages]
    if messages[-1].role == "assistant":
        found[-1] = Piece(messages[-1].content, True, ends=True)
    return found


def takes_chats(tokenizer: Any, rows: int) -> bool:
    """Tell whether a model can be shown a question and its answer by its own template.

    It cannot where it has no template, where the template refuses them, or writes tokens without an embedding.

    Args:
        tokenizer: the model's.
        rows: of the model's embeddings.
    """
    if not tokenizer.chat_template:
        return False
    try:
        text = rendered([Message("user", "a"), Message("assistant", "b")], tokenizer, "")
    except Exception:  # a template is a program, and may raise anything
        return False
    return max(tokenizer(text, add_special_tokens=False)["input_ids"], default=0) < rows


def default_sources(tokenizer: Any, rows: int, use: str | None = None) -> tuple[str, ...]:
    """Name the text that a model is calibrated on where none is named, by what it is for (None: all of its kind)."""
    return sources_for(use, takes_chats(tokenizer, rows))


def templated(document: Document, tokenizer: Any, opening: str) -> list[Piece]:
    """Write a chat by the model's template, and find the assistant's turns in it.

    A turn is what the chat up to it has more than the one before it, opened for an answer. Where the template writes
    earlier turns differently once others follow (without their thoughts), only the last one counts.
    """
    messages = document.messages
    try:
        whole = rendered(messages, tokenizer, opening)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(
            f"the model's chat template refuses a chat of '{document.domain}' ({first_line(error)}); leave out the one "
            f"that begins with {document.text[:40]!r}"
        ) from error
    found, done = [], 0
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start, end = turn(messages[: number + 1], tokenizer, opening, whole)
        if done <= start < end:
            found += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
            done = end
    return [*found, Piece(whole[done:], False)]


def turn(messages: Sequence[Message], tokenizer: Any, opening: str, whole: str) -> tuple[int, int]:
    """Find where the last of some messages begins and ends in the whole chat; (0, 0): it is written differently."""
    try:
        after = rendered(messages, tokenizer, opening)
        before = rendered(messages[:-1], tokenizer, opening) if len(messages) > 1 else ""
        opened = rendered(messages[:-1], tokenizer, opening, opened=True) if len(messages) > 1 else ""
    except Exception:  # some templates refuse a part of a chat that they take whole
        return 0, 0
    start = next((i for i, (a, b) in enumerate(zip(opened, after, strict=False)) if a != b), len(opened))
    return (start, len(after)) if whole.startswith(after) and start >= len(before) else (0, 0)


def rendered(messages: Sequence[Message], tokenizer: Any, opening: str, opened: bool = False) -> str:
    """Write a chat by the model's template, `opened` for an answer or not, on one day for all days."""
    turns = [turn_of(message) for message in messages]
    own, options = tokenizer.chat_template, {}
    if isinstance(own, str) and "strftime_now" in own:
        options["chat_template"] = FIXED_DATE + own
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened, **options)
    return text.removeprefix(opening)


def turn_of(message: Message) -> dict[str, object]:
    """Write a turn as chat templates take it: its pictures, if any, before its text."""
    if not message.pictures:
        return {"role": message.role, "content": message.content}
    text = [{"type": "text", "text": message.content}] if message.content else []
    return {"role": message.role, "content": [{"type": "image"}] * message.pictures + text}
