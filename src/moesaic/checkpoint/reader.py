"""Checkpoint folders on disk, read tensor by tensor when a tensor is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import InputError

INDEX = "model.safetensors.index.json"
SAMPLE_BYTES = 1 << 20


class Checkpoint:
    """The tensors of a folder of safetensors files, read one at a time.

    Raises:
        InputError: no config or weights in the folder, a shard that is missing or cut short, or quantised weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise InputError(f"'{folder}' holds no config.json; expected a folder saved by transformers")
        self.config = self._json("config.json")
        if "quantization_config" in self.config:
            raise InputError(f"'{folder}' holds quantised weights; give the bf16, fp16 or fp32 checkpoint, or a .gguf")
        self.files = {name: folder / file for name, file in self._weight_map().items()}

    def _weight_map(self) -> dict[str, str]:
        single = self.folder / "model.safetensors"
        if single.is_file():  # transformers prefers it too: saving a model again may leave an old index behind
            return dict.fromkeys(self._names(single), single.name)
        if (self.folder / INDEX).is_file():
            weight_map = self._json(INDEX).get("weight_map", {})
            missing = sorted({f for f in weight_map.values() if not (self.folder / f).is_file()})
            if missing:
                raise InputError(
                    f"'{self.folder}' lacks {', '.join(missing)}, which its index names; download it again"
                )
            held = {name for file in set(weight_map.values()) for name in self._names(self.folder / file)}
            if not weight_map or not held.issuperset(weight_map):
                lost = sorted(set(weight_map) - held)[:1] or ["any tensor"]
                raise InputError(f"'{self.folder / INDEX}' names {lost[0]}, which no shard holds; download it again")
            return weight_map
        found = ", ".join(sorted(p.name for p in self.folder.iterdir())[:8]) or "nothing"
        raise InputError(f"'{self.folder}' holds no safetensors weights (found {found})")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text())
        except ValueError as error:
            raise InputError(f"'{self.folder / name}' is not JSON ({error}); download it again") from error
        if not isinstance(content, dict):
            raise InputError(f"'{self.folder / name}' is not a JSON object; download it again")
        return content

    def shapes(self) -> dict[str, list[int]]:
        """Read the shape of every tensor by name, from the files' headers."""
        found = {}
        for path in set(self.files.values()):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        return found

    @staticmethod
    def _names(path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except Exception as error:  # safetensors raises its own type for every kind of damage
            raise InputError(f"'{path}' is not a whole safetensors file ({error}); download it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self, prefix: str = "") -> list[str]:
        """List the names of all tensors that begin with `prefix`."""
        return [name for name in self.files if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the dtype on disk."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def items(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Read (name, tensor) pairs, each file opened once."""
        for path in dict.fromkeys(self.files[name] for name in names):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self.files[name] == path:
                        yield name, file.get_tensor(name)

    def dtype(self) -> torch.dtype:
        """Read the dtype of the weights, as the config says or else as the first tensor has."""
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        found = getattr(torch, str(name).removeprefix("torch."), None) if name else None
        return found if isinstance(found, torch.dtype) else self.read(next(iter(self.files))).dtype

    def size(self) -> int:
        """Count the bytes of all weight files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def fingerprint(self) -> str:
        """Hash the config, each file's size and a mebibyte from each end of it: SHA-256."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(set(self.files.values())):
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE_BYTES))
                file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
                digest.update(file.read())
        return digest.hexdigest()
