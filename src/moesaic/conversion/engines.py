"""What a conversion is like that one engine is to run."""

from __future__ import annotations

from pathlib import Path

from ..config import ConvertConfig
from ..errors import InputError
from ..formats.engines import LLAMA_CPP, choose_for
from ..plan import Plan, disjoint_plan, engine_plan
from ..results import EngineChoice

GGUF = ".gguf"
"""How OUT ends where it is one file."""


def for_output(config: ConvertConfig, output: Path) -> ConvertConfig:
    """Read off OUT's name that it is llama.cpp that is to run the model, where it is that of a GGUF.

    Raises:
        InputError: it is another engine.
    """
    if output.suffix.lower() != GGUF:
        return config
    if config.engine not in (None, LLAMA_CPP):
        raise InputError(f"'{output}' is a file of llama.cpp's, and --for {config.engine} loads folders; drop {GGUF}")
    return config.model_copy(update={"engine": LLAMA_CPP})


def check_engine_wishes(engine: str | None, outtype: str | None) -> EngineChoice | None:
    """Choose what a conversion for an engine is like; None for no engine in particular.

    Raises:
        InputError: no such engine, or a type that it does not have.
    """
    if engine is not None:
        return choose_for(engine, outtype)
    if outtype is not None:
        raise InputError(f"--outtype {outtype} is a type of GGUF; add --for {LLAMA_CPP}, or call OUT something.gguf")
    return None


def plan_for(taken: EngineChoice, active: float, size: int) -> Plan:
    """Choose the disjoint plan for an engine; for one that was not measured that of no engine in particular."""
    if taken.least_width is None:
        return disjoint_plan(active, size)
    return engine_plan(active, size, taken.least_width, taken.multiple)
