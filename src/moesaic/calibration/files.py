"""Files of text, whatever their names say: UTF-8, gzip or not; what is no text is refused by name."""

from __future__ import annotations

import gzip
import zlib
from os.path import expanduser
from pathlib import Path

from ..errors import InputError

READ = "plain text (.txt, .md, code), rows (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), or one of these as .gz"
MOST_BYTES = 2**30
"""Of one file, decompressed; calibration and light training need some megabytes."""
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
SIGNATURES = {
    b"%PDF": "a PDF", b"PK\x03\x04": "a zip archive or office document", b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd", b"BZh91AY&SY": "compressed by bzip2", b"7z\xbc\xaf": "a 7z archive",
    b"{\\rtf": "rich text",
}  # fmt: skip
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
REFUSED = (
    ".7z", ".arrow", ".bin", ".bz2", ".doc", ".docx", ".epub", ".feather", ".gguf", ".htm", ".html", ".ipynb", ".npy",
    ".npz", ".odt", ".orc", ".pdf", ".pickle", ".pkl", ".pt", ".rtf", ".safetensors", ".tar", ".tgz", ".xls", ".xlsx",
    ".xml", ".xz", ".zip", ".zst",
)  # fmt: skip


def plain_name(path: Path) -> Path:
    """Drop `.gz`: `rows.JSONL.gz` is `rows.JSONL`."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def suffix_of(path: Path) -> str:
    """Say which suffix decides a file's form: the last one but `.gz`, in small letters."""
    return plain_name(path).suffix.lower()


def local(name: str) -> Path:
    """Make a path of a name, `~` opened where there is such a home."""
    return Path(expanduser(name))


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed where it is gzip.

    Raises:
        InputError: its name or its first bytes say that it is no text, it is damaged, or larger than `MOST_BYTES`.
    """
    if suffix_of(path) in REFUSED:
        raise InputError(
            f"'{path}' is named {suffix_of(path)}, which is not read; save its text as .txt; read are {READ}"
        )
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
        if path.suffix.lower() == ".gz" and not packed:
            raise InputError(f"'{path}' is named .gz and is not compressed by gzip; give it its true name")
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{path}' cannot be read ({error}); give a whole and readable file") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"'{path}' has more than {MOST_BYTES >> 20} MiB of text; a part of it is enough: give that")
    for start, kind in SIGNATURES.items():
        if data.startswith(start):
            raise InputError(f"'{path}' is {kind}, not text; read are {READ}")
    return data


def decode(data: bytes, path: Path) -> str:
    """Decode UTF-8, without its byte order mark and with all line ends as they are.

    Raises:
        InputError: UTF-16, bytes that are not UTF-8, or binary.
    """
    for mark, name in WIDE.items():
        if data.startswith(mark):
            raise InputError(f"'{path}' is {name} text; save it as UTF-8: iconv -f {name} -t UTF-8 '{path}' > new.txt")
    if b"\0" in data:
        raise InputError(
            f"'{path}' holds zero bytes: it is binary, or UTF-16 without a mark; read are {READ}, in UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise InputError(f"'{path}' is not UTF-8 text ({reason}); convert it, e.g. with iconv") from error


def read_text(path: Path) -> str:
    """Read a file as the one text that it is, lines ended by newlines.

    Raises:
        InputError: it is no text in UTF-8.
    """
    return newlines(decode(read_bytes(path), path))


def newlines(text: str) -> str:
    """End lines by newlines, however they were ended."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
