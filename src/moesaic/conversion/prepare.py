"""A conversion resolved and checked before any costly work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .. import registry
from ..calibration.windows import check_tokens
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space, partial_folder, read_state
from ..compat import set_experts_implementation
from ..config import ConvertConfig
from ..errors import InputError
from ..formats.base import Format, MoesaicModelConfig
from ..formats.converted import choose_format
from ..formats.loading import load_tokenizer
from ..machine import versions
from ..models.devices import choose_device, choose_dtype, compute_dtype
from ..models.layerwise import LayerwiseModel
from ..moe.modeling import DEFAULT_EXPERTS, moesaic_config
from ..partition import Partitioner
from ..plan import Plan
from ..recovery import Recovery
from ..routing import Router
from ..routing.selection import Selection
from ..routing.selection.base import SMALLEST, Counting
from .plans import choose_plan
from .tokens import ConversionTokens, check_domains, tokenise

COMPUTE_DTYPE = "compute dtype"
"""Of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that can start: everything chosen, checked and tokenised."""

    model: str
    """As the user called it; a folder by its name alone."""
    source: Path
    config: ConvertConfig
    plan: Plan
    partitioner: Partitioner
    router: Router
    recovery: Recovery
    layerwise: LayerwiseModel
    """The dense model; it calculates in a dtype of its own."""
    dtype: torch.dtype
    """Of what is written."""
    model_config: MoesaicModelConfig
    """The converted model's transformers configuration."""
    format: Format
    """How it is written."""
    format_reason: str
    """Why that is no stock architecture though one was welcome, or nothing."""
    tokenizer: PreTrainedTokenizerBase
    tokens: ConversionTokens

    @property
    def name(self) -> str:
        """Its cut, e.g. `coactivation S2A2E8`."""
        return f"{registry.text('partition', self.config.partition)} {self.plan}"

    @property
    def fingerprint(self) -> dict[str, str]:
        """What unfinished work must agree in to be gone on with."""
        return {
            "model": self.layerwise.checkpoint.fingerprint(),
            "calibration text": self.tokens.text_sha256,
            "tokens": self.tokens.fingerprint(),
            "configuration": hashlib.sha256(self.config.to_yaml().encode()).hexdigest(),
            "plan": f"{self.plan} of {self.plan.width}",
            "format": self.format.name,
            "device": self.layerwise.device.type,
            COMPUTE_DTYPE: str(self.layerwise.dtype).removeprefix("torch."),
            "version": " ".join(f"{name} {version}" for name, version in versions().items()),
        }

    def bytes_needed(self) -> int:
        """Count the bytes of disk that it takes: the output's weights, its last shard twice, and the hidden states."""
        checkpoint, config = self.layerwise.checkpoint, self.layerwise.config
        weights = checkpoint.size() * max(1.0, self.plan.memory_factor(config.intermediate_size))
        weights *= self.dtype.itemsize / checkpoint.dtype().itemsize
        weights += self.format.copied_parameters(self.model_config).total * self.dtype.itemsize
        hidden = self.tokens.count() * config.hidden_size * self.layerwise.dtype.itemsize
        return round(1.1 * weights) + 2 * hidden

    def check_space(self, output: Path) -> None:
        """Check that OUT's disk has room for what is not yet in `OUT.partial`.

        Raises:
            InputError: it has less.
        """
        partial = partial_folder(output)
        done = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        check_space(output, max(0, self.bytes_needed() - done))


def fingerprint(conversions: list[Conversion]) -> dict[str, str]:
    """Say what an unfinished output must agree in to be gone on with: all that the candidates may do."""
    prints = [conversion.fingerprint for conversion in conversions]
    return {key: " or ".join(dict.fromkeys(found[key] for found in prints)) for key in prints[0]}


def begun_dtype(output: Path) -> torch.dtype | None:
    """Read the dtype that an unfinished conversion calculates in; another day's timing might choose another one."""
    state = read_state(partial_folder(output))
    found = getattr(torch, state.fingerprint.get(COMPUTE_DTYPE, ""), None) if state else None
    return found if isinstance(found, torch.dtype) else None


def prepare(
    model: str | Path,
    config: ConvertConfig,
    compute: torch.dtype | None = None,
    layerwise: LayerwiseModel | None = None,
) -> Conversion:
    """Resolve and check everything that a conversion with a named partition needs.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        config: its partition is not `auto`.
        compute: the dtype to calculate in; None is the one that the machine is fast in.
        layerwise: the model if it is open already, so that its embeddings are in memory once.

    Raises:
        InputError: unknown model or method, a plan that does not fit, or unusable calibration text.
    """
    if config.active is None and config.plan is None:
        config = config.model_copy(update={"active": 0.5})
    partitioner: Partitioner = registry.build("partition", config.partition)
    router: Router = registry.build("router", config.router or partitioner.default_router)
    selection: Selection = registry.build("selection", config.selection or router.default_selection)
    config = config.model_copy(
        update={"router": config.router or partitioner.default_router, "selection": registry.spec(selection)}
    )
    recovery: Recovery = registry.build("recovery", config.recovery)
    check_methods(config, partitioner, router, selection)
    source = resolve(str(model))
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, source)
    layerwise = layerwise or LayerwiseModel(source, compute or compute_dtype(dtype, device), device)
    plan = choose_plan(config, partitioner, layerwise.config.intermediate_size)
    model_config = moesaic_config(
        layerwise.config, plan, router.gate_name, registry.spec(selection),
        router_hidden_size=router.router_hidden_size, shared_expert_bias=partitioner.static,
    )  # fmt: skip
    model_config.dtype = dtype
    set_experts_implementation(model_config, DEFAULT_EXPERTS)
    format, format_reason = choose_format(config.format, model_config, router.has_bias and plan.num_experts > 0)
    if partitioner.labelled:
        check_domains(config, plan)
    tokens = tokenise(source, config, min(config.window, layerwise.config.max_position_embeddings))
    tokenizer = load_tokenizer(source)
    check_tokens(tokens.all(), layerwise.config.vocab_size, tokenizer)
    # a folder is known by its name only, with a stroke to tell it from a built-in model's
    return Conversion(
        model=f"{source.name}/" if Path(model).is_dir() else str(model),
        source=source, config=config, plan=plan, partitioner=partitioner, router=router, recovery=recovery,
        layerwise=layerwise, dtype=dtype, model_config=model_config, format=format, format_reason=format_reason,
        tokenizer=tokenizer, tokens=tokens,
    )  # fmt: skip


def check_methods(config: ConvertConfig, partitioner: Partitioner, router: Router, selection: Selection) -> None:
    """Check that methods go together, whatever the model is.

    Raises:
        InputError: they do not.
    """
    if router.scope == "model":
        raise InputError(
            f"router '{config.router}' decides ahead of the whole model; a conversion fits a router in each layer. "
            "Hand its decisions to the blocks (moesaic.models.moe_block.routed_by)"
        )
    if router.runs_all_experts and registry.text("recovery", config.recovery) != "none":
        raise InputError(f"router '{config.router}' ranks by norms that recovery changes; use it with --recovery none")
    if isinstance(selection, Counting) and selection.parameters(SMALLEST):
        name = registry.split("selection", registry.spec(selection))[0]
        raise InputError(
            f"selection '{name}' has something to learn or to calibrate in each layer; convert without it, then: "
            f"moesaic adapt OUT ADAPTER --method {name}"
        )
    if selection.dynamic_top_k and router.has_bias and not isinstance(selection, Counting):
        raise InputError(
            f"selection '{config.selection}' compares scores with a threshold and does not read the intercept or "
            f"balance that router '{config.router}' fits; leave it out, e.g. --router linear:intercept=False"
        )
    if router.token_clusters and not partitioner.token_clusters:
        raise InputError(
            f"router '{config.router}' needs clusters of tokens (specialists:alternations=0); with "
            f"'{config.partition}' use 'linear'"
        )
