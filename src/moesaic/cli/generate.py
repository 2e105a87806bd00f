"""`moesaic generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import InputError
from ..results import Result
from . import options
from .options import print_result


@dataclass(frozen=True, kw_only=True)
class Completion(Result):
    """A prompt and its continuation."""

    prompt: str
    completion: str


def read_stdin() -> str:
    """Read a prompt from standard input.

    Raises:
        InputError: there is none, or it is not UTF-8.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed; give the prompt there, or in place of -")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 text ({error}); convert it") from error


def generate(
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    chat: Annotated[bool, typer.Option(help="use the model's chat template")] = False,
    seed: Annotated[int, typer.Option(help="seed of sampling")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    adapter: options.Adapter = None,
    select: options.Select = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with a dense or converted model."""
    from ..serving.generate import check_request, complete

    prompt = read_stdin() if prompt == "-" else prompt
    check_request(prompt, max_new_tokens, temperature, seed)
    loaded, tokenizer = options.load_model(model, device, dtype, threads, experts, adapter=adapter, select=select)
    with options.status("generating"):
        text = complete(
            loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, chat=chat, seed=seed
        )
    print_result(Completion(prompt=prompt, completion=text), as_json, lambda: print(text if chat else prompt + text))
