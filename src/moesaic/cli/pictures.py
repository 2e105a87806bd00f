"""The pictures that verbs take, read before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from ..models.processor import Processor

Images = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="a picture that PROMPT asks about; repeat for more; for vision-language models",
        callback=options.expand,
    ),
]  # fmt: skip

Timed = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="a picture: time a question about it too; repeat for more; for vision-language models",
        callback=options.expand,
    ),
]  # fmt: skip


def read_pictures(model: str, files: list[str] | None, prompt: str = "?") -> tuple[Processor | None, list[Image]]:
    """Read pictures and the model's processor, and check that the model takes them; nothing of nothing.

    Raises:
        InputError: a picture that cannot be read, more of them than the model has places for, or a model of text.
    """
    if not files:
        return None, []
    from ..serving.questions import load_processor, opened, question

    pictures = opened(files)
    with options.silent_bars():
        processor = load_processor(model)
    question(processor, prompt, pictures)
    return processor, pictures


def task_processor(model: str, tasks: Path | None) -> Processor | None:
    """Load the model's processor if a task file has pictures.

    Raises:
        InputError: a bad task file, a model of text, or no processor.
    """
    from ..evaluation.evaluate import task_processor as load

    with options.silent_bars():
        return load(model, tasks)
