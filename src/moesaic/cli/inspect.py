"""`moesaic inspect`: what a converted model says of itself, and how many experts any Mixture-of-Experts runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ..errors import InputError
from ..given import check
from ..report import experts, passage, tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr

if TYPE_CHECKING:
    from ..serving.loading import Loaded

PAGE = ".html"
VIEWS = ("--adaptive", "--oracle", "--trace")
OF_VIEW = {
    "--at-most": ("--oracle",), "--by-layer": ("--oracle",), "--plot": ("--adaptive",), "--html": ("--adaptive",),
    "--requests": ("--trace",), "--prompt": ("--trace",), "--new": ("--trace",),
    "--tokens": ("--adaptive", "--oracle"), "--window": ("--adaptive", "--oracle"),
}  # fmt: skip
"""Options that only some of the views have."""
Model = Annotated[
    str,
    typer.Argument(
        help="a converted model's folder; with --adaptive, --oracle or --trace any Mixture-of-Experts",
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
    int | None,
    typer.Option(help="the most experts that --oracle tries [default: the model's own number, or the rule's if more]"),
]
Trace = Annotated[
    Path | None,
    typer.Option(help="write which experts each token of some requests runs: .csv or .csv.gz", callback=options.expand),
]
Requests = Annotated[int | None, typer.Option(help="of --trace [default: 8]")]
Prompt = Annotated[int | None, typer.Option(help="tokens of each prompt of --trace [default: 64]")]
New = Annotated[int | None, typer.Option(help="tokens decoded after each [default: 64]")]
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


class Said(NamedTuple):
    """What was asked for, as results name it."""

    model: str
    rule: str | None


def inspect(
    model: Model,
    adaptive: Adaptive = False,
    oracle: Oracle = False,
    trace: Trace = None,
    adapter: options.Adapter = None,
    select: options.Select = None,
    text: Text = None,
    tokens: Tokens = None,
    window: Window = None,
    at_most: AtMost = None,
    by_layer: ByLayer = None,
    requests: Requests = None,
    prompt: Prompt = None,
    new: New = None,
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
        "--at-most": at_most, "--by-layer": by_layer, "--requests": requests, "--prompt": prompt, "--new": new,
        "--plot": plot, "--html": html, "--device": device, "--dtype": dtype, "--threads": threads,
    }  # fmt: skip
    view = chosen_view(adaptive=adaptive, oracle=oracle, trace=trace is not None)
    check_options({name for name, value in given.items() if value is not None}, view)
    options.check_plot(plot)
    if html:
        options.check_file("--html", html, (PAGE,))
    if view is None:
        from ..evaluation.inspect import inspect as run

        inspection = run(model)
        print_result(inspection, as_json, lambda: tables.show_inspection(stderr, inspection))
        return
    from ..evaluation.experts import inspected_text
    from ..evaluation.routes import trace_file

    sizes = {"requests": requests or 8, "prompt": prompt or 64, "new": 64 if new is None else new}
    check(requests=requests, prompt=prompt, new=new or None)
    if window is None:
        window = 128 if oracle else 256
    inspected_text(text, tokens, window)
    if trace:
        trace_file(trace)
    loaded = load(model, device, dtype, threads, adapter, select)
    said = Said(model, select if adapter is None else f"the adapter {adapter}")
    if trace:
        write_trace(loaded, said, as_json, trace, text, sizes)
    elif oracle:
        find_best(loaded, said, as_json, text, tokens, window, at_most, bool(by_layer))
    else:
        count(loaded, said, as_json, text, tokens, window, plot, html)


def write_trace(
    loaded: Loaded, said: Said, as_json: bool, file: Path, text: Path | None, sizes: dict[str, int]
) -> None:
    """Write a trace, and print what it holds."""
    from ..evaluation.routes import inspect_routes

    with progress(stderr, "tracing", "step") as tick:
        found = inspect_routes(*loaded, file, text=text, **sizes, name=said.model, progress=tick)
    found = replace(found, model=said.model, rule=said.rule)
    print_result(found, as_json, lambda: experts.show_routes(stderr, found))


def find_best(
    loaded: Loaded, said: Said, as_json: bool, text: Path | None, tokens: int | None,
    window: int, at_most: int | None, by_layer: bool,
) -> None:  # fmt: skip
    """Find the best number of experts for each token, and print it."""
    from ..evaluation.oracle import inspect_oracle

    with progress(stderr, "trying", "run") as tick:
        found = inspect_oracle(
            *loaded, text=text, tokens=tokens, window=window, at_most=at_most, by_layer=by_layer, progress=tick
        )
    found = replace(found, model=said.model, rule=said.rule)
    print_result(found, as_json, lambda: experts.show_oracle(stderr, found))


def count(
    loaded: Loaded, said: Said, as_json: bool, text: Path | None, tokens: int | None,
    window: int, plot: Path | None, html: Path | None,
) -> None:  # fmt: skip
    """Count the experts that each token runs, print and draw them."""
    from ..evaluation.experts import inspect_experts

    with progress(stderr, "counting", "window") as tick:
        found = inspect_experts(*loaded, text=text, tokens=tokens, window=window, progress=tick)
    found = replace(found, model=said.model, rule=said.rule)
    if plot:
        passage.write_heat_map(found.passage, plot, experts.experts_title(found))
    if html:
        passage.write_experts_page(found, html)
    print_result(found, as_json, lambda: experts.show_experts(stderr, found))


def chosen_view(**given: bool) -> str | None:
    """Name the one view that was asked for; None is what the model's folder says.

    Raises:
        InputError: more than one was asked for.
    """
    views = [f"--{name}" for name, wanted in given.items() if wanted]
    if len(views) > 1:
        raise InputError(f"{' and '.join(views)} are {len(views)} views with a result each; give one of them")
    return views[0] if views else None


def check_options(given: set[str], view: str | None) -> None:
    """Check that options belong to a view.

    Raises:
        InputError: options of a view that was not asked for.
    """
    for name in sorted(given):
        views = OF_VIEW.get(name, VIEWS)
        if view not in views:
            one = "one of them too" if len(views) > 1 else "it too"
            raise InputError(
                f"{name} is for {' or '.join(views)}; " + ("leave it out" if view else f"give {one}, or leave it out")
            )


def load(
    model: str, device: str | None, dtype: str | None, threads: int | None, adapter: Path | None, select: str | None
) -> Loaded:
    """Load a Mixture-of-Experts; a dense model is refused before its weights are read.

    Raises:
        InputError: a dense model, or as `options.load_model`.
    """
    from ..checkpoint.sources import resolve
    from ..evaluation.experts import check_mixture
    from ..serving.loading import read_rule

    read_rule(adapter, select)
    with options.silent_bars():
        folder = resolve(model, stderr)
    check_mixture(folder)
    device, dtype = ("auto" if given is None else given for given in (device, dtype))
    return options.load_model(model, device, dtype, threads, adapter=adapter, select=select)
