"""GGUF, what llama.cpp and its kin read: a stock architecture's tensors under llama.cpp's names, a layer at a time.

Shapes: D hidden size, E routed experts, I neurons of one.
"""

from __future__ import annotations

import subprocess
import zlib
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from ...checkpoint.claim import claim, clear, real_path
from ...checkpoint.single_file import MADE, check_file
from ...checkpoint.writer import check_space, partial_folder, read_state
from ...errors import InputError, StorageError, WorkError
from ...models.families import EMBEDDINGS, HEAD
from ...models.tokenizer import load_tokenizer
from ...progress import Progress
from ...results import ExportResult
from ..architectures._decoder import head_dim
from ..base import Format, MoesaicModelConfig
from ..converted import Converted
from ..gguf_names import OUTSIDE_NAMES, RENAMED, ROPE_FACTORS, interleaved
from ..gguf_support import K_QUANTS, block_size, check_k_quant, gguf_format
from .config import write_config, write_kept
from .tensors import OUTTYPES, announce, encoded, kind_of, rope_factors
from .vocabulary import write_vocabulary

Tensors = dict[str, Tensor]


def write_gguf(
    source: Converted, output: Path, outtype: str = "f16", *, overwrite: bool = False, progress: Progress | None = None
) -> ExportResult:
    """Write a converted model as one GGUF file, which appears only when it was read back whole.

    Raises:
        InputError: a model, tokenizer, rope or type that llama.cpp or this writer lacks; before anything is written.
        WorkError: what was read back is not what was written.
    """
    block_size(outtype)
    if source.takes_pictures:
        raise InputError(
            f"'{source.checkpoint.folder}' takes pictures, which a GGUF of moesaic does not hold; convert the text "
            "model in it with --text-only, and export that"
        )
    format = gguf_format(source.config, source.has_bias())
    quantiser = check_k_quant(outtype, *widths(source, format)) if outtype in K_QUANTS else None
    report = progress or (lambda done, all, note: None)
    with claim(partial_folder(output)):
        state = read_state(partial_folder(output))
        if state is not None and state.replaced != MADE:
            raise InputError(
                f"'{partial_folder(output)}' holds an unfinished conversion; finish it with its own command, or delete "
                "that folder"
            )
        clear(partial_folder(output))  # also where the file is there already: a kill may have come right after that
        check_file(output, overwrite)
        check_space(output, source.checkpoint.size() * (2 if quantiser else 1))
        partial = partial_folder(output) / output.name
        try:
            fallbacks = _write(source, format, partial, "f16" if quantiser else outtype, report)
            if quantiser:
                fallbacks = quantise(quantiser, partial, outtype)
            check_file(output, overwrite)
            partial.replace(real_path(output))
        except OSError as error:
            raise StorageError(f"cannot write '{partial}' ({error}); make room and run the command again") from error
        finally:
            clear(partial_folder(output))
    return ExportResult(
        output=str(output), target="gguf", outtype=outtype, bytes=output.stat().st_size, fallbacks=fallbacks,
        architecture=format.gguf_architecture, max_abs_logit_error=None,
    )  # fmt: skip


def widths(source: Converted, format: Format) -> tuple[int, int]:
    """Find the width of a routed expert and of the shared one, as the format has them."""
    config = format.config_json(source.config)
    return config.get("moe_intermediate_size") or config["intermediate_size"], (
        source.config.shared_expert_intermediate_size
    )


def quantise(command: str, path: Path, outtype: str) -> int:
    """Replace the file by a quantised one; returns how many matrices got no K-quant."""
    made = path.with_name(path.name + ".quantised")
    try:
        done = subprocess.run([command, str(path), str(made), outtype.upper()], capture_output=True, text=True)
        if done.returncode:
            raise WorkError(f"llama-quantize failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
        before, after = (
            {t.name: (t.tensor_type, list(t.shape)) for t in gguf.GGUFReader(file).tensors} for file in (path, made)
        )
        if {name: shape for name, (_, shape) in before.items()} != {name: shape for name, (_, shape) in after.items()}:
            raise WorkError("llama-quantize left out or changed tensors; is it of a version that knows this model?")
        made.replace(path)
        return sum(
            kind != Kind.F32 and not kind.name.endswith("_K") for kind, shape in after.values() if len(shape) > 1
        )
    finally:
        made.unlink(missing_ok=True)


def _write(source: Converted, format: Format, path: Path, outtype: str, report: Progress) -> int:
    """Write the file and read it back; returns how many matrices are of another type than `outtype`."""
    count = source.config.num_hidden_layers
    outside = embeddings_and_head(source)
    shapes = {name: tensor.shape for name, tensor in outside.items()}
    first = {name: tensor.shape for name, tensor in block(format, source.layer(0), source.config).items()}
    for index in range(count):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in first.items()}
    kinds = {name: kind_of(name, shape, OUTTYPES[outtype]) for name, shape in shapes.items()}
    assert format.gguf_architecture is not None
    writer = gguf.GGUFWriter(path, format.gguf_architecture)
    write_config(writer, format, source, outtype)
    write_kept(writer, format, source)
    write_vocabulary(
        writer, source.checkpoint.folder, load_tokenizer(source.checkpoint.folder), source.config.vocab_size
    )
    announce(writer, shapes, kinds)
    sums = {}

    def put(name: str, tensor: Tensor) -> None:
        data = encoded(name, tensor, kinds[name])
        sums[name] = checksum(data)
        writer.write_tensor_data(data)

    for name, tensor in outside.items():
        put(name, tensor)
    for index in range(count):
        report(index, count, "writing")
        for name, tensor in block(format, source.layer(index), source.config).items():
            put(f"blk.{index}.{name}", tensor)
    writer.close()
    report(count, count, "reading back")
    reader = gguf.GGUFReader(path)
    tokens, rows = reader.get_field("tokenizer.ggml.tokens"), shapes[OUTSIDE_NAMES[EMBEDDINGS]][0]
    found = {tensor.name: checksum(tensor.data) for tensor in reader.tensors}
    if found != sums or tokens is None or len(tokens.data) != rows:
        raise WorkError(f"'{path}' is not what was written to it; is the disk sound?")
    wish = OUTTYPES[outtype]
    return sum(kind != wish and len(shapes[n]) > 1 and kind != Kind.F32 for n, kind in kinds.items())


def checksum(data: np.ndarray) -> int:
    """Compute the CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(data).view(np.uint8).data)


def embeddings_and_head(source: Converted) -> Tensors:
    """Read embeddings, final norm, head, and Llama 3's rope factors, by llama.cpp's names."""
    outside = source.embeddings_and_head()
    outside.setdefault(HEAD, outside[EMBEDDINGS])
    tensors = {OUTSIDE_NAMES[name]: tensor for name, tensor in outside.items()}
    factors = rope_factors(source.config, head_dim(source.config))
    return tensors if factors is None else tensors | {ROPE_FACTORS: factors}


def block(format: Format, layer: Tensors, config: MoesaicModelConfig) -> Tensors:
    """Name a decoder layer's tensors as llama.cpp does."""
    stock = format.layer(layer, config)
    tensors = {RENAMED[name]: stock.pop(name) for name in list(stock) if name in RENAMED}
    if format.gguf_interleaved:
        for n, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            tensors[f"attn_{n}.weight"] = interleaved(tensors[f"attn_{n}.weight"], heads)
    tensors |= format.gguf_layer(stock, config)
    assert not stock, f"left over: {list(stock)}"
    return tensors
