"""Find where each expert is in a checkpoint, of any maker.

Shapes: E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoint.reader import Checkpoint
from ..errors import InputError
from ..models.families import layers_prefix
from ..models.integrity import check_contents, is_transposed, model_on_meta, read_config
from ..models.layerwise import Joined
from ..models.moe_block import MoEBlock, find_blocks
from .source import DiskSource, ExpertWeights, Matrix, Place, Rows, rows_of

BANKS = ("gate_up_proj", "down_proj")
"""What transformers calls the experts' matrices."""


def blocks_with_experts(model: PreTrainedModel, folder: Path) -> list[MoEBlock]:
    """Find a model's Mixture-of-Experts blocks, all of which the store can hold.

    Raises:
        InputError: it is dense, its experts differ in shape, or they do not run through transformers' experts
            interface.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise InputError(
            f"'{folder}' is dense: it has no experts to keep elsewhere; leave --expert-memory out, or convert it "
            "first: moesaic convert MODEL OUT"
        )
    shapes = {(block.down_proj.shape, block.experts.get_parameter("gate_up_proj").shape) for block in blocks}
    if len(shapes) > 1:
        raise InputError(
            f"'{folder}' has experts of {len(shapes)} different shapes; the expert store holds those of one"
        )
    if not hasattr(blocks[0].experts, "has_gate"):
        raise InputError(
            f"'{folder}': the experts of {blocks[0].experts.__class__.__name__} do not run through transformers' "
            "experts interface; leave --expert-memory out"
        )
    return blocks


def expert_shapes(blocks: list[MoEBlock], dtype: torch.dtype) -> ExpertWeights:
    """Give an expert's matrices, without memory."""
    parts = (blocks[0].experts.get_parameter(name) for name in BANKS)
    return ExpertWeights(*(torch.empty(part.shape[1:], dtype=dtype, device="meta") for part in parts))


class Layout:
    """The names and places of a checkpoint's tensors, those of experts apart.

    Args:
        checkpoint: a folder of safetensors, of a stock architecture or in moesaic's own format.
        divisor: what down-projections are to be divided by.

    Raises:
        InputError: damaged, or with experts that are not kept in a known way.
    """

    def __init__(self, checkpoint: Checkpoint, divisor: float = 1.0) -> None:
        self.checkpoint, self.divisor = checkpoint, divisor
        self.model = model_on_meta(read_config(checkpoint.folder), checkpoint.folder)
        found = check_contents(self.model, checkpoint)
        self.shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        blocks = blocks_with_experts(self.model, checkpoint.folder)
        prefix = layers_prefix(self.model)
        self.banks = [
            {part: f"{prefix}{block.layer}.{block.names['experts']}.{part}" for part in BANKS} for block in blocks
        ]
        held = {name for bank in self.banks for name in bank.values()}
        self.names = self._one_each({name: sources for name, sources in found.items() if name not in held})
        """The checkpoint's names by the model's, of all tensors but the experts'."""
        self.source = DiskSource([self._places(found, bank, blocks[0].num_experts) for bank in self.banks])

    def _one_each(self, found: Mapping[str, list[str]]) -> dict[str, str]:
        odd = [name for name, sources in found.items() if len(sources) != 1]
        if odd:
            raise InputError(
                f"'{self.checkpoint.folder}': {odd[0]} is made of parts of other tensors there, which the expert store "
                "does not read; leave --expert-memory out"
            )
        return {name: sources[0] for name, sources in found.items()}

    def _places(self, found: Mapping[str, list[str]], bank: Mapping[str, str], experts: int) -> list[Place]:
        gate_up, down = (self._parts(name, found[name], experts) for name in bank.values())
        pairs = zip(gate_up, down, strict=True)
        return [Place(Matrix(up), Matrix(out, self.divisor)) for up, out in pairs]

    def _parts(self, name: str, sources: list[str], experts: int) -> list[tuple[Rows, ...]]:
        """Find the parts of each expert's matrix: rows of one tensor of all experts, or tensors of its own."""
        if len(sources) == 1:
            if is_transposed(self.shapes[name], self.checkpoint.shapes()[sources[0]]):
                raise InputError(
                    f"'{self.checkpoint.folder}': {sources[0]} has its experts' matrices transposed, so that none of "
                    "their rows lie together; leave --expert-memory out"
                )
            return [(rows_of(self.checkpoint, sources[0], expert),) for expert in range(experts)]
        joined = Joined(name, sources)
        return [tuple(rows_of(self.checkpoint, own) for own in joined.sources(e)) for e in range(experts)]
