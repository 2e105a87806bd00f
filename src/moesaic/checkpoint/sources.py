"""From what a user calls MODEL to a folder of safetensors: folders, .gguf files, hub ids and built-in names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rich.console import Console

from ..errors import InputError, first_line
from ..given import place
from ..registry import nearest
from .builtin import BUILTINS, NAMES, SHIPPED, cache_folder, shipped_folder
from .gguf_source import from_gguf
from .mirrors import fetch_gguf
from .reader import SINGLE, Checkpoint

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TERMS = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use", "terms")
"""How names of files begin, in capitals or not, that say what a model may be used for."""
HUB_FILES = (
    "*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab*", "README.md",
    *(f"{name}*" for word in TERMS for name in (word.upper(), word.title(), word)),
)  # fmt: skip
HUB_IGNORED = ("*/*.safetensors", "consolidated*.safetensors", "*.fp16.safetensors", "*.fp32.safetensors")
"""Second copies of the weights: in folders of their own, as Mistral names them, in other dtypes."""
SHARDS = "model-*-of-*.safetensors"
HUB_PATIENCE_SECONDS = 5


def resolve(model: str, console: Console | None = None) -> Path:
    """Find the folder with the model's safetensors, config and tokenizer.

    It is fetched or unpacked into the cache if need be.

    Args:
        model: folder, .gguf file, hub id or built-in name.
        console: where downloads show their progress; None is standard error.

    Raises:
        InputError: nothing is known under that name; the message has the nearest built-in one.
        WorkError: a download failed or is corrupt.
    """
    console = console or Console(stderr=True)
    model = place(model)
    path = Path(model)
    if model in SHIPPED:
        return shipped_folder(model)
    if model in BUILTINS:
        builtin, gguf = BUILTINS[model], cache_folder() / model / f"{model}.gguf"
        if (folder := _from_hub(builtin.hub_id)) is not None:
            return folder
        if not gguf.is_file():
            console.print(f"Fetching {model} ({builtin.terms})", markup=False, emoji=False)
            fetch_gguf(model, gguf, console)
        return from_gguf(gguf, console)
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"no file '{model}'")
        return from_gguf(path, console)
    if HUB_ID.fullmatch(model):
        folder = _from_hub(model, complain=True)
        assert folder is not None
        return folder
    raise InputError(
        f"no model '{model}': not a folder, not a .gguf file, not a hub id (owner/name), and not built in "
        f"({', '.join(NAMES)}).{nearest(model, NAMES)}"
    )


def _from_hub(hub_id: str, complain: bool = False) -> Path | None:
    """Fetch the local snapshot of a hub repository, downloaded when the hub answers; None when there is none."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(HUB_IGNORED)}
    try:
        folder = Path(snapshot_download(hub_id, **patterns, local_files_only=True))
        Checkpoint(folder)
        if any(folder.glob("tokenizer*")):
            return folder
    except (OSError, ValueError):
        pass  # not downloaded yet, only in part, or no name that the hub could have
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(hub_id, timeout=HUB_PATIENCE_SECONDS)
        if SINGLE in {file.rfilename for file in info.siblings or ()}:  # the same again in shards
            patterns["ignore_patterns"].append(SHARDS)
        return Path(snapshot_download(hub_id, **patterns))
    except Exception as error:  # the hub client's errors share no base class over its transports
        if not complain:
            return None
        raise InputError(
            f"'{hub_id}' is no local folder, and the hub did not give it: {first_line(error)}. Check the name, log in "
            "with 'hf auth login' if it is gated, or give a local folder"
        ) from error
