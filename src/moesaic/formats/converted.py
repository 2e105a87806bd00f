"""A converted model on disk, in whichever form, read as the working form."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .. import registry
from ..checkpoint.reader import Checkpoint
from ..errors import InputError
from ..moe.modeling import MODEL_TYPE, MoesaicConfig
from .base import Format

CONFIG_KEY = "moesaic"
"""The key of a native form's config.json under which the working form's is kept."""
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
ROUNDING = 0.01
"""How far a weight may be from what was written and still count as rounded to another dtype."""
GATE_BIAS = "mlp.gate.e_score_correction_bias"
PREFERRED = ("glm4_moe", "granitemoeshared", "flex_olmo", "mixtral")
"""Native forms in the order in which they are tried; the others are written when asked for."""


def choose_format(wish: str, working: Any, has_bias: bool) -> tuple[Format, str]:
    """The form to write a model in, and why it is no native one (or nothing).

    Args:
        wish: a form's name, or `auto` for the first native one that holds this model, else the working form.
        working: the working form's configuration.
        has_bias: whether routers add a constant to each expert's score.

    Raises:
        InputError: a form that is unknown or cannot hold the model.
    """
    if wish == "gguf":
        raise InputError("GGUF is made of a converted model: moesaic export OUT OUT.gguf --to gguf")
    if wish != "auto":
        form = registry.build("export", wish)
        form.config(working)
        form.check_bias(has_bias)
        return form, ""
    family = working.dense_model_type
    reasons = []
    for name in PREFERRED:
        form = registry.build("export", name)
        if family not in form.sources:
            continue
        try:
            if form.copies_shared and working.n_shared_experts and working.num_experts_per_tok > 1:
                raise InputError(f"{name}: each of several active experts would run a copy of the shared one")
            return choose_format(name, working, has_bias)
        except InputError as error:
            reasons.append(str(error).partition(": ")[2].partition(". The working")[0])
    return registry.build("export", MODEL_TYPE), [*reasons, f"no stock Mixture-of-Experts has {family}'s layers"][0]


def is_stock(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds a native form that moesaic wrote."""
    return CONFIG_KEY in checkpoint.config


def moesaic_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The working form's config.json, of a folder in either form."""
    return checkpoint.config[CONFIG_KEY] if is_stock(checkpoint) else checkpoint.config


class Converted:
    """The working form's configuration and tensors, a layer at a time.

    Raises:
        InputError: the folder holds no converted model.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.fields = moesaic_fields(self.checkpoint)
        if self.fields.get("model_type") != MODEL_TYPE:
            raise InputError(
                f"'{folder}' holds a {self.fields.get('model_type')} model that moesaic did not make; expected a "
                "folder made by 'moesaic convert' or 'moesaic export'"
            )
        self.format: Format = registry.build("export", self.checkpoint.config["model_type"])
        if self.fields.get("tie_word_embeddings") and not self._tied():
            self.fields = self.fields | {"tie_word_embeddings": False}
        self.config: Any = MoesaicConfig.from_dict(self.fields)

    def _tied(self) -> bool:
        """Whether the head is still the embeddings: a native form holds both, and they may have been trained since."""
        if HEAD not in self.checkpoint:
            return True
        head, embeddings = (tensor for _, tensor in self.checkpoint.items([HEAD, EMBEDDINGS]))
        return torch.equal(head, embeddings)

    def has_bias(self) -> bool:
        """Whether routers add a constant to each expert's score."""
        names = [name for name in self.checkpoint.names() if name.endswith(GATE_BIAS)]
        return any(bool(bias_E.any()) for _, bias_E in self.checkpoint.items(names))

    def layer(self, index: int) -> dict[str, Tensor]:
        """A decoder layer's tensors, by their name in the layer.

        Raises:
            InputError: a native form was changed, as by training, in what the working form has no place for.
        """
        prefix = self.prefix(index)
        tensors = self.checkpoint.items(self.checkpoint.names(prefix))
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors}
        layer = self.format.moesaic_layer(named, self.config)
        if self.format.name != MODEL_TYPE:
            again = self.format.layer(layer, self.config)
            for name, tensor in named.items():
                if not torch.allclose(again[name].float(), tensor.float(), rtol=ROUNDING, atol=0, equal_nan=True):
                    raise InputError(
                        f"'{self.checkpoint.folder}': {prefix}{name} was changed since moesaic wrote it, and the "
                        "working form has no place for that; load the folder with transformers"
                    )
        return layer

    def prefix(self, index: int) -> str:
        """How the names of a layer's tensors begin."""
        return f"model.layers.{index}."

    def outer(self) -> dict[str, Tensor]:
        """Embeddings, final norm, and the head if it is not the embeddings."""
        names = [name for name in self.checkpoint.names() if not name.startswith("model.layers.")]
        if self.config.tie_word_embeddings:
            names = [name for name in names if name != HEAD]
        return dict(self.checkpoint.items(names))

    def tensors(self, layers: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """All of them, or those of the first `layers` layers and what is outside the layers."""
        yield from self.outer().items()
        for index in range(layers or self.config.num_hidden_layers):
            for name, tensor in self.layer(index).items():
                yield self.prefix(index) + name, tensor

    def load(self, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
        """The working form in memory, or its first `layers` layers and the head."""
        config, folder = shortened(self.config, layers), self.checkpoint.folder
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        state = {name: tensor.to(dtype) for name, tensor in self.tensors(layers)}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise InputError(f"'{folder}' lacks {len(missing)} tensors, e.g. {missing[0]}")
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model


def shortened(config: Any, layers: int | None) -> Any:
    """The configuration of a model's first `layers` layers."""
    short = copy.deepcopy(config)
    if layers is not None:
        short.num_hidden_layers = layers
        if getattr(short, "layer_types", None):
            short.layer_types = short.layer_types[:layers]
    return short
