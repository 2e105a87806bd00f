"""`moesaic inspect`: what a converted model says of itself, and how many experts any Mixture-of-Experts runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..report import experts, passage, tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr

if TYPE_CHECKING:
    from ..formats.loading import Loaded

PAGE = ".html"
Model = Annotated[
    str,
    typer.Argument(
        help="a converted model's folder; with --adaptive or --oracle any Mixture-of-Experts",
        metavar="MODEL",
        callback=options.expand,
    ),
]
Adaptive = Annotated[bool, typer.Option("--adaptive", help="count the experts that each token runs")]
Oracle = Annotated[bool, typer.Option("--oracle", help="try every number of experts for each token; small models")]
Text = Annotated[
    Path | None,
    typer.Option(
        help="a file of text or rows (.jsonl, .csv, ...) [default: bundled held-out text]", callback=options.expand
    ),
]
Tokens = Annotated[
    int | None, typer.Option(help="to look at [default: 4096, with --oracle 1024, or all of a shorter --text]")
]
Window = Annotated[int | None, typer.Option(help="tokens in a window [default: 256, with --oracle 128]")]
AtMost = Annotated[
    int | None, typer.Option(help="the most experts that --oracle tries [default: the model's own number]")
]
ByLayer = Annotated[
    bool | None, typer.Option("--by-layer", help="let --oracle go on with a number for each layer; takes longer")
]
HeatMap = Annotated[
    Path | None,
    typer.Option(help="heat map of a passage, tokens by layers: .png, .svg or .pdf", callback=options.expand),
]
Page = Annotated[
    Path | None, typer.Option(help="the passage coloured by experts, and all means: .html", callback=options.expand)
]


def inspect(
    model: Model,
    adaptive: Adaptive = False,
    oracle: Oracle = False,
    adapter: options.Adapter = None,
    select: options.Select = None,
    text: Text = None,
    tokens: Tokens = None,
    window: Window = None,
    at_most: AtMost = None,
    by_layer: ByLayer = None,
    plot: HeatMap = None,
    html: Page = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="in which the model runs [default: as evaluate's]")] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Show a converted model's plan and layers, or how many experts run for which tokens and how many would be best."""
    given = {
        "--adapter": adapter, "--select": select, "--text": text, "--tokens": tokens, "--window": window,
        "--at-most": at_most, "--by-layer": by_layer, "--plot": plot, "--html": html, "--device": device,
        "--dtype": dtype, "--threads": threads,
    }  # fmt: skip
    check_options({name for name, value in given.items() if value is not None}, adaptive, oracle)
    options.check_plot(plot)
    check_page(html)
    rule = select if adapter is None else f"the adapter {adapter}"
    if not adaptive and not oracle:
        from ..evaluation.inspect import inspect as run

        inspection = run(model)
        print_result(inspection, as_json, lambda: tables.show_inspection(stderr, inspection))
        return
    from ..evaluation.experts import inspect_experts, read_text
    from ..evaluation.oracle import inspect_oracle

    if window is None:
        window = 128 if oracle else 256
    read_text(text, tokens, window)
    loaded, tokenizer = load(model, device, dtype, threads, adapter, select)
    if oracle:
        with progress(stderr, "trying", "run") as tick:
            best = inspect_oracle(
                loaded, tokenizer, text=text, tokens=tokens, window=window, at_most=at_most, by_layer=bool(by_layer),
                progress=tick,
            )  # fmt: skip
        best = replace(best, model=model, rule=rule)
        print_result(best, as_json, lambda: experts.show_oracle(stderr, best))
        return
    with progress(stderr, "counting", "window") as tick:
        found = inspect_experts(loaded, tokenizer, text=text, tokens=tokens, window=window, progress=tick)
    found = replace(found, model=model, rule=rule)
    if plot:
        passage.write_heat_map(found.passage, plot, experts.experts_title(found))
    if html:
        passage.write_experts_page(found, html)
    print_result(found, as_json, lambda: experts.show_experts(stderr, found))


def check_options(given: set[str], adaptive: bool, oracle: bool) -> None:
    """Check that options go together.

    Raises:
        InputError: both views, or options of a view that was not asked for.
    """
    if adaptive and oracle:
        raise InputError("--adaptive and --oracle are two views with a result each; give one of them")
    if adaptive:
        others, way = {"--at-most", "--by-layer"}, "is for --oracle; leave it out"
    elif oracle:
        others, way = {"--plot", "--html"}, "is for --adaptive; leave it out"
    else:
        others, way = given, "is for --adaptive or --oracle; give one of them too, or leave it out"
    for name in sorted(given & others):
        raise InputError(f"{name} {way}")


def check_page(path: Path | None) -> None:
    """Check that a page can be written at that path.

    Raises:
        InputError: another ending, or no such folder.
    """
    if path and (path.suffix != PAGE or path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"--html {path} is no file ending in {PAGE} in a folder that exists")


def load(
    model: str, device: str | None, dtype: str | None, threads: int | None, adapter: Path | None, select: str | None
) -> Loaded:
    """Load a Mixture-of-Experts; a dense model is refused before its weights are read.

    Raises:
        InputError: a dense model, or as `options.load_model`.
    """
    from ..checkpoint.sources import resolve
    from ..evaluation.experts import check_mixture
    from ..formats.loading import read_rule

    read_rule(adapter, select)
    with options.silent_bars():
        folder = resolve(model, stderr)
    check_mixture(folder)
    device, dtype = ("auto" if given is None else given for given in (device, dtype))
    return options.load_model(model, device, dtype, threads, for_scoring=True, adapter=adapter, select=select)
