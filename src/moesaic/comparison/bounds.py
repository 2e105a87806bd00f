"""What routing could reach at the finest: every token runs its own best neurons, with the dense weights.

After TEAL (arXiv 2408.14690) and WINA (arXiv 2505.19427), on FFNs only.

Shapes: T tokens, F neurons, K kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ..models.families import GatedFFN, decoder_layers, ffn_name, gated_ffn


class TopNeurons(nn.Module):
    """A dense FFN that keeps, in each token, the `kept` neurons of largest `|h_i| ‖Wd_i‖`; it computes all of them."""

    def __init__(self, ffn: GatedFFN, kept: int) -> None:
        super().__init__()
        self.ffn, self.kept = ffn, kept
        self.norm_F = ffn.down_DF.float().norm(dim=0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        h_TF = self.ffn.hidden(hidden_states)
        index_TK = (h_TF.float().abs() * self.norm_F).topk(self.kept, dim=-1, sorted=False).indices
        kept_TF = torch.zeros_like(h_TF).scatter_(-1, index_TK, h_TF.gather(-1, index_TK))
        return linear(kept_TF, self.ffn.down_DF)


@contextmanager
def top_neurons(model: PreTrainedModel, active: float) -> Iterator[PreTrainedModel]:
    """Let each token run only the best share `active` of each FFN's neurons, with the dense weights.

    The model is dense again on leaving.
    """
    width: int = model.config.get_text_config().intermediate_size
    dense = [(layer, ffn_name(layer)) for layer in decoder_layers(model)]
    modules = [layer.get_submodule(name) for layer, name in dense]
    try:
        for (layer, name), module in zip(dense, modules, strict=True):
            setattr(layer, name, TopNeurons(gated_ffn(module), max(1, round(active * width))))
        yield model
    finally:
        for (layer, name), module in zip(dense, modules, strict=True):
            setattr(layer, name, module)
