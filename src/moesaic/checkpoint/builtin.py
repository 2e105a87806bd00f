"""Built-in models: three ship in the package, the others are fetched once from the hub or, failing that, a mirror."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Builtin:
    """A model that can be named without knowing where it is."""

    hub_id: str
    terms: str
    """Who made it, under which licence."""
    license: str
    """As the hub names it."""


BUILTINS = {
    "demo": Builtin(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct by the Qwen team, Apache 2.0", "apache-2.0"
    ),
    "demo-1.5b": Builtin(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct by the Qwen team, Apache 2.0", "apache-2.0"
    ),
    "gemma-270m": Builtin(
        "google/gemma-3-270m",
        "Gemma 3 270M by Google, under the Gemma Terms of Use (ai.google.dev/gemma/terms); by using it you accept them",
        "gemma",
    ),
}
SHIPPED = ("tiny", "tiny-moe", "tiny-vlm")
"""In the package: a dense model and a Mixture-of-Experts, trained by `scripts/train_tiny.py`, and a LLaVA that answers
questions about pictures of 64 x 64, of which `tiny` is the language model, by `scripts/train_tiny_vlm.py`."""
NAMES = (*SHIPPED, *BUILTINS)


def known_as(model: str) -> str:
    """Call a model by a name that readers know: of a built-in one, what it is too."""
    return f"{model} ({BUILTINS[model].hub_id.rpartition('/')[2]})" if model in BUILTINS else model


def cache_folder() -> Path:
    """Find where fetched models are kept: `$MOESAIC_CACHE`, else `$XDG_CACHE_HOME/moesaic`, else `~/.cache/moesaic`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOESAIC_CACHE") or Path(base) / "moesaic")


def shipped_folder(name: str) -> Path:
    """Find the folder of a model that is in the package."""
    return Path(str(files("moesaic"))) / "data" / name.replace("-", "_")


def tiny_folder() -> Path:
    """Find the folder of the bundled `tiny` model."""
    return shipped_folder("tiny")
