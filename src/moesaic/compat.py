"""Names of transformers that are not public, each used in this file only, so that a new version is met in one place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .errors import InputError

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager


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


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Name the parameters that are another one under a second name, and that one, where the configuration ties them."""
    return dict(model.all_tied_weights_keys)


def class_for(auto: AutoClass, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Find the model class that an auto class makes of a configuration.

    Raises:
        KeyError: the auto class does not know the configuration.
    """
    return auto._model_mapping[config_class]  # pyrefly: ignore[missing-attribute]


def has_class_for(auto: AutoClass, config_class: type[PreTrainedConfig]) -> bool:
    """Tell whether an auto class knows a configuration."""
    return config_class in auto._model_mapping  # pyrefly: ignore[missing-attribute]


def names_in_model(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """Name a checkpoint's tensors as the model does: transformers renames, joins and splits some as it loads them.

    Returns:
        The checkpoint's names by the model's: several that are joined, none of what is a part of one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[str]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        first, *others = next((c.target_patterns for c in converters if pattern in c.source_patterns), [""])
        found.setdefault(target, []).extend([] if others else [name])
        for other in others:
            found.setdefault(target.replace(first, other), [])
    return found


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name the dtype that transformers gives each tensor when it loads a model in `dtype`: some stay in float32."""
    plan = model._get_dtype_plan(dtype)
    kept = {re.compile(pattern.replace("*", ".*")): wide for pattern, wide in plan.items()}
    return {
        name: next((wide for pattern, wide in kept.items() if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def needed_and_unread(
    model: PreTrainedModel, missing: Iterable[str], unread: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Leave out what transformers does not miss, and what it passes over on purpose; both sorted."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unread))
    model._adjust_missing_and_unexpected_keys(info)  # pyrefly: ignore[bad-argument-type]
    return sorted(info.missing_keys), sorted(info.unexpected_keys)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let new modules have parameters on the meta device, without memory or values; buffers (rotary positions) stay.

    A head is not tied to the embeddings yet: call `tie_weights` once the weights are there.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyrefly: ignore[bad-assignment]
    try:
        with no_init_weights():  # drawing values that no memory holds takes most of the time
            yield
    finally:
        nn.Module.register_parameter = register


def run_batch(manager: ContinuousBatchingManager) -> bool:
    """Run one batch of continuous batching whose thread is not started, and tell whether there was something to run."""
    processor = manager.batch_processor
    assert processor is not None
    if not processor.prepare_next_batch():
        return False
    processor._generation_step(manager.model)
    processor.update_batch()
    return True


def survive(manager: ContinuousBatchingManager, *errors: type[Exception]) -> None:
    """Let a batch that fails by one of these errors end its own requests only, where transformers ends the thread."""
    processor = manager.batch_processor
    assert processor is not None
    step, update = processor._generation_step, processor.update_batch
    failed = False

    def try_step(model: nn.Module) -> None:
        nonlocal failed
        failed = False
        try:
            step(model)
        except errors as error:
            failed = True
            processor.handle_batch_error(error)

    def update_what_ran() -> None:
        if not failed:
            update()

    processor._generation_step, processor.update_batch = try_step, update_what_ran


def init_weights(base: type[PreTrainedModel], model: PreTrainedModel, module: object) -> None:
    """Initialise one module as the class `base` does."""
    base._init_weights(model, module)  # pyrefly: ignore[bad-argument-type]
