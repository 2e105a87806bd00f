"""`moesaic generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import InputError
from ..results import Result
from . import options
from .options import print_result, stderr


@dataclass(frozen=True, kw_only=True)
class Completion(Result):
    """A prompt and its continuation."""

    prompt: str
    completion: str


def generate(
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    chat: Annotated[bool, typer.Option(help="use the model's chat template")] = False,
    seed: Annotated[int, typer.Option(help="seed of sampling")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with a dense or converted model."""
    from ..serving.generate import complete

    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise InputError("the prompt is empty; give some text")
    loaded, tokenizer = options.load_model(model, device, dtype, threads, experts)
    with stderr.status("generating"):
        text = complete(
            loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, chat=chat, seed=seed
        )
    print_result(Completion(prompt=prompt, completion=text), as_json, lambda: print(text if chat else prompt + text))
