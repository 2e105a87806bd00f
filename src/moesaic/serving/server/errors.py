"""Errors as OpenAI's clients know them: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.utils import CBWorkerDeadError

from ...errors import InputError

BAD = "invalid_request_error"
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's types by status; any other below 500 is `BAD`, from 500 on `server_error`."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message.encode(errors="backslashreplace").decode()  # it may quote half a surrogate pair
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry is None else {"Retry-After": str(retry)}

    def body(self) -> dict[str, object]:
        """Make OpenAI's form of it."""
        kind = TYPES.get(self.status, BAD if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def event(self) -> str:
        """Make the event that ends a stream which has begun."""
        return f"data: {json.dumps(self.body())}\n\n"

    def response(self) -> JSONResponse:
        """Make the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the error of a request that cannot work."""
    return ApiError(400, message, param=param, code=code)


def dead(reason: object) -> ApiError:
    """Make the error of a server whose worker has ended."""
    return ApiError(503, f"the worker that runs the model has ended ({reason}); restart the server", code="worker_dead")


def stopping() -> ApiError:
    """Make the error of a server that is stopping."""
    return ApiError(503, "the server is stopping; try another", code="stopping", retry=1)


def install(app: FastAPI) -> None:
    """Give every error of an app OpenAI's form."""

    @app.exception_handler(ApiError)
    async def _ours(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(InputError)
    async def _input(request: Request, error: InputError) -> JSONResponse:
        return bad(str(error)).response()

    @app.exception_handler(CBWorkerDeadError)
    async def _dead(request: Request, error: CBWorkerDeadError) -> JSONResponse:
        return dead(error).response()

    @app.exception_handler(HTTPException)
    @app.exception_handler(StarletteHTTPException)
    async def _http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(RequestValidationError)
    async def _form(request: Request, error: RequestValidationError) -> JSONResponse:
        return bad("the body is not a JSON object").response()

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"the server failed ({type(error).__name__}); this is a fault of moesaic").response()
