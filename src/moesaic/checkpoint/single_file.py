"""An output that is one GGUF file, whole or absent: made in a folder beside its name, as an output folder is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from .claim import claim, clear, real_path, remove
from .writer import ResumableOutput, check_parent, partial_folder, read_state

MADE = "model.gguf"
"""The file's name in `OUT.partial`, and in an output folder that holds one."""


def check_file(output: Path, overwrite: bool) -> None:
    """Check that a GGUF may be written there.

    Raises:
        InputError: something has that name that may not be replaced, or is no GGUF.
    """
    place = real_path(output)
    if place.exists() and not (overwrite and place.is_file()):
        raise InputError(f"'{output}' exists; choose another file or pass --overwrite")
    if place.exists() and place.stat().st_size:
        with place.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"'{output}' is no GGUF and is not replaced; choose another file")


@contextmanager
def claim_file(output: Path, overwrite: bool) -> Iterator[None]:
    """Keep OUT, which is a GGUF, to this process while it is made, having checked that it can be.

    What a kill at the very end left behind is removed first.

    Raises:
        InputError: it cannot, or another process makes it.
    """
    check_parent(output)
    partial = partial_folder(output)
    with claim(partial):
        state = read_state(partial)
        if state and state.replaced == MADE and not (partial / MADE).exists():  # it has its place already
            clear(partial)
        check_file(output, overwrite)
        yield


class ResumableFile(ResumableOutput):
    """The folder `OUT.partial`, whose file `MADE` becomes OUT."""

    def take_place(self) -> None:
        """Give the file its name, and drop all else."""
        self.state = replace(self.state, replaced=MADE)
        self._commit()
        (self.folder / MADE).replace(self.output)
        remove(self.folder)
