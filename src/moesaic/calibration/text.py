"""Calibration, training and evaluation text: bundled, files, `datasets` names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from os.path import exists, isdir, isfile  # of a name that no file can have they say no
from pathlib import Path

from ..errors import InputError
from .documents import Document, document
from .files import local, plain_name
from .rows import Row, read_rows

DATASET_ROWS = 2_000


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
        replace(one, domain=source) if stems[one.domain] > 1 else one
        for source, documents in zip(sources, read, strict=True)
        for one in documents
    ]


def _read(source: str) -> list[Document]:
    """Read a source's documents, of the domain that its name says."""
    path = local(source)
    if isfile(path):
        found = read_file(path)
    elif isdir(path):
        raise InputError(f"no text file '{source}': it is a folder; give the files in it, each by its name")
    elif path.suffix or exists(path):
        raise InputError(f"no text file '{source}'")
    else:
        found = _dataset(source, path.stem)
    found = [one for one in found if one.pictures or (one.text and not one.text.isspace())]
    if not found:
        raise InputError(f"'{source}' holds no text")
    return found


def read_file(path: Path) -> list[Document]:
    """Read a file's documents, also those without text: one of a plain text, one of each row of others.

    Raises:
        InputError: it is neither, or a row stands for no document.
    """
    read, domain = read_rows(path), plain_name(path).stem
    if isinstance(read, str):
        return [Document(read, domain)]
    return [document(row.value, domain, row.where, path.parent) for row in read]


def _dataset(name: str, domain: str) -> list[Document]:
    try:
        from datasets import load_dataset  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError(
            f"no text file '{name}'; to read it as a dataset from the hub, install moesaic[datasets]"
        ) from None
    try:
        rows: Iterable[object] = load_dataset(name, split="train", streaming=True)
        found = [Row(f"dataset '{name}', row {i}", row) for i, row in enumerate(islice(rows, DATASET_ROWS), 1)]
    except Exception as error:  # datasets raises many unrelated types for what cannot be had
        raise InputError(f"'{name}' is no text file, and no dataset could be had by that name: {error}") from error
    return [document(row.value, domain, row.where) for row in found]


def text_hash(documents: Sequence[Document]) -> str:
    """Hash all texts, chats and pictures in order: SHA-256."""
    digest = hashlib.sha256()
    for one in documents:
        text = json.dumps([message[:2] for message in one.messages]) if one.messages else one.text
        digest.update(text.encode() + b"\0")
        for picture in one.pictures:
            digest.update(picture.read_bytes() if picture.is_file() else b"")
    return digest.hexdigest()


def by_domain(documents: Sequence[Document]) -> list[list[Document]]:
    """Group documents by domain, domains in the order in which they first appear."""
    domains: dict[str, list[Document]] = {}
    for one in documents:
        domains.setdefault(one.domain, []).append(one)
    return list(domains.values())
