"""What stands between the network and the app: which routes, who may, how much, and clients that go away."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batching import OWNED, Batcher, Generation
from .errors import ApiError, bad, stopping

ROUTES = {
    "/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET", "/metrics": "GET",
}  # fmt: skip
"""All that is open; transformers' app has more routes, which load models and drop them."""
ONE_MODEL = "/v1/models/"
log = logging.getLogger("moesaic.serve")
MARGIN = 5.0
"""Seconds that a client has to take its answer after the longest time that one may be made in."""
GONE = 499
"""The status of requests whose client went away, as nginx counts them."""


class Guard:
    """Checks each request before the app sees it, in the order of what costs least, and cancels those left alone."""

    def __init__(self, app: ASGIApp, batcher: Batcher, *, api_key: str | None, most_bytes: int, timeout: float) -> None:
        self.app, self.batcher, self.most_bytes, self.timeout = app, batcher, most_bytes, timeout
        self.key = None if api_key is None else api_key.encode()
        self.stopping = False
        """Whether new requests are turned away."""
        self.busy = 0
        """Requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        answer = Answer(send)
        owned: list[Generation] = []
        OWNED.set(owned)
        self.busy += 1
        try:
            await self._answer(scope, receive, answer)
        except (ApiError, asyncio.CancelledError) as error:
            if not (self.stopping or isinstance(error, ApiError)):
                raise
            if not answer.status:  # of a request that is no generation yet, cancelled at the very end
                known = error if isinstance(error, ApiError) else stopping()
                await known.response()(scope, receive, answer)
        finally:
            self.busy -= 1
            for generation in owned:
                self.batcher.leave(generation)
            self.batcher.metrics.requests.labels(str(answer.status if answer.whole else GONE)).inc()

    async def _answer(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        path, method = scope["path"], scope["method"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.stopping and path != "/metrics":
            raise stopping()
        allowed = ROUTES.get(path) or ("GET" if path.startswith(ONE_MODEL) else None)
        if path != "/health":
            self._check_key(headers.get(b"authorization", b""))
        if allowed is None:
            raise ApiError(404, f"no route {path[:100]}; there are {', '.join(ROUTES)}", code="not_found")
        if method != allowed:
            error = ApiError(405, f"{path} wants {allowed}, not {method}", code="method_not_allowed")
            error.headers["Allow"] = allowed
            raise error
        body = b""
        if method == "POST":
            body = await self._read(headers, receive)
            check_json(body)
        await self._run(scope, body, receive, answer)

    def _check_key(self, given: bytes) -> None:
        """Compare keys in a time that tells nothing of them."""
        if self.key is None:
            return
        kind, _, key = given.partition(b" ")
        if not hmac.compare_digest(key.strip(), self.key) or kind.lower() != b"bearer":
            error = ApiError(401, "no API key, or a wrong one; send Authorization: Bearer KEY", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Read a body of JSON, up to the limit.

        A page in a browser can send other types anywhere without being asked, so they are refused.
        """
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
        too_large = ApiError(413, f"the body is larger than {self.most_bytes:,} bytes (--max-request-bytes)")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most_bytes:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(GONE, "the client went away")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.most_bytes:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.timeout:g} s", code="timeout") from None
        return b"".join(parts)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: Answer) -> None:
        """Run the app, and cancel it if the client goes away before the answer is whole."""
        left = asyncio.Event()
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if given:
                return given.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.app(scope, replay, answer))
        watch = asyncio.ensure_future(gone(receive))
        try:
            longest = self.timeout + MARGIN  # also of a client that does not take its answer
            await asyncio.wait({work, watch}, timeout=longest, return_when=asyncio.FIRST_COMPLETED)
            left.set()
            if not work.done() and not answer.whole:
                work.cancel()
            await asyncio.wait({work})
        finally:
            work.cancel()
            watch.cancel()
        if not work.cancelled() and (error := work.exception()):
            log.error("a request failed", exc_info=error)
            if not answer.status:
                raise ApiError(500, "the server failed; its log says why")


class Answer:
    """A `send` that remembers the status, and whether all was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.whole = True
        await self._send(message)


async def gone(receive: Receive) -> None:
    """Wait until the client has gone away, or has all of its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


def check_json(body: bytes) -> None:
    """Check that a body is a JSON object.

    Raises:
        ApiError: 400, it is not.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise bad("the body is not a JSON object")
