"""Documents, and the rows that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError

TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations")
PAIR_KEYS = (("prompt", "response"), ("prompt", "completion"))
TURN_KEYS = (("instruction", "output"), ("question", "answer"))
KEYS = frozenset({*TEXT_KEYS, *CHAT_KEYS, *(key for pair in PAIR_KEYS + TURN_KEYS for key in pair), "input"})
"""The fields of rows that are read."""
EXPECTED = (
    "text in 'text' or 'content', 'prompt' with 'response' or 'completion', 'instruction' with 'output', 'question' "
    "with 'answer', or the turns of a chat in 'messages' or 'conversations'"
)
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool",
}  # fmt: skip
"""Of a chat's turn, by the names that files give them."""
BLANK = "\n\n"
SURROGATE = re.compile("[\ud800-\udfff]")


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A text and the domain it belongs to."""

    text: str
    """Of a chat: what is said, joined by blank lines."""
    domain: str
    prompt_characters: int = 0
    """How many of them a prompt has, which training gives and does not ask for."""
    messages: tuple[Message, ...] = ()
    """The turns, if it is a chat."""


def document(row: object, domain: str, where: str) -> Document:
    """Make the document of a row: of its chat, else its prompt and answer, else its text.

    An instruction or question and its answer are a chat of two turns. A prompt and its response are one text as it
    stands.

    Args:
        row: a text, or an object with some of `KEYS`.
        domain: what it belongs to.
        where: its file and line, for errors.

    Raises:
        InputError: it is something else.
    """
    if isinstance(row, str):
        return Document(clean(row), domain)
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {kind(row)}, not a JSON object; expected {EXPECTED}")
    for key in CHAT_KEYS:
        if row.get(key) is not None:
            return chat(turns(row[key], f"{where}: '{key}'"), domain)
    for keys in PAIR_KEYS:
        prompt, response = (row.get(key) for key in keys)
        if isinstance(prompt, str) and isinstance(response, str):
            prompt = clean(prompt)
            return Document(prompt + clean(response), domain, len(prompt))
    for keys in TURN_KEYS:
        asked, answer = (row.get(key) for key in keys)
        if isinstance(asked, str) and isinstance(answer, str):
            more = row.get("input") if keys[0] == "instruction" else None
            asked = BLANK.join((asked, more)) if isinstance(more, str) and more.strip() else asked
            return chat((Message("user", clean(asked)), Message("assistant", clean(answer))), domain)
    for key in TEXT_KEYS:
        if isinstance(row.get(key), str):
            return Document(clean(row[key]), domain)
    found = ", ".join(f"{key!r} ({kind(value)})" for key, value in row.items())
    raise InputError(f"{where} is a JSON object with {found[:100] or 'nothing'}; expected {EXPECTED}")


def chat(messages: tuple[Message, ...], domain: str) -> Document:
    """Make the document of a chat."""
    return Document(BLANK.join(message.content for message in messages), domain, messages=messages)


def turns(value: object, where: str) -> tuple[Message, ...]:
    """Read a chat's turns: a list of `{role, content}`, or of `{from, value}`.

    Raises:
        InputError: it is not that, or more than text.
    """
    if not isinstance(value, list):
        raise InputError(f"{where} is {kind(value)}; expected a list of turns {{role, content}}")
    return tuple(_turn(turn, f"{where}, turn {number},") for number, turn in enumerate(value, 1))


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where} is {kind(turn)}; expected an object {{role, content}}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where} is said by {repr(role)[:40]}; expected one of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise InputError(f"{where} calls tools, which is not read; leave such rows out")
    content = turn.get("content", turn.get("value"))
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return Message(ROLES[role], "".join(_part(part, where) for part in parts))


def _part(part: object, where: str) -> str:
    found = part.get("type") if isinstance(part, Mapping) else kind(part)
    text = part.get("text") if isinstance(part, Mapping) else None
    if found != "text":
        raise InputError(f"{where} holds {repr(found)[:40]}; only text is read: leave such rows out")
    if not isinstance(text, str):
        raise InputError(f"{where} has {kind(text)} for its content; expected text")
    return clean(text)


def clean(text: str) -> str:
    """Put U+FFFD for halves of surrogate pairs, which JSON can write and no text can hold."""
    return SURROGATE.sub("\ufffd", text)


def kind(value: object) -> str:
    """Name what a JSON value is."""
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    names = {"int": "a number", "float": "a number", "list": "a list", "dict": "an object", "str": "text"}
    return names.get(type(value).__name__, type(value).__name__)
