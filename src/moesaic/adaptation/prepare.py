"""An adaptation resolved and checked before any costly work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import registry
from ..calibration.mixture import bundled_both
from ..calibration.windows import check_tokens
from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_output
from ..config import AdaptConfig
from ..errors import InputError
from ..formats.adapter import counting
from ..formats.converted import is_converted, without_weights
from ..models.devices import check_dtype, choose_device, choose_dtype
from ..models.families import context_length, embedding_rows, takes_pictures
from ..models.modality import check_modality
from ..models.processor import Processor
from ..models.tokenizer import load_tokenizer
from ..moe.adaptive import moe_blocks_of
from ..routing.base import Gate
from ..routing.selection.base import Counting, Learning
from ..serving.loading import load
from ..serving.own_text import TRAINING_TOKENS, bundled_text, documents_of
from ..store.opening import StoreOptions
from ..training.data import Samples, make_samples
from ..training.pictures import make_pictured_samples
from ..training.prepare import make_accelerator, training_dtype
from ..training.state import RunFolder, begun_training_dtype, fingerprint_of, training_folder
from .budget import check_budget
from .learners import Learner
from .trainer import AdaptState


@dataclass(frozen=True)
class Adaptation:
    """A checked and resolved adaptation."""

    name: str
    """Of the model, as it was given."""
    checkpoint: Checkpoint
    output: Path
    overwrite: bool
    config: AdaptConfig
    selection: Counting
    learner: Learner | None
    tokenizer: PreTrainedTokenizerBase
    train: Samples
    held: Samples
    accelerator: Accelerator
    folder: RunFolder[AdaptState]
    dtype: torch.dtype
    store: StoreOptions | None

    def load(self) -> PreTrainedModel:
        """Load the model."""
        model, _ = load(self.checkpoint.folder, dtype=self.dtype, device=self.accelerator.device, store=self.store)
        return model

    def calibration(self) -> Samples:
        """Take the sequences that the budget is met on."""
        length = max(1, self.train.count() // len(self.train))
        return self.train.take(torch.arange(min(len(self.train), max(1, self.config.tokens // length))))


def prepare(
    model: str | Path, output: Path, config: AdaptConfig, store: StoreOptions | None, *, resume: bool, overwrite: bool
) -> Adaptation:
    """Resolve and check everything that an adaptation needs.

    Raises:
        InputError: a dense model, a budget that it cannot meet, an unknown selection or one that cannot learn, unusable
            text, or a window beyond the model's.
    """
    check_output(output, overwrite)
    selection, learner = choose_methods(config)
    if store is not None:
        check_with_store(config, learner, store)
    check_dtype(config.dtype)
    device = choose_device(config.device)
    checkpoint = Checkpoint(resolve(str(model)))
    selection = check_model(checkpoint, selection, config)
    accelerator = make_accelerator(device, training_folder(output))
    if config.batch % accelerator.num_processes:
        raise InputError(
            f"--batch {config.batch} cannot be shared by {accelerator.num_processes} processes; give a multiple of it"
        )
    tokenizer = load_tokenizer(checkpoint.folder)
    train, held = adaptation_samples(checkpoint, config, tokenizer, learner)
    begun = begun_training_dtype(output) if resume else None
    dtype = choose_dtype(config.dtype, checkpoint.folder)
    if config.dtype == "auto":
        dtype = begun or training_dtype(checkpoint.dtype(), device)
    fingerprint = fingerprint_of(checkpoint, (train, held), config, accelerator.device, dtype)
    folder = RunFolder(AdaptState, output, fingerprint, resume, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return Adaptation(
        str(model), checkpoint, output, overwrite, config, selection, learner, tokenizer, train, held, accelerator,
        folder, dtype, store,
    )  # fmt: skip


def check_with_store(config: AdaptConfig, learner: Learner | None, store: StoreOptions) -> None:
    """Check that an adaptation does with experts that come and go.

    Raises:
        InputError: it needs them all at once: gradients go through them, or they are to be written.
    """
    store.policy()
    if learner is not None and learner.through_experts:
        method = registry.split("selection", registry.text("selection", config.method))[0]
        raise InputError(
            f"--method {method} is trained by gradients through the experts, which --expert-memory lets come and go; "
            "take a rule that is calibrated, such as top-p, or --method ada-k --learner ppo"
        )
    if config.inside:
        raise InputError("--inside writes the whole model, which --expert-memory does not hold; leave one of them out")
    if store.cache_bias:
        raise InputError("--cache-bias changes which experts run, and so what is adapted; leave it out")


def adaptation_samples(
    checkpoint: Checkpoint, config: AdaptConfig, tokenizer: PreTrainedTokenizerBase, learner: Learner | None
) -> tuple[Samples, Samples]:
    """Make the sequences to adapt a model on, and those held out; of rules on vision-language models with pictures.

    Raises:
        InputError: unusable data, or pictures for a selection that learns.
    """
    whole = without_weights(checkpoint).config
    if not takes_pictures(whole):
        documents = documents_of(
            config.data, checkpoint.folder, TRAINING_TOKENS, config.seed, config.device, window=config.window
        )
        return make_samples(documents, tokenizer, config.samples, config.window, config.held_out, config.seed)
    bundle = bundled_both if learner is None else bundled_text
    documents = documents_of(
        config.data, checkpoint.folder, TRAINING_TOKENS, config.seed, config.device, bundle, window=config.window
    )
    if learner is not None and any(one.pictures for one in documents):
        raise InputError(
            f"--method {registry.text('selection', config.method)} learns from text alone; leave rows with pictures "
            "out, or take a rule that is calibrated, such as modality-threshold"
        )
    return make_pictured_samples(
        documents, Processor(checkpoint.folder, whole), config.samples, config.window, config.held_out, config.seed,
        context_length(whole),
    )  # fmt: skip


def choose_methods(config: AdaptConfig) -> tuple[Counting, Learner | None]:
    """Make the selection and what trains it, if it learns.

    Raises:
        InputError: unknown, a selection for converted models only, or a learner for one that does not learn.
    """
    selection = counting(registry.build("selection", config.method))
    if isinstance(selection, Learning):
        learner: Learner = registry.build("learner", config.learner or selection.default_learner)
        learner.check(selection)
        return selection, learner
    if config.learner is not None:
        name = registry.spec_name(type(selection))
        raise InputError(f"--method {name} is calibrated and does not learn; leave out --learner")
    return selection, None


def check_model(checkpoint: Checkpoint, selection: Counting, config: AdaptConfig) -> Counting:
    """Check by its configuration that a model can be adapted, and give the selection its least count.

    Raises:
        InputError: a dense model, one whose number of experts varies already, a budget that it cannot meet, or a window
            beyond its context.
    """
    ours = is_converted(checkpoint)
    if config.inside and not ours:
        raise InputError(
            f"'{checkpoint.folder}' is a stock {checkpoint.config.get('model_type')}, whose format has no place for a "
            "selection; leave out --inside and load the adapter beside it"
        )
    model = without_weights(checkpoint)
    blocks = moe_blocks_of(model)
    if selection.by_modality:
        check_modality(model)
    if config.window > (longest := context_length(model.config)):
        raise InputError(f"--window {config.window} is more than the model's longest, {longest} tokens")
    gates = [block.router for block in blocks if isinstance(block.router, Gate)]
    if any(gate.selection.dynamic_top_k for gate in gates):
        raise InputError("the model's number of experts varies by token already; adapt what it was made of")
    if config.allow_zero and not all(block.shared_experts for block in blocks):
        raise InputError("--allow-zero needs a shared expert in each layer, and this model has none")
    if config.allow_zero and not selection.reaches_zero:
        name = registry.spec_name(type(selection))
        raise InputError(f"--method {name} always runs an expert; leave out --allow-zero, or take threshold")
    selection = replace(selection, at_least=0 if config.allow_zero else max(1, selection.at_least))
    default = max(block.num_experts_per_tok for block in blocks)
    check_budget(config.target_active * default, default, selection)
    return selection


def check_text(samples: Samples, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model has embeddings for all tokens.

    Raises:
        InputError: it has not.
    """
    check_tokens(samples.tokens_NL, embedding_rows(model), tokenizer)
