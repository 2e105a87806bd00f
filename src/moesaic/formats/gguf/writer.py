"""GGUF, what llama.cpp and its kin read: a native form's tensors under llama.cpp's names, a layer at a time.

Shapes: D hidden size, E routed experts, I neurons of one.
"""

from __future__ import annotations

import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ... import registry
from ...checkpoint.writer import check_space
from ...errors import InputError, WorkError
from ..architectures._decoder import head_dim, join_experts
from ..base import Format
from ..converted import HEAD, Converted
from ..loading import load_tokenizer
from .config import write_config
from .vocabulary import write_vocabulary

ARCHITECTURES = {"glm4_moe": "glm4moe", "granitemoeshared": "granitemoe", "mixtral": "llama"}
"""llama.cpp's name of a native form."""
OUTTYPES = {
    "f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q5_1": Kind.Q5_1, "q5_0": Kind.Q5_0,
    "q4_1": Kind.Q4_1, "q4_0": Kind.Q4_0,
}  # fmt: skip
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
"""Made by llama.cpp's own `llama-quantize`."""
K_BLOCK = 256
RENAMED = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    **{f"self_attn.{n}_proj.{kind}": f"attn_{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")},
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
ROPES = ("default", "llama3", "linear", "yarn")
KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor",
}  # fmt: skip
"""Of a rope's parameters those that are written; llama.cpp has the others' defaults."""
Tensors = dict[str, Tensor]
Progress = Callable[[int, int, str], None]


def write_gguf(
    source: Converted, output: Path, outtype: str = "f16", *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write a converted model as one GGUF file, which appears only when it was read back whole.

    Returns:
        `output, target, architecture, outtype, bytes, fallbacks` (matrices whose rows do not fit the type, in
        another) and `max_abs_logit_error`, which is None: no engine is run.

    Raises:
        InputError: a model, tokenizer, rope or type that llama.cpp or this writer lacks; before anything is written.
        WorkError: what was read back is not what was written.
    """
    known = (*OUTTYPES, *K_QUANTS)
    if outtype not in known:
        raise InputError(f"unknown outtype '{outtype}'.{registry.nearest(outtype, known)} One of: {', '.join(known)}")
    form = gguf_format(source.config, source.has_bias())
    quantiser = check_k_quant(source, form, outtype) if outtype in K_QUANTS else None
    if output.exists() and not (overwrite and output.is_file()):
        raise InputError(f"'{output}' exists; choose another file or pass --overwrite")
    check_space(output, source.checkpoint.size() * (2 if quantiser else 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        facts = _write(
            source, form, partial, "f16" if quantiser else outtype, progress or (lambda done, all, note: None)
        )
        if quantiser:
            facts["fallbacks"] = _quantise(quantiser, partial, outtype)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    found = {"output": str(output), "target": "gguf", "outtype": outtype, "bytes": output.stat().st_size}
    return found | facts | {"max_abs_logit_error": None}


def gguf_format(working: Any, has_bias: bool) -> Format:
    """The native form whose architecture llama.cpp runs as transformers does, for a working form's configuration.

    Raises:
        InputError: there is none.
    """
    rope = working.rope_parameters.get("rope_type")
    # llama.cpp reads Llama 3's rope factors for these two only, and others silently wrong
    names = ["granitemoeshared", "mixtral"] if rope == "llama3" else list(ARCHITECTURES)
    reasons = []
    for name in names:
        form: Format = registry.build("export", name)
        try:
            form.config(working)
            form.check_bias(has_bias)
        except InputError as error:
            reasons.append(str(error).partition(". The working")[0])
            continue
        if rope not in ROPES:
            raise InputError(f"rope type '{rope}' is not written to GGUF; {', '.join(ROPES)} are")
        if others := [key for key, value in working.rope_parameters.items() if value is not None and key not in KEYS]:
            raise InputError(f"llama.cpp has no place for what {', '.join(others)} do to the model's rope")
        return form
    raise InputError("this model cannot be written as GGUF. " + "; ".join(reasons))


def check_k_quant(source: Converted, form: Format, outtype: str) -> str:
    """The path of `llama-quantize`.

    Raises:
        InputError: it is not installed, or the experts' width is no multiple of 256, which K-quants' blocks need.
    """
    config = form.config(source.config)
    widths = {"experts": config.get("moe_intermediate_size") or config["intermediate_size"]}
    if width := source.config.shared_expert_intermediate_size:
        widths["the shared expert"] = width
    for what, width in widths.items():
        if width % K_BLOCK:
            raise InputError(
                f"{outtype} has blocks of {K_BLOCK}, and the width of {what}, {width}, is no multiple of it; take q8_0 "
                f"or another type without k, or convert with a plan that 'moesaic plan' marks for K-quants"
            )
    found = shutil.which("llama-quantize")
    if not found:
        raise InputError(
            f"{outtype} is made by llama.cpp's llama-quantize, which is not on the PATH; install llama.cpp, or take "
            f"one of {', '.join(OUTTYPES)}"
        )
    return found


def _quantise(command: str, path: Path, outtype: str) -> int:
    """Replace the file by its quantised form; returns how many matrices got no K-quant."""
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


def _write(source: Converted, form: Format, path: Path, outtype: str, report: Progress) -> dict[str, Any]:
    count = source.config.num_hidden_layers
    outer = embeddings_and_head(source)
    shapes = {name: tensor.shape for name, tensor in outer.items()}
    first = {name: tensor.shape for name, tensor in block(form, source.layer(0), source.config).items()}
    for index in range(count):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in first.items()}
    kinds = {name: kind_of(name, shape, OUTTYPES[outtype]) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, ARCHITECTURES[form.name])
    write_config(writer, form.config(source.config), source, outtype)
    write_vocabulary(
        writer, source.checkpoint.folder, load_tokenizer(source.checkpoint.folder), source.config.vocab_size
    )
    for name, shape in shapes.items():
        size, bytes_ = gguf.GGML_QUANT_SIZES[kinds[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), shape.numel() // size * bytes_, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sums = {}

    def put(name: str, tensor: Tensor) -> None:
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kinds[name])
        sums[name] = checksum(data)
        writer.write_tensor_data(data)

    for name, tensor in outer.items():
        put(name, tensor)
    for index in range(count):
        report(index, count, "writing")
        for name, tensor in block(form, source.layer(index), source.config).items():
            put(f"blk.{index}.{name}", tensor)
    writer.close()
    report(count, count, "reading back")
    found = {tensor.name: checksum(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    if found != sums:
        raise WorkError(f"'{path}' is not what was written to it; is the disk sound?")
    wish = OUTTYPES[outtype]
    fallbacks = sum(kind != wish and len(shapes[n]) > 1 and kind != Kind.F32 for n, kind in kinds.items())
    return {"architecture": ARCHITECTURES[form.name], "fallbacks": fallbacks}


def checksum(data: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(data).view(np.uint8).data)


def kind_of(name: str, shape: torch.Size, wish: Kind) -> Kind:
    """Norms, biases and routers in f32; matrices as wished, or in f16 where a row is no whole number of blocks."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Kind.F32
    return wish if shape[-1] % gguf.GGML_QUANT_SIZES[wish][0] == 0 else Kind.F16


def embeddings_and_head(source: Converted) -> Tensors:
    """Embeddings, final norm, head, and Llama 3's rope factors."""
    outer = source.outer()
    outer.setdefault(HEAD, outer["model.embed_tokens.weight"])
    tensors = {OUTER[name]: tensor for name, tensor in outer.items()}
    if source.config.rope_parameters["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
        steps = torch.arange(0, head_dim(source.config), 2) / head_dim(source.config)
        tensors["rope_freqs.weight"] = source.config.rope_parameters["rope_theta"] ** -steps / scaled
    return tensors


def block(form: Format, layer: Tensors, working: Any) -> Tensors:
    """A decoder layer by llama.cpp's names."""
    native = form.layer(layer, working)
    experts = working.num_experts
    tensors = {RENAMED[name]: native.pop(name) for name in list(native) if name in RENAMED}
    norm = native.pop("post_attention_layernorm.weight")
    if form.name == "glm4_moe":
        tensors["post_attention_norm.weight"] = norm
        tensors["ffn_gate_inp.weight"] = native.pop("mlp.gate.weight")
        tensors["exp_probs_b.bias"] = native.pop("mlp.gate.e_score_correction_bias")
        gate_up, down = join_experts(native, experts, "mlp.experts.", ("gate_proj", "up_proj", "down_proj"))
        shared = {n: native.pop(f"mlp.shared_experts.{n}_proj.weight") for n in ("gate", "up", "down")}
    else:
        tensors["ffn_norm.weight"] = norm
        for n, heads in (("q", working.num_attention_heads), ("k", working.num_key_value_heads)):
            tensors[f"attn_{n}.weight"] = interleaved(tensors[f"attn_{n}.weight"], heads)
        shared = {}
        if form.name == "mixtral":
            tensors["ffn_gate_inp.weight"] = native.pop("block_sparse_moe.gate.weight")
            gate_up, down = join_experts(native, experts, "block_sparse_moe.experts.", ("w1", "w3", "w2"))
        else:
            tensors["ffn_gate_inp.weight"] = native.pop("block_sparse_moe.router.layer.weight")
            gate_up = native.pop("block_sparse_moe.input_linear.weight")
            down = native.pop("block_sparse_moe.output_linear.weight")
            shared["gate"], shared["up"] = native.pop("shared_mlp.input_linear.weight").chunk(2)
            shared["down"] = native.pop("shared_mlp.output_linear.weight")
    assert not native, f"left over: {list(native)}"
    gate_EID, up_EID = gate_up.chunk(2, dim=1)
    tensors |= {"ffn_gate_exps.weight": gate_EID, "ffn_up_exps.weight": up_EID, "ffn_down_exps.weight": down}
    return tensors | {f"ffn_{n}_shexp.weight": weight for n, weight in shared.items()}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of the rope that turns neighbours, of one that turns halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
