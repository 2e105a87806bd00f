"""A converted model on disk, in whichever format, read as moesaic's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .. import registry
from ..checkpoint.facts import saved_settings
from ..checkpoint.reader import Checkpoint
from ..compat import parameters_on_meta
from ..errors import InputError, first_line
from ..files import AGAIN
from ..models.families import EMBEDDINGS, HEAD, LAYERS
from ..models.integrity import SIZES, check_fields, check_finite, check_tensors, model_on_meta
from ..moe.modeling import MODEL_TYPE, MoesaicConfig
from .base import Format, MoesaicModelConfig
from .fields import check_agreement, is_stock, making_sense, moesaic_fields

Config = TypeVar("Config")
ROUNDING = 0.01
"""How far a weight may be from what was written and still count as rounded to another dtype."""
PARTS = dict.fromkeys(
    ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
     "shared_expert_intermediate_size", "router_hidden_size"), (0, 1_000_000)
)  # fmt: skip
"""Fields of a configuration that say how the FFN is cut, and what they can be."""
GENERATION = "generation_config.json"
GATE_BIAS = "mlp.gate.e_score_correction_bias"


class ChosenFormat(NamedTuple):
    """How a model is written, and why not as a stock architecture (nothing if it is)."""

    format: Format
    reason: str


def choose_format(wish: object, config: MoesaicModelConfig, has_bias: bool) -> ChosenFormat:
    """Choose the format to write a model in.

    Args:
        wish: a format or its name, or `auto` for the first stock architecture that holds the model, else moesaic's own.
        config: the model's.
        has_bias: whether routers add a constant to each expert's score.

    Raises:
        InputError: a format that is unknown or cannot hold the model.
    """
    if wish == "gguf":
        raise InputError("GGUF is made of a converted model: moesaic export OUT OUT.gguf --format gguf")
    if wish != "auto":
        format: Format = registry.build("format", wish)
        format.check(config, has_bias)
        return ChosenFormat(format, "")
    reasons = []
    formats: list[Format] = [registry.build("format", name) for name in registry.names("format")]
    able = [f for f in formats if f.preference is not None and config.dense_model_type in f.sources]
    for format in sorted(able, key=lambda f: f.preference or 0):
        copies = format.copies_shared and config.n_shared_experts and config.num_experts_per_tok > 1
        several = "each of several active experts would run a copy of the shared one" if copies else ""
        reason = several or format.reason(config, has_bias) or format.width_reason(config)
        if not reason:
            return ChosenFormat(format, "")
        reasons.append(f"not {format.name}: {reason}")
    reasons.append(f"no stock Mixture-of-Experts has {config.dense_model_type}'s layers")
    return ChosenFormat(registry.build("format", MODEL_TYPE), reasons[0])


class Converted:
    """The configuration and tensors of moesaic's own format, a layer at a time.

    Raises:
        InputError: the folder holds no converted model, or is not whole: tensors are missing, of another shape or would
            not be read, or `config.json` contradicts itself.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.fields = moesaic_fields(self.checkpoint)
        if self.fields.get("model_type") != MODEL_TYPE:
            raise InputError(
                f"'{folder}' holds a {self.fields.get('model_type')} model that moesaic did not make; expected a "
                "folder made by 'moesaic convert' or 'moesaic export'"
            )
        stock = is_stock(self.checkpoint)
        named = self.fields.pop("format", None) if stock else None
        named = named or self.checkpoint.config.get("model_type")
        self.format: Format = registry.build("format", named, imported_only=True)
        if self.fields.get("tie_word_embeddings") and not self._tied():
            self.fields = self.fields | {"tie_word_embeddings": False}
        with making_sense(self.checkpoint):
            self.config: MoesaicModelConfig = MoesaicConfig.from_dict(self.fields)
            check_fields(self.config, SIZES | PARTS, folder)
            if stock:
                check_agreement(self.checkpoint, self.format, self.config)
            shapes = self._shapes()
        check_tensors(self.checkpoint, shapes, f"the {self.format.name} model that config.json describes")

    def _shapes(self) -> dict[str, list[int]]:
        """Say which tensors the folder must hold, in which shape."""
        state = model_on_meta(self.config, self.checkpoint.folder).state_dict()
        if self.config.tie_word_embeddings and self.format.name == MODEL_TYPE:
            del state[HEAD]
        layers = range(self.config.num_hidden_layers)
        found = {name: tensor for name, tensor in state.items() if not name.startswith(LAYERS)}
        for index in layers:
            prefix = self.prefix(index)
            layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            found |= {prefix + name: tensor for name, tensor in self.format.layer(layer, self.config).items()}
        return {name: list(tensor.shape) for name, tensor in found.items()}

    def _tied(self) -> bool:
        """Tell whether the head is still the embeddings: a stock format holds both, and one may have been trained."""
        if HEAD not in self.checkpoint or EMBEDDINGS not in self.checkpoint:
            return True
        head, embeddings = (tensor for _, tensor in self.checkpoint.items([HEAD, EMBEDDINGS]))
        return torch.equal(head, embeddings)

    def has_bias(self) -> bool:
        """Tell whether routers add a constant to each expert's score."""
        names = [name for name in self.checkpoint.names() if name.endswith(GATE_BIAS)]
        return any(bool(bias_E.any()) for _, bias_E in self.checkpoint.items(names))

    def layer(self, index: int) -> dict[str, Tensor]:
        """Read a decoder layer's tensors, by their name in the layer.

        Raises:
            InputError: a tensor is NaN or infinite somewhere; or a stock architecture was changed, as by training, in
                what moesaic's own format has no place for.
        """
        prefix = self.prefix(index)
        tensors = self.checkpoint.items(self.checkpoint.names(prefix))
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors}
        check_finite(((prefix + name, tensor) for name, tensor in named.items()), self.checkpoint.folder)
        layer = self.format.moesaic_layer(named, self.config)
        if self.format.name != MODEL_TYPE:
            again = self.format.layer(layer, self.config)
            for name, tensor in named.items():
                if not torch.allclose(again[name].float(), tensor.float(), rtol=ROUNDING, atol=0, equal_nan=True):
                    raise InputError(
                        f"'{self.checkpoint.folder}': {prefix}{name} was changed since moesaic wrote it, and the "
                        "format of moesaic has no place for that; load the folder with transformers"
                    )
        return layer

    def prefix(self, index: int) -> str:
        """Name the beginning of the names of a layer's tensors."""
        return f"{LAYERS}{index}."

    def embeddings_and_head(self) -> dict[str, Tensor]:
        """Read embeddings, final norm, and the head if it is not the embeddings.

        Raises:
            InputError: one is NaN or infinite somewhere.
        """
        names = [name for name in self.checkpoint.names() if not name.startswith(LAYERS)]
        if self.config.tie_word_embeddings:
            names = [name for name in names if name != HEAD]
        found = dict(self.checkpoint.items(names))
        check_finite(found.items(), self.checkpoint.folder)
        return found

    def tensors(self, layers: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read all tensors, or those of the first `layers` layers and what is outside the layers."""
        yield from self.embeddings_and_head().items()
        for index in range(layers or self.config.num_hidden_layers):
            for name, tensor in self.layer(index).items():
                yield self.prefix(index) + name, tensor

    def load(self, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
        """Load moesaic's own format into memory, or its first `layers` layers and the head."""
        config, folder = shortened(self.config, layers), self.checkpoint.folder
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        state = {name: tensor.to(dtype) for name, tensor in self.tensors(layers)}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        if (folder / GENERATION).is_file():
            model.generation_config = read_generation(folder)
        return model


def read_generation(folder: Path) -> GenerationConfig:
    """Read how a model is to generate.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many unrelated types for what a file may hold
        raise InputError(f"'{folder / GENERATION}' is damaged: {first_line(error)}; {AGAIN}, or delete it") from error


def shortened(config: Config, layers: int | None) -> Config:
    """Shorten a configuration to the model's first `layers` layers."""
    short: Any = copy.deepcopy(config)
    if layers is not None:
        short.num_hidden_layers = layers
        if getattr(short, "layer_types", None):
            short.layer_types = short.layer_types[:layers]
    return short


def dense_origin(model: str, option: str = "--against") -> str:
    """Name the dense model that a converted one came from.

    Args:
        model: the folder of a converted model.
        option: how a user would name the dense one, for the message.

    Raises:
        InputError: unknown, or a folder that only its maker knows.
    """
    origin = saved_settings(Path(model).expanduser())["model"]
    if origin.endswith(("/", ".gguf")):
        raise InputError(f"'{model}' was converted from the local '{origin}'; name it with {option}")
    return origin
