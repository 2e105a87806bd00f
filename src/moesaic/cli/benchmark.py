"""`moesaic benchmark`: speed against the dense model."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import given
from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def benchmark(
    model: options.ModelArgument,
    against: options.Against = None,
    prompt: Annotated[int, typer.Option(help="prompt tokens")] = 512,
    new: Annotated[int, typer.Option(help="new tokens")] = 32,
    batch: Annotated[str, typer.Option(help="sequences decoded at once, comma-separated")] = "1",
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 5,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    adapter: options.Adapter = None,
    select: options.Select = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Measure speed against the dense model, or with --adapter or --select against the model without it."""
    from ..evaluation.benchmark import benchmark as run
    from ..evaluation.inspect import prompt_tokens
    from ..formats.converted import dense_origin
    from ..serving.generate import check_length

    options.check_plot(plot)
    sizes = options.whole_numbers(batch, "--batch", given.LIMITS["batch"])
    given.check(prompt=prompt, new=new, rounds=rounds)
    adapted = adapter is not None or select is not None
    against = against or (model if adapted else dense_origin(model))
    loaded, tokenizer = options.load_model(model, device, dtype, threads, experts, adapter=adapter, select=select)
    check_length(loaded, prompt, new, "--new")
    tokens_BL = prompt_tokens(tokenizer, prompt, max(sizes))
    dense, _ = options.load_model(against, device, str(loaded.dtype).removeprefix("torch."), threads)
    with progress(stderr, "measuring", "measurement") as tick:
        result = run(loaded, dense, tokens_BL, new=new, batches=sizes, rounds=rounds, progress=tick)
    if plot:
        from ..report.plots import write_roofline  # matplotlib is slow to import

        write_roofline(result.to_dict(), plot)
    print_result(result, as_json, lambda: tables.show_benchmark(stderr, result))
