"""The folder `OUT.training`: where a training is, its best weights, what it logged, the teacher's logits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.writer import write_whole
from ..errors import InputError
from ..results import ExpertLoad, Json, Result

FINGERPRINT, STATE, BEST, LOG = "fingerprint.json", "state.pt", "best.safetensors", "metrics.jsonl"


def training_folder(output: Path) -> Path:
    """Name the folder of an unfinished training of OUT, `OUT.training`."""
    return output.absolute().with_name(output.absolute().name + ".training")


@dataclass(frozen=True, kw_only=True)
class StepRecord(Result):
    """One step of a training, a line of `metrics.jsonl`."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"held_out"})

    loss: float
    """Of the objective, nats a token."""
    layer_loss: float
    """The layers' own losses, a token and layer."""
    gradient_norm: float
    """Before it was clipped."""
    learning_rate: float
    """Its factor, of 1."""
    tokens: int
    load: ExpertLoad
    """Of the step, or of held-out text where that was measured."""
    step: int = 0
    seconds: float = 0.0
    """Of the training so far."""
    step_seconds: float = 0.0
    held_out: float | None = None
    """Next-token loss on held-out text, nats a token, where it was measured."""


@dataclass(kw_only=True)
class TrainingState:
    """Where a training is."""

    step: int = 0
    seconds: float = 0.0
    held_out: float = math.inf
    """Least held-out loss so far, nats a token; at first that of the model as it came."""
    best_step: int = 0
    """The step after which it was reached; 0: none was better than the start."""
    least: float = math.inf
    """Least held-out loss of the training itself, which may be above the start's."""
    stale: int = 0
    """Evaluations since that one."""
    evaluated: int = 0
    """How many of the evaluations are done."""
    history: list[StepRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SavedTraining:
    """What `RunFolder.save` stored."""

    state: TrainingState
    tensors: dict[str, Tensor]
    optimizer: Json


class RunFolder:
    """What an unfinished training needs to go on; each file is replaced at once, the state last.

    Raises:
        InputError: it holds an unfinished training of something else.
    """

    def __init__(self, output: Path, fingerprint: dict[str, str], resume: bool, main: bool = True) -> None:
        self.path = training_folder(output)
        if not main:
            return
        mark = self.path / FINGERPRINT
        if self.path.exists() and not mark.is_file() and any(self.path.iterdir()):
            raise InputError(f"'{self.path}' is in the way and was not made by moesaic; move it or choose another OUT")
        if self.path.exists() and not resume:
            shutil.rmtree(self.path)
        if not mark.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(mark, lambda path: path.write_text(json.dumps(fingerprint)))
        known = json.loads(mark.read_text())
        changed = [key for key in fingerprint if known.get(key) != fingerprint[key]]
        if changed:
            raise InputError(
                f"'{self.path}' holds an unfinished training with another {', '.join(changed)}; repeat that command to "
                "finish it, or pass --no-resume to start anew"
            )

    def keep_best(self, named: Mapping[str, Tensor]) -> None:
        """Store the weights of the least held-out loss."""
        tensors = {name: tensor.contiguous() for name, tensor in named.items()}
        write_whole(self.path / BEST, lambda path: save_file(tensors, path))

    def best(self) -> dict[str, Tensor]:
        """Read the weights that `keep_best` stored."""
        return load_file(self.path / BEST)

    def save(self, state: TrainingState, named: dict[str, Tensor], optimizer: Json) -> None:
        """Store where the training is."""
        content = {"state": asdict(state), "tensors": named, "optimizer": optimizer}
        write_whole(self.path / STATE, lambda path: torch.save(content, path))

    def load(self) -> SavedTraining | None:
        """Read what `save` stored; None before the first time."""
        path = self.path / STATE
        if not path.is_file():
            return None
        found = torch.load(path, map_location="cpu", weights_only=True)
        state = TypeAdapter(TrainingState).validate_python(found["state"])
        return SavedTraining(state=state, tensors=found["tensors"], optimizer=found["optimizer"])

    def start_log(self, rows: list[StepRecord]) -> None:
        """Write `metrics.jsonl` with the steps that are done."""
        (self.path / LOG).write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))

    def log(self, row: StepRecord) -> None:
        """Append a step to `metrics.jsonl`."""
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(row.to_dict()) + "\n")
