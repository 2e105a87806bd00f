"""A conversion resolved and checked before any costly work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import registry
from ..calibration.sinks import opening_tokens
from ..calibration.text import bundled, labelled_windows, read_documents, text_hash, token_windows
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space, partial_folder
from ..compat import set_experts_implementation
from ..config import ConvertConfig
from ..errors import InputError
from ..formats.base import Format, MoesaicModelConfig
from ..formats.converted import choose_format
from ..formats.loading import load_tokenizer
from ..models.devices import choose_device, choose_dtype, compute_dtype
from ..models.layerwise import LayerwiseModel
from ..moe.modeling import DEFAULT_EXPERTS, moesaic_config
from ..partition import Partitioner
from ..plan import FINE, Plan, disjoint_plan, parse_plan, specialists_plan
from ..recovery import Recovery
from ..results import Result
from ..routing import Router
from ..routing.selection import Selection

VALIDATION = 16


@dataclass(frozen=True, kw_only=True)
class ConversionTokens:
    """The text of a conversion, as tokens; int64."""

    calibration_NL: Tensor
    """What layers are fitted to."""
    domain_N: Tensor
    """The number of each calibration window's domain."""
    opening_M1: Tensor
    """Tokens that open a text, which become attention sinks: a window has one, too few to learn from."""
    validation_NL: Tensor
    """Every `VALIDATION`-th calibration window: nothing is fitted to it but the temperature of the whole model."""
    held_out_NL: Tensor
    """Bundled text on which the converted model is compared with the dense one."""
    text_sha256: str
    """Of the calibration text."""

    def count(self) -> int:
        """Tokens whose hidden states are kept, on both paths where there are two."""
        once = self.calibration_NL.numel() + self.validation_NL.numel()
        return once + 2 * self.held_out_NL.numel() + 2 * self.opening_M1.numel()


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
            "configuration": hashlib.sha256(self.config.to_yaml().encode()).hexdigest(),
            "plan": f"{self.plan} of {self.plan.width}",
        }

    def bytes_needed(self) -> int:
        """Disk that the conversion takes: the output's weights, its last shard twice, and the hidden states."""
        checkpoint, config = self.layerwise.checkpoint, self.layerwise.config
        weights = checkpoint.size() * max(1.0, self.plan.memory_factor(config.intermediate_size))
        weights *= self.dtype.itemsize / checkpoint.dtype().itemsize
        weights += self.format.copied_parameters(self.model_config).total * self.dtype.itemsize
        hidden = self.tokens.count() * config.hidden_size * self.layerwise.dtype.itemsize
        return round(1.1 * weights) + 2 * hidden

    def check_space(self, output: Path) -> None:
        """Raises InputError unless OUT's disk has room for what is not yet in `OUT.partial`."""
        partial = partial_folder(output)
        done = sum(path.stat().st_size for path in partial.iterdir()) if partial.is_dir() else 0
        check_space(output, max(0, self.bytes_needed() - done))


def fingerprint(conversions: list[Conversion]) -> dict[str, str]:
    """What an unfinished output must agree in to be gone on with: all that the candidates may do."""
    prints = [conversion.fingerprint for conversion in conversions]
    return {key: " or ".join(dict.fromkeys(found[key] for found in prints)) for key in prints[0]}


def prepare(model: str | Path, config: ConvertConfig, layerwise: LayerwiseModel | None = None) -> Conversion:
    """Resolve and check everything that a conversion with a named partition needs.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        config: its partition is not `auto`.
        layerwise: the model if it is open already, so that its embeddings are in memory once.

    Raises:
        InputError: unknown model or method, a plan that does not fit, or unusable calibration text.
    """
    if config.active is None and config.plan is None:
        config = config.model_copy(update={"active": 0.5})
    partitioner: Partitioner = registry.build("partition", config.partition)
    router: Router = registry.build("router", config.router or partitioner.default_router)
    selection = config.selection or router.default_selection
    config = config.model_copy(
        update={
            "router": config.router or partitioner.default_router,
            "selection": registry.text("selection", selection),
        }
    )
    recovery: Recovery = registry.build("recovery", config.recovery)
    check_methods(config, partitioner, router, registry.build("selection", selection))
    source = resolve(str(model))
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, source)
    layerwise = layerwise or LayerwiseModel(source, compute_dtype(dtype, device), device)
    plan = choose_plan(config, partitioner, layerwise.config.intermediate_size)
    model_config = moesaic_config(
        layerwise.config, plan, router.gate_name, registry.text("selection", selection),
        router_hidden_size=router.router_hidden_size, shared_expert_bias=partitioner.static,
    )  # fmt: skip
    model_config.dtype = dtype
    set_experts_implementation(model_config, DEFAULT_EXPERTS)
    format, format_reason = choose_format(config.format, model_config, router.has_bias and plan.num_experts > 0)
    if partitioner.labelled:
        check_domains(config, plan)
    tokens = tokenise(source, config, min(config.window, layerwise.config.max_position_embeddings))
    # a folder is known by its name only, with a stroke to tell it from a built-in model's
    return Conversion(
        model=f"{source.name}/" if Path(model).is_dir() else str(model),
        source=source, config=config, plan=plan, partitioner=partitioner, router=router, recovery=recovery,
        layerwise=layerwise, dtype=dtype, model_config=model_config, format=format, format_reason=format_reason,
        tokenizer=load_tokenizer(source), tokens=tokens,
    )  # fmt: skip


def check_methods(config: ConvertConfig, partitioner: Partitioner, router: Router, selection: Selection) -> None:
    """Raises InputError for methods that do not go together, whatever the model is."""
    if router.scope == "model":
        raise InputError(
            f"router '{config.router}' decides ahead of the whole model; a conversion fits a router in each layer. "
            "Hand its decisions to the blocks (moesaic.models.moe_block.routed_by)"
        )
    if router.runs_all_experts and registry.text("recovery", config.recovery) != "none":
        raise InputError(f"router '{config.router}' ranks by norms that recovery changes; use it with --recovery none")
    if router.token_clusters and not partitioner.token_clusters:
        raise InputError(
            f"router '{config.router}' needs clusters of tokens (specialists:alternations=0); with "
            f"'{config.partition}' use 'linear'"
        )


def check_domains(config: ConvertConfig, plan: Plan) -> None:
    """Raises InputError unless the calibration text has a domain for each expert."""
    domains = len({document.domain for document in read_documents(config.calibration)})
    if domains < plan.num_experts:
        raise InputError(
            f"partition '{registry.text('partition', config.partition)}' needs a domain of text for each expert: "
            f"{plan.num_experts}, found {domains}; give each domain a file of its own with --calibration, or ask for "
            "fewer experts"
        )


def tokenise(source: Path, config: ConvertConfig, window: int) -> ConversionTokens:
    """Cut calibration and held-out text into windows of tokens; the same text is not tokenised twice in a process.

    Raises:
        InputError: a file that is missing or not text, or less text than is asked for.
    """
    paths = [Path(name).expanduser() for name in config.calibration]
    stamps = tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)
    opening = config.first_tokens if registry.text("recovery", config.recovery) != "none" else 0
    return _tokenise(source, config.calibration, stamps, config.tokens, window, opening, config.held_out_tokens)


@lru_cache(maxsize=4)
def _tokenise(
    source: Path,
    calibration: tuple[str, ...],
    stamps: tuple[int, ...],
    tokens: int,
    window: int,
    opening: int | None,
    held_out: int,
) -> ConversionTokens:
    tokenizer, documents = load_tokenizer(source), read_documents(calibration)
    tokens_NL, domain_N = labelled_windows(documents, tokenizer, tokens, window)
    spare = torch.arange(len(tokens_NL)) % VALIDATION == VALIDATION - 1
    return ConversionTokens(
        calibration_NL=tokens_NL[~spare],
        domain_N=domain_N[~spare],
        opening_M1=opening_tokens(tokens_NL[~spare], tokenizer, opening),
        validation_NL=tokens_NL[spare],
        held_out_NL=token_windows(bundled("heldout"), tokenizer, held_out, window),
        text_sha256=text_hash(documents),
    )


@dataclass(frozen=True, kw_only=True)
class DryRun(Result):
    """What a conversion would do: shape, methods, data, sizes."""

    model: str
    architecture: str
    layers: int | str
    plan: str
    expert_width: int | str
    ffn_active: float | str
    memory_factor: float | str
    partition: str
    router: str
    recovery: str
    format: str
    calibration_tokens: int | str
    dense_parameters: int | str
    dtype: str
    compute_dtype: str
    device: str
    disk_bytes: int | str


def describe(conversions: list[Conversion]) -> DryRun:
    """Say what a conversion would do; `a or b` where a trial between candidates decides."""
    rows = [_describe(conversion) for conversion in conversions]
    changes = {}
    for name, value in rows[0].to_dict().items():
        others = dict.fromkeys(str(row.to_dict()[name]) for row in rows)
        changes[name] = value if len(others) == 1 else " or ".join(others)
    return replace(rows[0], **changes)


def _describe(conversion: Conversion) -> DryRun:
    layerwise, plan, width = conversion.layerwise, conversion.plan, conversion.layerwise.config.intermediate_size
    return DryRun(
        model=conversion.model,
        architecture=type(layerwise.model).__name__,
        layers=len(layerwise.layers),
        plan=str(plan),
        expert_width=plan.width,
        ffn_active=plan.ffn_active(width),
        memory_factor=plan.memory_factor(width),
        partition=registry.text("partition", conversion.config.partition),
        router=registry.text("router", conversion.config.router),
        recovery=registry.text("recovery", conversion.config.recovery),
        format=conversion.format.name,
        calibration_tokens=conversion.tokens.calibration_NL.numel() + conversion.tokens.validation_NL.numel(),
        dense_parameters=layerwise.parameters(),
        dtype=str(conversion.dtype).removeprefix("torch."),
        compute_dtype=str(layerwise.dtype).removeprefix("torch."),
        device=str(layerwise.device),
        disk_bytes=conversion.bytes_needed(),
    )


def choose_plan(config: ConvertConfig, partitioner: Partitioner, intermediate_size: int) -> Plan:
    """Choose the shape that a configuration asks for.

    Raises:
        InputError: contradictory wishes or a shape that does not fit the FFN.
    """
    _check_wishes(config, partitioner)
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


def _check_wishes(config: ConvertConfig, partitioner: Partitioner) -> None:
    """Raises InputError for options that contradict each other."""
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
