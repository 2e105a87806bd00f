"""Calibration, training and evaluation text: bundled, files, `datasets` names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError

TEXT_KEYS = ("text", "content")
PAIR_KEYS = ("prompt", "response")
DATASET_ROWS = 2_000


@dataclass(frozen=True)
class Document:
    """A text and the domain it belongs to."""

    text: str
    domain: str
    prompt_characters: int = 0
    """How many of them a prompt has, which training gives and does not ask for."""


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


def by_domain(documents: Sequence[Document]) -> list[list[Document]]:
    """Group documents by domain, domains in the order in which they first appear."""
    domains: dict[str, list[Document]] = {}
    for document in documents:
        domains.setdefault(document.domain, []).append(document)
    return list(domains.values())
