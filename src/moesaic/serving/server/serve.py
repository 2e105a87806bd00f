"""`moesaic.serve`: any model behind OpenAI's interface."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import compat
from ...errors import InputError
from ...results import ServeResult
from .settings import ServeConfig

if TYPE_CHECKING:
    from .lifecycle import Background

PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")


def check_packages() -> None:
    """Check that what serving needs is installed.

    Raises:
        InputError: something is missing; the message has the command that installs it.
    """
    compat.require("moesaic serve", "serve", *PACKAGES)


def listen(config: ServeConfig) -> socket.socket:
    """Take the address, so that no other process can; who calls waits until the server runs.

    Raises:
        InputError: no such host, or a port that is taken or not allowed.
    """
    where = f"--host {config.host} --port {config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host '{config.host}' is no address of a network; give 127.0.0.1, or 0.0.0.0") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # two processes can bind one address, and one alone listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"{where}: no address of this machine; give --host 127.0.0.1, or 0.0.0.0") from error
        why = "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
        raise InputError(f"{where}: {why}; give another --port, or 0 for any that is free") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Write the address that clients use."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """A model that is ready to be served: `run` until a signal comes, or `with server:` on a thread of its own."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ServeConfig, listener: socket.socket
    ) -> None:
        from .app import make_app

        self.config, self._listener = config, listener
        self.name = config.name or Path(model.name_or_path or "").name or str(model.config.model_type)
        self.url = url_of(listener)
        """Where it listens; OpenAI's `base_url` is this and `/v1`."""
        self.app = make_app(model, tokenizer, self.name, config)
        self._background: Background | None = None

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it."""
        address = self._listener.getsockname()[0].partition("%")[0]
        return not ipaddress.ip_address(address).is_loopback

    def facts(self) -> ServeResult:
        """Tell where it is and what it holds."""
        batching = self.app.batcher.manager.continuous_batching_config
        return ServeResult(
            url=self.url, model=self.name, pid=os.getpid(), scheduler=self.config.scheduler, context=self.app.context,
            cache_tokens=(batching.num_blocks or 0) * batching.page_size,
            max_batch_tokens=batching.max_batch_tokens or 0,
        )  # fmt: skip

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Answer requests until SIGTERM or Ctrl-C; those that run then finish, within `grace` seconds.

        The signal then has the effect that it has without a server, e.g. `KeyboardInterrupt`.

        Args:
            ready: called once clients can connect.
        """
        from .lifecycle import WebServer

        try:
            WebServer(self.app, self.config, ready).run([self._listener])
        finally:
            self.close()

    def close(self) -> None:
        """Free the address and the thread."""
        self.app.batcher.stop()
        self._listener.close()

    def __enter__(self) -> Self:
        from .lifecycle import Background, WebServer

        self._background = Background(WebServer(self.app, self.config, lambda: None), self._listener)
        return self

    def __exit__(self, *_: object) -> None:
        if self._background:
            self._background.stop()
        self.close()


def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ServeConfig | None = None) -> Server:
    """Serve a model, dense or a Mixture-of-Experts, as OpenAI's completions and chats.

    Args:
        model: as `load` gives it.
        tokenizer: the model's.
        config: address, limits and scheduler.

    Returns:
        A server that has its address; `.run()` answers until a signal, `with server:` meanwhile, at `server.url`.

    Raises:
        InputError: a package is missing, the address is taken, or the model cannot be batched.
    """
    check_packages()
    config = config or ServeConfig()
    listener = listen(config)
    try:
        return Server(model, tokenizer, config, listener)
    except BaseException:
        listener.close()
        raise
