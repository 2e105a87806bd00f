"""A training resolved and checked before any costly work."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from psutil import virtual_memory
from transformers import PreTrainedModel

from .. import registry
from ..calibration.text import read_documents, text_hash
from ..errors import InputError
from ..evaluation.inspect import dense_origin
from ..models.converted import Converted
from ..models.loading import load_tokenizer
from ..models.sources import resolve
from ..models.writer import check_output
from ..shapes import empty
from .config import FinetuneConfig
from .held_out import MICRO_TOKENS
from .method import Method
from .parts import trainable
from .state import RunFolder
from .teacher import Teacher
from .text import Samples, make_samples

TRACKERS = ("tensorboard", "trackio")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Run:
    """A checked and resolved training."""

    source: Converted
    output: Path
    config: FinetuneConfig
    method: Method
    tokenizer: Any
    train: Samples
    held: Samples
    teacher: Teacher | None
    accelerator: Accelerator
    folder: RunFolder

    @property
    def dtype(self) -> torch.dtype:
        """In which the model runs: bfloat16 for half precision on disk, whose own steps need no scaling then."""
        own = self.source.checkpoint.dtype()
        return torch.bfloat16 if own in HALF else own

    def load(self) -> PreTrainedModel:
        """The converted model as it came."""
        return self.source.load(self.dtype).to(self.accelerator.device)  # pyrefly: ignore[bad-argument-type]


def prepare(
    model: str | Path, output: Path, config: FinetuneConfig, *, resume: bool, overwrite: bool, cache: Path | None
) -> Run:
    """Resolve and check everything that a training needs.

    Raises:
        InputError: no converted model, unknown method, unusable text or teacher, a window beyond the model's, or a
            training that does not fit in memory.
    """
    check_output(output, overwrite)
    method: Method = registry.build("method", config.method)
    source = Converted(resolve(str(model)))
    if not source.config.num_experts and config.method.partition(":")[0] not in ("lora", "full"):
        raise InputError(f"'{model}' has no routed experts, so --method {config.method} has nothing to train")
    longest = source.config.max_position_embeddings
    if config.window > longest:
        raise InputError(f"--window {config.window} is more than the model's longest, {longest} tokens")
    documents = read_documents(config.data)
    tokenizer = load_tokenizer(source.checkpoint.folder)
    train, held = make_samples(documents, tokenizer, config.samples, config.window, config.held_out, config.seed)
    working = output.absolute().with_name(output.name + ".training")
    accelerator = make_accelerator(config.device, working)
    fingerprint = {
        "model": source.checkpoint.fingerprint(),
        "text": text_hash(documents),
        "configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
    }
    taught = config.objective != "lm" or config.match > 0 or method.needs_dense
    name = (config.teacher or dense_origin(str(source.checkpoint.folder), "--teacher")) if taught else None
    where = cache or working / "teacher"
    text = hashlib.sha256(train.tokens_NL.numpy().tobytes()).hexdigest()[:12]
    teacher = None
    if name:
        teacher = Teacher(name, source.config, tokenizer, where, config.top_k, accelerator.device)
        kept = f"{teacher.checkpoint.fingerprint()[:12]}-{text}-{teacher.top_k}"
        teacher.folder = where / kept
    check_memory(source, method, teacher, config, accelerator.device)
    folder = RunFolder(output, fingerprint, resume, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if teacher:
        teacher.folder.mkdir(parents=True, exist_ok=True)
    return Run(source, output, config, method, tokenizer, train, held, teacher, accelerator, folder)


def make_accelerator(device: str, folder: Path) -> Accelerator:
    """Accelerate's view of this process: its device, how many others there are, the trackers that are installed.

    Raises:
        InputError: no such device here.
    """
    try:
        if device not in ("auto", "cpu"):
            torch.empty(0, device=device)
            torch.get_device_module(device.partition(":")[0]).set_device(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    # a step reaches some experts only
    some = DistributedDataParallelKwargs(find_unused_parameters=True)
    trackers: list[Any] = [name for name in TRACKERS if find_spec(name)]
    return Accelerator(cpu=device == "cpu", log_with=trackers or None, project_dir=str(folder), kwargs_handlers=[some])


def check_memory(
    source: Converted, method: Method, teacher: Teacher | None, config: FinetuneConfig, device: torch.device
) -> None:
    """Raises InputError unless the training's estimate fits in the device's free memory.

    Weights of model and teacher as on disk; 16 bytes for each parameter that learns (itself, gradient and Adam's two
    moments in float32); activations and logits of a micro-batch.
    """
    on_meta = empty(copy.deepcopy(source.config))  # methods change the configuration
    learning = sum(p.numel() for p in trainable(method.prepare(on_meta)).values())
    c = source.config
    tokens = min(max(MICRO_TOKENS, config.window), config.batch * config.window)
    width = c.shared_expert_intermediate_size + c.num_experts_per_tok * c.moe_intermediate_size
    itemsize = 4 if source.checkpoint.dtype() == torch.float32 else 2
    activations = tokens * c.num_hidden_layers * (16 * c.hidden_size + 8 * width) * itemsize
    logits = tokens * c.vocab_size * (8 + itemsize)
    needed = source.checkpoint.size() + (teacher.checkpoint.size() if teacher else 0) + 16 * learning
    needed += activations + logits
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else virtual_memory().available
    if needed > free:
        raise InputError(
            f"training would need about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; use --method "
            "lora or router, or a smaller --window or --batch"
        )


def quiet(report: Callable[..., None] | None) -> Callable[..., None]:
    """A progress callback, or one that does nothing."""
    return report or (lambda done, count, note="": None)
