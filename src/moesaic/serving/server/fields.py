"""The fields of a request: OpenAI's, as far as they are kept; one that would be passed over in silence is refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError, bad

MOST_STOPS = 16
MOST_PROMPTS = 128
MOST_LOGPROBS = 20
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change no answer; they are passed over."""
REFUSED = {
    "best_of": "give one request for each",
    "echo": "put the prompt before the answer yourself",
    "suffix": "these models continue a text, they do not fill a gap",
    "tools": "answers are text only",
    "tool_choice": "answers are text only",
    "functions": "answers are text only",
    "function_call": "answers are text only",
    "response_format": "only {'type': 'text'} is possible",
}
"""Fields that OpenAI has and this server has not, with a word on it; allowed where they ask for nothing."""
PICTURES = "ask about pictures by 'moesaic generate --image'"
TURN = ("role", "content")
"""Fields of a message."""
NOTHING = (None, False, [], "none", {"type": "text"})
Text = Annotated[str, Field(min_length=1)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = False


class Fields(BaseModel, ABC):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Literal[1] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @abstractmethod
    def top_logprobs_asked(self) -> int | None:
        """Tell how many most likely tokens are asked for beside each; None: no logarithms at all."""


class CompletionFields(Fields):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def prompts(self) -> list[str] | list[list[int]]:
        """List the prompts: texts, or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if tokens:
            return [tokens]
        texts = [item for item in self.prompt if isinstance(item, str)]
        return texts or [item for item in self.prompt if isinstance(item, list)]

    def top_logprobs_asked(self) -> int | None:
        return self.logprobs


class ChatFields(Fields):
    """`/v1/chat/completions`."""

    messages: Annotated[list[dict[str, object]], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    chat_template_kwargs: dict[str, bool | int | str] | None = None

    def top_logprobs_asked(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("'top_logprobs' wants 'logprobs': true beside it", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def read(kind: type[Fields], body: dict[str, object]) -> Fields:
    """Read a request's fields.

    Raises:
        ApiError: 400, one is missing, of another type, outside its limits, or unknown.
    """
    for name, word in REFUSED.items():
        if name in body and body[name] not in NOTHING and not (name == "best_of" and body[name] == 1):
            raise bad(f"'{name}' is not supported: {word}", name)
    kept = {name: value for name, value in body.items() if name not in HARMLESS and name not in REFUSED}
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _first(error) from error


def _first(error: ValidationError) -> ApiError:
    """Say the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        return bad(f"unrecognised field '{name}'; leave it out", name)
    if name == "n":
        return bad("n is not 1; give one request for each answer", name)
    return bad(f"field '{name}': {first['msg'].lower()}", name)


def turns_of(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    """Take role and content of messages; clients send the other fields of an answer back, where they are empty.

    Raises:
        ApiError: 400, one has no role or no text, or something else that would be passed over.
    """
    for number, message in enumerate(messages):
        where, content = f"messages[{number}]", message.get("content")
        for name, value in message.items():
            if name not in TURN and value not in NOTHING:
                raise bad(f"{where} has '{name}', which is not supported: answers are text only", "messages")
        if not isinstance(message.get("role"), str):
            raise bad(f"{where} has no role; give system, user or assistant", "messages")
        if message["role"] in ("tool", "function"):
            raise bad(f"{where} is what a {message['role']} said, and answers are text only", "messages")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str) and not parts:
            raise bad(f"{where} has no content; give text", "messages")
        for part in parts:
            if isinstance(part, dict) and "image" in str(part.get("type")):
                raise bad(f"{where} holds a picture, no text; this server answers text only: {PICTURES}", "messages")
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise bad(f"{where} holds what is no text; this server has models of text only", "messages")
    return [{name: message[name] for name in TURN} for message in messages]
