"""A converted model in a GGUF file of ours, read back as the folder it was written from, in the precision it has there.

The file holds the stock architecture's `config.json`, the tokenizer and what the conversion was, under keys that
llama.cpp passes over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import registry
from ..errors import InputError
from ..files import write_json
from ..results import Json
from .reader import INDEX

if TYPE_CHECKING:
    from gguf import GGUFReader

CONFIG, FILES, TOKENIZER = "moesaic.config", "moesaic.file.", "tokenizer.huggingface.json"
"""Keys: of `config.json`, how those of other files begin, and GGUF's own of `tokenizer.json`."""
KEPT_FILES = (
    "moesaic.yaml", "metrics.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""Files beside the weights that a GGUF holds as text."""


class NativeFormat(Protocol):
    """What of a format is used here."""

    def read_gguf(self, theirs: dict[str, Tensor], config: Json) -> dict[str, Tensor]:
        """Name a GGUF's tensors as the stock architecture does."""
        ...


def unpack(readers: Sequence[GGUFReader], folder: Path, called: Path, value: Callable[[str], object]) -> None:
    """Write what a GGUF of ours holds as a folder, a layer's tensors in memory at a time.

    Weights are in the model's own dtype: what a type with blocks rounded is rounded once more, by far less.

    Args:
        readers: of the file's parts.
        folder: where to; it is there and empty.
        called: the file as a user knows it.
        value: reads a key of the first part.

    Raises:
        InputError: the file is damaged.
    """
    config = _json(value(CONFIG), called)
    format: NativeFormat = registry.build("format", _format_name(config), imported_only=True)
    dtype = getattr(torch, str(config.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"'{called}' is damaged: {CONFIG} has dtype {config.get('dtype')!r}; convert again")
    write_json(folder / "config.json", config)
    for key, name in [(TOKENIZER, "tokenizer.json"), *((FILES + kept, kept) for kept in KEPT_FILES)]:
        if isinstance(text := value(key), str):
            (folder / name).write_text(text, "utf-8")
    groups: dict[str, list[tuple[GGUFReader, int]]] = {}
    for reader in readers:
        for number, tensor in enumerate(reader.tensors):
            parts = tensor.name.split(".", 2)
            groups.setdefault(parts[1] if parts[0] == "blk" else "", []).append((reader, number))
    files, size = {}, 0
    for group, places in groups.items():
        theirs = {reader.tensors[n].name: _dequantised(reader, n) for reader, n in places}
        try:
            stock = format.read_gguf(theirs, config)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"'{called}' is damaged: layer {group or 'none'}: {error}; convert again") from error
        name = f"model-{group or 'outer'}.safetensors"
        save_file(_in_dtype(stock, dtype), folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(stock, name)
        size += (folder / name).stat().st_size
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def _json(text: object, called: Path) -> Json:
    try:
        found = json.loads(str(text))
    except ValueError as error:
        raise InputError(f"'{called}' is damaged: {CONFIG} is no JSON ({error}); convert again") from error
    if not isinstance(found, dict) or not isinstance(found.get("moesaic"), dict):
        raise InputError(f"'{called}' is damaged: {CONFIG} describes no converted model; convert again")
    return found


def _format_name(config: Json) -> str:
    return str(config["moesaic"].get("format") or config.get("model_type"))


def _dequantised(reader: GGUFReader, number: int) -> Tensor:
    """Read a tensor in float32."""
    import gguf

    tensor = reader.tensors[number]
    shape = [int(size) for size in reversed(tensor.shape)]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.astype("float32")).reshape(shape)


def _in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Round to a dtype, but for routers that it does not hold, as scaled ones: they stay as they are."""
    found = {}
    for name, tensor in tensors.items():
        rounded = tensor.to(dtype)
        router = ".gate." in name or ".router." in name
        found[name] = tensor if router and not torch.equal(rounded.float(), tensor) else rounded
        found[name] = found[name].contiguous().clone()
    return found
