"""A web server's life: it starts, answers, and stops so that running requests finish."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from .app import App
from .settings import ServeConfig


class WebServer(uvicorn.Server):
    """uvicorn's server for an app.

    Told to stop, it turns new requests away with 503 until the running ones have finished or their time is over;
    uvicorn alone would close its door at once. A second signal ends them.
    """

    def __init__(self, app: App, config: ServeConfig, ready: Callable[[], None]) -> None:
        options = uvicorn.Config(app.guard, log_config=None, access_log=False, server_header=False, lifespan="on")
        options.timeout_graceful_shutdown = 1
        super().__init__(options)
        self._app, self._grace, self._ready = app, config.grace, ready
        self._end: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.batcher.start()
        await super().startup(sockets)
        self._ready()

    def drain(self) -> None:
        """Turn new requests away, and stop when the running ones have finished."""
        self._app.guard.stopping = True
        self._end = self._end or time.monotonic() + self._grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._captured_signals.append(sig)
        if self._end is None:
            self.drain()
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        over = self._end is not None and (not self._app.guard.busy or time.monotonic() > self._end)
        if ends := await super().on_tick(counter) or over:
            self._app.batcher.give_up()  # whose requests are told so within the second that uvicorn leaves them
        return ends


class Background:
    """A web server on a thread of its own."""

    def __init__(self, server: WebServer, listener: socket.socket) -> None:
        self.server = server
        self._thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="moesaic serve")
        self._thread.start()
        while not server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Let running requests finish, and stop."""
        self.server.drain()
        self._thread.join()
