"""What stands beside every number: versions, machine, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import transformers

from . import __version__

CONTROL = Path("/sys/fs/cgroup")
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Files with the limit and the use of memory, and the name of what can be dropped at once."""


def versions() -> dict[str, str]:
    """Read the versions of what decides the numbers: moesaic, Python, torch and transformers."""
    return {
        "moesaic": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def machine() -> str:
    """Name processor, cores and GPU, e.g. `AMD EPYC, 2 cores, bf16 instructions`."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    if "avx512_bf16" in info or "amx_bf16" in info:
        parts.append("bf16 instructions")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps it for a next time, and chunks of tokens add up over layers."""
    with suppress(OSError, AttributeError, TypeError):  # other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_bytes() -> int:
    """Read the largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> int:
    """Read the bytes of memory that the device has free, within a container that of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """Read what a control group, of version 2 or 1, leaves of its limit; the cache of files does not count."""
    for limit, used, cached in CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # there is no such group, or its limit is `max`
            most, taken = (int((CONTROL / name).read_text()) for name in (limit, used))
            facts = dict(line.split() for line in (CONTROL / limit).with_name("memory.stat").read_text().splitlines())
            return max(0, most - taken + int(facts.get(cached, 0)))
    return sys.maxsize


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def triton_is_interpreted() -> bool:
    """Tell whether Triton's interpreter runs its kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"
