"""Folders that moesaic works in beside its output: told from a user's own, and kept to one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InputError
from ..files import WRITING
from ..given import place

LOCK = ".moesaic.lock"
INNER = "moesaic"
"""The folder in `OUT.partial` where what does not hold as a stock architecture is written in our own format."""
MARKS = {LOCK, "state.json", "fingerprint.json", "moesaic.yaml", "frontier.json"}
"""Files by which a folder of moesaic's is known."""
BESIDE = (".partial", ".replaced", ".failed")
"""How names end of what is made beside OUT, and read by nobody."""


def real_path(output: Path) -> Path:
    """Find where OUT is written: the folder itself, or the one that a link of that name leads to.

    Raises:
        InputError: a link that leads nowhere, or the root of all folders.
    """
    output = Path(os.path.abspath(output))  # without resolving links
    if not output.name:
        raise InputError(f"'{output}' cannot be replaced, and nothing can be made beside it; choose another folder")
    if not output.is_symlink():
        return output
    if not output.exists():
        raise InputError(f"'{output}' is a link to '{os.readlink(output)}', where nothing is; remove it")
    return output.resolve()


def check_apart(model: str | Path, output: Path) -> None:
    """Check that neither OUT nor what is made beside it is the model that is read, or holds it; before any claim.

    Raises:
        InputError: it is, and would be replaced or emptied.
    """
    own = Path(place(str(model)))
    if not own.exists():
        return
    made, own = real_path(output).resolve(), own.resolve()
    for written in (made, *(made.with_name(made.name + ending) for ending in BESIDE)):
        if written == own or written in own.parents:
            raise InputError(f"OUT '{output}' or what is made beside it is the model that is read, '{model}'; name "
                             "another OUT")  # fmt: skip


def is_ours(folder: Path) -> bool:
    """Tell whether moesaic made a folder: it holds a mark, or nothing but what a kill left half-written."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if names == {INNER}:
        return is_ours(folder / INNER)
    return bool(names & MARKS) or all(name.endswith(WRITING) for name in names)


def check_ours(folder: Path) -> None:
    """Check that a folder to work in is free or ours.

    Raises:
        InputError: a user's own file or folder has that name.
    """
    if os.path.lexists(folder) and not is_ours(folder):
        raise InputError(f"'{folder}' is in the way and was not made by moesaic; move it or choose another OUT")


def clear(folder: Path, keep: str = "", last: str = "") -> None:
    """Remove everything in a folder of ours but `keep` and the lock that keeps it to this process; marks go late.

    So what a kill leaves of it is known as ours.
    """
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name in MARKS)):
        if path.name not in (LOCK, keep):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder of ours, in the same order."""
    clear(folder)
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def claim(folder: Path, *, working: bool = True) -> Iterator[None]:
    """Keep a folder to this process; if nothing was put there, it is gone afterwards.

    Args:
        folder: the folder, which is made if need be.
        working: whether it is one to work in beside an output, and so must be ours; else it is the output itself.

    Raises:
        InputError: it is a user's own, cannot be made, or another process works in it.
    """
    if working:
        check_ours(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        process = _holder(folder)
        raise InputError(
            f"'{folder}' is in use by {process}, which writes the same output; wait for it, or choose another OUT"
        ) from None
    except OSError as error:
        raise InputError(f"'{folder}' cannot be made ({error.strerror or error}); choose another folder") from error
    try:
        if not (folder / LOCK).exists():  # the other process was done between our two looks
            raise InputError(f"'{folder}' was in use until now; run the command again")
        (folder / LOCK).write_text(str(os.getpid()))
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # what is not empty stays
            for path in made or [folder] * working:
                path.rmdir()


def _holder(folder: Path) -> str:
    with suppress(OSError, ValueError):
        return f"process {int((folder / LOCK).read_text())}"
    return "another process"
