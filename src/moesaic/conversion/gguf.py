"""The GGUF that a conversion for llama.cpp ends in: written from the finished folder, and its quality measured."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint.gguf_source import unpack_file
from ..checkpoint.single_file import MADE
from ..compat import require
from ..evaluation.layerwise import layerwise_perplexity
from ..formats.base import MoesaicModelConfig
from ..formats.converted import Converted
from ..formats.engines import LLAMA_CPP
from ..formats.gguf_support import K_QUANTS, check_k_quant
from ..models.layerwise import LayerwiseModel
from ..progress import Progress
from ..results import EngineChoice, WrittenGGUF


def check_gguf(
    engine: EngineChoice | None, config: MoesaicModelConfig, tokenizer: PreTrainedTokenizerBase
) -> EngineChoice | None:
    """Check before costly work that a conversion for llama.cpp can end in a GGUF; one for others ends in none.

    Returns:
        The engine, as it came.

    Raises:
        InputError: gguf is not installed, the type needs what is not there, or llama.cpp lacks such a tokenizer.
    """
    if engine is None or engine.engine != LLAMA_CPP:
        return engine
    require("writing GGUF", "export", "gguf")
    from gguf import GGUFWriter

    from ..formats.gguf.vocabulary import write_vocabulary

    if engine.outtype in K_QUANTS:
        check_k_quant(engine.outtype, config.moe_intermediate_size, config.shared_expert_intermediate_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        write_vocabulary(GGUFWriter(None, "llama"), Path(folder), tokenizer, config.vocab_size)
    return engine


def write_checked_gguf(
    folder: Path, outtype: str, called: Path, held_out_NL: Tensor, device: torch.device, report: Progress
) -> WrittenGGUF:
    """Write `MADE` into the folder of a finished conversion, and measure the file's own perplexity.

    Args:
        folder: in moesaic's own format or a stock one.
        outtype: GGUF's type of matrices.
        called: what the file is to be called in the end.
        held_out_NL: the text, token ids.
        device: to measure on.
        report: called with (finished layers, all layers, what is being done).
    """
    from ..formats.gguf.writer import write_gguf

    written = write_gguf(
        Converted(folder), folder / MADE, outtype, overwrite=True,
        progress=lambda done, count, note: report(done, count, f"{note} GGUF"),
    )  # fmt: skip
    assert written.architecture is not None
    assert written.fallbacks is not None
    return WrittenGGUF(
        output=str(called), outtype=outtype, architecture=written.architecture, bytes=written.bytes,
        fallbacks=written.fallbacks, perplexity=gguf_perplexity(folder / MADE, held_out_NL, device, report),
    )  # fmt: skip


@torch.no_grad()
def gguf_perplexity(file: Path, tokens_NL: Tensor, device: torch.device, report: Progress) -> float:
    """Compute `exp(mean loss)` of a GGUF's weights as they are read back, a layer in memory at a time.

    llama.cpp rounds activations too where weights are quantised, to 8 bits, which changes little.

    Raises:
        WorkError: logits are NaN or infinite.
    """
    scratch = file.with_name(file.name + ".read")
    shutil.rmtree(scratch, ignore_errors=True)  # as a kill leaves it
    scratch.mkdir()
    try:
        unpack_file(file, scratch)
        layerwise = LayerwiseModel(scratch, torch.float32, device, experts=True)
        layerwise.load_embeddings_and_head()
        hidden_NLD = layerwise.embed(tokens_NL)
        for index in range(len(layerwise.layers)):
            report(index, len(layerwise.layers), "measuring GGUF")
            with layerwise.layer(index) as layer:
                hidden_NLD = layerwise.run(index, layer, hidden_NLD)
        return layerwise_perplexity(layerwise, tokens_NL, hidden_NLD)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
