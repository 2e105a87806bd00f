"""The folder `OUT.training`: where a training is, its best weights, what it logged, the teacher's logits."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.claim import claim, clear, real_path
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import beside, check_parent, claim_output, sha256
from ..errors import InputError
from ..files import read_json, to_json, write_json, write_whole
from ..machine import versions
from ..models.devices import dtype_name
from ..results import Json, Result, StepRecord
from .data import Samples

FINGERPRINT, STATE, LOG = "fingerprint.json", "state.pt", "metrics.jsonl"
PROJECT = "moesaic"
"""What trackers know a training by; TensorBoard's files are in a folder of that name."""
log = logging.getLogger("moesaic")


def training_folder(output: Path) -> Path:
    """Name the folder of an unfinished training of OUT, `OUT.training`."""
    return beside(output, ".training")


def fingerprint_of(
    checkpoint: Checkpoint, text: Sequence[Samples], config: BaseModel, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Say what a training must be of, to be gone on with."""
    return {
        "model": checkpoint.fingerprint(),
        "text": " ".join(samples.fingerprint() for samples in text),
        "configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
        "device": device.type,
        "dtype": dtype_name(dtype),
        "version": " ".join(f"{name} {version}" for name, version in versions().items()),
    }


def begun_training_dtype(output: Path) -> torch.dtype | None:
    """Read the dtype of an unfinished training; another day's timing might choose another one."""
    try:
        found = getattr(torch, str(read_json(training_folder(output) / FINGERPRINT).get("dtype")), None)
    except InputError:
        return None
    return found if isinstance(found, torch.dtype) else None


@contextmanager
def claimed_training(output: Path, overwrite: bool) -> Iterator[None]:
    """Keep other processes from training OUT, and put right what a kill left of it; in the first process only.

    Raises:
        InputError: another one is at it, or OUT is there and is not to be replaced.
    """
    check_parent(output)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with claim(training_folder(output)):
        drop_finished(output)
        with claim_output(output, overwrite):
            pass
        yield


def drop_finished(output: Path) -> None:
    """Empty the training folder of a training that was written, where a kill at the very end left that undone."""
    own, written = training_folder(output) / LOG, real_path(output) / LOG
    if written.is_file() and own.is_file() and written.read_bytes() == own.read_bytes():
        drop(output)


def drop(output: Path) -> None:
    """Empty the training folder of a training that was written; its log, by which that is known, goes last."""
    folder = training_folder(output)
    if (folder / PROJECT).is_dir():
        shutil.copytree(folder / PROJECT, real_path(output) / "tensorboard", dirs_exist_ok=True)
    clear(folder, last=LOG)


@dataclass(kw_only=True)
class StepState:
    """Where a training of any kind is."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    """The step after which the best weights stood; 0: none was better than the start."""


State = TypeVar("State", bound=StepState)


@dataclass(kw_only=True)
class TrainingState(StepState):
    """Where a training of `finetune` is."""

    held_out: float = math.inf
    """Least held-out loss so far, nats a token; at first that of the model as it came."""
    least: float = math.inf
    """Least held-out loss of the training itself, which may be above the start's."""
    stale: int = 0
    """Evaluations since that one."""
    evaluated: int = 0
    """How many of the evaluations are done."""
    history: list[StepRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SavedTraining(Generic[State]):
    """What `RunFolder.save` stored."""

    state: State
    tensors: dict[str, Tensor]
    optimizer: Json
    best_sha256: str
    """Of the file of the best weights, if there are any."""


class RunFolder(Generic[State]):
    """What an unfinished training needs to go on; each file is replaced at once, the state last.

    What was damaged since is found when it is opened again: the training starts anew then, and says so.

    Raises:
        InputError: it holds an unfinished training of something else.
    """

    def __init__(
        self, state_class: type[State], output: Path, fingerprint: dict[str, str], resume: bool, main: bool = True
    ) -> None:
        self.state_class = state_class
        self.path = training_folder(output)
        self.best_sha256 = ""
        if not main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        known = self._fingerprint() if resume else None
        if known is None or self._damaged():
            clear(self.path)
            write_json(self.path / FINGERPRINT, fingerprint)
            return
        changed = [key for key in fingerprint if known.get(key) != fingerprint[key]]
        if changed:
            raise InputError(
                f"'{self.path}' holds an unfinished training with another {', '.join(changed)}; repeat that command to "
                "finish it, or pass --no-resume to start anew"
            )

    def _fingerprint(self) -> Json | None:
        if not (self.path / FINGERPRINT).is_file():
            return None
        try:
            return read_json(self.path / FINGERPRINT)
        except InputError as error:
            log.warning("%s. The training starts anew", error)
            return None

    def _damaged(self) -> bool:
        """Tell whether the state, or the best weights that it speaks of, are not what was written; and say so."""
        path = self.path / STATE
        if not path.exists():
            return False
        try:
            with zipfile.ZipFile(path) as archive:  # what torch.save makes; it has a checksum of each member
                bad = archive.testzip()
            found = None if bad else self.load()
        except Exception:  # zipfile, torch and pydantic have types of their own for every kind of damage
            found = None
        if found and (not found.state.best_step or sha256(self.best_path(found.state.best_step)) == found.best_sha256):
            return False
        log.warning("%s or what belongs to it is damaged, so the training starts anew", path)
        return True

    def best_path(self, step: int) -> Path:
        """Name the file of the best weights, those after a step."""
        return self.path / f"best-{step:08d}.safetensors"

    def keep_best(self, step: int, named: Mapping[str, Tensor]) -> None:
        """Store the weights of the least held-out loss."""
        tensors = {name: tensor.contiguous() for name, tensor in named.items()}
        write_whole(self.best_path(step), lambda path: save_file(tensors, path))
        self.best_sha256 = sha256(self.best_path(step))

    def best(self, step: int) -> dict[str, Tensor]:
        """Read the weights that `keep_best` stored."""
        return load_file(self.best_path(step))

    def save(self, state: State, named: dict[str, Tensor], optimizer: Json) -> None:
        """Store where the training is; earlier best weights go when nothing speaks of them any more."""
        content = {"state": asdict(state), "tensors": named, "optimizer": optimizer, "best_sha256": self.best_sha256}
        write_whole(self.path / STATE, lambda path: torch.save(content, path))
        for path in self.path.glob("best-*"):
            if path != self.best_path(state.best_step):
                path.unlink()

    def load(self) -> SavedTraining[State] | None:
        """Read what `save` stored; None before the first time."""
        path = self.path / STATE
        if not path.is_file():
            return None
        found = torch.load(path, map_location="cpu", weights_only=True)
        state = TypeAdapter(self.state_class).validate_python(found["state"])
        self.best_sha256 = found["best_sha256"]
        return SavedTraining(
            state=state, tensors=found["tensors"], optimizer=found["optimizer"], best_sha256=self.best_sha256
        )

    def start_log(self, rows: Sequence[Result]) -> None:
        """Write `metrics.jsonl` with the steps that are done."""
        (self.path / LOG).write_text("".join(to_json(row.to_dict()) + "\n" for row in rows))

    def log(self, row: Result) -> None:
        """Append a step to `metrics.jsonl`."""
        with (self.path / LOG).open("a") as file:
            file.write(to_json(row.to_dict()) + "\n")
