"""`moesaic generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import InputError
from ..report.store import show_store
from ..results import Result
from . import options, pictures
from .options import print_result, stderr


@dataclass(frozen=True, kw_only=True)
class Completion(Result):
    """A prompt and its continuation."""

    prompt: str
    completion: str
    expert_store: dict[str, float] | None = None
    """What the expert store did, if there is one."""


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
    image: pictures.Images = None,
    chat: Annotated[bool, typer.Option(help="use the model's chat template; always with --image")] = False,
    seed: Annotated[int, typer.Option(help="seed of sampling")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    adapter: options.Adapter = None,
    select: options.Select = None,
    expert_memory: options.ExpertMemory = None,
    cache: options.Cache = None,
    prefetch: options.Prefetch = True,
    cache_bias: options.CacheBias = 0.0,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with a dense or converted model, or answer a question about pictures."""
    from ..serving.generate import check_request, complete
    from ..store.opening import report_of

    prompt = read_stdin() if prompt == "-" else prompt
    store = options.store_options(expert_memory, cache, prefetch, cache_bias)
    check_request(prompt, max_new_tokens, temperature, seed)
    processor, shown = pictures.read_pictures(model, image, prompt)
    loaded, tokenizer = options.load_model(
        model, device, dtype, threads, experts, adapter=adapter, select=select, store=store
    )
    with options.status("generating"):
        text = complete(
            loaded, processor or tokenizer, prompt, images=shown, max_new_tokens=max_new_tokens,
            temperature=temperature, chat=chat, seed=seed,
        )  # fmt: skip
    store_report = report_of(loaded)
    result = Completion(prompt=prompt, completion=text, expert_store=store_report)

    def show() -> None:
        print(text if chat or shown else prompt + text)
        if store_report:
            show_store(stderr, store_report)

    print_result(result, as_json, show)
