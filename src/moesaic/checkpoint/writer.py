"""An output folder that is whole or absent: written beside its name, layer by layer, and renamed when finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError, StorageError, WorkError
from ..results import Json
from .reader import INDEX

STATE = "state.json"
CONFIG_FILE = "moesaic.yaml"
"""The file by which a finished conversion is known."""
FACTS = (CONFIG_FILE, "metrics.json")
OUTER = "model-outer.safetensors"
HEADROOM_BYTES = 64 << 20


def check_output(output: Path, overwrite: bool) -> None:
    """Check that OUT can be written, before any work.

    Raises:
        InputError: OUT exists and may not be replaced, or its parent folder cannot be written.
    """
    if output.exists() and not overwrite:
        raise InputError(f"'{output}' exists; choose another folder or pass --overwrite")
    if output.exists() and not (output / CONFIG_FILE).is_file():
        raise InputError(f"'{output}' was not made by moesaic and is not replaced; choose another folder")
    partial = partial_folder(output)
    if partial.exists() and not (partial / STATE).is_file():
        raise InputError(f"'{partial}' is in the way and was not made by moesaic; move it or choose another OUT")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"'{parent}' is a file, so '{output}' cannot be made; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"'{parent}' is not writable; choose another folder for OUT")


def check_space(output: Path, needed: int) -> None:
    """Check that the disk of OUT has `needed` bytes free.

    Raises:
        InputError: it has fewer.
    """
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + HEADROOM_BYTES:
        raise InputError(
            f"the disk of '{output}' has {free / 1e9:.2f} GB free, the conversion needs {needed / 1e9:.2f} GB; free "
            "some or choose another folder"
        )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, then give it its own: the file is whole or absent.

    Raises:
        StorageError: it cannot be written, as when the disk is full; what was there before stays.
    """
    partial = path.with_name(f"{path.name}.writing")
    try:
        write(partial)
    except Exception as error:  # safetensors and torch have types of their own for a full disk
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise StorageError(
            f"cannot write '{partial}' ({error}); {free / 1e9:.2f} GB are free. What is finished is kept: make room "
            "and run the same command again"
        ) from error
    partial.replace(path)


def check_conversion_files(folder: Path) -> None:
    """Check that a converted model's folder holds what `convert` wrote beside the weights.

    Raises:
        InputError: a file is missing.
    """
    for name in FACTS:
        if not (folder / name).is_file():
            raise InputError(f"'{folder}' has no {name}; copy it from the folder that 'moesaic convert' made")


def partial_folder(output: Path) -> Path:
    """Name the folder in which OUT is built, `OUT.partial`."""
    return output.absolute().with_name(output.absolute().name + ".partial")


class ResumableOutput:
    """The folder `OUT.partial`, which becomes OUT.

    After each layer it holds that layer's shard, the hidden states that enter the next one and `state.json`, which is
    replaced last and atomically: a kill at any moment costs at most the layer in hand.
    """

    def __init__(self, output: Path, fingerprint: dict[str, str], resume: bool) -> None:
        self.output = output.absolute()
        self.folder = partial_folder(output)
        self.layers: list[Json] = []
        """The records of finished layers."""
        self.trials: dict[str, float] = {}
        """Losses of finished trials, by the candidate's name."""
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        if (self.folder / STATE).is_file():
            state = json.loads((self.folder / STATE).read_text())
            changed = [k for k in fingerprint if state["fingerprint"].get(k) != fingerprint[k]]
            if changed:
                raise InputError(
                    f"'{self.folder}' holds unfinished work with another {', '.join(changed)}; repeat that "
                    "command to finish it, or start anew: pass --no-resume, or delete that folder"
                )
            self.layers, self.trials = state["layers"], state["trials"]
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint
        self._commit()
        self._drop(keep=self._hidden_name())

    def shard(self, index: int) -> str:
        """Name the file of one layer's tensors."""
        return f"model-layer-{index:05d}.safetensors"

    def _drop(self, keep: str = "") -> None:
        """Remove what only resuming needs, or what a kill left half-written."""
        for path in (*self.folder.glob("hidden-*"), *self.folder.glob("*.writing")):
            if path.name != keep:
                path.unlink(missing_ok=True)  # a hidden file half-written matches both

    def hidden(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Read the hidden states that enter the next layer, by name; None before `start`.

        Raises:
            WorkError: they were deleted though layers are finished.
        """
        path = self.folder / self._hidden_name()
        if self.layers and not path.is_file():
            raise WorkError(f"'{path}' is missing, so the conversion cannot go on; pass --no-resume to start anew")
        if not path.is_file():
            return None
        return {name: hidden.to(dtype) for name, hidden in load_file(path, device=str(device)).items()}

    def start(self, hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store the hidden states that enter the first layer, and return them."""
        self.write(self._hidden_name(), hidden)
        return hidden

    def _hidden_name(self) -> str:
        return f"hidden-{len(self.layers):05d}.safetensors"

    def add_trial(self, name: str, loss: float) -> None:
        """Store a finished trial's held-out loss, nats a token."""
        self.trials[name] = loss
        self._commit()

    def add_layer(self, tensors: dict[str, Tensor], hidden: dict[str, Tensor], record: Json) -> None:
        """Store a finished layer."""
        self.write(self.shard(len(self.layers)), tensors)
        self.layers.append(record)
        self.write(self._hidden_name(), hidden)
        self._commit()
        self._drop(keep=self._hidden_name())

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file, which takes its name only when whole.

        Raises:
            StorageError: the disk is full.
        """
        whole = {k: v.cpu().contiguous() for k, v in tensors.items()}
        write_whole(self.folder / name, lambda path: save_file(whole, path, metadata={"format": "pt"}))

    def _commit(self) -> None:
        state = json.dumps({"fingerprint": self.fingerprint, "layers": self.layers, "trials": self.trials})
        write_whole(self.folder / STATE, lambda path: path.write_text(state))

    def finish(self, check: Callable[[Path], object] | None = None) -> None:
        """Index the shards, let `check` see the folder, give it its name, and drop what only resuming needs."""
        weight_map, size = {}, 0
        for name in (OUTER, *map(self.shard, range(len(self.layers)))):
            path = self.folder / name
            with safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            size += path.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if check:
            check(self.folder)
        replaced = self.output.with_name(self.output.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.output.exists():
            self.output.rename(replaced)
        self.folder.rename(self.output)
        self.folder = self.output
        self._drop()
        (self.output / STATE).unlink()
        shutil.rmtree(replaced, ignore_errors=True)
