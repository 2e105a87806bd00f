"""Speed in llama.cpp of GGUF files that take turns in one process, and of a converted model beside its dense one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space
from ..errors import InputError, WorkError
from ..progress import Progress, unheard
from ..results import Json, LlamaCppSpeed, Rate

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class Turns(NamedTuple):
    """What files that took turns gave, tokens a second by round."""

    version: str
    rates: list[dict[str, list[float]]]
    """Of each file: `decode` and `prefill`."""

    def rate(self, ours: int, theirs: int, kind: str) -> Rate:
        """Compare two of the files: medians, and the median of the rounds' own ratios."""
        a, b = self.rates[ours][kind], self.rates[theirs][kind]
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        return Rate(
            tokens_per_s=statistics.median(a), dense_tokens_per_s=statistics.median(b),
            speedup=statistics.median(ratios),
        )  # fmt: skip


def find_llama_cpp(python: Path | None = None) -> Path | None:
    """Find the Python that can import `xllamacpp`: the given one, else this one; None where it is not installed.

    Raises:
        InputError: the Python that is given cannot.
    """
    if python is None:
        return Path(sys.executable) if find_spec("xllamacpp") else None
    try:
        done = subprocess.run([str(python), "-c", "import xllamacpp"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--llama-cpp {python} is no Python: {error}") from error
    if done.returncode:
        raise InputError(f"--llama-cpp {python} has no xllamacpp: {python} -m pip install xllamacpp")
    return python


def take_turns(
    files: Sequence[Path],
    tokens: Sequence[int],
    python: Path,
    *,
    new: int,
    rounds: int,
    threads: int,
    clock: str = "wall",
) -> Turns:
    """Run GGUF files in turns, after one round that warms up.

    Args:
        files: the models; all are open at once.
        tokens: the prompt.
        python: a Python that has xllamacpp; see `find_llama_cpp`.
        new: tokens decoded after the prompt.
        rounds: timed turns of each.
        threads: of each.
        clock: `wall`; or `cpu`, the process's CPU time, which other work on the machine hardly changes and which only
            one thread makes sense of, since several wait for each other busily.

    Raises:
        InputError: CPU time of several threads.
        WorkError: llama.cpp failed.
    """
    if clock == "cpu" and threads != 1:
        raise InputError(f"CPU time is measured of one thread, not of {threads}; give --threads 1")
    ask = {
        "models": [str(file.absolute()) for file in files], "tokens": list(tokens), "new": new, "rounds": rounds,
        "threads": threads, "clock": clock,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        found = _run(python, ask, Path(scratch) / "answer.json")
    return Turns(found["version"], found["rates"])


def llama_cpp_speed(
    dense: str,
    converted: Path,
    tokens: Sequence[int],
    python: Path,
    *,
    new: int = 32,
    rounds: int = 3,
    outtype: str = "f16",
    progress: Progress | None = None,
) -> LlamaCppSpeed:
    """Write both models as GGUF for a while, then measure decode and prefill with as many threads as torch has.

    Args:
        dense: the dense model, as a user names it.
        converted: folder of the converted one.
        tokens: the prompt.
        python: a Python that has xllamacpp; see `find_llama_cpp`.
        new: tokens decoded after the prompt.
        rounds: timed turns of each model after one that warms up.
        outtype: GGUF's type of both.
        progress: called with (finished, all, what comes next).

    Raises:
        InputError: a model that llama.cpp cannot run, or gguf is not installed.
        WorkError: llama.cpp failed.
    """
    check_gguf()
    from ..formats.export import export
    from ..formats.gguf.dense import write_dense_gguf

    report, threads = progress or unheard, torch.get_num_threads()
    folder = resolve(dense)
    with tempfile.TemporaryDirectory(prefix="moesaic-gguf-") as scratch:
        check_space(Path(scratch) / "files", Checkpoint(folder).size() + Checkpoint(Path(converted)).size())
        files = [Path(scratch) / name for name in ("dense.gguf", "converted.gguf")]
        report(0, 3, "writing GGUF")
        write_dense_gguf(folder, files[0], outtype)
        report(1, 3, "writing GGUF")
        export(converted, files[1], "gguf", outtype=outtype)
        report(2, 3, "speed in llama.cpp")
        found = take_turns(files, tokens, python, new=new, rounds=rounds, threads=threads)
    return LlamaCppSpeed(
        version=found.version, type=outtype, threads=threads, prompt=len(tokens), new=new, rounds=rounds,
        decode=found.rate(1, 0, "decode"), prefill=found.rate(1, 0, "prefill"),
    )  # fmt: skip


def check_gguf() -> None:
    """Check that GGUF files can be written.

    Raises:
        InputError: gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise InputError("GGUF files are written by gguf; install it with: pip install 'moesaic[export]'")


def _run(python: Path, ask: Mapping[str, object], answer: Path) -> Json:
    command = [str(python), str(WORKER), json.dumps(ask), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not answer.is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise WorkError(f"llama.cpp failed: {last}")
    return json.loads(answer.read_text())
