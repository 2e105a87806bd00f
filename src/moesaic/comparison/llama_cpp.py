"""Speed in llama.cpp of a converted model and of the dense one, taking turns in one process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ..checkpoint.sources import resolve
from ..errors import InputError, WorkError
from ..results import Json, LlamaCppSpeed, Rate

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


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


def llama_cpp_speed(
    dense: str,
    converted: Path,
    tokens: Sequence[int],
    python: Path,
    *,
    new: int = 32,
    rounds: int = 3,
    outtype: str = "f16",
    progress: Callable[[int, int, str], None] | None = None,
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
    if find_spec("gguf") is None:
        raise InputError("GGUF files are written by gguf; install it with: pip install 'moesaic[export]'")
    from ..formats.export import export
    from ..formats.gguf.dense import write_dense_gguf

    report = progress or (lambda done, count, note: None)
    with tempfile.TemporaryDirectory(dir=converted, prefix="gguf-") as scratch:
        files = [Path(scratch) / name for name in ("dense.gguf", "converted.gguf")]
        report(0, 3, "writing GGUF")
        write_dense_gguf(resolve(dense), files[0], outtype)
        report(1, 3, "writing GGUF")
        export(converted, files[1], "gguf", outtype=outtype)
        report(2, 3, "speed in llama.cpp")
        ask = {
            "models": [str(file) for file in files], "tokens": list(tokens), "new": new, "rounds": rounds,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        found = _run(python, ask, Path(scratch) / "answer.json")
    theirs, ours = found["rates"]
    return LlamaCppSpeed(
        version=found["version"], type=outtype, threads=torch.get_num_threads(), prompt=len(tokens), new=new,
        rounds=rounds, decode=_rate(ours, theirs, "decode"), prefill=_rate(ours, theirs, "prefill"),
    )  # fmt: skip


def _run(python: Path, ask: Json, answer: Path) -> Json:
    command = [str(python), str(WORKER), json.dumps(ask), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not answer.is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise WorkError(f"llama.cpp failed: {last}")
    return json.loads(answer.read_text())


def _rate(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]], kind: str) -> Rate:
    ratios = [a / b for a, b in zip(ours[kind], theirs[kind], strict=True)]
    medians = statistics.median(ours[kind]), statistics.median(theirs[kind])
    return Rate(tokens_per_s=medians[0], dense_tokens_per_s=medians[1], speedup=statistics.median(ratios))
