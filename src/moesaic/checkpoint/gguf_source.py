"""GGUF files as models: checked, joined if they are split, and dequantised once into a folder of safetensors."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..compat import require
from ..errors import InputError
from .builtin import cache_folder
from .gguf_converted import CONFIG, unpack
from .reader import some

if TYPE_CHECKING:
    from gguf import GGUFReader

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""How llama.cpp's gguf-split names parts."""
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
"""The scaling of Llama 3.1 and later but for its factor, which GGUF holds as a tensor of its effect."""


def from_gguf(gguf: Path, console: Console) -> Path:
    """Unpack a GGUF file's dequantised weights to a safetensors folder, made once and kept in the cache.

    Raises:
        InputError: it is damaged, a part of it is missing, or transformers does not read all that it holds.
    """
    files = parts(gguf)
    stats = [(file.resolve(), file.stat()) for file in files]
    key = hashlib.sha256(":".join(f"{path}:{s.st_size}:{s.st_mtime_ns}" for path, s in stats).encode()).hexdigest()[:12]
    folder = cache_folder() / "dequantised" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    require("reading .gguf", "export", "gguf", "accelerate")
    readers = [read_gguf(file) for file in files]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):  # others wait, and find it made
        if folder.is_dir():
            return folder
        console.print(f"Dequantising {gguf.name} once into the cache (about a minute)", markup=False, highlight=False)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            whole = files[0]
            if len(files) > 1 and readers[0].get_field(CONFIG) is None:
                whole = partial / f"{gguf.stem}.gguf"
                join(readers, whole)
            _unpack(whole, readers, partial, gguf)
            if whole != files[0]:
                whole.unlink()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def unpack_file(gguf: Path, folder: Path) -> None:
    """Write what one GGUF file holds to an empty folder, dequantised.

    Raises:
        InputError: it is damaged, or transformers does not read all that it holds.
    """
    _unpack(gguf, [read_gguf(gguf)], folder, gguf)


def _unpack(whole: Path, readers: Sequence[GGUFReader], folder: Path, called: Path) -> None:
    if readers[0].get_field(CONFIG) is None:
        dequantise(whole, readers, folder, called)
    else:
        unpack(readers, folder, called, lambda name: _value(readers[0], name))


def parts(gguf: Path) -> list[Path]:
    """List the files that a GGUF consists of, in order: itself, or those that gguf-split made.

    Raises:
        InputError: one is missing.
    """
    match = SPLIT.fullmatch(gguf.name)
    if not match:
        return [gguf]
    name, _, count = match.groups()
    files = [gguf.with_name(f"{name}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"'{gguf}' is one of {int(count)} files, and {', '.join(missing[:3])} is missing beside it")
    return files


def read_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file.

    Raises:
        InputError: it is no GGUF file, or cut short.
    """
    import gguf

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"'{path}' is not a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        for tensor in reader.tensors:
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name} has {tensor.data.nbytes} of {tensor.n_bytes} bytes")
    except Exception as error:  # the reader checks nothing, so that damage raises anything
        raise InputError(f"'{path}' is damaged or cut short ({error}); download it again") from error
    return reader


def join(readers: Sequence[GGUFReader], path: Path) -> None:
    """Write the parts of a split GGUF as one file: the first part's keys, the tensors of all."""
    import gguf

    first = readers[0]
    writer = gguf.GGUFWriter(path, _value(first, "general.architecture"))
    for name, found in first.fields.items():
        if not name.startswith(("GGUF.", "split.", "general.architecture")):
            inner = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, found.contents(), found.types[0], inner)
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantise(whole: Path, readers: Sequence[GGUFReader], folder: Path, called: Path) -> None:
    """Write a GGUF's weights, configuration and tokenizer as a folder that transformers loads.

    Raises:
        InputError: tensors are missing, or hold what transformers does not read.
    """
    place = {"gguf_file": whole.name, "trust_remote_code": False}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            whole.parent, **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16,
            output_loading_info=True,
        )  # fmt: skip
        tokenizer: Any = AutoTokenizer.from_pretrained(whole.parent, **place)
    except Exception as error:  # transformers and gguf raise many unrelated types for what a file may hold
        raise InputError(f"transformers cannot read '{called}': {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"'{called}' lacks {some(missing)}; download it again, with all of its parts")
    sizes = {tensor.name: tensor.n_elements for reader in readers for tensor in reader.tensors}
    factors = sizes.pop(ROPE_FACTORS, 0)
    held, read = sum(map(int, sizes.values())), sum(p.numel() for p in model.parameters())
    if held != read:
        raise InputError(
            f"'{called}' holds {held:,} weights, but the {model.config.model_type} model that transformers makes of "
            f"it has {read:,}, so some would not be read; give the model's safetensors"
        )
    if rope := rope_scaling(readers[0], model.config, bool(factors)):
        model.config.rope_parameters = dict(model.config.rope_parameters) | rope
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rope_scaling(reader: GGUFReader, config: Any, factors: bool) -> dict[str, Any]:
    """Read how rotary positions are scaled, which transformers leaves out; empty where they are not.

    Raises:
        InputError: in a way that is not known here.
    """
    architecture = _value(reader, "general.architecture")
    kind = _value(reader, f"{architecture}.rope.scaling.type")
    factor = _value(reader, f"{architecture}.rope.scaling.factor")
    if factors:
        [tensor] = [t for t in reader.tensors if t.name == ROPE_FACTORS]
        theirs = torch.tensor(tensor.data).flatten().double()
        rope = LLAMA3 | {"factor": round(float(theirs.max()), 4)}  # float32 in the file
        scaled = type(config)(**config.to_dict() | {"rope_parameters": dict(config.rope_parameters) | rope})
        plain, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
        steps = torch.arange(0, 2 * len(theirs), 2).double() / (2 * len(theirs))
        ours = config.rope_parameters["rope_theta"] ** -steps / plain.double()
        if torch.allclose(ours, theirs, rtol=1e-3):
            return rope
    elif kind in (None, "none"):
        return {}
    elif kind == "linear" and factor:
        return {"rope_type": kind, "factor": factor}
    elif (
        kind == "yarn" and factor and (length := _value(reader, f"{architecture}.rope.scaling.original_context_length"))
    ):
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": length}
    raise InputError(
        f"the rotary positions of this GGUF are scaled ({kind or ROPE_FACTORS}) in a way that transformers does not "
        "read from it; give the model's safetensors"
    )


def _value(reader: GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()
