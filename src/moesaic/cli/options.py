"""What the verbs share: their common options, and how a result is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from .. import given, registry
from ..errors import InputError
from ..files import to_json
from ..report.console import plain_console
from ..report.progress import silent_bars
from ..results import Result

if TYPE_CHECKING:
    from ..serving.loading import Loaded
    from ..store.opening import StoreOptions

THREADS_PER_CORE = 4
PICTURES = (".png", ".svg", ".pdf")
stderr = plain_console()
"""Standard error: everything that people read; standard output has the result alone."""


def expand(value: Path | str | list[str] | None) -> Path | str | list[str] | None:
    """Expand `~` in what a path, a name or a list of them was given as.

    Raises:
        InputError: no such home folder, or a name that is not UTF-8.
    """
    if isinstance(value, Path):
        return given.path(value)
    if isinstance(value, str):
        return given.place(value)
    return value if value is None else [given.place(name) for name in value]


def _model(help: str) -> object:
    return typer.Argument(help=help, metavar="MODEL", callback=expand)


DENSE = "tiny, tiny-vlm, demo, demo-1.5b, gemma-270m"
DenseArgument = Annotated[str, _model(f"a dense model: hub id, folder, .gguf file, or built in: {DENSE}")]
MoEArgument = Annotated[str, _model("a Mixture-of-Experts: hub id, folder, converted or not, or built in: tiny-moe")]
ModelArgument = Annotated[str, _model(f"hub id, folder, .gguf file, or built in: {DENSE}, tiny-moe")]
ConvertedArgument = Annotated[str, _model("a converted model's folder")]
TextFile = Annotated[
    Path | None,
    typer.Option(
        help="raw text; for gptq rows too (.jsonl, .csv, ...) [default: bundled held-out text]", callback=expand
    ),
]
Tasks = Annotated[Path | None, typer.Option(help="choices or questions with answers, .jsonl", callback=expand)]
Recipe = Annotated[
    Path | None, typer.Option(help="YAML of settings, as in moesaic.yaml; options override it", callback=expand)
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="text, .jsonl, .csv, .parquet, datasets name, bundled, answers, self; repeatable [default: by the model]",
        callback=expand,
    ),
]
FORMATS = ", ".join(name.replace("-", "_") for name in registry.names("format"))
Partition = Annotated[
    str | None, typer.Option(help=f"auto or one of: {', '.join(registry.names('partition'))} [default: auto]")
]
Fine = Annotated[
    bool | None,
    typer.Option("--fine", help="about 64 small groups; auto tries them too: better on most models, slow on CPUs"),
]
Router = Annotated[str | None, typer.Option(help=f"one of: {', '.join(registry.names('router'))}")]
Selection = Annotated[
    str | None,
    typer.Option(
        help=f"how many experts run: {', '.join(registry.names('selection'))}; ada-k, layer-k, learned-threshold and "
        "skip are for moesaic adapt [default: the router's, mostly top-k]"
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for", help="the engine that is to run it: llama.cpp, transformers, vllm, sglang or mlx [default: any]"
    ),
]
DenseLayers = Annotated[
    str | None, typer.Option(help="layers that keep their dense FFN: 0,2,5-7, odd (every second one) or even")
]
Recovery = Annotated[
    str | None, typer.Option(help=f"one of: {', '.join(registry.names('recovery'))} [default: mostly closed-form]")
]
Method = Annotated[str | None, typer.Option(help=f"what learns: {', '.join(registry.names('method'))} [default: lora]")]
Objective = Annotated[
    str | None, typer.Option(help="lm (next token), distill (the dense model) or both [default: both]")
]
Balance = Annotated[
    str | None, typer.Option(help="of the experts' load: none, bias or loss [default: the method's, mostly none]")
]
Overwrite = Annotated[bool, typer.Option(help="replace OUT if it exists")]
OutArgument = Annotated[Path, typer.Argument(help="folder to make", metavar="OUT", callback=expand)]
OutOrFileArgument = Annotated[
    Path, typer.Argument(help="folder, or .gguf file for llama.cpp, to make", metavar="OUT", callback=expand)
]
Format = Annotated[
    str | None, typer.Option(help=f"auto (one that engines load, if any) or one of: {FORMATS} [default: auto]")
]
Target = Annotated[str, typer.Option(help=f"auto, gguf (llama.cpp; OUT is a file) or one of: {FORMATS}")]
Outtype = Annotated[
    str | None,
    typer.Option(
        help="of GGUF: f16, q8_0, q4_0, f32, ..., K-quants with llama-quantize on the PATH "
        "[default: f16; with --for llama.cpp what was measured best]"
    ),
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(
        metavar="PYTHON",
        help="a Python that has xllamacpp, which runs llama.cpp [default: this one]",
        callback=expand,
    ),
]
Against = Annotated[
    str | None, typer.Option(help="the dense model [default: what MODEL was converted from]", callback=expand)
]
Plot = Annotated[
    Path | None,
    typer.Option(help="draw the FFN block under the machine's roofline: .png, .svg or .pdf", callback=expand),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object; all else goes to standard error")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16, float32 or float64")]
Experts = Annotated[
    str | None,
    typer.Option(help="how experts run: eager, batched_mm, grouped_mm, moesaic, moesaic_triton [default: moesaic]"),
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="a folder that 'moesaic adapt' made for MODEL: experts vary by token", callback=expand),
]
Select = Annotated[
    str | None,
    typer.Option(
        "--select", help="a rule in its place, such as top-k:k=2, top-p:p=0.6, relative:at_least=2,threshold=0.3"
    ),
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(help="memory for experts, read when used: 512MB, 30% (of them), auto [default: all are loaded]"),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help=f"which expert leaves it: {', '.join(n for n in registry.names('cache') if n != 'belady')} "
        "[default: look-ahead]"
    ),
]
Prefetch = Annotated[bool, typer.Option(help="read the next layer's experts while a layer runs")]
CacheBias = Annotated[
    float, typer.Option(help="prefer experts in memory by this share of a token's range of scores: changes the text")
]
Items = Annotated[int | None, typer.Option(help="at most so many items of each task, or exercises of each file")]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: all cores)")]


def numbers(text: str, option: str, limit: given.Limit) -> list[float]:
    """Read a comma-separated list of numbers.

    Raises:
        InputError: something else, or a number that is not within the limit.
    """
    try:
        return [given.number(option, part.strip(), limit) for part in text.split(",")]
    except InputError:
        pass
    raise InputError(
        f"{option} '{text}' is not a list of numbers from {limit.least:,} to {limit.most:,}, such as 1,8,32"
    )


def whole_numbers(text: str, option: str, limit: given.Limit) -> list[int]:
    """Read a comma-separated list of whole numbers.

    Raises:
        InputError: something else, or a number that is not within the limit.
    """
    return [int(number) for number in numbers(text, option, limit)]


def check_plot(path: Path | None) -> None:
    """Check that a picture can be drawn at that path.

    Raises:
        InputError: no picture's ending, or no such folder.
    """
    if path:
        from ..report.plots import check_matplotlib

        check_matplotlib()
        check_file("--plot", path, PICTURES)


def check_file(option: str, path: Path, endings: Sequence[str]) -> None:
    """Check that a file of one of the endings can be written at a path.

    Raises:
        InputError: another ending, no such folder, or something else than a file is there.
    """
    if path.suffix not in endings:
        raise InputError(f"{option} {path} must end in {' or '.join(endings)}")
    given.file_to_write(option, path)


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves it to torch.

    Raises:
        InputError: none, or so many more than there are cores that the system may refuse them.
    """
    if threads is None:
        return
    import torch

    from ..machine import cores

    torch.set_num_threads(int(given.number("threads", threads, given.Limit(1, THREADS_PER_CORE * cores()))))


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show what goes on while it takes, with the names in it as they are, and no bars of libraries."""
    spinner = "dots" if stderr.encoding.startswith("utf") else "line"
    with silent_bars(), stderr.status(Text(text), spinner=spinner):
        yield


def load_model(
    model: str, device: str, dtype: str, threads: int | None, experts: str | None = None,
    adapter: Path | None = None, select: str | None = None, store: StoreOptions | None = None,
) -> Loaded:  # fmt: skip
    """Load a model as the options ask for.

    Raises:
        InputError: no such model, device, dtype, experts implementation, adapter or selection.
    """
    from ..checkpoint.sources import resolve
    from ..models.devices import check_dtype, choose_device, choose_dtype
    from ..serving.loading import check_experts, check_store, load, read_rule

    set_threads(threads)
    check_dtype(dtype)
    where = choose_device(device)
    check_experts(experts, where)
    rule = read_rule(adapter, select)
    if store is not None:
        check_store(store, experts, rule)
    with silent_bars():
        folder = resolve(model, stderr)  # may take long, so after the checks
    wanted = None if dtype == "auto" else choose_dtype(dtype, folder)
    with status(f"loading {model}"):
        return load(
            folder, dtype=wanted, device=where, experts=experts, adapter=adapter,
            select=select, store=store,
        )  # fmt: skip


def store_options(
    expert_memory: str | None, cache: str | None, prefetch: bool, cache_bias: float
) -> StoreOptions | None:
    """Gather how experts are to be kept; None: all are loaded.

    Raises:
        InputError: something that has no use without --expert-memory.
    """
    from ..store.opening import StoreOptions

    if expert_memory is None:
        said = {
            f"--cache {cache}": cache is not None,
            "--no-prefetch": not prefetch,
            f"--cache-bias {cache_bias}": cache_bias,
        }
        for option in (option for option, value in said.items() if value):
            raise InputError(f"{option} has no use without --expert-memory; give that too, such as 30%")
        return None
    return StoreOptions(expert_memory, cache or "look-ahead", prefetch, cache_bias)


def print_result(result: Result, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result: one JSON object on standard output, or what `show` prints on standard error."""
    if as_json:
        print(to_json(result.to_dict()))
    else:
        show()
