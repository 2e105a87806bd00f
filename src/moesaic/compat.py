"""Names of transformers that are not public, each used in this file only, so that a new version is met in one place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import InputError


class AutoClass(Protocol):
    """`AutoModel`, `AutoModelForCausalLM` and their like, as far as they are used here."""

    def from_config(self, config: PreTrainedConfig, **kwargs: object) -> PreTrainedModel:
        """Make a model of a configuration, without pretrained weights."""
        ...

    def from_pretrained(self, folder: object, **kwargs: object) -> PreTrainedModel:
        """Load a model."""
        ...

    def register(self, config_class: type, model_class: type) -> None:
        """Let the class make and load models of another configuration."""
        ...


def require(what: str, extra: str, *modules: str) -> None:
    """Check that the modules of an extra are installed.

    Args:
        what: what needs them, for the message.
        extra: the extra of moesaic that brings them, e.g. `train`.
        modules: names as Python imports them.

    Raises:
        InputError: one is missing; the message has the command that installs it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}; install it with: pip install 'moesaic[{extra}]'")


def experts_implementation(config: object) -> str:
    """Read how a model's experts run: a name of `ExpertsInterface`, or `eager`."""
    return getattr(config, "_experts_implementation", None) or "eager"


def wish_experts_implementation(config: object) -> str | None:
    """Read how experts are to run in a model that is yet to be made of this configuration; None leaves it open."""
    return getattr(config, "_experts_implementation", None)


def set_experts_implementation(config: Any, name: str) -> None:
    """Write how experts are to run, without transformers' check that the model's class has experts."""
    config._experts_implementation = name


def has_experts(model: PreTrainedModel) -> bool:
    """Tell whether transformers can choose how a model's experts run."""
    return model._can_set_experts_implementation()


ALLOW_EXPERTS = {"_can_set_experts_implementation": classmethod(lambda cls: True)}
"""Class attributes by which a model's class says that it has experts; transformers would read its source file."""


def tied_weights(model: PreTrainedModel) -> set[str]:
    """List the parameters that are another one's under a second name, where the configuration ties them."""
    config = model.config.get_text_config()
    return set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()


def class_for(auto: AutoClass, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Find the model class that an auto class makes of a configuration.

    Raises:
        KeyError: the auto class does not know the configuration.
    """
    return auto._model_mapping[config_class]  # pyrefly: ignore[missing-attribute]


def has_class_for(auto: AutoClass, config_class: type[PreTrainedConfig]) -> bool:
    """Tell whether an auto class knows a configuration."""
    return config_class in auto._model_mapping  # pyrefly: ignore[missing-attribute]


def names_in_model(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name a checkpoint's tensors as the model does: vision-language models are saved under names of older versions.

    Returns:
        The checkpoint's names by the model's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: name for name in names}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let new modules have their parameters on the meta device, without memory; buffers (rotary positions) stay."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyrefly: ignore[bad-assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def init_weights(base: type[PreTrainedModel], model: PreTrainedModel, module: object) -> None:
    """Initialise one module as the class `base` does."""
    base._init_weights(model, module)  # pyrefly: ignore[bad-argument-type]
