"""The slow tier: experts where they are on disk, or all of them in host memory.

Shapes: D hidden size, I neurons of one expert, W columns of what is read.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..errors import WorkError
from .policies.base import ExpertKey

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ExpertWeights(NamedTuple):
    """One expert's matrices, as its experts module has them."""

    gate_up: Tensor
    down: Tensor


class Rows(NamedTuple):
    """A matrix on disk, or the first rows and columns of one."""

    path: Path
    offset: int
    """Of the matrix in the file, in bytes."""
    shape: tuple[int, int]
    """Of the whole matrix."""
    dtype: torch.dtype


class Matrix(NamedTuple):
    """A matrix of an expert: parts on disk one below the other, and what each value is divided by."""

    parts: tuple[Rows, ...]
    divisor: float = 1.0


class Place(NamedTuple):
    """Where an expert is on disk."""

    gate_up: Matrix
    down: Matrix


class OpenFile(NamedTuple):
    """A file that experts are read from."""

    descriptor: int
    state: tuple[int, int]
    """As it was when it was opened."""


def state_of(descriptor: int) -> tuple[int, int]:
    """Tell a file's size, and when it was last written to; another file under its name is not seen."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


class ExpertSource(ABC):
    """Where experts come from; read by several threads at once."""

    num_layers: int
    num_experts: int
    is_pinned: bool = False
    """Whether experts are in pinned memory, from where a GPU copies them without help."""

    @abstractmethod
    def read(self, key: ExpertKey, out: ExpertWeights) -> int:
        """Read an expert into memory that is given; returns how many bytes came from the slow tier.

        Raises:
            WorkError: it cannot be read.
        """

    def close(self) -> None:
        """Let go of files."""
        return


def tensor_offsets(path: Path) -> Mapping[str, int]:
    """Read where each tensor of a safetensors file begins, in bytes from the file's beginning."""
    found = path.stat()
    return _tensor_offsets(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _tensor_offsets(path: Path, *written: int) -> Mapping[str, int]:
    """Read them once for a file as it was `written`: a model may take another's place under its name."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def rows_of(checkpoint: Checkpoint, name: str, expert: int | None = None) -> Rows:
    """Find a matrix in a checkpoint, or that of one expert in a tensor of all experts' [E, ...]."""
    header = checkpoint.headers[name]
    dtype, shape = DTYPES[header.dtype], tuple(header.shape[-2:])
    skipped = 0 if expert is None else expert * math.prod(shape) * dtype.itemsize
    return Rows(header.file, tensor_offsets(header.file)[name] + skipped, (shape[0], shape[1]), dtype)


@dataclass
class DiskSource(ExpertSource):
    """Experts in the safetensors files of a checkpoint, each read by its own few calls; nothing is mapped.

    Memory that is mapped counts as the process's own and is given back when the system likes; what is read into the
    fast tier is the size that was asked for.
    """

    places: Sequence[Sequence[Place]]
    """By layer and expert."""

    def __post_init__(self) -> None:
        self.num_layers, self.num_experts = len(self.places), len(self.places[0])
        self._files: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()

    def read(self, key: ExpertKey, out: ExpertWeights) -> int:
        place = self.places[key.layer][key.expert]
        return self._matrix(place.gate_up, out.gate_up, key) + self._matrix(place.down, out.down, key)

    def _matrix(self, matrix: Matrix, out: Tensor, key: ExpertKey) -> int:
        # parts are of one height, but of more than the expert's own neurons where a copy of the shared ones follows
        pieces = out.chunk(len(matrix.parts))
        total = sum(self._rows(rows, piece, key) for rows, piece in zip(matrix.parts, pieces, strict=True))
        if matrix.divisor != 1:
            out.div_(matrix.divisor)
        return total

    def _rows(self, rows: Rows, out: Tensor, key: ExpertKey) -> int:
        height, width = out.shape
        direct = rows.dtype == out.dtype and width == rows.shape[1] and out.is_contiguous() and out.device.type == "cpu"
        part = out if direct else torch.empty(height, rows.shape[1], dtype=rows.dtype)
        size = part.nbytes
        buffer = part.view(torch.uint8).numpy().data.cast("B")
        read = 0
        try:
            file = self._file(rows.path)
            while read < size and (more := os.preadv(file.descriptor, [buffer[read:]], rows.offset + read)):
                read += more
            same = file.state == state_of(file.descriptor)
        except OSError as error:
            raise WorkError(f"expert {key.expert} of layer {key.layer} cannot be read: {error}") from error
        if read < size:
            raise WorkError(
                f"'{rows.path}' ends within expert {key.expert} of layer {key.layer}: it was cut short or replaced; "
                "download the model again"
            )
        if not same:
            raise WorkError(
                f"'{rows.path}' was written to while its experts were in use: load the model again, and download it "
                "again if it is no longer the same"
            )
        if not direct:
            out.copy_(part[:, :width])
        return size

    def _file(self, path: Path) -> OpenFile:
        with self._lock:
            if path not in self._files:
                descriptor = os.open(path, os.O_RDONLY)
                self._files[path] = OpenFile(descriptor, state_of(descriptor))
            return self._files[path]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                with suppress(OSError):
                    os.close(file.descriptor)
            self._files.clear()

    def __del__(self) -> None:
        self.close()


class HostSource(ExpertSource):
    """All experts in host memory, for a GPU whose memory is the fast tier; pinned, so that copies need no help.

    Args:
        source: where they are read from, once.
        like: an expert's shapes and dtype.
        pinned: whether the memory is pinned, which needs a GPU.
    """

    def __init__(self, source: ExpertSource, like: ExpertWeights, *, pinned: bool) -> None:
        self.num_layers, self.num_experts, self.is_pinned = source.num_layers, source.num_experts, pinned
        count = (self.num_layers, self.num_experts)
        with torch.inference_mode(False):
            self.banks = ExpertWeights(
                *(torch.empty(*count, *part.shape, dtype=part.dtype, pin_memory=pinned) for part in like)
            )
        for layer in range(self.num_layers):
            for expert in range(self.num_experts):
                source.read(ExpertKey(layer, expert), self._at(ExpertKey(layer, expert)))
        source.close()

    def _at(self, key: ExpertKey) -> ExpertWeights:
        return ExpertWeights(*(bank[key.layer, key.expert] for bank in self.banks))

    def read(self, key: ExpertKey, out: ExpertWeights) -> int:
        here = self._at(key)
        for part, target in zip(here, out, strict=True):
            target.copy_(part, non_blocking=True)
        return sum(part.nbytes for part in here)


class ThrottledSource(ExpertSource):
    """A source made slower, to measure what a slower disk or link would do.

    Args:
        source: what is read.
        bytes_per_second: the most that all threads read together.
        latency_seconds: before each expert.
    """

    def __init__(self, source: ExpertSource, bytes_per_second: float, latency_seconds: float = 0.0) -> None:
        self.source, self.bytes_per_second, self.latency = source, bytes_per_second, latency_seconds
        self.num_layers, self.num_experts = source.num_layers, source.num_experts
        self._lock = threading.Lock()
        self._free_at = 0.0

    def read(self, key: ExpertKey, out: ExpertWeights) -> int:
        size = self.source.read(key, out)
        self.wait(size)
        return size

    def wait(self, size: int) -> None:
        """Wait until a link of this speed would have brought so many bytes, after all that were asked for before."""
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            self._free_at = begin + self.latency + size / self.bytes_per_second
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        self.source.close()
