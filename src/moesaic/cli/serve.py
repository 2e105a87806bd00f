"""`moesaic serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..serving.schedulers import SCHEDULERS
from ..serving.server.settings import ServeConfig
from . import options
from .options import print_result, stderr

if TYPE_CHECKING:
    from ..serving.server.serve import Server
    from ..store.opening import StoreOptions

KEY = "MOESAIC_API_KEY"
Key = Annotated[str | None, typer.Option(envvar=KEY, help="clients must send it [default: none]")]
Grace = Annotated[float, typer.Option(help="seconds that running requests have when it is told to stop")]
BatchTokens = Annotated[int | None, typer.Option(help="tokens of a batch [default: 512, on a GPU 2,048]")]
CacheTokens = Annotated[
    int | None,
    typer.Option(help="tokens that the key-value cache holds [default: 16,384, on a GPU what memory allows]"),
]
RequestBytes = Annotated[int, typer.Option(help="of one request's body; a larger one gets 413")]


def serve(
    model: options.ModelArgument,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 is every one")] = ServeConfig.host,
    port: Annotated[int, typer.Option(help="0 takes any that is free")] = ServeConfig.port,
    name: Annotated[
        str | None, typer.Option(help="what clients call the model [default: MODEL, a folder by its last part]")
    ] = None,
    api_key: Key = None,
    max_queue: Annotated[int, typer.Option(help="requests that run or wait; more get 429")] = ServeConfig.max_queue,
    scheduler: Annotated[str, typer.Option(help=f"one of: {', '.join(SCHEDULERS)}")] = ServeConfig.scheduler,
    max_request_bytes: RequestBytes = ServeConfig.max_request_bytes,
    timeout: Annotated[float, typer.Option(help="seconds of one request")] = ServeConfig.timeout,
    grace: Grace = ServeConfig.grace,
    max_batch_tokens: BatchTokens = None,
    cache_tokens: CacheTokens = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="load and check all, and stop")] = False,
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
    """Serve a model to OpenAI's clients until Ctrl-C."""
    from ..serving.server.serve import Server, check_packages, listen

    check_packages()
    api_key = os.environ.get(KEY) if api_key is None else api_key  # an empty one, which typer takes for none
    folder = Path(model)
    called = (folder.name or folder.resolve().name) if folder.exists() else model  # `.` has a name too
    store = options.store_options(expert_memory, cache, prefetch, cache_bias)
    config = ServeConfig(
        host=host, port=port, api_key=api_key, name=name or called, max_queue=max_queue, scheduler=scheduler,
        max_request_bytes=max_request_bytes, timeout=timeout, grace=grace, max_batch_tokens=max_batch_tokens,
        cache_tokens=cache_tokens,
    )  # fmt: skip
    with listen(config) as listener:
        loaded, tokenizer = options.load_model(
            model, device, dtype, threads, experts, adapter=adapter, select=select, store=store
        )
        warn_of_changed_routing(store)
        server = Server(loaded, tokenizer, config, listener)
        if dry_run:
            print_result(server.facts(), as_json, lambda: None)
            warn_of_other_machines(server)
            stderr.print(f"{server.name} can be served at {server.url}/v1; nothing was started", markup=False)
            server.close()
        else:
            server.run(lambda: introduce(server, as_json))


def introduce(server: Server, as_json: bool) -> None:
    """Say where a server is, and how to try it; the key is not shown."""
    print_result(server.facts(), as_json, lambda: None)
    sys.stdout.flush()  # who reads the object does not wait for the end
    key = server.config.api_key
    warn_of_other_machines(server)
    header = "" if key is None else " -H 'Authorization: Bearer KEY'"
    stderr.print(
        f"{server.name} at {server.url}/v1; Ctrl-C stops it. Try:\n"
        f"curl {server.url}/v1/completions -H 'Content-Type: application/json'{header} "
        """-d '{"prompt": "The first", "max_tokens": 16}'""",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def warn_of_changed_routing(store: StoreOptions | None) -> None:
    """Say so where answers are not quite those of the checkpoint."""
    if store is not None and store.cache_bias:
        stderr.print(f"note: --cache-bias {store.cache_bias:g} changes which experts run, and so the answers")


def warn_of_other_machines(server: Server) -> None:
    """Say so where anyone on the network can use a server."""
    if server.is_open and server.config.api_key is None:
        stderr.print("warning: other machines can use this server; give --api-key, or leave out --host")
