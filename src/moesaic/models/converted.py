"""A converted model on disk, in whichever form, read as the working form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import registry
from ..errors import InputError
from .checkpoint import Checkpoint
from .native import NativeForm
from .working import MODEL_TYPE, MoesaicConfig

NOTE = "moesaic"
"""The key of a native form's config.json under which the working form's is kept."""
HEAD = "lm_head.weight"


def is_native(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds a native form that moesaic wrote."""
    return NOTE in checkpoint.config


def working_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The working form's config.json, of a folder in either form."""
    return checkpoint.config[NOTE] if is_native(checkpoint) else checkpoint.config


class Converted:
    """The working form's configuration and tensors, a layer at a time.

    Raises:
        InputError: the folder holds no converted model.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder)
        self.fields = working_fields(self.checkpoint)
        if self.fields.get("model_type") != MODEL_TYPE:
            raise InputError(
                f"'{folder}' holds a {self.fields.get('model_type')} model that moesaic did not make; expected a "
                "folder made by 'moesaic convert' or 'moesaic export'"
            )
        self.config: Any = MoesaicConfig.from_dict(self.fields)
        self.form: NativeForm = registry.build("export", self.checkpoint.config["model_type"])

    def layer(self, index: int) -> dict[str, Tensor]:
        """A decoder layer's tensors, by their name in the layer."""
        prefix = self.prefix(index)
        tensors = self.checkpoint.items(self.checkpoint.names(prefix))
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors}
        return self.form.working_layer(named, self.config)

    def prefix(self, index: int) -> str:
        """How the names of a layer's tensors begin."""
        return f"model.layers.{index}."

    def outer(self) -> dict[str, Tensor]:
        """Embeddings, final norm, and the head if it is not the embeddings."""
        names = [name for name in self.checkpoint.names() if not name.startswith("model.layers.")]
        if self.config.tie_word_embeddings:
            names = [name for name in names if name != HEAD]
        return dict(self.checkpoint.items(names))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them."""
        yield from self.outer().items()
        for index in range(self.config.num_hidden_layers):
            for name, tensor in self.layer(index).items():
                yield self.prefix(index) + name, tensor

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The working form in memory."""
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        state = {name: tensor.to(dtype) for name, tensor in self.tensors()}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise InputError(f"'{self.checkpoint.folder}' lacks {len(missing)} tensors, e.g. {missing[0]}")
        return model
