"""Programs that a model wrote, run in a process of their own with limits of time, memory and place.

It keeps mistakes from doing harm: a program that loops, eats memory, writes without end, forks, deletes files or calls
the network. It is no sandbox against malice: who wants to break out of Python may.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic
from typing import NamedTuple

from ..errors import WorkError

CHILD = Path(__file__).with_name("code_child.py")
TIME_S, MEMORY_BYTES = 15.0, 2**30
NAMESPACES = True
"""Whether namespaces of Linux are tried; without them the child's audit hook is all there is."""
MOST_BYTES = 4_096
"""Of a verdict, which a pipe takes at once."""


class Outcome(NamedTuple):
    """Whether what was written is right, and why not."""

    passed: bool
    reason: str
    """Empty where it passed."""


def run_program(source: str, time_s: float = TIME_S, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a Python program; it passes if it comes to its end, so that tests belong at its end.

    It runs by `python -I` in a new folder, without environment, input, output or network; it may change files in that
    folder alone and start no other program. When it is done, or `time_s` is over, its whole process group is killed.
    That it came to its end says a random number which goes back by a pipe: an exit before that, by `sys.exit(0)` or
    `os._exit(0)`, is none.

    Args:
        source: the program with its tests.
        time_s: of the wall clock, in seconds, the start of Python included; and, with a second or two more, of the
            processor, for programs of several threads.
        memory_bytes: of address space; not on macOS, which has no such limit.
    """
    nonce = secrets.token_hex(16)
    reading, writing = os.pipe()
    order = {"nonce": nonce, "source": source, "verdict": writing, "cpu_seconds": _processor_s(time_s)}
    with TemporaryDirectory(prefix="moesaic-", ignore_cleanup_errors=True) as folder, TemporaryFile() as given:
        given.write(json.dumps(order | {"memory_bytes": memory_bytes, "namespaces": NAMESPACES}).encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(CHILD)], cwd=folder, env={}, stdin=given, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        try:
            said = _verdict(reading, time_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # before it is waited for: its number is still its own
            code = process.wait()
            os.close(reading)
    return _outcome(said, nonce, code, time_s)


def check_runner() -> None:
    """Check that programs can be run here, so that a model is not blamed for it.

    Raises:
        WorkError: an empty program does not pass.
    """
    found = run_program("", time_s=60)
    if not found.passed:
        raise WorkError(f"programs cannot be run here: an empty one {found.reason}")


def _processor_s(time_s: float) -> int:
    """Leave the clock the first word on a program of one thread, whose two times are nearly one."""
    return math.ceil(time_s) + 1


def _verdict(reading: int, time_s: float) -> bytes | None:
    """Wait for what the process says; empty where it ended without a word, None where the time is over."""
    end = monotonic() + time_s
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while (left := end - monotonic()) > 0:
            if selector.select(left):
                return os.read(reading, MOST_BYTES)
    return None


def _outcome(said: bytes | None, nonce: str, code: int, time_s: float) -> Outcome:
    """Judge by what the process said, else by how it ended."""
    if said is None:
        return Outcome(False, f"took longer than {time_s:g} s")
    with suppress(ValueError, TypeError, KeyError):
        verdict = json.loads(said)
        if secrets.compare_digest(verdict["nonce"], nonce):
            return Outcome(verdict["error"] is None, verdict["error"] or "")
    if said:
        return Outcome(False, "wrote where only its runner writes")
    if code == -signal.SIGXCPU:
        return Outcome(False, f"used more than {_processor_s(time_s)} s of the processor")
    if code == -signal.SIGKILL:  # by us, as it had closed its pipe, or by a system without memory
        return Outcome(False, "ended before its tests did")
    if code < 0:
        return Outcome(False, f"was killed by {signal.Signals(-code).name}")
    return Outcome(False, f"ended before its tests did, with exit code {code}")
