"""Rows of data files, as their suffix or their content says."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .documents import EXPECTED, KEYS
from .files import MOST_BYTES, PARQUET, decode, newlines, read_bytes, suffix_of

JSON_SUFFIXES, TABLES = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
SNIFFED = 5
"""So many lines tell whether a text is JSON lines by another name."""
LONGEST_CELL = 2**31 - 1


class Row(NamedTuple):
    """A row of a file or data set."""

    where: str
    """File and line, for errors."""
    value: object


def read_rows(path: Path) -> str | Iterator[Row]:
    """Read a file: its rows, or the one text that it is.

    Raises:
        InputError: no text, a row that cannot be read, or Parquet without a reader of it.
    """
    data, suffix = read_bytes(path), suffix_of(path)
    if suffix == ".parquet" or (data.startswith(PARQUET) and data.endswith(PARQUET)):
        return parquet_rows(data, path)
    text = decode(data, path)
    if suffix in TABLES:
        return table_rows(text, path, TABLES[suffix])
    text = newlines(text)
    return json_rows(text, path) if suffix in JSON_SUFFIXES or is_json(text) else text


def parse_json(text: str, path: Path, line: int) -> object:
    """Parse JSON that begins at a line of a file.

    Raises:
        InputError: it is not JSON, or too deep or with too long a number to be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:
        reason = "a number of thousands of digits"
    raise InputError(f"{path}:{line} is not JSON that can be read ({reason}); mend or leave out that line")


def json_rows(text: str, path: Path) -> Iterator[Row]:
    """Read one JSON value a line, or the values of one array, or one object over several lines."""
    if re.match(r"\s*\[", text):
        values = parse_json(text, path, 1)
        yield from (Row(f"{path}, row {i}", v) for i, v in enumerate(values if isinstance(values, list) else [], 1))
        return
    with suppress(ValueError, RecursionError):
        yield Row(f"{path}:1", json.loads(text))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(f"{path}:{number}", parse_json(line, path, number))


def is_json(text: str) -> bool:
    """Tell whether a text is JSON lines, or an array, of objects with fields that are read here."""
    try:
        if re.match(r"\s*\{", text):
            first = [json.loads(line[0]) for line in islice(re.finditer(r"\S.*", text), SNIFFED)]
        else:
            first = json.loads(text) if re.match(r"\s*\[\s*\{", text) else []
    except (ValueError, RecursionError):
        return False
    return bool(first) and all(isinstance(row, dict) and KEYS & row.keys() for row in first[:SNIFFED])


def table_rows(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    """Read a table whose first line names its columns.

    Raises:
        InputError: no column that is read here, a quote that does not end, or a row of another length.
    """
    before = csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [name.strip() for name in next((cells for cells in lines if cells), [])]
        if header and not KEYS & set(header):
            raise InputError(f"{path}:1 names the columns {shown(header)}; expected {EXPECTED}")
        line = lines.line_num + 1
        for cells in lines:
            if cells and len(cells) != len(header):
                raise InputError(f"{path}:{line} has {len(cells)} cells, its first line {len(header)}; mend it")
            if cells:
                yield Row(f"{path}:{line}", dict(zip(header, cells, strict=True)))
            line = lines.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line} is no row of a table ({error}); mend it, or save the file anew") from None
    finally:
        csv.field_size_limit(before)


def parquet_rows(data: bytes, path: Path) -> Iterator[Row]:
    """Read the rows of a Parquet file, of the columns that are read here.

    Raises:
        InputError: pyarrow is not installed, the file is damaged or too large, or it has no such column.
    """
    try:
        from pyarrow import ArrowException  # pyrefly: ignore[missing-import]
        from pyarrow.parquet import ParquetFile  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError(f"'{path}' is Parquet; to read it: pip install 'moesaic[datasets]'") from None
    number = 0
    try:
        file = ParquetFile(io.BytesIO(data))
        names = list(file.schema_arrow.names)
        columns = [name for name in names if name in KEYS]
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        batches = file.iter_batches(columns=columns) if columns and size <= MOST_BYTES else ()
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", value)
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"'{path}' is no Parquet file that can be read ({reason}); save it anew") from error
    if not columns:
        raise InputError(f"'{path}' has the columns {shown(names)}; expected {EXPECTED}")
    if size > MOST_BYTES:
        raise InputError(f"'{path}' has more than {MOST_BYTES >> 20} MiB; a part of it is enough: give that")


def shown(names: list[str]) -> str:
    """List names for an error, on one line."""
    return repr(", ".join(names))[:100]
