"""The folder `OUT.training`: where a training is, its best weights, what it logged, the teacher's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.writer import write_whole
from ..errors import InputError

if TYPE_CHECKING:
    from .trainer import State

FINGERPRINT, STATE, BEST, LOG = "fingerprint.json", "state.pt", "best.safetensors", "metrics.jsonl"


class RunFolder:
    """What an unfinished training needs to go on; each file is replaced at once, the state last.

    Raises:
        InputError: it holds an unfinished training of something else.
    """

    def __init__(self, output: Path, fingerprint: dict[str, str], resume: bool, main: bool = True) -> None:
        self.path = output.absolute().with_name(output.absolute().name + ".training")
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
        """The weights that `keep_best` stored."""
        return load_file(self.path / BEST)

    def save(self, state: State, named: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Store where the training is."""
        content = {"state": asdict(state), "tensors": named, "optimizer": optimizer}
        write_whole(self.path / STATE, lambda path: torch.save(content, path))

    def load(self) -> dict[str, Any] | None:
        """What `save` stored: `state`, `tensors`, `optimizer`; None before the first time."""
        path = self.path / STATE
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None

    def start_log(self, rows: list[dict[str, Any]]) -> None:
        """Write `metrics.jsonl` with the steps that are done."""
        (self.path / LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def log(self, row: dict[str, Any]) -> None:
        """Append a step to `metrics.jsonl`."""
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(row) + "\n")
