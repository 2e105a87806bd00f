"""A depth pruning resolved and checked before any costly work, and which layers go."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ... import registry
from ...calibration.chat import default_sources
from ...calibration.sinks import opening_tokens
from ...calibration.text import bundled, text_hash
from ...calibration.windows import check_tokens, labelled_windows, token_windows
from ...checkpoint.facts import display_name
from ...checkpoint.sources import resolve
from ...config import PruneConfig
from ...conversion.tokens import VALIDATION
from ...errors import InputError
from ...machine import give_back_memory
from ...models.devices import choose_device, choose_dtype, compute_dtype
from ...models.families import check_convertible
from ...models.integrity import check_numbers
from ...models.layerwise import LayerwiseModel
from ...models.tokenizer import load_tokenizer
from ...progress import Progress
from ...serving.own_text import documents_of
from ..methods import LayerPruner
from ..prepare import fingerprint
from .source import DeepSource


@dataclass(frozen=True, kw_only=True)
class DepthPruning:
    """A depth pruning that can start: everything chosen, checked and tokenised."""

    model: str
    """As the user called it; a folder by its name alone."""
    folder: Path
    config: PruneConfig
    pruner: LayerPruner
    source: DeepSource
    drop: int
    """How many layers go."""
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, Tensor]
    """Tokens, int64 [N, L], by the text's name: `calibration`, `opening` (what may open a text), `validation` (every
    `VALIDATION`-th window of the calibration text, which the temperature is fitted to), `held_out`."""
    text_sha256: str

    @property
    def heals(self) -> bool:
        """Whether layers are fitted."""
        return self.config.recovery != "none" and self.drop > 0

    @property
    def fingerprint(self) -> dict[str, str]:
        """What unfinished work must agree in to be gone on with."""
        return fingerprint(self.source.layerwise, self.config, self.text_sha256, list(self.texts.values()))


def prepare(model: str, config: PruneConfig, compute: torch.dtype | None = None) -> DepthPruning:
    """Resolve and check everything that a depth pruning needs.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        config: what to do; its method is a `LayerPruner`.
        compute: the dtype to calculate in; None is the one that the machine is fast in.

    Raises:
        InputError: unknown model, a number of layers that cannot be, or unusable calibration text.
    """
    check_wishes(config)
    pruner: LayerPruner = registry.build("pruning", config.method)
    folder = resolve(model)
    device = choose_device(config.device)
    source = DeepSource(folder, compute or compute_dtype(choose_dtype("auto", folder), device), device)
    layerwise = source.layerwise
    drop = layers_to_drop(config, len(layerwise.layers))
    if drop and config.recovery != "none":
        check_healable(source, config)
    tokenizer = load_tokenizer(folder)
    sources = config.calibration or default_sources(tokenizer, layerwise.config.vocab_size)
    documents = documents_of(sources, folder, config.tokens, config.seed, config.device, window=config.window)
    window = min(config.window, layerwise.config.max_position_embeddings)
    tokens_NL, _ = labelled_windows(documents, tokenizer, config.tokens, window)
    spare = torch.arange(len(tokens_NL)) % VALIDATION == VALIDATION - 1
    texts = {
        "calibration": tokens_NL[~spare], "opening": opening_tokens(tokens_NL[~spare], tokenizer, None),
        "validation": tokens_NL[spare],
        "held_out": token_windows(bundled("heldout"), tokenizer, config.held_out_tokens, window),
    }  # fmt: skip
    texts = {name: tokens_NL for name, tokens_NL in texts.items() if len(tokens_NL)}
    check_tokens(torch.cat([t.flatten() for t in texts.values()]), layerwise.config.vocab_size, tokenizer)
    return DepthPruning(
        model=display_name(model, folder), folder=folder, config=config, pruner=pruner,
        source=source, drop=drop, tokenizer=tokenizer, texts=texts, text_sha256=text_hash(documents),
    )  # fmt: skip


def check_wishes(config: PruneConfig) -> None:
    """Check that a configuration says how many layers stay, once, and nothing of experts.

    Raises:
        InputError: it does not.
    """
    name = registry.text("pruning", config.method)
    if config.experts is not None:
        raise InputError(
            f"--experts {config.experts} is for methods that leave experts out, and {name} leaves out layers; give "
            "--layers (how many stay) or --ratio (the share that goes)"
        )
    if (config.layers is None) == (config.ratio is None):
        said = "both are given" if config.layers is not None else "neither is given"
        raise InputError(
            f"--layers says how many layers stay, --ratio which share goes, and {said}; give one of them, such as "
            "--ratio 0.25"
        )


def layers_to_drop(config: PruneConfig, count: int) -> int:
    """Find how many of `count` layers go.

    Raises:
        InputError: none would stay, or more are asked for than there are.
    """
    keep = config.layers if config.layers is not None else count - round(count * (config.ratio or 0))
    given = f"--layers {config.layers}" if config.layers is not None else f"--ratio {config.ratio:g}"
    if not 1 <= keep <= count:
        raise InputError(f"{given} leaves {keep} of the {count} layers that the model has; keep from 1 to {count}")
    return count - keep


def check_healable(source: DeepSource, config: PruneConfig) -> None:
    """Check that every layer has a dense gated FFN, which recovery fits.

    Raises:
        InputError: one has none.
    """
    if source.has_experts:
        raise InputError(
            f"'{source.checkpoint.folder}' is a Mixture of Experts, whose layers --method depth leaves out as they "
            f"are; add --recovery none ({config.recovery} fits dense FFNs)"
        )
    try:
        check_convertible(source.layerwise.layers)
    except InputError as error:
        raise InputError(f"{error} Without healing its layers can go: --recovery none") from error


@torch.no_grad()
def distances(
    layerwise: LayerwiseModel, pruner: LayerPruner, hidden_NLD: Tensor, drop: int, report: Progress
) -> list[float]:
    """Run the source on calibration tokens, and measure the mean of `pruner.distance` over runs of layers.

    Args:
        layerwise: the source, with its embeddings.
        pruner: the method.
        hidden_NLD: what enters the first layer.
        drop: how many layers go; 0 judges none.
        report: called with (finished layers, all, what is done).

    Returns:
        One number for each layer that such a run can begin with.

    Raises:
        WorkError: hidden states are NaN or infinite.
    """
    if not drop:
        return []
    span, count = pruner.span(drop), len(layerwise.layers)
    states, found = deque([hidden_NLD], maxlen=span + 1), []
    for index in range(count):
        report(0, count - drop, f"judging layer {index + 1} of {count}")
        with layerwise.layer(index) as layer:
            states.append(layerwise.run(index, layer, states[-1]))
        check_numbers({"hidden states": states[-1]}, f"layer {index}", layerwise.dtype)
        if len(states) > span:
            pairs = zip(states[0], states[-1], strict=True)
            found.append(torch.cat([pruner.distance(before, after) for before, after in pairs]).double().mean().item())
    give_back_memory()
    return found
