"""Documents, and the rows that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError

TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations")
PAIR_KEYS = (("prompt", "response"), ("prompt", "completion"))
TURN_KEYS = (("instruction", "output"), ("question", "answer"))
PICTURE_KEYS, VIDEO_KEYS = ("image", "images"), ("video", "videos")
KEYS = frozenset({
    *TEXT_KEYS, *CHAT_KEYS, *(key for pair in PAIR_KEYS + TURN_KEYS for key in pair), "input",
    *PICTURE_KEYS, *VIDEO_KEYS,
})  # fmt: skip
"""The fields of rows that are read."""
EXPECTED = (
    "text in 'text' or 'content', 'prompt' with 'response' or 'completion', 'instruction' with 'output', 'question' "
    "with 'answer', or the turns of a chat in 'messages' or 'conversations'; beside any of them 'image'"
)
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool",
}  # fmt: skip
"""Of a chat's turn, by the names that files give them."""
BLANK_LINE = "\n\n"
PLACE = "<image>"
"""Where a picture stands in the text of a row that has pictures, as in LLaVA's data."""
SURROGATE = re.compile("[\ud800-\udfff]")


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str
    pictures: int = 0
    """Before the text."""


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
    pictures: tuple[Path, ...] = ()
    """Files, in the order in which the turns show them."""
    share: float = 1.0
    """Of what is cut from several domains, how much is its domain's, relative to others."""


def document(row: object, domain: str, where: str, folder: Path = Path()) -> Document:
    """Make the document of a row: of its chat, else its prompt and answer, else its text.

    An instruction or question and its answer are a chat of two turns. A prompt and its response are one text as it
    stands, but with pictures two turns; a text with pictures is what is said of them.

    Args:
        row: a text, or an object with some of `KEYS`.
        domain: what it belongs to.
        where: its file and line, for errors.
        folder: what names of pictures start from.

    Raises:
        InputError: it is something else.
    """
    if isinstance(row, str):
        return Document(clean(row), domain)
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {kind(row)}, not a JSON object; expected {EXPECTED}")
    found = _document(row, domain, where)
    if found is None:
        keys = ", ".join(f"{key!r} ({kind(value)})" for key, value in row.items())
        raise InputError(f"{where} is a JSON object with {keys[:100] or 'nothing'}; expected {EXPECTED}")
    return with_pictures(found, row, where, folder)


def _document(row: Mapping[str, object], domain: str, where: str) -> Document | None:
    """Make the document of a row, without pictures that are beside it."""
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
            asked = BLANK_LINE.join((asked, more)) if isinstance(more, str) and more.strip() else asked
            return chat((Message("user", clean(asked)), Message("assistant", clean(answer))), domain)
    texts = (row[key] for key in TEXT_KEYS if isinstance(row.get(key), str))
    return next((Document(clean(str(text)), domain) for text in texts), None)


def picture_names(row: Mapping[str, object], where: str) -> list[str]:
    """Read the names of a row's pictures; none of a row without.

    Raises:
        InputError: a video, or no names of files; the message begins with `where`.
    """
    for key in VIDEO_KEYS:
        if row.get(key) is not None:
            raise InputError(
                f"{where} has a '{key}'; videos are not read: leave such rows out, or give single pictures"
            )
    names: list[str] = []
    for value in (row[key] for key in PICTURE_KEYS if row.get(key) is not None):
        several = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name for name in several):
            raise InputError(
                f"{where} has {kind(value)} for its pictures; expected the name of a file, or a list of some"
            )
        names += several
    return names


def with_pictures(found: Document, row: Mapping[str, object], where: str, folder: Path) -> Document:
    """Give a document the pictures of its row, where the turns show them or, where none does, before the first.

    Raises:
        InputError: a video, no names of files, or another number of pictures than of places for them.
    """
    names, messages = picture_names(row, where), found.messages
    if names and not messages:
        asked = Message("user", found.text[: found.prompt_characters])
        messages = (asked, Message("assistant", found.text[found.prompt_characters :]))
    if names:
        messages = tuple(_placed(message) for message in messages)
        if not any(message.pictures for message in messages):
            first = next((i for i, m in enumerate(messages) if m.role == "user"), 0)
            messages = tuple(m._replace(pictures=len(names)) if i == first else m for i, m in enumerate(messages))
    places = sum(message.pictures for message in messages)
    if places != len(names):
        raise InputError(
            f"{where} has {len(names)} picture{'s' * (len(names) != 1)} and {places} "
            f"place{'s' * (places != 1)} for them in its turns; give as many, in 'image' or 'images'"
        )
    if not names:
        return found
    return replace(chat(messages, found.domain), pictures=tuple(folder / name for name in names))


def _placed(message: Message) -> Message:
    """Take LLaVA's marks of pictures out of a turn, and count them."""
    marks = message.content.count(PLACE)
    return message._replace(content=message.content.replace(PLACE, "").strip(), pictures=message.pictures + marks)


def chat(messages: tuple[Message, ...], domain: str) -> Document:
    """Make the document of a chat."""
    said = (message.content for message in messages if message.content or not message.pictures)
    return Document(BLANK_LINE.join(said), domain, messages=messages)


def turns(value: object, where: str) -> tuple[Message, ...]:
    """Read a chat's turns: a list of `{role, content}`, or of `{from, value}`.

    Raises:
        InputError: it is not that, or more than text and places of pictures.
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
    pictures = sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
    texts = [part for part in parts if not (isinstance(part, Mapping) and part.get("type") == "image")]
    return Message(ROLES[role], "".join(_part(part, where) for part in texts), pictures)


def _part(part: object, where: str) -> str:
    found = part.get("type") if isinstance(part, Mapping) else kind(part)
    text = part.get("text") if isinstance(part, Mapping) else None
    if found != "text":
        raise InputError(f"{where} holds {repr(found)[:40]}; only text and 'image' are read: leave such rows out")
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
