"""What a conversion did to text and to pictures apart, and the speed of questions about pictures, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console

from ..results import ConversionResult, LayerRecord, PictureSpeed
from .grid import grid, say

NAMES = {"text": "text", "image": "pictures"}
"""Of modalities, as people read them."""


def name_of(modality: str) -> str:
    """Name a modality as people read it."""
    return NAMES.get(modality, modality)


def modalities_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """List the modalities of a conversion, which layers that stay dense do not name."""
    return list(next((row for row in rows if row), {}))


def mean_errors(layers: Sequence[LayerRecord]) -> dict[str, float]:
    """Average the error after recovery over layers, by modality; empty where there is one modality only."""
    found = [record.error_by_modality for record in layers if record.error_by_modality]
    return {name: sum(row[name] for row in found) / len(found) for name in (found[0] if found else ())}


def answer_rows(m: ConversionResult) -> list[list[str]]:
    """Make the rows (what, dense, converted) on answers to questions about pictures; none of a language model."""
    if m.pictures is None:
        return []
    p = m.pictures
    rows = [["perplexity (answers on pictures)", f"{p.perplexity_dense:.2f}", f"{p.perplexity:.2f}"]]
    return rows if p.agreement is None else [*rows, ["the same first token in answers", "", f"{p.agreement:.1%}"]]


def say_errors(console: Console, m: ConversionResult) -> None:
    """Say what the layers' errors are on text and on pictures, and whether pictures were calibrated on."""
    errors = [f"{error:.3f} on {name_of(modality)}" for modality, error in mean_errors(m.layers).items()]
    if errors:
        say(console, f"error of an FFN, mean over layers: {', '.join(errors)}")
    if m.pictures and not m.pictures.calibrated:
        say(console, "calibrated on text alone; --calibration takes rows with pictures", "yellow")


def show_modalities(console: Console, layers: Sequence[LayerRecord]) -> None:
    """Print errors and loads of each layer by modality; nothing where there is one modality only."""
    first = next((record.error_by_modality for record in layers if record.error_by_modality), None)
    if first is None:
        return
    names = list(first)
    table = grid(
        "By modality", "layer", *(f"error, {name_of(name)}" for name in names),
        *(f"load, {name_of(name)}" for name in names),
    )  # fmt: skip
    for record in layers:
        errors, loads = record.error_by_modality or {}, record.expert_tokens_by_modality or {}
        cells = [f"{errors[name]:.3f}" if name in errors else "-" for name in names]
        table.add_row(str(record.layer), *cells, *(load_range(loads.get(name, [])) for name in names))
    console.print(table)


def load_range(tokens: Sequence[int]) -> str:
    """Write the load of the least and the most used expert, 1 is an even share; `-` where nothing was routed."""
    even = sum(tokens) / len(tokens) if tokens else 0
    return f"{min(tokens) / even:.2f}-{max(tokens) / even:.2f}" if even else "-"


def even_shares(tokens: Sequence[float]) -> list[float]:
    """Divide the loads of a layer's experts by an even share; zeros where nothing was routed."""
    return [n * len(tokens) / (sum(tokens) or 1) for n in tokens]


def show_picture_speed(console: Console, p: PictureSpeed) -> None:
    """Print the times of a question about pictures."""
    table = grid(
        f"A question about pictures: {p.image_tokens:,} visual tokens, {p.text_tokens:,} of text",
        "", "MoE", "dense", "speed-up",
    )  # fmt: skip
    table.add_row("encode the pictures", f"{p.encode_ms:.1f} ms", f"{p.dense_encode_ms:.1f} ms", "-")
    table.add_row("prefill", f"{p.prefill_ms:.1f} ms", f"{p.dense_prefill_ms:.1f} ms", f"{p.prefill_speedup:.2f}x")
    speeds = (f"{speed:.1f} tok/s" for speed in (p.decode_tokens_per_s, p.dense_decode_tokens_per_s))
    table.add_row("decode after it", *speeds, f"{p.decode_speedup:.2f}x")
    console.print(table)
