"""Calibration and evaluation text (bundled, .txt, .jsonl, `datasets` names) and token windows of it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

TEXT_KEYS = ("text", "content")
PAIR_KEYS = ("prompt", "response")
DATASET_ROWS = 2_000
SPARE = 8
CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class Document:
    """A text and the domain it belongs to."""

    text: str
    domain: str
    prompt_characters: int = 0
    """How many of them a prompt has, which training gives and does not ask for."""


Window = tuple[list[int], list[bool]]
"""Tokens, and whether each counts in a loss."""


def bundled(name: str) -> list[Document]:
    """Read the bundled `calibration` (1 MB) or `heldout` (0.16 MB) text of six domains; no document is in both."""
    lines = (files("moesaic") / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Document(**json.loads(line)) for line in lines]


def read_documents(sources: Sequence[str]) -> list[Document]:
    """Read the documents of files or `datasets` names, each source one domain; the bundled text when there are none.

    Raises:
        InputError: a missing, empty or malformed file, or a dataset that cannot be had.
    """
    if not sources:
        return bundled("calibration")
    read = [_read(source) for source in sources]
    stems = Counter(documents[0].domain for documents in read)
    return [
        replace(document, domain=source) if stems[document.domain] > 1 else document
        for source, documents in zip(sources, read, strict=True)
        for document in documents
    ]


def _read(source: str) -> list[Document]:
    """Read a source's documents, of the domain that its name says."""
    path = Path(source).expanduser()
    if path.is_file():
        plain = path.suffix not in (".jsonl", ".json")
        found = [Document(read_text(path), path.stem)] if plain else list(_jsonl(path))
    elif path.suffix or path.exists():
        raise InputError(f"no text file '{source}'")
    else:
        found = _dataset(source, path.stem)
    found = [document for document in found if document.text.strip()]
    if not found:
        raise InputError(f"'{source}' holds no text")
    return found


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _document(json.loads(line), path.stem)
        except (json.JSONDecodeError, StopIteration, AttributeError):
            raise InputError(
                f"{path}:{number} is not a JSON object with a 'text' field, or with 'prompt' and 'response'"
            ) from None


def _document(row: dict[str, Any], domain: str) -> Document:
    """Make a document of a row with one of `TEXT_KEYS`, or with both of `PAIR_KEYS`; else StopIteration."""
    if all(isinstance(row.get(key), str) for key in PAIR_KEYS):
        return Document(row["prompt"] + row["response"], domain, len(row["prompt"]))
    return Document(next(row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), domain)


def _dataset(name: str, domain: str) -> list[Document]:
    try:
        from datasets import load_dataset  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError(
            f"no text file '{name}'; to read it as a dataset from the hub, install moesaic[datasets]"
        ) from None
    try:
        rows: Any = load_dataset(name, split="train", streaming=True)
        return [_document(row, domain) for row in islice(rows, DATASET_ROWS)]
    except StopIteration:
        raise InputError(
            f"dataset '{name}' has no column {' or '.join(TEXT_KEYS)}, nor both of {' and '.join(PAIR_KEYS)}"
        ) from None
    except Exception as error:  # datasets raises many unrelated types for what cannot be had
        raise InputError(f"'{name}' is no text file, and no dataset could be had by that name: {error}") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file's text.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text ({error}); convert it") from error


def text_hash(documents: Sequence[Document]) -> str:
    """Hash all texts in order: SHA-256."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()


def bos(tokenizer: Any) -> list[int]:
    """List the tokens that the tokenizer puts before any text: its BOS where the model expects one, else nothing."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def by_domain(documents: Sequence[Document]) -> list[list[Document]]:
    """Group documents by domain, domains in the order in which they first appear."""
    domains: dict[str, list[Document]] = {}
    for document in documents:
        domains.setdefault(document.domain, []).append(document)
    return list(domains.values())


def token_windows(documents: Sequence[Document], tokenizer: Any, tokens: int | None, window: int) -> Tensor:
    """Cut documents into windows as `labelled_windows` does, without their domains: int64 [N, window]."""
    return labelled_windows(documents, tokenizer, tokens, window)[0]


def labelled_windows(
    documents: Sequence[Document], tokenizer: Any, tokens: int | None, window: int
) -> tuple[Tensor, Tensor]:
    """Cut documents into windows of packed text, and tell the domain of each.

    Every domain gives the same number of windows, in turn; domains are numbered as they first appear.

    A domain's windows are spread evenly over its text: many documents say more about a model than long ones. Every
    window opens with the tokenizer's BOS where the model expects one, so that attention sinks are where they will be
    in use.

    Args:
        documents: the text.
        tokenizer: the model's.
        tokens: how many in all, `tokens // window` windows; None: as many windows as every domain has.
        window: tokens in a window.

    Returns:
        Windows, int64 [N, window], and the number of each one's domain, int64 [N].

    Raises:
        InputError: fewer tokens are asked for than one window holds, or than the text has.
    """
    if tokens is not None and tokens < window:
        raise InputError(f"{tokens} tokens are less than one window of {window}; raise --tokens or lower --window")
    start = bos(tokenizer)
    wanted = sys.maxsize if tokens is None else tokens // window
    cut = [packed_windows(texts, tokenizer, start, window - len(start), wanted) for texts in by_domain(documents)]
    if tokens is None:
        cut = [windows for windows in cut if windows]
        wanted = max(1, min(map(len, cut), default=0) * len(cut))
    share = shares(list(map(len, cut)), wanted)
    if sum(share) < wanted:
        have = sum(map(len, cut)) * window
        raise InputError(
            f"the text holds {have} tokens in windows of {window}, {tokens or window} are needed; give more text or "
            "ask for fewer or shorter windows"
        )
    even = [[w[i * len(w) // n] for i in range(n)] for w, n in zip(cut, share, strict=True)]
    turns = [(d, window) for turn in zip_longest(*even) for d, window in enumerate(turn) if window is not None]
    return torch.tensor([ids for _, (ids, _) in turns]), torch.tensor([d for d, _ in turns])


def shares(available: list[int], wanted: int) -> list[int]:
    """Choose how many windows each domain gives: as equal as they allow, `wanted` in all (or all there are)."""
    share = [0] * len(available)
    while sum(share) < wanted and share != available:
        for i, most in enumerate(available):
            if share[i] < most and sum(share) < wanted:
                share[i] += 1
    return share


def packed_windows(
    documents: Sequence[Document], tokenizer: Any, start: list[int], body: int, wanted: int
) -> list[Window]:
    """Cut documents, one after the other, into windows of `start` + `body` tokens.

    A response ends with the end-of-text token, which counts too; other documents end with a blank line. Of much text
    only evenly spaced documents are tokenised, one for each window at least and several times what is wanted.
    """
    enough = SPARE * wanted * body * CHARACTERS_PER_TOKEN
    step = max(1, min(sum(len(document.text) for document in documents) // enough, len(documents) // wanted))
    while step > 1 and sum(len(document.text) for document in documents[::step]) < enough:
        step //= 2  # those that are met are the short ones
    ids: list[int] = []
    counts: list[bool] = []
    end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def add(text: str, scored: bool, end: Sequence[int] = ()) -> None:
        found = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
        ids.extend(found)
        counts.extend([scored] * len(found))

    for document in documents[::step]:
        if prompt := document.prompt_characters:
            add(document.text[:prompt], False)
            add(document.text[prompt:], True, end_of_text)
        else:
            add(document.text + "\n\n", True)
    cut = range(0, len(ids) // body * body, body)
    return [(start + ids[i : i + body], [False] * len(start) + counts[i : i + body]) for i in cut]
