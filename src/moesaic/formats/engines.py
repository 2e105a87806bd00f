"""What an engine runs well: the width of experts and the type of weights, by our own measurements.

`data/engine_shapes.json` is made of `benchmarks/results` by `python benchmarks/engine_shapes.py --table`. What was not
measured is not claimed: for such an engine the shape is that of a conversion for no engine in particular.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig

from .. import registry
from ..errors import InputError
from ..files import read_json
from ..models.families import takes_pictures
from ..moe.modeling import MODEL_TYPE
from ..plan import KEPT_SPEED
from ..results import EngineChoice
from .base import Format, MoesaicModelConfig, all_formats
from .choose import ChosenFormat, choose_format, engines_of, tower_reason
from .gguf_support import block_size, gguf_format

LLAMA_CPP = "llama.cpp"
ENGINES = (LLAMA_CPP, "transformers", "vllm", "sglang", "mlx")
TYPES = {LLAMA_CPP: "", "transformers": "bfloat16", "vllm": "bfloat16"}
"""Of weights, where the engine has one way; llama.cpp's is chosen."""
TABLE = Path(__file__).parent.parent / "data" / "engine_shapes.json"
SAME_QUALITY = 1.01
"""Perplexity over f16's up to which a type counts as as good."""


class EngineSpeed(NamedTuple):
    """How an engine runs experts of one width: shares of what bytes (decode) and FLOPs (prefill) allow."""

    width: int
    decode: float
    prefill: float | None

    def kept(self, best: EngineSpeed) -> float:
        """Compare with another width: the lesser of the two ratios."""
        parts = [self.decode / best.decode]
        if self.prefill and best.prefill:
            parts.append(self.prefill / best.prefill)
        return min(parts)


class MeasuredType(NamedTuple):
    """How llama.cpp runs weights of one type, over f16."""

    name: str
    speed: float
    perplexity: float


@cache
def _table() -> dict[str, list[dict[str, object]]]:
    return read_json(TABLE)


def check_engine(engine: str) -> None:
    """Check that an engine is known.

    Raises:
        InputError: it is not.
    """
    if engine not in ENGINES:
        raise InputError(
            f"--for {engine} is no engine.{registry.nearest(engine, ENGINES)} One of: {', '.join(ENGINES)}"
        )


def measured(engine: str, outtype: str) -> list[EngineSpeed]:
    """List what was measured of an engine with weights of a type, the widest experts first."""
    rows = [row for row in _table()["widths"] if (row["engine"], row["type"]) == (engine, outtype)]
    found = [EngineSpeed(int(r["width"]), float(r["decode"]), r.get("prefill")) for r in rows]  # pyrefly: ignore
    return sorted(found, key=lambda each: -each.width)


def measured_types() -> list[MeasuredType]:
    """List llama.cpp's types that were measured, the fastest first."""
    found = [MeasuredType(str(r["type"]), float(r["speed"]), float(r["perplexity"])) for r in _table()["types"]]  # pyrefly: ignore
    return sorted(found, key=lambda each: -each.speed)


def best_type() -> MeasuredType:
    """Choose llama.cpp's type: the fastest whose perplexity is f16's within one per cent."""
    return next(each for each in measured_types() if each.perplexity <= SAME_QUALITY)


def measured_as(engine: str, outtype: str) -> list[EngineSpeed]:
    """List what was measured of an engine with weights of a type; where that was not, of llama.cpp's best type."""
    if engine != LLAMA_CPP:
        return measured(engine, TYPES.get(engine, ""))
    return measured(engine, outtype) or measured(engine, best_type().name)


def finest(rows: list[EngineSpeed]) -> EngineSpeed:
    """Choose the narrowest experts that keep `KEPT_SPEED` of the speed of the fastest, as all wider ones do."""
    best = max(rows, key=lambda row: row.decode)
    found = best
    for row in rows:
        if row.width < best.width and row.kept(best) < KEPT_SPEED:
            break
        found = row if row.width <= best.width else found
    return found


def choose_for(engine: str, outtype: str | None = None) -> EngineChoice:
    """Choose what a conversion for an engine is like: the least width of experts, and llama.cpp's type of weights.

    Args:
        engine: one of `ENGINES`.
        outtype: the type of weights that a user asks for; llama.cpp only.

    Raises:
        InputError: no such engine, or a type that it does not have.
    """
    check_engine(engine)
    if outtype is not None and engine != LLAMA_CPP:
        raise InputError(f"--outtype {outtype} is a type of llama.cpp's; drop it, or give --for {LLAMA_CPP}")
    chosen = best_type() if engine == LLAMA_CPP and outtype is None else None
    kind = chosen.name if chosen else outtype
    multiple = block_size(kind) if kind else 1
    rows = measured_as(engine, kind or "")
    if not rows:
        reason = f"widths of {engine} were not compared by us: the shape is the one for no engine in particular"
        return EngineChoice(engine=engine, outtype=kind, least_width=None, multiple=multiple, reason=reason)
    width = finest(rows)
    shares = f"decode at {width.decode:.0%} of what bytes allow"
    shares += f", prefill at {width.prefill:.0%} of what FLOPs do" if width.prefill else ""
    reason = (
        f"groups of {width.width} neurons or more, the finest that keep {KEPT_SPEED:.0%} of {engine}'s speed ({shares})"
    )
    if chosen:
        reason += (
            f"; {chosen.name}: {chosen.speed:.2f} x f16's tokens a second at {chosen.perplexity:.3f} x its perplexity"
        )
    return EngineChoice(
        engine=engine, outtype=kind, least_width=width.width, multiple=multiple, reason=reason,
        decode_share=width.decode, prefill_share=width.prefill,
    )  # fmt: skip


def good_for(width: int, engines: list[str]) -> list[str]:
    """List those of the engines that were measured to run experts of a width at `KEPT_SPEED` of their best or more."""
    return [engine for engine in engines if (least := choose_for(engine).least_width) is not None and width >= least]


def loaders(format: Format, whole: PreTrainedConfig) -> list[str]:
    """List the engines that run a model in a format: on their own, or with moesaic's classes (transformers, vLLM)."""
    if format.name != MODEL_TYPE:
        return engines_of(format, whole)
    return ["transformers"] if takes_pictures(whole) else ["transformers", "vllm"]


def format_for(
    engine: str | None, wish: object, config: MoesaicModelConfig, has_bias: bool, whole: PreTrainedConfig
) -> ChosenFormat:
    """Choose the format to write a model in that an engine loads; None: any engine, as `choose_format` does.

    Raises:
        InputError: the engine loads no format that holds the model; the message names what does.
    """
    if engine is None:
        return choose_format(wish, config, has_bias, whole)
    chosen = choose_format(wish, config, has_bias, whole)
    if engine == LLAMA_CPP:
        if reason := llama_cpp_reason(config, has_bias, whole):
            raise InputError(f"--for {engine}: {reason}. {_way_out(chosen.format, whole)}")
        return chosen
    if engine in loaders(chosen.format, whole):
        return chosen
    other = next((f for f in _able(config, has_bias, whole) if engine in loaders(f, whole)), None)
    if other is None or wish != "auto":
        reason = f" ({chosen.reason})" if chosen.reason else ""
        raise InputError(
            f"--for {engine}: it does not load this model as {chosen.format.name}{reason}. "
            + _way_out(chosen.format, whole)
        )
    return ChosenFormat(other, "")


def llama_cpp_reason(config: MoesaicModelConfig, has_bias: bool, whole: PreTrainedConfig) -> str:
    """Say why llama.cpp does not run a model; nothing if it does."""
    if config is not whole:
        return "a model that takes pictures is not written as GGUF; convert the text model in it with --text-only"
    try:
        gguf_format(config, has_bias)
    except InputError as error:
        return str(error).removesuffix(".")
    return ""


def _way_out(format: Format, whole: PreTrainedConfig) -> str:
    found = ", ".join(loaders(format, whole))
    return f"What loads it (as {format.name}): {found}; give --for {found.split(',')[0]}, or leave --for out"


def _able(config: MoesaicModelConfig, has_bias: bool, whole: PreTrainedConfig) -> Iterator[Format]:
    """List the stock formats that hold a model, those that `auto` would try first."""
    for format in all_formats():
        if format.name != MODEL_TYPE and not (
            tower_reason(format, whole) or format.reason(config, has_bias) or format.width_reason(config)
        ):
            yield format
