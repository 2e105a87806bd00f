"""A conversion's conversion: everything resolved and checked before any costly work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..calibration.sinks import opening_tokens
from ..calibration.text import bundled, labelled_windows, read_documents, text_hash, token_windows
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space, partial_folder
from ..config import ConvertConfig, build_config, read_recipe
from ..errors import InputError
from ..formats.base import Format
from ..formats.converted import choose_format
from ..formats.loading import load_tokenizer
from ..models.devices import choose_device, choose_dtype, compute_dtype
from ..models.layerwise import LayerwiseModel
from ..moe.modeling import DEFAULT_EXPERTS, moesaic_config
from ..partition import Partitioner
from ..plan import FINE, Plan, disjoint_plan, parse_plan, specialists_plan
from ..recovery import Recovery
from ..routing import RouterBuilder

VALIDATION = 16


@dataclass(frozen=True)
class Conversion:
    """A checked and resolved conversion, before any costly work."""

    model: str
    """As the user called it; a folder by its name alone."""
    source: Path
    config: ConvertConfig
    plan: Plan
    partitioner: Partitioner
    router: RouterBuilder
    recovery: Recovery
    stream: LayerwiseModel
    dtype: torch.dtype
    """Of what is written; the stream calculates in its own."""
    working: Any
    """The converted model's transformers configuration, in the working form."""
    format: Format
    """What is written."""
    format_reason: str
    """Why that is the working form though a native one was welcome, or nothing."""
    tokenizer: Any
    tokens_NL: Tensor
    """Calibration tokens that layers are fitted to."""
    domain_N: Tensor
    opening_N1: Tensor
    """Tokens that open a text, which becomes an attention sink: a window has one, too few to learn from."""
    validation_NL: Tensor
    """Every `VALIDATION`-th calibration window: nothing is fitted to it but the confidence of the whole model."""
    held_out_NL: Tensor
    fingerprint: dict[str, str]

    @property
    def name(self) -> str:
        """Its cut, e.g. `coactivation S2A2E8`."""
        return f"{self.config.partition} {self.plan}"

    def bytes_needed(self) -> int:
        """Disk that the conversion takes: the output's weights, its last shard twice, and three hidden states."""
        weights = self.stream.checkpoint.size() * max(
            1.0, self.plan.memory_factor(self.stream.config.intermediate_size)
        )
        weights *= self.dtype.itemsize / self.stream.checkpoint.dtype().itemsize
        weights += self.format.copied_parameters(self.working)[0] * self.dtype.itemsize
        tokens = self.tokens_NL.numel() + self.validation_NL.numel()
        tokens += 2 * self.held_out_NL.numel() + 2 * self.opening_N1.numel()
        return round(1.1 * weights) + 2 * tokens * self.stream.config.hidden_size * self.stream.dtype.itemsize

    def check_space(self, output: Path) -> None:
        """Raises InputError unless OUT's disk has room for what is not yet in `OUT.partial`."""
        partial = partial_folder(output)
        done = sum(path.stat().st_size for path in partial.iterdir()) if partial.is_dir() else 0
        check_space(output, max(0, self.bytes_needed() - done))


def fingerprint(conversions: list[Conversion]) -> dict[str, str]:
    """What an unfinished output must agree in to be gone on with: all that the conversions may do."""
    return {
        key: " or ".join(dict.fromkeys(conversion.fingerprint[key] for conversion in conversions))
        for key in conversions[0].fingerprint
    }


def prepare(model: str | Path, config: ConvertConfig) -> Conversion:
    """Resolve and check everything that a conversion with a named partition needs.

    Raises:
        InputError: unknown model or method, a plan that does not fit, or unusable calibration text.
    """
    if config.active is None and config.plan is None:
        config = config.model_copy(update={"active": 0.5})
    partitioner = registry.build("partition", config.partition)
    router_name = config.router or partitioner.default_router
    config = config.model_copy(update={"router": router_name})
    router = registry.build("router", router_name)
    recovery = registry.build("recovery", config.recovery)
    if router.gate == "oracle" and config.recovery != "none":
        raise InputError("router 'oracle' ranks by norms that recovery changes; use it with --recovery none")
    if router.token_clusters and not partitioner.token_clusters:
        raise InputError(
            f"router '{router_name}' needs clusters of tokens (specialists:alternations=0); with '{config.partition}' "
            "use 'linear'"
        )
    source = resolve(str(model))
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, source)
    stream = LayerwiseModel(source, compute_dtype(dtype, device), device)
    plan = choose_plan(config, partitioner, stream.config.intermediate_size)
    working = moesaic_config(stream.config, plan, router.gate, shared_expert_bias=partitioner.static)
    working.dtype = dtype
    working._experts_implementation = DEFAULT_EXPERTS
    form, format_reason = choose_format(config.format, working, router.has_bias and plan.num_experts > 0)
    tokenizer = load_tokenizer(source)
    documents = read_documents(config.calibration)
    domains = len({document.domain for document in documents})
    if partitioner.labelled and domains < plan.num_experts:
        raise InputError(
            f"partition '{config.partition}' needs a domain of text for each expert: {plan.num_experts}, found "
            f"{domains}; give each domain a file of its own with --calibration, or ask for fewer experts"
        )
    window = min(config.window, stream.config.max_position_embeddings)
    tokens_NL, domain_N = labelled_windows(documents, tokenizer, config.tokens, window)
    spare = torch.arange(len(tokens_NL)) % VALIDATION == VALIDATION - 1
    opening_N1 = opening_tokens(tokens_NL[~spare], tokenizer, config.first_tokens if config.recovery != "none" else 0)
    held_out_NL = token_windows(bundled("heldout"), tokenizer, config.held_out_tokens, window)
    fingerprint = {
        "model": stream.checkpoint.fingerprint(),
        "calibration text": text_hash(documents),
        "configuration": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
        "plan": f"{plan} of {plan.width}",
    }
    # a folder is known by its name only, with a stroke to tell it from a built-in model's
    name = f"{source.name}/" if Path(model).is_dir() else str(model)
    return Conversion(
        name, source, config, plan, partitioner, router, recovery, stream, dtype, working, form, format_reason,
        tokenizer, tokens_NL[~spare], domain_N[~spare], opening_N1, tokens_NL[spare], held_out_NL, fingerprint,
    )  # fmt: skip


def make_config(recipe: Path | None, settings: dict[str, Any]) -> ConvertConfig:
    """A configuration from a YAML recipe (or a saved `moesaic.yaml`) and settings that override it.

    Raises:
        InputError: no such file, an unknown setting (with the nearest name) or a value that does not fit.
    """
    content = read_recipe(recipe, "config", ConvertConfig)
    if "plan" in settings:
        content.pop("active", None)
    if "active" in settings:
        content.pop("plan", None)
    return build_config(ConvertConfig, content | settings)


def describe(conversions: list[Conversion]) -> dict[str, Any]:
    """What a conversion would do: shape, methods, data, sizes; `a or b` where a trial between conversions decides."""
    facts = [_facts(conversion) for conversion in conversions]
    return {
        name: value
        if all(other[name] == value for other in facts)
        else " or ".join(dict.fromkeys(str(o[name]) for o in facts))
        for name, value in facts[0].items()
    }


def _facts(conversion: Conversion) -> dict[str, Any]:
    width = conversion.stream.config.intermediate_size
    return {
        "model": conversion.model,
        "architecture": type(conversion.stream.model).__name__,
        "layers": len(conversion.stream.layers),
        "plan": str(conversion.plan),
        "expert_width": conversion.plan.width,
        "ffn_active": conversion.plan.ffn_active(width),
        "memory_factor": conversion.plan.memory_factor(width),
        "partition": conversion.config.partition,
        "router": conversion.config.router,
        "recovery": conversion.config.recovery,
        "format": conversion.format.name,
        "calibration_tokens": conversion.tokens_NL.numel() + conversion.validation_NL.numel(),
        "dense_parameters": conversion.stream.parameters(),
        "dtype": str(conversion.dtype).removeprefix("torch."),
        "compute_dtype": str(conversion.stream.dtype).removeprefix("torch."),
        "device": str(conversion.stream.device),
        "disk_bytes": conversion.bytes_needed(),
    }


def choose_plan(config: ConvertConfig, partitioner: Partitioner, intermediate_size: int) -> Plan:
    """The shape that a configuration asks for.

    Raises:
        InputError: contradictory wishes or a shape that does not fit the FFN.
    """
    if config.plan is not None and config.active is not None:
        raise InputError("--plan fixes what --active would choose; give one of them")
    if config.memory_factor != 1 and not partitioner.overlapping:
        raise InputError(
            f"--memory-factor {config.memory_factor} needs experts that overlap; use --partition specialists"
        )
    if config.memory_factor != 1 and config.plan is not None:
        raise InputError("--plan fixes how many experts there are, so --memory-factor has no say; give one of them")
    if partitioner.overlapping and config.expert_width is not None and config.plan is None:
        raise InputError("a specialist's width follows from --active; drop --expert-width, or fix a --plan too")
    if config.fine and (partitioner.overlapping or config.plan is not None or config.expert_width is not None):
        other = next((name for name in ("plan", "expert_width") if getattr(config, name) is not None), "partition")
        raise InputError(
            f"--fine asks for about {FINE[1]} disjoint groups, --{other.replace('_', '-')} {getattr(config, other)} "
            "for something else; give one of them"
        )
    if config.plan is not None:
        plan = parse_plan(config.plan, intermediate_size, config.expert_width, partitioner.overlapping)
        if partitioner.overlapping and plan.num_experts_per_tok != 1:
            raise InputError(
                f"specialists run one at a time: plan '{plan}' must say A1, e.g. S{plan.shared}A1E{plan.groups}"
            )
    else:
        assert config.active is not None
        if partitioner.overlapping:
            plan = specialists_plan(config.active, config.memory_factor, intermediate_size)
        else:
            plan = disjoint_plan(config.active, intermediate_size, config.expert_width, config.fine)
    return plan.as_static() if partitioner.static else plan
