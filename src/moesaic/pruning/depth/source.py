"""A checkpoint without some of its decoder layers: which fields change, and what its tensors are called then."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ...checkpoint.facts import copy_generation
from ...checkpoint.reader import Checkpoint
from ...checkpoint.writer import OUTSIDE_FILE, ResumableOutput
from ...errors import InputError
from ...files import write_json
from ...formats.converted import is_converted
from ...models.families import decoder_layers
from ...models.integrity import model_on_meta
from ...results import Json
from ..sources import LAYER_NUMBER, MTP_LAYERS, StockSource, Tensors

BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type")
"""Fields of a configuration that hold one entry a decoder layer."""
NUMBERED = ("mlp_only_layers",)
"""Fields that hold numbers of decoder layers."""


class DeepSource(StockSource):
    """A checkpoint of a stock architecture whose decoder layers can be left out.

    Raises:
        InputError: it is damaged, a conversion, or takes pictures.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        checkpoint = Checkpoint(folder)
        if is_converted(checkpoint):
            raise InputError(
                f"'{folder}' was converted by moesaic; --method depth leaves layers of the dense model out: prune that "
                "and convert the result"
            )
        super().__init__(folder, dtype, device)
        if self.layerwise.takes_pictures:
            raise InputError(
                f"'{folder}' takes pictures, and --method depth knows text models only; prune the text model that it "
                "is built on"
            )

    @cached_property
    def has_experts(self) -> bool:
        """Whether a decoder layer is a Mixture of Experts."""
        return bool(self.layerwise.joined) or any("experts" in name for name in self.layerwise.on_disk)

    def shorter_json(self, kept: Sequence[int]) -> Json:
        """Write `config.json` for these of the layers.

        What the family fills in by a layer's number, such as which layers look through a sliding window, is written
        out where it would come out differently.
        """
        fields = copy.deepcopy(self.checkpoint.config)
        fields["num_hidden_layers"] = len(kept)
        whole = self.layerwise.config
        for name in NUMBERED:
            if fields.get(name):
                fields[name] = [kept.index(number) for number in fields[name] if number in kept]
        wanted = {
            name: [value[number] for number in kept]
            for name in BY_LAYER
            if isinstance(value := getattr(whole, name, None), list) and len(value) == len(self.layerwise.layers)
        }
        fields |= {name: value for name, value in wanted.items() if fields.get(name) is not None}
        if fields.get(MTP_LAYERS) and self._beyond():
            fields[MTP_LAYERS] = 0
        made = _config(fields)
        return fields | {name: value for name, value in wanted.items() if getattr(made, name, None) != value}

    def shorter_model(self, kept: Sequence[int]) -> PreTrainedModel:
        """Make the model of these layers, without weights.

        Raises:
            InputError: a layer would be another one in its new place.
        """
        model = model_on_meta(_config(self.shorter_json(kept)), self.checkpoint.folder, self.layerwise.dtype)
        for layer, number in zip(decoder_layers(model), kept, strict=True):
            found, wanted = layer.state_dict(), self.layerwise.layers[number].state_dict()
            if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in wanted.items()}:
                raise InputError(
                    f"layer {number} of {self.checkpoint.architecture()} would be of another kind in its new place: "
                    "its configuration says by a layer's number what it is; keep another --layers"
                )
        return model

    def renamed(self, tensors: Tensors, index: int, number: int) -> Tensors:
        """Write layer `index` of the source, given by names in the layer, as layer `number` of the checkpoint."""
        return {
            LAYER_NUMBER.sub(f"layers.{number}.", name, count=1): tensor
            for name, tensor in self.on_disk(index, tensors, 0).items()
        }

    def write_outside(self, partial: ResumableOutput, kept: Sequence[int], changed: Tensors) -> list[str]:
        """Write what is in no layer, `config.json` and generation settings; returns what people should know of it.

        `changed` are tensors by the model's names that take the place of the checkpoint's.
        """
        beyond, new = set(self._beyond()), {self.layerwise.on_disk[name]: tensor for name, tensor in changed.items()}
        tensors = dict(self.checkpoint.items([name for name in self._rest() if name not in beyond]))
        partial.write(OUTSIDE_FILE, tensors | {name: tensor.to(tensors[name].dtype) for name, tensor in new.items()})
        fields = self.shorter_json(kept)
        write_json(partial.folder / "config.json", fields)
        copy_generation(self.checkpoint.folder, partial.folder)
        notes = [f"{len(beyond)} tensors of layers that predict further tokens were left out"] * bool(beyond)
        if len(set(fields.get("layer_types") or ())) > 1 and len(kept) < len(self.layerwise.layers):
            notes.append(
                "kinds of layers (layer_types) no longer repeat in the family's pattern; engines that assume the "
                "pattern and do not read the list, such as llama.cpp, would run another model"
            )
        return notes


def _config(fields: Json) -> PreTrainedConfig:
    known = {name: value for name, value in fields.items() if name != "quantization_config"}
    return CONFIG_MAPPING[known["model_type"]].from_dict(known)
