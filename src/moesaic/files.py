"""JSON and YAML files: written whole or not at all, and read with a clear word where they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError, StorageError, WorkError

WRITING = ".writing"
"""What the name of a file ends in while it is not whole."""
AGAIN = "download it again, or copy it from where it was made"


def read_json(path: Path, way_out: str = AGAIN) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8-sig")), path, "JSON object", way_out)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "JSON object", error, way_out) from error


def read_yaml(path: Path, way_out: str = AGAIN) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8-sig")), path, "YAML mapping", way_out)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, "YAML mapping", error, way_out) from error


def _mapping(content: object, path: Path, what: str, way_out: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"'{path}' is no {what} but {type(content).__name__}; {way_out}")
    return content


def _damaged(path: Path, what: str, error: Exception, way_out: str) -> InputError:
    if isinstance(error, OSError):
        return InputError(f"'{path}' cannot be read ({error.strerror or error}); {way_out}")
    reason = " ".join(str(error).split())[:200] or "too deep"
    return InputError(f"'{path}' is no {what} ({reason}); {way_out}")


def to_json(values: Mapping[str, object], indent: int | None = None) -> str:
    """Write JSON as the standard has it, without NaN and infinity.

    Raises:
        WorkError: a number is not finite.
    """
    try:
        return json.dumps(values, indent=indent, allow_nan=False)
    except ValueError as error:
        raise WorkError(f"a result is not finite: {', '.join(_not_finite(values)) or error}") from error


def _not_finite(value: object, name: str = "") -> list[str]:
    """Name the numbers in a result that are NaN or infinite."""
    if isinstance(value, Mapping):
        inner = [(f"{name}.{key}" if name else str(key), inside) for key, inside in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{name}.{number}", inside) for number, inside in enumerate(value)]
    else:
        odd = isinstance(value, float) and value - value != 0
        return [f"{name} {value}"] if odd else []
    return [found for key, inside in inner for found in _not_finite(inside, key)]


def write_json(path: Path, values: Mapping[str, object], indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        WorkError: a number is not finite.
        StorageError: it cannot be written.
    """
    content = to_json(values, indent) + "\n"
    write_whole(path, lambda partial: partial.write_text(content, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, then give it its own: the file is whole or absent.

    It may be read by whom the umask says, whatever `write` thinks of that (safetensors lets the owner alone).

    Raises:
        StorageError: it cannot be written, as when the disk is full; what was there before stays.
    """
    partial = path.with_name(path.name + WRITING)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        partial.replace(path)
    except Exception as error:  # safetensors and torch have types of their own for a full disk
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise StorageError(
            f"cannot write '{partial}' ({error}); {free / 1e9:.2f} GB are free. What is finished is kept: make room "
            "and run the same command again"
        ) from error
