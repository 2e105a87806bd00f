"""What the verbs share: their common options, and how a result is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from .. import registry
from ..errors import InputError
from ..results import Result

if TYPE_CHECKING:
    from ..formats.loading import Loaded

PICTURES = (".png", ".svg", ".pdf")
Number = TypeVar("Number", int, float)
stderr = Console(stderr=True)
"""Standard error: everything that people read; standard output has the result alone."""

ModelArgument = Annotated[
    str,
    typer.Argument(help="hub id, folder, .gguf file, or built in: tiny, demo, demo-1.5b, gemma-270m", metavar="MODEL"),
]
FORMATS = ", ".join(name.replace("-", "_") for name in registry.names("format"))
Partition = Annotated[
    str | None, typer.Option(help=f"auto or one of: {', '.join(registry.names('partition'))} [default: auto]")
]
Fine = Annotated[
    bool | None,
    typer.Option("--fine", help="about 64 small groups; auto tries them too: better on some models, slow on CPUs"),
]
Router = Annotated[str | None, typer.Option(help=f"one of: {', '.join(registry.names('router'))}")]
Selection = Annotated[
    str | None,
    typer.Option(
        help=f"how many experts run: {', '.join(registry.names('selection'))} [default: the router's, mostly top-k]"
    ),
]
Recovery = Annotated[
    str | None, typer.Option(help=f"one of: {', '.join(registry.names('recovery'))} [default: closed-form]")
]
Method = Annotated[str | None, typer.Option(help=f"what learns: {', '.join(registry.names('method'))} [default: lora]")]
Objective = Annotated[
    str | None, typer.Option(help="lm (next token), distill (the dense model) or both [default: both]")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help=".txt, .jsonl (text, or prompt and response) or datasets name; repeat for more [default: bundled]"
    ),
]
Balance = Annotated[str | None, typer.Option(help="of the experts' load: none, bias or loss [default: none]")]
Overwrite = Annotated[bool, typer.Option(help="replace OUT if it exists")]
OutArgument = Annotated[Path, typer.Argument(help="folder to make", metavar="OUT")]
Format = Annotated[
    str | None, typer.Option(help=f"auto (one that engines load, if any) or one of: {FORMATS} [default: auto]")
]
Target = Annotated[str, typer.Option(help=f"auto, gguf (llama.cpp; OUT is a file) or one of: {FORMATS}")]
Outtype = Annotated[
    str | None,
    typer.Option(help="of GGUF: f32, f16 [default], bf16, q8_0, q4_0, ...; K-quants with llama-quantize on the PATH"),
]
Against = Annotated[str | None, typer.Option(help="the dense model [default: what MODEL was converted from]")]
Plot = Annotated[Path | None, typer.Option(help="draw the FFN block under the machine's roofline: .png, .svg or .pdf")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object; all else goes to standard error")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32")]
ScoringDtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's, or float32 where a CPU is faster in it), bfloat16, float16, float32"),
]
Experts = Annotated[
    str | None,
    typer.Option(help="how experts run: eager, batched_mm, grouped_mm, moesaic, moesaic_triton [default: moesaic]"),
]
Items = Annotated[int | None, typer.Option(help="of each task, at most so many items", min=1)]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: all cores)", min=1)]


def numbers(text: str, option: str, kind: type[Number] = int, least: float = 1, most: float = math.inf) -> list[Number]:
    """Read a comma-separated list of numbers.

    Raises:
        InputError: something else, or a number below `least` or above `most`.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least or max(found) > most:
        limits = f"from {least} up" if math.isinf(most) else f"from {least} to {most}"
        raise InputError(f"{option} '{text}' is not a list of numbers {limits}, such as 1,8,32")
    return found


def check_plot(path: Path | None) -> None:
    """Check that a picture can be drawn at that path.

    Raises:
        InputError: no picture's ending, or no such folder.
    """
    if path:
        from ..report.plots import check_matplotlib

        check_matplotlib()
    if path and (path.suffix not in PICTURES or not path.absolute().parent.is_dir()):
        raise InputError(f"--plot {path} is no file ending in {', '.join(PICTURES)} in a folder that exists")


def load_model(
    model: str, device: str, dtype: str, threads: int | None, experts: str | None = None, for_scoring: bool = False
) -> Loaded:
    """Load a model as the options ask for.

    Raises:
        InputError: no such model, device, dtype or experts implementation.
    """
    import torch

    from ..checkpoint.sources import resolve
    from ..formats.loading import check_experts, load
    from ..models.devices import choose_device, choose_dtype

    if threads:
        torch.set_num_threads(threads)
    check_experts(experts)
    where = choose_device(device)
    folder = resolve(model, stderr)  # may take long, so after the checks
    wanted = None if dtype == "auto" else choose_dtype(dtype, folder)
    with stderr.status(f"loading {model}"):
        return load(folder, dtype=wanted, device=where, experts=experts, for_scoring=for_scoring)


def print_result(result: Result, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result: one JSON object on standard output, or what `show` prints on standard error."""
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        show()
