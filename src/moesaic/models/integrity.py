"""What a checkpoint must be before anything is done with it: readable, whole, of finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..checkpoint.reader import Checkpoint, some
from ..compat import names_in_model, needed_and_unread, tied_weights
from ..errors import InputError, WorkError, first_line
from .devices import dtype_name
from .families import empty

SIZES = {
    "num_hidden_layers": (1, 10_000), "hidden_size": (1, 1_000_000), "vocab_size": (1, 100_000_000),
    "max_position_embeddings": (2, 10**10),
}  # fmt: skip
"""Fields of a configuration that everything here counts with, and what they can be."""


def read_config(folder: Path) -> Any:
    """Read a model's transformers configuration.

    Raises:
        InputError: transformers does not know it, or it holds impossible values.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types for what a configuration may hold
        raise _unknown(folder, error) from error
    check_fields(config.get_text_config(), SIZES, folder)
    return config


def check_fields(config: Any, limits: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Check that fields of a configuration, those that it has, are whole numbers within limits.

    Raises:
        InputError: one is not.
    """
    for name, (least, most) in limits.items():
        value = getattr(config, name, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(
                f"'{folder / 'config.json'}': {name} is {value!r}, expected a whole number from {least} to {most:,}"
            )


def model_on_meta(config: Any, folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make a model of a configuration, whose parameters take no memory.

    Raises:
        InputError: the configuration holds impossible values.
    """
    try:
        return empty(config, dtype)
    except InputError:
        raise
    except Exception as error:
        raise _unknown(folder, error) from error


def _unknown(folder: Path, error: Exception) -> InputError:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own, which is never run"
    return InputError(f"'{folder}' is no causal language model that transformers knows: {reason}")


def check_contents(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Check that a checkpoint holds what a model of its configuration has, in its shape, and nothing else.

    What transformers leaves out on purpose, such as rotary frequencies of old checkpoints, may be there.

    Returns:
        The checkpoint's names by the model's; several where transformers joins them, as experts.

    Raises:
        InputError: tensors are missing, of another shape, or would not be read; or a head of its own though the
            configuration ties it to the embeddings.
    """
    wanted, found = model.state_dict(), names_in_model(model, checkpoint.headers)
    missing, unread = needed_and_unread(
        model, wanted.keys() - found.keys() - tied_weights(model).keys(), found.keys() - wanted.keys()
    )
    sources = [name for key in unread for name in found[key]]
    shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
    _refuse(checkpoint, shapes, found, missing, sources, type(model).__name__)
    check_tied(model, checkpoint, found)
    return {name: names for name, names in found.items() if name in wanted}


def check_tensors(checkpoint: Checkpoint, wanted: Mapping[str, list[int]], what: str) -> None:
    """Check that a checkpoint holds tensors of those names and shapes, and no others.

    Raises:
        InputError: it does not.
    """
    missing, unread = sorted(wanted.keys() - checkpoint.headers.keys()), sorted(checkpoint.headers.keys() - wanted)
    _refuse(checkpoint, wanted, {name: [name] for name in checkpoint.headers}, missing, unread, what)


def _refuse(
    checkpoint: Checkpoint, wanted: Mapping[str, list[int]], found: Mapping[str, list[str]],
    missing: list[str], unread: list[str], what: str,
) -> None:  # fmt: skip
    """Raise InputError for what is missing, unread or of another shape, if anything is."""
    folder, shapes = checkpoint.folder, checkpoint.shapes()
    if missing:
        raise InputError(
            f"'{folder}' lacks {some(missing)} of {what}; it has {', '.join(list(shapes)[:3])}, ... Download it again"
        )
    if unread:
        raise InputError(
            f"'{folder}' holds {some(unread)}, which {what} does not read (as in a quantised, adapted or other model); "
            "give a checkpoint that config.json describes"
        )
    for name, shape in wanted.items():
        there = [shapes[source] for source in found.get(name, ())]
        if not _fits(shape, there):
            others = f" and {len(there) - 1} others" if len(there) > 1 else ""
            raise InputError(
                f"'{folder}': {name} is {there[0]}{others}, config.json says {shape}; repair config.json, or download "
                "the model again"
            )


def is_transposed(shape: Sequence[int], there: Sequence[int]) -> bool:
    """Tell whether a checkpoint has a bank of experts with its matrices transposed, as Qwen3-VL-MoE's do.

    transformers turns them when they do not fit.
    """
    return len(shape) == 3 and list(there) != list(shape) and list(there) == [shape[0], shape[2], shape[1]]


def _fits(shape: list[int], there: list[list[int]]) -> bool:
    """Tell whether a checkpoint's tensors, if any, make up a model's."""
    if len(there) == 1 and there[0] != shape and not is_transposed(shape, there[0]):
        return False
    return not there or sum(map(math.prod, there)) == math.prod(shape)


@torch.inference_mode()
def check_runs(model: PreTrainedModel, folder: Path) -> None:
    """Check that a loaded model runs at all, by a token: a configuration may load and then make no sense.

    Raises:
        InputError: it does not.
    """
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a nonsensical setting makes of a forward pass
        raise InputError(
            f"'{folder}' loads but does not run ({first_line(error)}); repair its config.json, or download it again"
        ) from error


def check_tied(model: PreTrainedModel, checkpoint: Checkpoint, found: dict[str, list[str]]) -> None:
    """Check that what the configuration ties is not there twice and different.

    Raises:
        InputError: it is.
    """
    for name, source in tied_weights(model).items():
        twice = [*found.get(name, ()), *found.get(source, ())]
        if len(twice) == 2 and not torch.equal(*map(checkpoint.read, twice)):
            raise InputError(
                f"'{checkpoint.folder}': config.json says tie_word_embeddings, but {twice[0]} is not {twice[1]}; write "
                '"tie_word_embeddings": false there to use it, or delete it from the weights'
            )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Check that weights are numbers.

    Raises:
        InputError: one is NaN or infinite; the message names its tensor.
    """
    for name, tensor in tensors:
        # the least and the greatest are NaN if any value is, and found at the speed of memory
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            way = "download the model again, or repair it"
            if tensor.dtype == torch.float16:
                way += "; or if they are numbers on disk, which float16 cannot hold, give --dtype bfloat16 or float32"
            raise InputError(
                f"'{where}': {name} holds {count} of {tensor.numel():,} values that are NaN or infinite; {way}"
            )


def check_numbers(named: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> None:
    """Check that what was calculated is finite.

    Raises:
        WorkError: something is NaN or infinite; the message names it and where.
    """
    for name, tensor in named.items():
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            short = dtype_name(dtype)
            raise WorkError(
                f"{where}: {name} {'is' if tensor.dim() == 0 else 'are'} NaN or infinite in {short}. The weights are "
                "finite, so the numbers grew too large on the way, or for the dtype that is written: choose --dtype "
                "bfloat16 or float32"
            )
