"""What a conversion would do, before it does it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import registry
from ..config import ConvertConfig
from ..evaluation.cost import mean_share
from ..models.devices import dtype_name
from ..results import Result
from .auto import unwritten
from .prepare import Conversion


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
    selection: str
    recovery: str
    format: str
    engine: str | None
    outtype: str | None
    """Of GGUF."""
    calibration_tokens: int | str
    dense_parameters: int | str
    dtype: str
    compute_dtype: str
    device: str
    disk_bytes: int | str


def describe(conversions: list[Conversion], config: ConvertConfig) -> DryRun:
    """Say what a conversion would do; `a or b` where a trial between candidates decides.

    Args:
        conversions: the candidates, which `unwritten` text may stand in.
        config: what was asked for.
    """
    rows = [_describe(conversion) for conversion in conversions]
    if unwritten(config) is not config:
        rows = [replace(row, calibration_tokens=config.tokens // config.window * config.window) for row in rows]
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
        ffn_active=mean_share(conversion.model_config, plan.ffn_active(width)),
        memory_factor=mean_share(conversion.model_config, plan.memory_factor(width)),
        partition=registry.text("partition", conversion.config.partition),
        router=registry.text("router", conversion.config.router),
        selection=registry.text("selection", conversion.config.selection),
        recovery=registry.text("recovery", conversion.config.recovery),
        format=conversion.format.name,
        engine=conversion.engine.engine if conversion.engine else None,
        outtype=conversion.engine.outtype if conversion.engine else None,
        calibration_tokens=conversion.tokens.calibration_NL.numel() + conversion.tokens.validation_NL.numel(),
        dense_parameters=layerwise.num_parameters(),
        dtype=dtype_name(conversion.dtype),
        compute_dtype=dtype_name(layerwise.dtype),
        device=str(layerwise.device),
        disk_bytes=conversion.bytes_needed(),
    )
