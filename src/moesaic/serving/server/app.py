"""transformers' serving app around one model, with metrics and errors of OpenAI's form."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.server import build_server

from ...models.families import context_length
from . import errors
from .batching import Batcher
from .errors import ApiError
from .handlers import Chats, Completions
from .metrics import Metrics
from .middleware import Guard
from .model import OneBatcher, OneModel, batching_config
from .settings import ServeConfig

CLOSED = ("response_handler", "transcription_handler", "systemone_handler")
"""Handlers of routes that are closed; older versions of transformers do not have all."""


@dataclass(frozen=True)
class App:
    """All that answers requests."""

    guard: Guard
    """What a web server calls."""
    batcher: Batcher
    metrics: Metrics
    context: int
    """Tokens that a prompt and its answer may have together."""


def make_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, config: ServeConfig) -> App:
    """Make the app of a model; its thread is not started.

    Raises:
        InputError: transformers' continuous batching cannot run the model, or its cache does not fit.
    """
    metrics, batching = Metrics(), batching_config(model.device, config)
    batcher = Batcher(model, batching, config.max_queue, metrics)
    metrics.watch(batcher)
    context = min(context_length(model.config), batcher.cache_tokens)
    one, state = OneModel(model, tokenizer, name, batcher), OneBatcher(batcher, batching)
    wanted = inspect.signature(build_server).parameters
    make: Callable[..., FastAPI] = build_server  # its types name handlers that are not in our place
    app = make(
        one, chat_handler=Chats(one, state, context, config.timeout),
        completion_handler=Completions(one, state, context, config.timeout), generation_state=state,
        **{closed: None for closed in CLOSED if closed in wanted},
    )  # fmt: skip
    errors.install(app)
    _add_routes(app, one, metrics)
    guard = Guard(app, batcher, api_key=config.api_key, most_bytes=config.max_request_bytes, timeout=config.timeout)
    return App(guard, batcher, metrics, context)


def _add_routes(app: FastAPI, one: OneModel, metrics: Metrics) -> None:
    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models/{name:path}")
    def show_model(name: str) -> Response:
        if name != one.name:
            raise ApiError(404, f"no model '{name}'; this server has '{one.name}'", code="model_not_found")
        return JSONResponse(one.get_gen_models()[0])
