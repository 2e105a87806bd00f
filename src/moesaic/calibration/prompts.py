"""Prompts for a model that is to write text itself, and the names of text that is not in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..registry import nearest
from .documents import CHAT_KEYS, PAIR_KEYS, TEXT_KEYS, TURN_KEYS, Document, document
from .files import local, plain_name
from .rows import read_rows

BUNDLED, ANSWERS, OWN = "bundled", "answers", "self"
"""In place of a file's name: the bundled text, bundled answers to the prompts, and what the model writes itself."""
KINDS = ("code", "chat", "text")
"""Of the bundled prompts."""
ASKING = tuple(dict.fromkeys((*(keys[0] for keys in PAIR_KEYS + TURN_KEYS), *TEXT_KEYS, *CHAT_KEYS)))
"""Fields of a row that hold what a model is asked."""
UNANSWERED = {"response": "", "output": "", "answer": ""}


class OwnText(NamedTuple):
    """Which prompts a model is to answer: `self`, `self:code`, `self:prompts.jsonl`."""

    kind: str | None
    """Of the bundled prompts; None: all, or those of a file."""
    file: Path | None


def own_text(source: str) -> OwnText | None:
    """Read the name of text that a model writes itself; None: it names something else.

    Raises:
        InputError: neither a kind of prompts nor a file.
    """
    name, _, what = source.partition(":")
    if name != OWN:
        return None
    if what in ("", *KINDS):
        return OwnText(what or None, None)
    if (file := local(what)).is_file():
        return OwnText(None, file)
    raise InputError(
        f"'{source}': no kind of prompts and no file '{what}'; give {OWN}, one of "
        f"{', '.join(f'{OWN}:{kind}' for kind in KINDS)}, or {OWN}:FILE with a prompt a line.{nearest(what, KINDS)}"
    )


def bundled_answers(source: str) -> list[Document] | None:
    """Read bundled answers to the bundled prompts, `answers` or `answers:code`; None: the source is no such name.

    Qwen2.5-Coder-0.5B-Instruct wrote them, as `self` makes a model write.

    Raises:
        InputError: there is no such kind of prompts.
    """
    name, _, kind = source.partition(":")
    if name != ANSWERS:
        return None
    if kind not in ("", *KINDS):
        known = ", ".join(f"{ANSWERS}:{kind}" for kind in KINDS)
        raise InputError(f"'{source}': no kind of answers; give {ANSWERS}, or one of {known}.{nearest(kind, KINDS)}")
    lines = (files("moesaic") / "data" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [document(row, row["domain"], ANSWERS) for row in rows if kind in ("", row["domain"])]


def sources_for(use: str | None, chats: bool) -> tuple[str, ...]:
    """Name the calibration text of a model that is for something; nothing stands for the bundled text alone.

    Args:
        use: `code`, `chat` or `text`; None: all that a model of its kind is for.
        chats: whether the model has a chat template.
    """
    if use is None:
        return (BUNDLED, ANSWERS) if chats else ()
    return (BUNDLED,) if use == "text" else (BUNDLED, f"{ANSWERS}:{use}")


def read_prompts(own: OwnText) -> list[Document]:
    """Read prompts: documents without their answers, each of the domain that its kind or file names.

    A question or instruction, and a chat up to its last answer, go through the chat template; a `prompt` or text is
    continued as it stands.

    Raises:
        InputError: a file without prompts, or a row that is none.
    """
    if own.file is None:
        lines = (files("moesaic") / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [prompt(row, row["kind"], OWN) for row in rows if own.kind in (None, row["kind"])]
    read, domain = read_rows(own.file), plain_name(own.file).stem
    if isinstance(read, str):
        found = [Document(line.strip(), domain) for line in read.split("\n") if line.strip()]
    else:
        found = [prompt(row.value, domain, row.where) for row in read]
    if not found:
        raise InputError(f"'{own.file}' holds no prompts; write one a line")
    return found


def prompt(row: object, domain: str, where: str) -> Document:
    """Make the prompt of a row: what stands before the answer, if it has one.

    Raises:
        InputError: nothing stands before an answer, or a picture does.
    """
    if isinstance(row, Mapping) and not any(row.get(key) for key in ASKING):
        keys = ", ".join(map(repr, row))[:100] or "nothing"
        raise InputError(f"{where} is a JSON object with {keys}; expected one of {', '.join(map(repr, ASKING))}")
    found = document({**UNANSWERED, **row} if isinstance(row, Mapping) else row, domain, where)
    if found.pictures:
        raise InputError(f"{where} has a picture; a model writes text of prompts of text: leave such rows out")
    turns = list(found.messages)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    text = found.text[: found.prompt_characters] if found.prompt_characters else found.text
    if not (turns if found.messages else text.strip()):
        raise InputError(f"{where} has nothing before the answer; give a prompt, a question or a chat")
    return replace(found, text=text, prompt_characters=0, messages=tuple(turns))
