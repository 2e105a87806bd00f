"""A pruning resolved and checked before any costly work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import registry
from ..calibration.chat import default_sources
from ..calibration.mixture import bundled_both, mixed
from ..calibration.text import bundled, text_hash
from ..calibration.windows import check_tokens, labelled_windows, token_windows
from ..checkpoint.facts import display_name, saved_result
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space, partial_folder
from ..config import PruneConfig
from ..errors import InputError
from ..machine import versions
from ..models.devices import COMPUTE_DTYPE, choose_device, choose_dtype, compute_dtype, dtype_name
from ..models.layerwise import LayerwiseModel
from ..models.pictured import Pictured
from ..models.processor import Processor
from ..models.tokenizer import load_tokenizer
from ..serving.own_text import documents_of
from .methods import Pruner
from .sources import ConvertedSource, Source, expert_axes, open_source

LEAST_IN_GROUP = 2
"""Experts that a routing group must keep: DeepSeek-V3 ranks groups by their two best."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """A pruning that can start: everything chosen, checked and tokenised."""

    model: str
    """As the user called it; a folder by its name alone."""
    folder: Path
    config: PruneConfig
    pruner: Pruner
    source: Source
    keep: int
    tokenizer: PreTrainedTokenizerBase
    calibration_NL: Tensor
    held_out_NL: Tensor
    pictured: Pictured | None
    """What comes with the calibration tokens of a vision-language model."""
    text_sha256: str

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The pruned model's decoder layers, without weights until one is loaded."""
        return self.source.pruned_layers(self.keep)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What unfinished work must agree in to be gone on with."""
        tokens = [self.calibration_NL, self.held_out_NL]
        return fingerprint(self.source.layerwise, self.config, self.text_sha256, tokens)


def fingerprint(
    layerwise: LayerwiseModel, config: PruneConfig, text_sha256: str, tokens: list[Tensor]
) -> dict[str, str]:
    """Say what unfinished work must agree in to be gone on with."""
    all_tokens = torch.cat([part.flatten() for part in tokens]).numpy()
    return {
        "model": layerwise.checkpoint.fingerprint(),
        "calibration text": text_sha256,
        "tokens": hashlib.sha256(all_tokens.data).hexdigest(),
        "configuration": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        "device": layerwise.device.type,
        COMPUTE_DTYPE: dtype_name(layerwise.dtype),
        "version": " ".join(f"{name} {version}" for name, version in versions().items()),
    }


def check_room(output: Path, layerwise: LayerwiseModel, tokens: int) -> None:
    """Check that OUT's disk has room for the weights that stay and the hidden states of so many tokens.

    Raises:
        InputError: it has less.
    """
    hidden = tokens * layerwise.config.hidden_size * layerwise.dtype.itemsize
    done = sum(path.stat().st_size for path in partial_folder(output).glob("*.safetensors"))
    check_space(output, max(0, layerwise.checkpoint.size() + 2 * hidden - done))


def prepare(model: str, config: PruneConfig, compute: torch.dtype | None = None) -> Pruning:
    """Resolve and check everything that a pruning needs.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        config: what to do.
        compute: the dtype to calculate in; None is the one that the machine is fast in.

    Raises:
        InputError: unknown model or method, no Mixture of Experts, a number of experts that cannot be, or unusable
            calibration text.
    """
    check_wishes(config)
    pruner: Pruner = registry.build("pruning", config.method)
    folder = resolve(model)
    device = choose_device(config.device)
    source = open_source(folder, compute or compute_dtype(choose_dtype("auto", folder), device), device)
    keep = experts_to_keep(config, source)
    check_method(config, pruner, source, keep)
    for before, after in zip(source.layerwise.layers, source.pruned_layers(keep), strict=True):
        expert_axes(before, after)
    tokenizer, layerwise, pictured = load_tokenizer(folder), source.layerwise, None
    longest = layerwise.config.max_position_embeddings
    window = min(config.window, longest)
    if layerwise.takes_pictures:
        documents = documents_of(
            config.calibration, folder, config.tokens, config.seed, config.device, bundled_both, window=config.window
        )
        processor = Processor(folder, layerwise.model.config)
        calibration_NL, pictured, _ = mixed(documents, processor, config.tokens, window, longest)
    else:
        sources = config.calibration or default_sources(tokenizer, layerwise.config.vocab_size)
        documents = documents_of(sources, folder, config.tokens, config.seed, config.device, window=config.window)
        calibration_NL, _ = labelled_windows(documents, tokenizer, config.tokens, window)
    held_out_NL = held_out(config, source, tokenizer, window)
    check_tokens(torch.cat([calibration_NL.flatten(), held_out_NL.flatten()]), layerwise.config.vocab_size, tokenizer)
    return Pruning(
        model=display_name(model, folder), folder=folder, config=config, pruner=pruner,
        source=source, keep=keep, tokenizer=tokenizer, calibration_NL=calibration_NL, held_out_NL=held_out_NL,
        pictured=pictured, text_sha256=text_hash(documents),
    )  # fmt: skip


def held_out(config: PruneConfig, source: Source, tokenizer: PreTrainedTokenizerBase, window: int) -> Tensor:
    """Make the windows of bundled text that a pruned model is compared on; of a converted one those it was measured on.

    Its `metrics.json` has the dense model's perplexity on them.
    """
    tokens = config.held_out_tokens
    if isinstance(source, ConvertedSource):
        protocol = saved_result(source.checkpoint.folder).perplexity_protocol
        tokens, window = protocol.tokens, protocol.window
    return token_windows(bundled("heldout"), tokenizer, tokens, window)


def check_wishes(config: PruneConfig) -> None:
    """Check that a configuration says how many experts stay, once, and nothing of layers.

    Raises:
        InputError: it says so twice, or not at all.
    """
    if config.layers is not None:
        raise InputError(
            f"--layers {config.layers} is for --method depth, and {registry.text('pruning', config.method)} leaves out "
            "experts; give --experts or --ratio"
        )
    if (config.experts is None) == (config.ratio is None):
        said = "both are given" if config.experts is not None else "neither is given"
        raise InputError(
            f"--experts says how many experts stay, --ratio which share goes, and {said}; give one of them, such as "
            "--ratio 0.25"
        )


def experts_to_keep(config: PruneConfig, source: Source) -> int:
    """Find how many experts of each layer stay.

    Raises:
        InputError: more than there are, fewer than a token runs, or not as many in each routing group; layers with
            different numbers of experts.
    """
    block, groups = source.block, source.groups
    count, chosen = block.num_experts, block.num_experts_per_tok
    if any(other is not None and other.num_experts != count for other in source.blocks):
        raise InputError(
            f"the layers of '{source.checkpoint.folder}' have different numbers of experts; this is not pruned"
        )
    keep = config.experts if config.experts is not None else count - round(count * (config.ratio or 0))
    given = f"--experts {config.experts}" if config.experts is not None else f"--ratio {config.ratio:g}"
    if keep > count:
        raise InputError(f"{given} is more than the {count} experts that a layer has; give {count} at most")
    if keep < chosen:
        raise InputError(
            f"{given} leaves {keep} experts, and a token runs {chosen} of them; give --experts {chosen} at least, or a "
            f"--ratio of {1 - chosen / count:.3g} at most"
        )
    if groups > 1:
        least = max(LEAST_IN_GROUP, -(-chosen // (getattr(block.router, "topk_group", groups) or groups))) * groups
        if keep % groups or keep < least:
            able = sorted({max(least, keep // groups * groups), max(least, -(-keep // groups) * groups)})
            raise InputError(
                f"{given} leaves {keep} experts in {groups} routing groups, which keep as many each and enough for a "
                f"token; give --experts {' or '.join(map(str, able))}"
            )
    return keep


def check_method(config: PruneConfig, pruner: Pruner, source: Source, keep: int) -> None:
    """Check that a method can work on the model's experts.

    Raises:
        InputError: it cannot.
    """
    block, name = source.block, registry.text("pruning", config.method)
    kind = type(block.router).__name__
    if block.is_transposed and not any("bias" in n for n, _ in block.experts.named_parameters()):
        raise InputError(
            f"{kind} weighs what enters an expert, not what it says, as Llama-4's; such models are not pruned"
        )
    if keep == block.num_experts:
        return
    if source.groups > 1 and not pruner.knows_groups:
        raise InputError(
            f"--method {name} does not search within {source.groups} routing groups, which this model has; use reap"
        )
    if block.is_transposed and (pruner.reads_neurons or config.recovery != "none"):
        what = f"--method {name}" if pruner.reads_neurons else f"--recovery {config.recovery}"
        raise InputError(
            f"{what} reads experts neuron by neuron, and gpt-oss interleaves them; use "
            f"{'--method reap' if pruner.reads_neurons else ''} --recovery none".replace("  ", " ")
        )
