"""A training resolved and checked before any costly work."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import registry
from ..calibration.mixture import bundled_both
from ..calibration.prompts import BUNDLED, bundled_answers, own_text
from ..calibration.windows import check_tokens
from ..checkpoint.facts import check_conversion_files, saved_settings
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_output
from ..config import FinetuneConfig
from ..conversion.prepare import Conversion
from ..errors import InputError
from ..evaluation.cost import sizes
from ..formats.base import block_config
from ..formats.converted import Converted, dense_origin
from ..machine import free_memory
from ..models.devices import choose_device, compute_dtype
from ..models.families import empty
from ..models.processor import Processor
from ..models.tokenizer import load_tokenizer
from ..moe.modeling import moe_blocks
from ..serving.own_text import TRAINING_TOKENS, bundled_text, documents_of
from .data import Samples, make_samples
from .expert_load import MICRO_TOKENS
from .methods import Method
from .parameters import counts, trainable
from .pictures import make_pictured_samples
from .state import RunFolder, TrainingState, begun_training_dtype, fingerprint_of, training_folder
from .teacher import Teacher

PATIENCE = timedelta(hours=4)
TRACKERS = ("tensorboard", "trackio")


@dataclass(frozen=True)
class Finetuning:
    """A checked and resolved training."""

    source: Converted
    output: Path
    overwrite: bool
    """Whether an OUT that is there is replaced."""
    config: FinetuneConfig
    method: Method
    tokenizer: PreTrainedTokenizerBase
    train: Samples
    held: Samples
    teacher: Teacher | None
    accelerator: Accelerator
    folder: RunFolder[TrainingState]
    dtype: torch.dtype
    """In which the model runs; it is written as it was on disk."""
    processor: Processor | None = None
    """Of a vision-language model."""

    def load(self) -> PreTrainedModel:
        """Load the converted model as it came."""
        return self.source.load(self.dtype).to(self.accelerator.device)  # pyrefly: ignore[bad-argument-type]


def prepare(
    model: str | Path, output: Path, config: FinetuneConfig, *, resume: bool, overwrite: bool, cache: Path | None
) -> Finetuning:
    """Resolve and check everything that a training needs.

    Raises:
        InputError: no converted model, unknown method, unusable text or teacher, a window beyond the model's, or a
            training that does not fit in memory.
    """
    check_output(output, overwrite)
    method: Method = registry.build("method", config.method)
    if not method.uses_objective:
        if "objective" in config.model_fields_set and config.objective != "lm":
            name = registry.text("method", config.method)
            raise InputError(f"--objective {config.objective} has no use with --method {name}, whose loss is its own")
        config = config.model_copy(update={"objective": "lm"})  # so that no teacher runs for nothing
    config = config.model_copy(update={"balance": config.balance or method.balance})
    source = Converted(resolve(str(model)))
    config = config.model_copy(update={"data": config.data or text_of_conversion(source)})
    folder = training_folder(output)
    accelerator = make_accelerator(choose_device(config.device), folder)
    check_request(source, method, config, accelerator.num_processes)
    tokenizer = load_tokenizer(source.checkpoint.folder)
    processor = Processor(source.checkpoint.folder, source.whole) if source.takes_pictures else None
    taught = config.objective != "lm" or config.match > 0 or method.needs_dense
    if cache and not taught:
        raise InputError("--teacher-cache has no use where nothing is learnt from the dense model; leave it out")
    name = (config.teacher or dense_origin(str(source.checkpoint.folder), "--teacher")) if taught else None
    begun = begun_training_dtype(output) if resume else None  # goes on in its own
    own = [begun or training_dtype(source.checkpoint.dtype(), accelerator.device)]
    dtype: torch.dtype = broadcast_object_list(own)[0]  # in all processes the first one's
    teacher = Teacher(name, source.config, tokenizer, config.top_k, accelerator.device, dtype) if name else None
    if teacher and (config.match > 0 or method.needs_dense):
        teacher.check_layers(source.config)
    checkpoints = [source.checkpoint, *([teacher.checkpoint] if teacher else [])]
    weights = sum(one.size() * dtype.itemsize / one.dtype().itemsize for one in checkpoints)
    check_memory(source.whole, weights, method, config, accelerator.device, dtype)
    # text that is to be written comes after all that can be refused
    train, held = training_samples(source, config, tokenizer, processor)
    for samples in (train, held):
        check_tokens(samples.tokens_NL, source.config.vocab_size, tokenizer)
    even = len(held) // accelerator.num_processes * accelerator.num_processes
    if not even:
        raise InputError(f"{len(held)} held-out sequences cannot be shared by {accelerator.num_processes} processes")
    held = held.take(torch.arange(even))
    fingerprint = fingerprint_of(source.checkpoint, (train, held), config, accelerator.device, dtype)
    fingerprint["teacher"] = teacher.checkpoint.fingerprint() if teacher else "none"
    folder = RunFolder(TrainingState, output, fingerprint, resume, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if teacher:
        teacher.keep_in(cache or training_folder(output) / "teacher", train)
    return Finetuning(
        source, output, overwrite, config, method, tokenizer, train, held, teacher, accelerator, folder, dtype,
        processor,
    )  # fmt: skip


def text_of_conversion(source: Converted) -> tuple[str, ...]:
    """Name the bundled text that a conversion was calibrated on; nothing if it was a user's own."""
    names: list[str] = saved_settings(source.checkpoint.folder)["config"]["calibration"]
    packaged = [name for name in names if name == BUNDLED or bundled_answers(name) is not None]
    return tuple(names) if packaged == names else ()


def learn_by_objective(model: PreTrainedModel) -> bool:
    """Tell whether the routers of a converted model get a gradient of its own loss."""
    return all(block.gate is None or block.gate.learns_by_objective for block in moe_blocks(model))


def training_samples(
    source: Converted, config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, processor: Processor | None
) -> tuple[Samples, Samples]:
    """Make the sequences to train on, and those held out; text that is to be written is written by the teacher.

    Raises:
        InputError: unusable text.
    """
    writer = source.checkpoint.folder
    if any(own_text(name) for name in config.data):
        writer = resolve(config.teacher or dense_origin(str(writer), "--teacher"))
    bundle = bundled_text if processor is None else bundled_both
    text = (config.data, writer, TRAINING_TOKENS, config.seed, config.device, bundle)
    documents, how = documents_of(*text, window=config.window), (config.samples, config.window, config.held_out)
    if processor is None:
        return make_samples(documents, tokenizer, *how, config.seed)
    return make_pictured_samples(documents, processor, *how, config.seed, source.config.max_position_embeddings)


def check_request(source: Converted, method: Method, config: FinetuneConfig, processes: int) -> None:
    """Check what can be checked whatever the text is.

    Raises:
        InputError: a window, batch, balance or number of processes that the model or the method cannot work with.
    """
    name = registry.text("method", config.method)
    check_conversion_files(source.checkpoint.folder)
    longest = source.config.max_position_embeddings
    if config.window > longest:
        raise InputError(f"--window {config.window} is more than the model's longest, {longest} tokens")
    if config.batch % processes:
        raise InputError(f"--batch {config.batch} cannot be shared by {processes} processes; give a multiple of it")
    if config.shard and processes == 1:
        raise InputError("--shard needs several processes: torchrun --nproc_per_node N -m moesaic.cli finetune ...")
    dynamic = registry.build("selection", source.config.selection, imported_only=True).dynamic_top_k
    if (method.dynamic_top_k or dynamic) and config.balance != "none":
        raise InputError(f"--balance {config.balance} has no effect where experts are chosen by a threshold (--method "
                         f"{name}, selection {source.config.selection}); give --balance none")  # fmt: skip
    alone = not method.uses_objective or method.alternates or (config.shard and not method.shards)
    if method.alternates and config.balance != "none":
        raise InputError(f"--balance {config.balance} moves what --method {name} trains by itself; drop it")
    if processes > 1 and alone:
        raise InputError(f"--method {name} trains in one process, or without --shard; found {processes}")


def make_accelerator(device: torch.device, folder: Path) -> Accelerator:
    """Make accelerate's view of this process: its device, how many others there are, the trackers installed."""
    if "WORLD_SIZE" not in os.environ:  # or the device of an earlier training in this process would stay
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    # a step reaches some experts only; and one process writes while the others wait
    some = (DistributedDataParallelKwargs(find_unused_parameters=True), InitProcessGroupKwargs(timeout=PATIENCE))
    trackers: list = [name for name in TRACKERS if find_spec(name)]
    return Accelerator(
        cpu=device.type == "cpu", log_with=trackers or None, project_dir=str(folder), kwargs_handlers=list(some)
    )


def training_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype to train in: bfloat16 for weights of it where it is the fastest here, else float32.

    Of float16 the gradients may overflow.
    """
    return compute_dtype(own, device) if own == torch.bfloat16 else torch.float32


def check_learning(whole: PreTrainedConfig, method: Method, config: FinetuneConfig) -> int:
    """Check that a method has something to train in a model, and count those parameters.

    Raises:
        InputError: it has not, or trains no router though the configuration or the router asks for it.
    """
    name, c = registry.text("method", config.method), block_config(whole)
    on_meta = empty(copy.deepcopy(whole))  # methods change the configuration
    named = trainable(method.prepare(on_meta))
    routers = "router" in counts(named.items())
    if routers and not method.has_layer_loss and not learn_by_objective(on_meta):
        raise InputError(
            f"router '{c.router}' learns by a loss of each layer, which --method {name} has not; use --method d2dmoe, "
            "or convert with another --router"
        )
    if config.locality and not routers:
        raise InputError(
            f"--locality {config.locality:g} is for routers, and --method {name} trains none here; drop it"
        )
    if not named:
        raise InputError(f"--method {name} has nothing to train in this model, whose router is "
                         f"{c.router} with {c.num_experts} routed experts")  # fmt: skip
    return sum(p.numel() for p in named.values())


def check_conversion(conversion: Conversion, config: FinetuneConfig) -> None:
    """Check before a conversion is made that it can be trained, taught by the dense model.

    Raises:
        InputError: what `check_memory` refuses.
    """
    device = conversion.layerwise.device
    dtype = training_dtype(conversion.dtype, device)
    parameters = sizes(empty(conversion.whole_config), conversion.plan, conversion.format).total_parameters
    weights = (parameters + conversion.layerwise.num_parameters()) * dtype.itemsize
    check_memory(conversion.whole_config, weights, registry.build("method", config.method), config, device, dtype)


def check_memory(
    whole: PreTrainedConfig,
    weights: float,
    method: Method,
    config: FinetuneConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Check that the training's estimate fits in the device's free memory.

    `weights`, the bytes of model and teacher in `dtype`; 16 bytes for each parameter that learns (itself, gradient and
    Adam's two moments in float32); activations and logits of a micro-batch; with adapters the routed experts' sum
    `W + B A`.

    Raises:
        InputError: it does not fit, or what `check_learning` refuses.
    """
    c, learning = block_config(whole), check_learning(whole, method, config)
    tokens = min(max(MICRO_TOKENS, config.window), config.batch * config.window)
    width = c.shared_expert_intermediate_size + c.num_experts_per_tok * c.moe_intermediate_size
    itemsize = dtype.itemsize
    activations = tokens * c.num_hidden_layers * (16 * c.hidden_size + 8 * width) * itemsize
    logits = tokens * c.vocab_size * (8 + itemsize)
    needed = weights + 16 * learning + activations + logits
    if method.copies_experts:
        needed += 3 * c.num_hidden_layers * c.num_experts * c.moe_intermediate_size * c.hidden_size * itemsize
    free = free_memory(device)
    if needed > free:
        raise InputError(
            f"training would need about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; use --method "
            "lora or router, or a smaller --window or --batch"
        )
