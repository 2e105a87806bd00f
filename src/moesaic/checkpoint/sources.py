"""From what a user calls MODEL to a folder of safetensors: folders, .gguf files, hub ids and built-in names."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..compat import require
from ..errors import InputError
from ..registry import nearest
from .builtin import BUILTINS, NAMES, cache_folder, tiny_folder
from .mirrors import fetch_gguf
from .reader import Checkpoint

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab*")
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
    path = Path(model).expanduser()
    if model == "tiny":
        return tiny_folder()
    if model in BUILTINS:
        builtin, gguf = BUILTINS[model], cache_folder() / model / f"{model}.gguf"
        if (folder := _from_hub(builtin.hub_id)) is not None:
            return folder
        if not gguf.is_file():
            console.print(f"Fetching {model} ({builtin.terms})", markup=False, emoji=False)
            fetch_gguf(model, gguf, console)
        return _from_gguf(gguf, console)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no file '{model}'")
        return _from_gguf(path, console)
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

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), local_files_only=True))
        Checkpoint(folder)
        if any(folder.glob("tokenizer*")):
            return folder
    except (OSError, InputError):
        pass  # not downloaded yet, or only in part
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("HF_HUB_OFFLINE is set")
        HfApi().model_info(hub_id, timeout=HUB_PATIENCE_SECONDS)
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client's errors share no base class over its transports
        if not complain:
            return None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"'{hub_id}' is no local folder, and the hub did not give it: {reason}. Check the name, log in with "
            "'hf auth login' if it is gated, or give a local folder"
        ) from error


def _from_gguf(gguf: Path, console: Console) -> Path:
    """Unpack a GGUF file's dequantised weights to a safetensors folder, made once and kept in the cache."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "dequantised" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"'{gguf}' is not a GGUF file")
    require("reading .gguf", "export", "gguf", "accelerate")
    console.print(f"Dequantising {gguf.name} once into the cache (about a minute)", markup=False, emoji=False)
    place = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **place)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"transformers cannot read '{gguf}': {error}") from error
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder
