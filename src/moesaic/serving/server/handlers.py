"""What `/v1/completions` and `/v1/chat/completions` do, in the places of transformers' own handlers.

Those give all requests the sampling of the first, pass over `stop`, and never end a stream with `[DONE]`.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

import torch
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response
from transformers.cli.serving.utils import BaseHandler, Modality

from ...calibration.windows import check_tokens
from ...errors import first_line
from ...models.families import embedding_rows
from ..questions import as_turn, opens_chats
from .answers import DONE, Writer
from .batching import Batcher, Generation
from .errors import ApiError, bad
from .fields import MOST_PROMPTS, ChatFields, CompletionFields, Fields, read, turns_of
from .model import OneBatcher, OneModel
from .sampling import Sampling
from .text import TextStream

SHORT, LONG = 16, 1_024
"""Tokens of an answer unless a request says: of a completion, as OpenAI's; of a chat, if the context has room."""
MOST_TOKENS = 2**31 - 1
"""What tokenizers take for a token at all."""


class Handler(BaseHandler, ABC):
    """What both handlers share: from prompts to an answer."""

    kind: type[Fields]
    prefix: str
    default_tokens: int

    def __init__(self, one: OneModel, state: OneBatcher, context: int, timeout: float) -> None:
        super().__init__(one, state)
        self.one, self.context, self.timeout = one, context, timeout
        self.batcher: Batcher = state.batcher

    async def handle_request(self, body: dict[str, object], request_id: str) -> Response:
        """Answer a request; its fields are OpenAI's.

        Raises:
            ApiError: it cannot be answered.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout
        fields = read(self.kind, body)
        if fields.model not in (None, self.one.name):
            raise ApiError(
                404, f"no model '{fields.model}'; this server has '{self.one.name}'", param="model",
                code="model_not_found",
            )  # fmt: skip
        self.batcher.admit(1)
        prompts = await asyncio.get_running_loop().run_in_executor(self.one.thread, self.prompts, fields)
        generations = [self._generation(prompt, fields) for prompt in prompts]
        self.batcher.admit(len(generations))
        for generation in generations:
            self.batcher.submit(generation)
        chat = isinstance(fields, ChatFields)
        writer = Writer(self.prefix + generations[0].name, self.one.name, chat, self.one.tokenizer)
        if not fields.stream:
            return await self._whole(writer, generations, deadline)
        stream = self._stream(writer, generations, deadline, fields.usage_in_stream)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @abstractmethod
    def prompts(self, fields: Fields) -> list[list[int]]:
        """Make the tokens of each prompt."""

    @abstractmethod
    def tokens_asked(self, fields: Fields) -> int | None:
        """Tell how many tokens a request asks for."""

    def _generation(self, prompt: list[int], fields: Fields) -> Generation:
        rows = embedding_rows(self.one.model)
        if not prompt:
            raise bad("the prompt has no tokens; give some text", "prompt")
        if min(prompt) < 0 or max(prompt) > MOST_TOKENS:
            raise bad(f"the prompt has a token that is not from 0 to {rows - 1:,}", "prompt")
        check_tokens(torch.tensor(prompt), rows, self.one.tokenizer)
        room, asked = self.context - len(prompt), self.tokens_asked(fields)
        if room < (asked or 1):
            raise bad(
                f"the prompt has {len(prompt):,} tokens and {asked or 1:,} are asked for, which is more than the "
                f"context of {self.context:,}; shorten the prompt, or ask for fewer", "prompt",
                "context_length_exceeded",
            )  # fmt: skip
        sampling = Sampling(
            len(prompt), fields.temperature or 0.0, fields.top_p or 1.0, fields.seed, fields.frequency_penalty or 0.0,
            fields.presence_penalty or 0.0, biases(fields.logit_bias or {}, rows), fields.top_logprobs_asked(),
        )  # fmt: skip
        text = TextStream(self.one.tokenizer, fields.stops, () if isinstance(fields, ChatFields) else prompt)
        return Generation(prompt, asked or min(self.default_tokens, room), text, sampling)

    async def _whole(self, writer: Writer, generations: Sequence[Generation], deadline: float) -> Response:
        texts, ends = [""] * len(generations), [""] * len(generations)
        for index, generation in enumerate(generations):
            async for piece in generation.pieces(deadline):
                texts[index] += piece.text
                ends[index] = piece.finish or ""
        return JSONResponse(writer.whole(generations, texts, ends))

    async def _stream(
        self, writer: Writer, generations: Sequence[Generation], deadline: float, with_usage: bool
    ) -> AsyncIterator[str]:
        try:
            async for event in merged([self._events(writer, i, g, deadline) for i, g in enumerate(generations)]):
                yield event
            if with_usage:
                yield writer.usage(generations)
            yield DONE
        except ApiError as error:
            yield error.event()

    async def _events(self, writer: Writer, index: int, generation: Generation, deadline: float) -> AsyncIterator[str]:
        if writer.chat:
            yield writer.first(index)
        shown = 0
        async for piece in generation.pieces(deadline):
            end = len(generation.text.tokens)
            yield writer.chunk(index, piece, writer.logprobs(generation, shown, end))
            shown = end


class Completions(Handler):
    """`/v1/completions`."""

    kind = CompletionFields
    prefix = "cmpl-"
    default_tokens = SHORT

    def prompts(self, fields: Fields) -> list[list[int]]:
        assert isinstance(fields, CompletionFields)
        given = fields.prompts()
        if not 0 < len(given) <= MOST_PROMPTS:
            raise bad(f"{len(given)} prompts; give 1 to {MOST_PROMPTS}", "prompt")
        return [self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]

    def _encode(self, prompt: str) -> list[int]:
        return list(self.one.encoder(unicode(prompt))["input_ids"])  # pyrefly: ignore[bad-argument-type]

    def tokens_asked(self, fields: Fields) -> int | None:
        assert isinstance(fields, CompletionFields)
        return fields.max_tokens


class Chats(Handler):
    """`/v1/chat/completions`."""

    kind = ChatFields
    prefix = "chatcmpl-"
    default_tokens = LONG

    def prompts(self, fields: Fields) -> list[list[int]]:
        assert isinstance(fields, ChatFields)
        encoder = self.one.encoder
        if not encoder.chat_template:
            raise bad("this model has no chat template; use /v1/completions", "messages")
        turns = turns_of(fields.messages)
        options = fields.chat_template_kwargs or {}
        if own := set(options) & set(inspect.signature(encoder.apply_chat_template).parameters):
            raise bad(f"chat_template_kwargs has '{own.pop()}', which is the server's to say", "chat_template_kwargs")
        messages = self.get_processor_inputs_from_messages(turns, Modality.LLM)
        for message in messages:
            unicode(str(message["content"]))
        try:
            text = encoder.apply_chat_template(
                [as_turn(self.one.model, message) for message in messages],  # pyrefly: ignore[bad-argument-type]
                add_generation_prompt=True,
                tokenize=False,
                **options,  # pyrefly: ignore[bad-argument-type]
            )
            special = opens_chats(self.one.model, encoder, str(text))
            found = encoder(str(text), add_special_tokens=special)["input_ids"]
        except Exception as error:  # a template is a program, and may raise anything
            raise bad(f"the model's chat template fails: {first_line(error)}", "messages") from error
        return [list(found)]  # pyrefly: ignore[bad-argument-type]

    def tokens_asked(self, fields: Fields) -> int | None:
        assert isinstance(fields, ChatFields)
        return fields.max_completion_tokens or fields.max_tokens


def unicode(text: str) -> str:
    """Return a text that UTF-8 can write.

    Raises:
        ApiError: 400, it holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad("the text holds half a surrogate pair, which is no character") from error
    return text


def biases(given: dict[str, float], rows: int) -> dict[int, float]:
    """Read `logit_bias`.

    Raises:
        ApiError: 400, a key that is no token.
    """
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < rows):
            raise bad(f"logit_bias has '{token[:20]}', which is no token of this model", "logit_bias")
    return {int(token): bias for token, bias in given.items()}


async def merged(sources: Sequence[AsyncIterator[str]]) -> AsyncIterator[str]:
    """Give what several iterators give, as it comes; what one raises ends all."""
    if len(sources) == 1:
        async for event in sources[0]:
            yield event
        return
    queue: asyncio.Queue[str | ApiError | None] = asyncio.Queue()

    async def drain(source: AsyncIterator[str]) -> None:
        try:
            async for event in source:
                queue.put_nowait(event)
            queue.put_nowait(None)
        except ApiError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            event = await queue.get()
            if isinstance(event, ApiError):
                raise event
            left -= event is None
            if event is not None:
                yield event
    finally:
        for task in tasks:
            task.cancel()
