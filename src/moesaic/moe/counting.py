"""How many routed experts run, measured on whatever a model runs.

Shapes: T tokens, D hidden size, K slots for a token's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.families import takes_pictures
from ..models.modality import IS_IMAGE, tell_modality
from ..models.moe_block import Routing
from .adaptive import moe_blocks_of


class MeanExperts(NamedTuple):
    """How many routed experts a token runs on average."""

    by_layer: list[float]
    by_modality: dict[str, float] | None
    """Of tokens of `text` and of pictures (`image`), over all layers; None where the model takes text only."""


@torch.inference_mode()
def mean_experts(model: PreTrainedModel, run: Callable[[], object]) -> MeanExperts:
    """Measure how many routed experts a token runs, on average over what `run` runs."""
    blocks = moe_blocks_of(model)
    layers, kinds = [[0, 0] for _ in blocks], {"text": [0, 0], "image": [0, 0]}

    def count(total: list[int], experts: int) -> Callable[[Tensor, Routing], None]:
        def see(hidden_TD: Tensor, routing: Routing) -> None:
            run_T = routing.runs(experts).sum(-1)
            add(total, run_T)
            if (is_image_T := IS_IMAGE.get()) is not None:
                add(kinds["text"], run_T[~is_image_T])
                add(kinds["image"], run_T[is_image_T])

        return see

    handles = [block.watch(count(total, block.num_experts)) for block, total in zip(blocks, layers, strict=True)]
    try:
        with tell_modality(model) if takes_pictures(model.config) else nullcontext():
            run()
    finally:
        for handle in handles:
            handle.remove()
    by_modality = {name: chosen / tokens for name, (chosen, tokens) in kinds.items() if tokens}
    return MeanExperts([chosen / max(1, tokens) for chosen, tokens in layers], by_modality or None)


def add(total: list[int], run_T: Tensor) -> None:
    """Add the experts that some tokens run, and the tokens, to a total."""
    total[0] += int(run_T.sum())
    total[1] += len(run_T)
