"""Where experts are pruned: a stock checkpoint, or a model that moesaic converted; read and written layer by layer.

Shapes: E routed experts, N experts that are kept.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..checkpoint.facts import check_conversion_files, copy_generation
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import OUTSIDE_FILE, ResumableOutput
from ..compat import has_experts
from ..errors import InputError
from ..files import write_json
from ..formats.base import block_config
from ..formats.companions import copy_companions
from ..formats.converted import Converted, is_converted
from ..formats.export import write_embeddings_and_head
from ..models.families import decoder_layers
from ..models.integrity import model_on_meta
from ..models.layerwise import LayerwiseModel
from ..models.moe_block import MoEBlock, find_block, routing_groups
from ..moe.modeling import DEFAULT_EXPERTS, MODEL_TYPE
from ..results import Json
from ..routing.base import Gate
from ..routing.sigmoid import SigmoidGate
from .sample import Axes

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of routed experts."""
MTP_LAYERS = "num_nextn_predict_layers"
LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
Tensors = dict[str, Tensor]


class Source(ABC):
    """A Mixture-of-Experts model whose layers can be read, run, and written with fewer experts."""

    layerwise: LayerwiseModel
    way_out: ClassVar[str] = "make one with moesaic convert, or leave out layers of this one: --method depth"
    """Of one without experts."""

    @property
    def checkpoint(self) -> Checkpoint:
        return self.layerwise.checkpoint

    @cached_property
    def blocks(self) -> list[MoEBlock | None]:
        """The Mixture-of-Experts of each decoder layer, without weights; None where a layer is dense.

        Raises:
            InputError: no layer has one.
        """
        found = [find_block(layer, number) for number, layer in enumerate(self.layerwise.layers)]
        if not any(found):
            raise InputError(
                f"'{self.checkpoint.folder}' is no Mixture of Experts: no decoder layer of "
                f"{self.checkpoint.architecture()} has a router and experts; {self.way_out}"
            )
        return found

    @property
    def block(self) -> MoEBlock:
        """The first of them."""
        return next(block for block in self.blocks if block is not None)

    @cached_property
    def groups(self) -> int:
        """Groups of experts that its routers choose among first, as DeepSeek's do; 1 where there are none."""
        return routing_groups(self.block.router)

    @abstractmethod
    def pruned_model(self, keep: int) -> PreTrainedModel:
        """Make the model with `keep` experts in each layer, without weights."""

    def pruned_layers(self, keep: int) -> list[nn.Module]:
        """Make its decoder layers, without weights."""
        model = self.pruned_model(keep).eval()
        if has_experts(model):
            model.set_experts_implementation(DEFAULT_EXPERTS)
        return list(decoder_layers(model))

    @abstractmethod
    def on_disk(self, index: int, tensors: Tensors, keep: int) -> Tensors:
        """Write a pruned layer's tensors as the checkpoint has them, under their names there."""

    @abstractmethod
    def write_rest(self, partial: ResumableOutput, keep: int) -> list[str]:
        """Write what is in no layer, `config.json` and generation settings; returns what people should know of it."""

    def read(self, index: int) -> Tensors:
        """Read a layer's tensors by their names in the layer, in the dtype on disk."""
        return self.layerwise.layer_tensors(index)


class StockSource(Source):
    """A checkpoint of a stock architecture."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.layerwise = LayerwiseModel(folder, dtype, device, experts=True)
        if has_experts(self.layerwise.model):
            self.layerwise.model.set_experts_implementation(DEFAULT_EXPERTS)

    def config_json(self, keep: int) -> Json:
        """Write `config.json` with another number of experts, under whatever names the source has it.

        Raises:
            InputError: it has none.
        """
        fields, count = copy.deepcopy(self.checkpoint.config), self.block.num_experts
        inner = fields.get("text_config")
        part = inner if isinstance(inner, dict) and not any(name in fields for name in COUNTS) else fields
        named = [name for name in COUNTS if part.get(name) == count]
        if not named:
            raise InputError(
                f"'{self.checkpoint.folder / 'config.json'}' does not say under {', '.join(COUNTS)} that there are "
                f"{count} experts; add the field that its architecture has"
            )
        part |= dict.fromkeys(named, keep)
        if part.get(MTP_LAYERS) and self._beyond():
            part[MTP_LAYERS] = 0
        return fields

    def pruned_model(self, keep: int) -> PreTrainedModel:
        fields = {k: v for k, v in self.config_json(keep).items() if k != "quantization_config"}
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        return model_on_meta(config, self.checkpoint.folder, self.layerwise.dtype)

    def on_disk(self, index: int, tensors: Tensors, keep: int) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            own = f"{self.layerwise.prefix}{index}.{name}"
            joined = self.layerwise.joined.get(own)
            tensor = tensor.transpose(1, 2).contiguous() if own in self.layerwise.turned else tensor
            found |= joined.separate(tensor) if joined else {self.layerwise.on_disk[own]: tensor}
        return found

    def _rest(self) -> list[str]:
        """Name the checkpoint's tensors that are in none of the model's decoder layers."""
        prefix = self.layerwise.prefix
        inside = {source for name, source in self.layerwise.on_disk.items() if name.startswith(prefix)}
        for name, joined in self.layerwise.joined.items():
            if name.startswith(prefix):
                inside.update(joined.all_sources())
        return [name for name in self.checkpoint.names() if name not in inside]

    def _beyond(self) -> list[str]:
        """Name the tensors of layers after the last, which predict further tokens and have experts of their own."""
        count = len(self.layerwise.layers)
        numbers = ((name, LAYER_NUMBER.search(name)) for name in self._rest())
        return [name for name, number in numbers if number and int(number[1]) >= count]

    def write_rest(self, partial: ResumableOutput, keep: int) -> list[str]:
        beyond = set(self._beyond())
        partial.write(OUTSIDE_FILE, dict(self.checkpoint.items([name for name in self._rest() if name not in beyond])))
        write_json(partial.folder / "config.json", self.config_json(keep))
        copy_generation(self.checkpoint.folder, partial.folder)
        note = (
            f"{len(beyond)} tensors of layers that predict further tokens were left out: their experts are not pruned"
        )
        return [note] if beyond else []


class ConvertedLayers(LayerwiseModel):
    """A converted model in whichever format, run as moesaic's own."""

    def __init__(self, source: Converted, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device, self.source = source.checkpoint, dtype, device, source
        self.model: Any = model_on_meta(source.whole, source.checkpoint.folder, dtype)
        self.on_disk, self.joined, self.turned = {}, {}, set()
        self.take_layers()

    def layer_tensors(self, index: int) -> Tensors:
        return self.source.layer(index)

    def embeddings_and_head(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.source.embeddings_and_head().items()


class ConvertedSource(Source):
    """A model that moesaic converted; what is written has the same format.

    Raises:
        InputError: it is damaged, or has a router that depends on how many experts there are.
    """

    way_out = "convert the dense model with experts that are routed"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.converted = Converted(folder)
        check_conversion_files(folder)
        self.layerwise = ConvertedLayers(self.converted, dtype, device)
        router = self.block.router
        recurrent = isinstance(router, Gate) and router.first_layer_names
        if isinstance(router, SigmoidGate) or recurrent or not any(p.ndim > 1 for p in router.parameters()):
            raise InputError(
                f"'{folder}' has the router '{self.converted.config.router}', which looks at all experts or other "
                "layers; only routers that score each expert of a layer for itself are pruned, such as 'linear'"
            )

    def config(self, keep: int) -> Any:
        """Make the configuration with `keep` experts, of the whole model.

        Raises:
            InputError: the model's format cannot hold so many.
        """
        whole: Any = copy.deepcopy(self.converted.whole)
        config = whole.get_text_config()
        config.num_experts = keep
        try:
            self.converted.format.check(config, self.converted.has_bias())
        except InputError as error:
            raise InputError(
                f"{error} (with {keep} experts); keep another number, or prune it in moesaic's own format, "
                f"which holds any: moesaic export {self.checkpoint.folder.name} OWN --format {MODEL_TYPE}"
            ) from error
        return whole

    def pruned_model(self, keep: int) -> PreTrainedModel:
        return model_on_meta(self.config(keep), self.checkpoint.folder, self.layerwise.dtype)

    def on_disk(self, index: int, tensors: Tensors, keep: int) -> Tensors:
        stock = self.converted.format.layer_exactly(tensors, block_config(self.config(keep)))
        return {self.converted.prefix(index) + name: tensor for name, tensor in stock.items()}

    def write_rest(self, partial: ResumableOutput, keep: int) -> list[str]:
        config, tensors = self.config(keep), self.converted.embeddings_and_head()
        write_embeddings_and_head(partial, self.converted.format, config, tensors)
        copy_companions(self.checkpoint.folder, partial.folder)
        return []


def open_source(folder: Path, dtype: torch.dtype, device: torch.device) -> Source:
    """Open a model whose experts are to be pruned.

    Raises:
        InputError: damaged, or no Mixture of Experts that can be pruned.
    """
    checkpoint = Checkpoint(folder)
    return ConvertedSource(folder, dtype, device) if is_converted(checkpoint) else StockSource(folder, dtype, device)


def expert_axes(source: nn.Module, pruned: nn.Module) -> Axes:
    """Find, by a parameter's name in the layer, the dimension in which a pruned layer's differs from the source's.

    Raises:
        InputError: one differs in two, so that its function depends on the number of experts.
    """
    found, there = {}, pruned.state_dict()
    for name, tensor in source.state_dict().items():
        pairs = enumerate(zip(tensor.shape, there[name].shape, strict=True))
        axes = [axis for axis, (before, after) in pairs if before != after]
        if len(axes) > 1:
            raise InputError(
                f"{name} has a row and a column for each expert: this router's width is the number of its experts, and "
                "without some it would say something else; convert with another --router"
            )
        found |= dict.fromkeys([name] * len(axes), axes[0] if axes else 0)
    return found
