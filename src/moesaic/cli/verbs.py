"""The application: what every verb has in common, and errors as one line and an exit code.

Exit codes: 0 done, 1 the work failed (self-test, collapse), 2 bad input, 130 Ctrl-C, 143 SIGTERM. With `--json`
standard output holds exactly one JSON object; everything for people goes to standard error.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from ..errors import InputError, WorkError
from ..registry import import_module
from . import (
    adapt,
    benchmark,
    convert,
    demo,
    describe,
    evaluate,
    export,
    finetune,
    frontier,
    generate,
    inspect,
    plan,
    prune,
    quiet,
    serve,
    streams,
)
from .options import stderr

app = typer.Typer(
    help="Make Mixture-of-Experts models cheap to get and cheap to run, on the engines people already use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (
    plan, convert, finetune, adapt, prune, export, generate, serve, evaluate, benchmark, inspect, frontier, describe,
    demo,
):  # fmt: skip
    app.command()(getattr(verb, verb.__name__.rpartition(".")[2]))


def run() -> int:
    """Run the verb; errors become one line and an exit code.

    Raises:
        Stopped: by a signal.
    """
    streams.prepare()
    try:
        try:
            app(standalone_mode=True)
        finally:
            streams.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # who read has gone away, which needs no word
        return 1
    except (InputError, WorkError, OSError) as error:  # OSError: a disk fills up, a file goes away under our hands
        stderr.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        from ..machine import versions

        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def _begin(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print versions and stop")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", help="import a module of your own first, for what a model has of it; repeat for more"),
    ] = None,
) -> None:
    """Keep libraries' progress bars and notices out of our output, and import what is asked for."""
    quiet.libraries()
    for name in modules or ():
        import_module(name)
