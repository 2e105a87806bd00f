"""An output folder that is whole or absent: written beside its name, layer by layer, and renamed when finished."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..files import WRITING, read_json, write_json, write_whole
from ..results import Json, Result
from .claim import INNER, LOCK, check_ours, claim, clear, is_ours, real_path, remove
from .reader import INDEX

STATE = "state.json"
CONFIG_FILE = "moesaic.yaml"
"""The file by which a finished conversion is known."""
OUTSIDE_FILE = "model-outer.safetensors"
HEADROOM_BYTES = 64 << 20
log = logging.getLogger("moesaic")


def check_output(output: Path, overwrite: bool) -> None:
    """Check that OUT can be written, before any work; nothing is changed.

    Raises:
        InputError: OUT exists and may not be replaced, or it cannot be made there.
    """
    place = real_path(output)
    check_ours(partial_folder(output))
    if place.exists() and not overwrite:
        raise InputError(f"'{output}' exists; choose another folder or pass --overwrite")
    empty = place.is_dir() and not any(place.iterdir())  # as a kill amid the removal of one leaves it
    if place.exists() and not empty and not (place / CONFIG_FILE).is_file():
        raise InputError(f"'{output}' was not made by moesaic and is not replaced; choose another folder")
    check_parent(output)


def check_parent(output: Path) -> None:
    """Check that a folder can be made there.

    Raises:
        InputError: it cannot.
    """
    place = real_path(output)
    parent = next(p for p in place.parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"'{parent}' is a file, so '{output}' cannot be made; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"'{parent}' is not writable; choose another folder for OUT")


def check_space(output: Path, needed: int) -> None:
    """Check that the disk of OUT has `needed` bytes free.

    Raises:
        InputError: it has fewer.
    """
    parent = next(p for p in real_path(output).parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + HEADROOM_BYTES:
        raise InputError(
            f"the disk of '{output}' has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed; free "
            "some or choose another folder"
        )


@contextmanager
def claim_output(output: Path, overwrite: bool) -> Iterator[None]:
    """Keep OUT to this process while it is made, having checked that it can be.

    What a kill at the very end left behind is put right first.

    Raises:
        InputError: it cannot, or another process makes it.
    """
    check_parent(output)
    with claim(partial_folder(output)):
        put_right(output)
        check_output(output, overwrite)
        yield


def partial_folder(output: Path) -> Path:
    """Name the folder in which OUT is built, `OUT.partial`."""
    return beside(output, ".partial")


def beside(output: Path, ending: str) -> Path:
    """Name a folder beside OUT, or beside what it is a link to."""
    place = real_path(output)
    return place.with_name(place.name + ending)


def put_right(output: Path) -> None:
    """Finish what a kill amid the last renames left undone: the old OUT comes back, or goes if the new one is there."""
    place, partial = real_path(output), partial_folder(output)
    finished = (place / STATE).is_file() and (place / CONFIG_FILE).is_file()
    for folder in (place,) if finished else (partial, partial / INNER):
        state = read_state(folder)
        replaced = place.with_name(state.replaced) if state and state.replaced else None
        if not replaced or not is_ours(replaced):
            continue
        if finished:
            remove(replaced)
        elif not os.path.lexists(place):
            replaced.rename(place)
    if finished:
        drop_unfinished(place)


def drop_unfinished(folder: Path) -> None:
    """Remove what only resuming needs from a finished folder; the state goes last."""
    for path in (*folder.glob("hidden-*"), *folder.glob(f"*{WRITING}"), folder / LOCK, folder / STATE):
        path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class State(Result):
    """Where unfinished work is; replaced last and at once, so that a kill costs at most the layer in hand."""

    fingerprint: dict[str, str]
    layers: list[Json] = field(default_factory=list)
    """The records of finished layers."""
    trials: dict[str, float] = field(default_factory=dict)
    """Losses of finished trials, by the candidate's name."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each file of tensors."""
    replaced: str | None = None
    """What the old OUT was renamed to, or is about to be."""


def read_state(folder: Path) -> State | None:
    """Read the state of unfinished work; None where there is none, or a damaged one."""
    try:
        return State.from_dict(read_json(folder / STATE)) if (folder / STATE).is_file() else None
    except InputError:
        return None


class ResumableOutput:
    """The folder `OUT.partial`, which becomes OUT.

    After each layer it holds that layer's shard, the hidden states that enter the next one and `state.json`. What was
    damaged since is found when it is opened again: the work starts anew then, and says so.

    Args:
        output: OUT.
        fingerprint: what unfinished work must agree in to be gone on with.
        resume: whether it is gone on with at all.
        inner: whether OUT is built within `OUT.partial`, from what is there, which goes when OUT is whole.

    Raises:
        InputError: the unfinished work there is another one.
    """

    def __init__(self, output: Path, fingerprint: dict[str, str], resume: bool, inner: bool = False) -> None:
        self.output = real_path(output)
        self.folder = partial_folder(output) / (INNER if inner else "")
        self.inner = inner
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = State(fingerprint=fingerprint)
        found = read_state(self.folder) if resume else None
        if found:
            changed = [key for key in fingerprint if found.fingerprint.get(key) != fingerprint[key]]
            if changed:
                raise InputError(
                    f"'{self.folder}' holds unfinished work with another {', '.join(changed)}; repeat that "
                    "command to finish it, or start anew: pass --no-resume, or delete that folder"
                )
            if damaged := self._damaged(found):
                log.warning("%s is damaged or missing, so the work starts anew", damaged)
                found = None
        elif resume and (self.folder / STATE).is_file():
            log.warning("%s is damaged, so the work starts anew", self.folder / STATE)
        if not found:
            clear(self.folder)
        self.state = replace(found or self.state, fingerprint=fingerprint)
        self._commit()
        self._drop()

    @property
    def layers(self) -> list[Json]:
        """The records of finished layers."""
        return self.state.layers

    @property
    def trials(self) -> dict[str, float]:
        """Losses of finished trials, by the candidate's name."""
        return self.state.trials

    def _damaged(self, found: State) -> str:
        """Find a file that is not what was written; nothing if all are."""
        names = [self.shard(index) for index in range(len(found.layers))]
        names += [name for name in found.sha256 if name.startswith("hidden-")]
        wrong = (name for name in names if sha256(self.folder / name) != found.sha256.get(name))
        return next((str(self.folder / name) for name in wrong), "")

    def shard(self, index: int) -> str:
        """Name the file of one layer's tensors."""
        return f"model-layer-{index:05d}.safetensors"

    def _drop(self) -> None:
        """Remove what a kill left half-written, and hidden states that no layer needs any more."""
        for path in (*self.folder.glob("hidden-*"), *self.folder.glob(f"*{WRITING}")):
            if path.name not in self.state.sha256:
                path.unlink(missing_ok=True)  # a hidden file half-written matches both

    def hidden(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Read the hidden states that enter the next layer, by name; None before `start`."""
        if self._hidden_name() not in self.state.sha256:
            return None
        found = load_file(self.folder / self._hidden_name(), device=str(device))
        return {name: hidden.to(dtype) for name, hidden in found.items()}

    def start(self, hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store the hidden states that enter the first layer, and return them."""
        self.write(self._hidden_name(), hidden)
        self._commit()
        return hidden

    def _hidden_name(self) -> str:
        return f"hidden-{len(self.layers):05d}.safetensors"

    def add_trial(self, name: str, loss: float) -> None:
        """Store a finished trial's held-out loss, nats a token."""
        self.trials[name] = loss
        self._commit()

    def add_layer(self, tensors: dict[str, Tensor], hidden: dict[str, Tensor], record: Json) -> None:
        """Store a finished layer; `hidden` enters the next one, and is empty where nothing does."""
        before = self._hidden_name()
        self.write(self.shard(len(self.layers)), tensors)
        self.layers.append(record)
        if hidden:
            self.write(self._hidden_name(), hidden)
        self.state.sha256.pop(before, None)
        self._commit()
        self._drop()

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file, which takes its name only when whole.

        Raises:
            StorageError: the disk is full.
        """
        whole = {k: v.cpu().contiguous() for k, v in tensors.items()}
        write_whole(self.folder / name, lambda path: save_file(whole, path, metadata={"format": "pt"}))
        self.state.sha256[name] = sha256(self.folder / name)

    def _commit(self) -> None:
        write_json(self.folder / STATE, self.state.to_dict(), indent=None)

    def finish(self, check: Callable[[Path], object] | None = None) -> None:
        """Index the shards, let `check` see the folder, give it its name, and drop what only resuming needs."""
        weight_map, size = {}, 0
        for name in (OUTSIDE_FILE, *map(self.shard, range(len(self.layers)))):
            path = self.folder / name
            with safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            size += path.stat().st_size
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        if check:
            check(self.folder)
        self.take_place()

    def take_place(self) -> None:
        """Give the folder, which is whole, its name, and drop what only resuming needs."""
        if self.inner:
            clear(self.folder.parent, keep=INNER)
        if self.output.exists():
            names = (f"{self.output.name}.replaced{n or ''}" for n in itertools.count())
            free = next(name for name in names if not os.path.lexists(self.output.with_name(name)))
            self.state = replace(self.state, replaced=free)
            self._commit()
            self.output.rename(self.output.with_name(free))
        self.folder.rename(self.output)
        self.folder = self.output
        put_right(self.output)


def sha256(path: Path) -> str:
    """Hash a file; nothing where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
