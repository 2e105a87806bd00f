"""Tensors in a GGUF file: their types, and their data one after the other."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...errors import InputError
from ..base import MoesaicModelConfig
from ..gguf_support import WRITTEN

OUTTYPES = {name: Kind[name.upper()] for name in WRITTEN}
HALF_MOST = torch.finfo(torch.float16).max


def kind_of(name: str, shape: torch.Size, wish: Kind) -> Kind:
    """Choose a tensor's type.

    Norms, biases and routers are f32; matrices as wished, or f16 where a row is no whole number of blocks.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Kind.F32
    return wish if shape[-1] % gguf.GGML_QUANT_SIZES[wish][0] == 0 else Kind.F16


def announce(writer: gguf.GGUFWriter, shapes: Mapping[str, torch.Size], kinds: Mapping[str, Kind]) -> None:
    """Write all that comes before the data: header, keys, and which tensors follow in which order."""
    for name, shape in shapes.items():
        size, bytes_ = gguf.GGML_QUANT_SIZES[kinds[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), shape.numel() // size * bytes_, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def encoded(name: str, tensor: Tensor, kind: Kind) -> np.ndarray:
    """Write a tensor's values in a type.

    Raises:
        InputError: half precision, which the type is made of, does not reach so far.
    """
    if kind not in (Kind.F32, Kind.BF16) and float(tensor.abs().max()) > HALF_MOST:
        raise InputError(f"{name} holds values beyond the {HALF_MOST:,.0f} of half precision, which "
                         f"{kind.name.lower()} is made of; give --outtype bf16 or f32")  # fmt: skip
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)


def rope_factors(config: MoesaicModelConfig, size: int) -> Tensor | None:
    """Compute what llama.cpp divides frequencies by, [size / 2], of Llama 3's scaling; None without it."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return rope["rope_theta"] ** -(torch.arange(0, size, 2) / size) / scaled
