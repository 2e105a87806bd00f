"""Layers that keep their dense FFN (`--dense-layers`), such as every second one in MoE-LLaVA."""

from __future__ import annotations

import torch

from .layer import ConvertedLayer, StageTimer, layer_record, stream_error
from .prepare import Conversion
from .states import HiddenStates, run_dense


@torch.no_grad()
def keep_layer(conversion: Conversion, index: int, states: HiddenStates) -> ConvertedLayer:
    """Take a decoder layer as it is on disk, bit by bit, and run it on all texts.

    Args:
        conversion: what is converted.
        index: the layer's number.
        states: what enters it.
    """
    done, layerwise = StageTimer(), conversion.layerwise
    with layerwise.layer(index) as layer:
        done("load")
        after = run_dense(layerwise, index, layer, states)
        tensors = {name: t.to("cpu", conversion.dtype) for name, t in layerwise.layer_tensors(index).items()}
    done("run_dense")
    stream, no_loads = stream_error(after, conversion.tokens.pictured), torch.zeros(0)
    return ConvertedLayer(tensors, after, layer_record(index, (0.0, 0.0), stream, no_loads, [], done))
