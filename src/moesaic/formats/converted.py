"""A converted model on disk, in whichever format, read as moesaic's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .. import registry
from ..checkpoint.facts import GENERATION, saved_settings
from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..compat import parameters_on_meta
from ..errors import InputError, first_line
from ..files import AGAIN
from ..models.families import HEAD, auto_class, layers_prefix
from ..models.integrity import SIZES, check_fields, check_finite, check_tensors, model_on_meta, read_config
from ..models.layerwise import EXPERT
from ..moe.modeling import MODEL_TYPE, MoesaicConfig
from ..results import Json
from .base import Format, MoesaicModelConfig, block_config
from .fields import check_agreement, is_converted_stock, making_sense, moesaic_fields, text_json

Config = TypeVar("Config")
ROUNDING = 0.01
"""How far a weight may be from what was written and still count as rounded to another dtype."""
PARTS = dict.fromkeys(
    ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
     "shared_expert_intermediate_size", "router_hidden_size", "pregate_groups", "pregate_heads"), (0, 1_000_000)
)  # fmt: skip
"""Fields of a configuration that say how the FFN is cut, and what they can be."""
GATE_BIAS = "mlp.gate.e_score_correction_bias"


def is_expert_tensor(name: str, shape: Sequence[int]) -> bool:
    """Tell whether a tensor of a decoder layer holds routed experts: all of them, or a matrix of one."""
    return len(shape) == 3 or EXPERT.fullmatch(name) is not None


class Converted:
    """The configuration and tensors of moesaic's own format, a layer at a time.

    Raises:
        InputError: the folder holds no converted model, or is not whole: tensors are missing, of another shape or would
            not be read, or `config.json` contradicts itself.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.fields = moesaic_fields(self.checkpoint)
        text = text_json(self.fields)
        if self.fields.get("model_type") != MODEL_TYPE:
            raise InputError(
                f"'{folder}' holds a {self.fields.get('model_type')} model that moesaic did not make; expected a "
                "folder made by 'moesaic convert' or 'moesaic export'"
            )
        stock = is_converted_stock(self.checkpoint)
        named = text.pop("format", None) if stock else MODEL_TYPE
        named = named or architecture_named(self.checkpoint.config)
        self.format: Format = registry.build("format", named, imported_only=True)
        with making_sense(self.checkpoint):
            self.whole: PreTrainedConfig = MoesaicConfig.from_dict(self.fields)
            check_fields(self.config, SIZES | PARTS, folder)
            model = model_on_meta(self.whole, folder)
            self.outside = outside_names(model)
            if not self._tied():
                untie(self.whole)
            if stock:
                check_agreement(self.checkpoint, self.format, self.config)
            shapes = self._shapes(model.state_dict())
        check_tensors(self.checkpoint, shapes, f"the {self.format.name} model that config.json describes")

    @property
    def config(self) -> MoesaicModelConfig:
        """The configuration of the language model; of a vision-language model, of its tower."""
        return block_config(self.whole)

    @property
    def takes_pictures(self) -> bool:
        """Whether it is a vision-language model."""
        return self.config is not self.whole

    def _shapes(self, state: dict[str, Tensor]) -> dict[str, list[int]]:
        """Say which tensors the folder must hold for a model of that `state_dict`, in which shape."""
        if self.whole.tie_word_embeddings and self.format.name == MODEL_TYPE:
            del state[HEAD]
        layers = range(self.config.num_hidden_layers)
        found = {name: tensor for name, tensor in state.items() if not name.startswith(self.outside.layers)}
        for index in layers:
            prefix = self.prefix(index)
            layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            found |= {prefix + name: tensor for name, tensor in self.format.layer(layer, self.config).items()}
        return {name: list(tensor.shape) for name, tensor in found.items()}

    def _tied(self) -> bool:
        """Tell whether the head is still the embeddings: a stock format holds both, and one may have been trained."""
        if not self.whole.tie_word_embeddings:
            return False
        both = [HEAD, self.outside.embeddings]
        if not all(name in self.checkpoint for name in both):
            return True
        head, embeddings = (tensor for _, tensor in self.checkpoint.items(both))
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
                if not is_rounded(again[name], tensor):
                    raise InputError(
                        f"'{self.checkpoint.folder}': {prefix}{name} was changed since moesaic wrote it, and the "
                        "format of moesaic has no place for that; load the folder with transformers"
                    )
        return layer

    def layer_without_experts(self, index: int) -> dict[str, Tensor]:
        """Read what a decoder layer has beside its routed experts, by its name in the layer.

        Raises:
            InputError: a tensor is NaN or infinite somewhere.
        """
        prefix = self.prefix(index)
        found = {name.removeprefix(prefix): h for name, h in self.checkpoint.headers.items() if name.startswith(prefix)}
        routed = {name: header for name, header in found.items() if is_expert_tensor(name, header.shape)}
        rest = dict(self.checkpoint.items([prefix + name for name in found if name not in routed]))
        check_finite(rest.items(), self.checkpoint.folder)
        named = {name.removeprefix(prefix): tensor for name, tensor in rest.items()}
        for name, header in routed.items():
            one = EXPERT.fullmatch(name)
            if one and one["number"] != "0":  # the first stands for all
                continue
            copied = one and self.format.copies_shared
            named[name] = self.checkpoint.read(prefix + name) if copied else torch.empty(header.shape, device="meta")
        layer = self.format.moesaic_layer(named, self.config)
        return {name: tensor for name, tensor in layer.items() if not is_expert_tensor(name, tensor.shape)}

    def prefix(self, index: int) -> str:
        """Name the beginning of the names of a layer's tensors."""
        return f"{self.outside.layers}{index}."

    def embeddings_and_head(self) -> dict[str, Tensor]:
        """Read what is outside the layers: embeddings, norm, the head if it is not the embeddings, a vision tower.

        Raises:
            InputError: one is NaN or infinite somewhere.
        """
        names = [name for name in self.checkpoint.names() if not name.startswith(self.outside.layers)]
        if self.whole.tie_word_embeddings:
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
        config, folder = shortened(self.whole, layers), self.checkpoint.folder
        with parameters_on_meta():
            model = auto_class(config).from_config(config, dtype=dtype)
        state = {name: tensor.to(dtype) for name, tensor in self.tensors(layers)}
        if dtype != self.checkpoint.dtype():  # whose range may be less
            check_finite(state.items(), folder)
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        if (folder / GENERATION).is_file():
            model.generation_config = read_generation(folder)
        return model


def is_rounded(again: Tensor, tensor: Tensor) -> bool:
    """Tell whether two tensors are equal but for the rounding to another dtype."""
    same = again.dtype == tensor.dtype and torch.equal(again, tensor)  # at the speed of memory
    return same or torch.allclose(again.float(), tensor.float(), rtol=ROUNDING, atol=0, equal_nan=True)


def read_generation(folder: Path) -> GenerationConfig:
    """Read how a model is to generate.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many unrelated types for what a file may hold
        raise InputError(f"'{folder / GENERATION}' is damaged: {first_line(error)}; {AGAIN}, or delete it") from error


def architecture_named(config: Json) -> str:
    """Name the stock architecture that a `config.json` is of, or that of its language tower."""
    whole = str(config.get("model_type"))
    return whole if whole.replace("_", "-") in registry.names("format") else str(text_json(config).get("model_type"))


class Outside(NamedTuple):
    """Names of tensors by where they are."""

    layers: str
    """How those of all decoder layers begin."""
    embeddings: str


def outside_names(model: PreTrainedModel) -> Outside:
    """Find how a model names its layers and embeddings."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return Outside(layers_prefix(model), f"{name}.weight")


def untie(config: PreTrainedConfig) -> None:
    """Say that the head is not the embeddings."""
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False


def shortened(config: Config, layers: int | None) -> Config:
    """Shorten a configuration to the model's first `layers` layers."""
    short: Any = copy.deepcopy(config)
    text = short.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return short


def dense_origin(model: str, option: str = "--against") -> str:
    """Name the dense model that a converted one came from.

    Args:
        model: the folder of a converted model.
        option: how a user would name the dense one, for the message.

    Raises:
        InputError: unknown, or a folder that only its maker knows.
    """
    place = Path(model).expanduser()
    origin = saved_settings(resolve(model) if place.is_file() else place)["model"]
    if origin.endswith(("/", ".gguf")):
        raise InputError(f"'{model}' was converted from the local '{origin}'; name it with {option}")
    return origin


def is_converted(checkpoint: Checkpoint) -> bool:
    """Tell whether moesaic wrote a model, in a stock architecture or in its own."""
    return is_converted_stock(checkpoint) or checkpoint.config.get("model_type") == MODEL_TYPE


def without_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    """Make the model that `load` would, whose parameters take no memory.

    Raises:
        InputError: a configuration that is damaged.
    """
    folder = checkpoint.folder
    return model_on_meta(Converted(folder).whole if is_converted(checkpoint) else read_config(folder), folder)
