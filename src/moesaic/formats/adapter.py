"""Adapters: how many experts run for each token, learnt or calibrated for one model and kept beside it.

A folder with `adapter_config.json`, which names the rule and the model, and `adapter.safetensors`, with what each layer
learnt, `layers.0.weight` and so on. The model's own files are never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .. import registry
from ..checkpoint.reader import ADAPTER_CONFIG, ADAPTER_KEY, Checkpoint, is_adapter
from ..errors import InputError
from ..files import read_json, write_json
from ..models.moe_block import MoEBlock
from ..moe.adaptive import Attached, attach, moe_blocks_of
from ..results import Json
from ..routing.selection.base import SMALLEST, Counting, Parameters

TENSORS = "adapter.safetensors"
DEEPEST = 10_000
"""Layers of a model, at most."""
AGAIN = "make it again with 'moesaic adapt'"


@dataclass(frozen=True)
class Adapter:
    """A selection and what it learnt for one model."""

    selection: Counting
    parameters: list[Parameters]
    """Of each Mixture-of-Experts block."""
    base_model: str
    base_fingerprint: str
    """Of the model's configuration and weights (`Checkpoint.fingerprint`)."""
    result: Json
    """What `adapt` measured."""

    def save(self, folder: Path) -> None:
        """Write the adapter into a folder that is there."""
        tensors = {
            f"layers.{number}.{name}": value.detach().cpu().contiguous()
            for number, values in enumerate(self.parameters)
            for name, value in values.items()
        }
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        write_json(
            folder / ADAPTER_CONFIG,
            {
                ADAPTER_KEY: registry.spec(self.selection),
                "base_model_name_or_path": self.base_model,
                "base_fingerprint": self.base_fingerprint,
                "blocks": len(self.parameters),
                "result": self.result,
            },
        )


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter.

    Raises:
        InputError: no adapter of moesaic's, or a damaged one.
    """
    if not is_adapter(folder):
        raise InputError(f"'{folder}' holds no adapter that 'moesaic adapt' made (no {ADAPTER_CONFIG} of its kind)")
    values = read_json(folder / ADAPTER_CONFIG)
    kinds = {
        ADAPTER_KEY: str, "base_model_name_or_path": str, "base_fingerprint": str, "blocks": int, "result": dict
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise InputError(f"'{folder / ADAPTER_CONFIG}' is damaged: {name} is {values.get(name)!r}; {AGAIN}")
    if isinstance(values["blocks"], bool) or not 1 <= values["blocks"] <= DEEPEST:
        raise InputError(f"'{folder / ADAPTER_CONFIG}' is damaged: blocks is {values['blocks']!r}; {AGAIN}")
    selection = counting(registry.build("selection", values[ADAPTER_KEY], imported_only=True))
    try:
        tensors = load_file(folder / TENSORS)
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise InputError(f"'{folder / TENSORS}' is not a whole safetensors file ({error}); {AGAIN}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise InputError(
                f"'{folder / TENSORS}' is damaged: {name} holds values that are no finite numbers; {AGAIN}"
            )
    parameters: list[Parameters] = []
    for number in range(values["blocks"]):
        prefix = f"layers.{number}."
        parameters.append({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    if sum(map(len, parameters)) != len(tensors):
        raise InputError(f"'{folder / TENSORS}' holds tensors of no layer that {ADAPTER_CONFIG} speaks of; {AGAIN}")
    return Adapter(
        selection, parameters, values["base_model_name_or_path"], values["base_fingerprint"], values["result"]
    )


def counting(selection: object) -> Counting:
    """Return a selection that says how many experts run, whatever the router is.

    Raises:
        InputError: it is of another kind, which belongs to the routers of converted models.
    """
    if not isinstance(selection, Counting):
        raise InputError(
            f"selection '{registry.spec(selection)}' works in converted models only; derive it from Counting"
        )
    if selection.at_most and selection.at_least > selection.at_most:
        raise InputError(
            f"at_least {selection.at_least} is more than at_most {selection.at_most}; give less of the one"
        )
    return selection


def check_base(adapter: Adapter, checkpoint: Checkpoint, folder: Path) -> None:
    """Check that an adapter was made for a checkpoint.

    Raises:
        InputError: it was made for another one.
    """
    if adapter.base_fingerprint != checkpoint.fingerprint():
        raise InputError(
            f"the adapter '{folder}' was made for '{adapter.base_model}', and '{checkpoint.folder}' is another one (in "
            "its configuration or weights); adapt this one: moesaic adapt MODEL OUT"
        )


def check_shapes(selection: Counting, blocks: Sequence[MoEBlock], parameters: Sequence[Parameters], where: str) -> None:
    """Check that parameters are those of a selection in a model's blocks.

    Raises:
        InputError: they are not.
    """
    wanted = [_shapes(selection.parameters(block)) for block in blocks]
    if [_shapes(values) for values in parameters] != wanted:
        raise InputError(f"{where} does not hold what '{registry.spec(selection)}' learns in this model; {AGAIN}")


def _shapes(values: Parameters) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in values.items()}


def build_selection(rule: object) -> Counting:
    """Make the selection of `--select`: one that needs no calibration of its own.

    Raises:
        InputError: unknown, or it has parameters that only `adapt` finds.
    """
    selection = counting(registry.build("selection", rule))
    if selection.parameters(SMALLEST):
        name = registry.spec_name(type(selection))
        raise InputError(
            f"selection '{name}' has something to learn or to calibrate in each layer; make an adapter first, "
            f"moesaic adapt MODEL OUT --method {name}, and give it with --adapter OUT"
        )
    return selection


def apply(model: PreTrainedModel, adapter: Adapter, where: str) -> Attached:
    """Put an adapter to work in the model that it was made for.

    Raises:
        InputError: the model is dense, or the adapter holds something else.
    """
    check_shapes(adapter.selection, moe_blocks_of(model), adapter.parameters, where)
    return attach(model, adapter.selection, adapter.parameters)
