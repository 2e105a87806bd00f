"""Checkpoint folders on disk, read tensor by tensor when a tensor is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from os.path import isfile  # of a name that no file can have it says no
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import InputError
from ..files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Dtypes of weights as safetensors names them; all others are some kind of quantised ones."""
SAMPLE_NAMES = 3
"""How many tensors a message names."""


ADAPTER_CONFIG, ADAPTER_KEY = "adapter_config.json", "moesaic_selection"
"""The file that says what an adapter is, and the key in it by which ours are known."""


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter that `moesaic adapt` made."""
    try:
        return isfile(folder / ADAPTER_CONFIG) and ADAPTER_KEY in read_json(folder / ADAPTER_CONFIG)
    except InputError:
        return False


class Header(NamedTuple):
    """What a file says of a tensor."""

    file: Path
    shape: list[int]
    dtype: str
    """As safetensors names it, e.g. `BF16`."""


def some(names: list[str]) -> str:
    """Name a few of many for a message: `3 tensors: a, b, c`, `5 tensors, e.g. a, b, c`."""
    count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
    return f"{count}{':' if len(names) <= SAMPLE_NAMES else ', e.g.'} {', '.join(names[:SAMPLE_NAMES])}"


class Checkpoint:
    """The tensors of a folder of safetensors files, read one at a time.

    Raises:
        InputError: no config or weights in the folder, a shard that is missing, cut short or elsewhere, or quantised
            weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            if is_adapter(folder):
                raise InputError(
                    f"'{folder}' holds an adapter that 'moesaic adapt' made, without the model that it belongs to; "
                    "give that model, and the adapter with --adapter"
                )
            if (folder / ADAPTER_CONFIG).is_file():
                raise InputError(
                    f"'{folder}' holds an adapter (LoRA or its like) without the model that it belongs to; merge the "
                    "adapter first: peft's merge_and_unload(), then save_pretrained"
                )
            raise InputError(f"'{folder}' holds no config.json; expected a folder saved by transformers")
        self.config = read_json(folder / "config.json")
        self._check_quantised()
        self.headers = self._read_headers()
        """By the tensor's name."""
        odd = sorted({h.dtype for h in self.headers.values()} - FLOATS)
        if odd:
            raise self._quantised(some([name for name, h in self.headers.items() if h.dtype not in FLOATS]), odd[0])

    def _check_quantised(self) -> None:
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in ("quantization_config", "compression_config"):
                if config.get(key) is not None:
                    raise self._quantised(f"{key} in config.json")
        if (self.folder / "hf_quant_config.json").is_file():
            raise self._quantised("hf_quant_config.json")

    def _quantised(self, where: str, dtype: str = "") -> InputError:
        """Say that the weights are quantised, and how that is seen."""
        kind = f" of {dtype}" if dtype else ""
        return InputError(
            f"'{self.folder}' holds quantised weights ({where}{kind}); give the bf16, fp16 or fp32 checkpoint, or a "
            ".gguf"
        )

    def _read_headers(self) -> dict[str, Header]:
        if (self.folder / SINGLE).is_file():  # transformers prefers it too: an old index may have stayed behind
            return self._headers_of(SINGLE)
        if not (self.folder / INDEX).is_file():
            found = ", ".join(sorted(p.name for p in self.folder.iterdir())[:8]) or "nothing"
            raise InputError(f"'{self.folder}' holds no safetensors weights (found {found})")
        files = self._weight_map()
        shards = {file: self._headers_of(file) for file in sorted(set(files.values()))}
        lost = [name for name, file in files.items() if name not in shards[file]]
        if lost or not files:
            where = self.folder / INDEX
            raise InputError(f"'{where}' names {some(lost) if lost else 'nothing'}, which no shard holds; "
                             "download it again")  # fmt: skip
        held = {name: header for headers in shards.values() for name, header in headers.items()}
        return held | {name: shards[file][name] for name, file in files.items()}

    def _weight_map(self) -> dict[str, str]:
        """Read which file holds which tensor; files lie in the folder itself."""
        files = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise InputError(f"'{self.folder / INDEX}' has no weight_map of file names; download it again")
        outside = sorted(
            {file for file in files.values() if file in ("", "..") or Path(file).name != file or "\\" in file}
        )
        if outside:
            raise InputError(
                f"'{self.folder / INDEX}' names '{outside[0]}', which is not a file of that folder; what lies "
                "elsewhere is not read"
            )
        missing = sorted({file for file in files.values() if not (self.folder / file).is_file()})
        if missing:
            raise InputError(f"'{self.folder}' lacks {', '.join(missing)}, which its index names; download it again")
        return files

    def _headers_of(self, file: str) -> dict[str, Header]:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {name: Header(path, part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        except Exception as error:  # safetensors raises its own type for every kind of damage
            raise InputError(f"'{path}' is not a whole safetensors file ({error}); download it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def names(self, prefix: str = "") -> list[str]:
        """List the names of all tensors that begin with `prefix`."""
        return [name for name in self.headers if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the dtype on disk."""
        with safe_open(self.headers[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def items(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Read (name, tensor) pairs, each file opened once."""
        for path in dict.fromkeys(self.headers[name].file for name in names):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self.headers[name].file == path:
                        yield name, file.get_tensor(name)

    def dtype(self) -> torch.dtype:
        """Read the dtype of the weights, as the config says or else as the first tensor has."""
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        found = getattr(torch, str(name).removeprefix("torch."), None) if name else None
        if isinstance(found, torch.dtype) and found.is_floating_point:
            return found
        return self.read(next(iter(self.headers))).dtype

    def architecture(self) -> str:
        """Name the model's class, as the config says; `unknown` where it says none."""
        found = self.config.get("architectures")
        return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else "unknown"

    def shapes(self) -> dict[str, list[int]]:
        """List the shape of every tensor by name."""
        return {name: header.shape for name, header in self.headers.items()}

    def paths(self) -> list[Path]:
        """List the files of weights."""
        return sorted({header.file for header in self.headers.values()})

    def size(self) -> int:
        """Count the bytes of all weight files."""
        return sum(path.stat().st_size for path in self.paths())

    def fingerprint(self) -> str:
        """Hash the config, each file's size, and evenly spaced parts of it: SHA-256."""
        return self._hash_weights(hashlib.sha256((self.folder / "config.json").read_bytes()))

    def weights_fingerprint(self) -> str:
        """Hash as `fingerprint` does without the config, in which versions of transformers write different things."""
        return self._hash_weights(hashlib.sha256())

    def _hash_weights(self, digest: hashlib._Hash) -> str:
        for path in self.paths():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                for part in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * part // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()
