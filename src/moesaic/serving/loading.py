"""Load any model that moesaic accepts or makes, ready to run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ExpertsInterface

from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..compat import experts_implementation, has_experts
from ..errors import InputError, first_line
from ..formats.adapter import Adapter, apply, build_selection, check_base, read_adapter
from ..formats.converted import Converted, is_converted
from ..given import path
from ..machine import triton_is_interpreted
from ..models.devices import choose_device
from ..models.families import auto_class
from ..models.integrity import check_contents, check_finite, check_runs, model_on_meta, read_config
from ..models.products import quicken
from ..models.tokenizer import load_tokenizer
from ..moe.adaptive import attach
from ..moe.kernels import TRITON, lay_down_column_major
from ..moe.modeling import DEFAULT_EXPERTS
from ..routing.selection.base import Counting
from ..store.opening import StoreOptions, load_with_store

EVERYWHERE = ("eager", "batched_mm", "grouped_mm", DEFAULT_EXPERTS)
"""Experts implementations that run on every device."""
GPU_ONLY = {TRITON: ("triton",), "deepgemm": ("kernels",), "sonicmoe": ("kernels",)}
"""Those that run on GPUs alone, and the packages that they need."""


class Loaded(NamedTuple):
    """A model that is ready to run, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "auto",
    experts: str | None = None,
    adapter: str | Path | None = None,
    select: object = None,
    store: StoreOptions | None = None,
) -> Loaded:
    """Load a folder, hub id, .gguf file or built-in name, dense or converted; the model is in eval mode.

    A stock architecture that `moesaic` wrote is read back into moesaic's own, bit by bit what it was written from.

    Args:
        model: what to load; Mixture-of-Experts models of other makers too.
        dtype: None is the checkpoint's.
        device: `auto` is the GPU when there is one.
        experts: the implementation of the experts' products, a name that transformers' `set_experts_implementation`
            takes; None is `moesaic` for every model that has experts, unless they are quantised.
        adapter: a folder that `adapt` made for this model.
        select: a selection or its name, e.g. `top-p:p=0.6`: how many experts run for each token, in place of the
            model's own number.
        store: how much memory experts get, and which leave it; they are read from the checkpoint when they are used,
            and the text is the same. None: all are loaded.

    Raises:
        InputError: no such model, a folder that is damaged, experts that cannot run that way, or an adapter of another
            model.
    """
    device = choose_device(str(device))
    rule = read_rule(adapter, select)
    if store is not None:
        check_store(store, experts, rule)
    check_experts(experts, device)
    folder = resolve(str(model))
    checkpoint = Checkpoint(folder)
    if isinstance(rule, Adapter):
        check_base(rule, checkpoint, Path(str(adapter)))
    if dtype is None:
        dtype = checkpoint.dtype()
    tokenizer = load_tokenizer(folder)
    if store is None:
        ready = _load_whole(checkpoint, dtype, device, experts)
    else:
        ready = load_with_store(checkpoint, dtype, device, store)
    check_runs(ready, folder)
    if isinstance(rule, Adapter):
        apply(ready, rule, f"the adapter '{adapter}'")
    elif rule:
        attach(ready, rule)
    return Loaded(ready, tokenizer)


def check_store(store: StoreOptions, experts: str | None, rule: Adapter | Counting | None) -> None:
    """Check how experts are to be kept, before anything costly.

    Raises:
        InputError: an option that cannot be, or does not go with the others.
    """
    store.policy()
    if experts is not None:
        raise InputError(
            f"--experts {experts} and --expert-memory exclude each other: experts that are kept elsewhere have an "
            "implementation of their own"
        )
    if store.cache_bias and rule is not None:
        raise InputError("--cache-bias does not go with --adapter or --select; leave one of them out")


def _load_whole(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, experts: str | None
) -> PreTrainedModel:
    """Load a model with all its experts."""
    folder = checkpoint.folder
    if is_converted(checkpoint):
        loaded = Converted(folder).load(dtype)
    else:
        config = read_config(folder)
        check_contents(model_on_meta(config, folder), checkpoint)
        try:
            loaded = auto_class(config).from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        except Exception as error:  # transformers raises many unrelated types for what a file may hold
            raise InputError(f"transformers cannot load '{folder}': {first_line(error)}") from error
        check_finite(loaded.named_parameters(), folder)
    choose_experts(loaded, experts)
    ready: PreTrainedModel = loaded.to(device).eval()  # pyrefly: ignore[bad-argument-type]
    lay_out(ready)
    return ready


def lay_out(model: PreTrainedModel) -> None:
    """Lay the weights of a model out as its device reads them the fastest, where `moesaic` runs its experts."""
    if model.device.type == "cpu" and experts_implementation(model.config.get_text_config()) == DEFAULT_EXPERTS:
        lay_down_column_major(model)
    quicken(model)


def read_rule(adapter: str | Path | None, select: object) -> Adapter | Counting | None:
    """Read what says how many experts run, before anything costly: an adapter, or a selection.

    Raises:
        InputError: both, a folder that holds no adapter, or a selection that needs one.
    """
    if adapter is not None and select is not None:
        raise InputError("--adapter and --select both say how many experts run; give one of them")
    if adapter is not None:
        return read_adapter(path(adapter))
    return None if select is None else build_selection(select)


def check_experts(name: str | None, device: torch.device) -> None:
    """Check that there is an experts implementation of that name, and that it can run on the device.

    Raises:
        InputError: there is none, it needs another device, or a package that is not installed.
    """
    known = ["eager", *sorted(ExpertsInterface().keys())]
    if name is None or name in EVERYWHERE:
        return
    if name not in known:
        raise InputError(f"--experts {name} is not one of {', '.join(known)}")
    if name in GPU_ONLY and device.type != "cuda" and not (name == TRITON and triton_is_interpreted()):
        raise InputError(f"--experts {name} needs a GPU, and the device is {device}; here run {', '.join(EVERYWHERE)}")
    missing = [package for package in GPU_ONLY.get(name, ()) if find_spec(package) is None]
    if missing:
        raise InputError(f"--experts {name} needs {missing[0]}; install it with: pip install {missing[0]}")


def choose_experts(model: PreTrainedModel, name: str | None) -> None:
    """Choose the implementation of a model's experts; None is ours, where there are experts that it can run.

    Raises:
        InputError: a model without experts.
    """
    able = has_experts(model)
    if name is None:
        if able and not hasattr(model.config, "quantization_config"):  # those have products of their own
            model.set_experts_implementation(DEFAULT_EXPERTS)
    elif able:
        model.set_experts_implementation(name)
    else:
        raise InputError(f"--experts {name} has no use: '{model.config.model_type}' is dense; leave it out")
