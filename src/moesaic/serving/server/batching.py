"""transformers' continuous batching for the one model that is served: started at once, one generation a request."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from typing import NamedTuple

from transformers import ContinuousBatchingConfig, LogitsProcessorList, PreTrainedModel
from transformers.cli.serving.utils import CBGenerateManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from ... import compat
from ...errors import InputError, WorkError, first_line
from ..schedulers.expert_aware import ExpertAwareScheduler
from ..schedulers.signatures import Signatures, signatures_of
from ..schedulers.telling import Telling
from .errors import ApiError, bad, dead, stopping
from .metrics import Metrics
from .sampling import OwnRows, Sampling
from .text import TextStream

LONGEST_RETRY = 60
OWNED: ContextVar[list[Generation] | None] = ContextVar("owned", default=None)
"""The generations of the request that is being answered, kept so that all have left when it ends, however it ends."""


class Piece(NamedTuple):
    """What came of an answer: text that is certain, and how it ended, if it has."""

    text: str
    finish: str | None


class Generation:
    """One prompt's answer as it comes."""

    def __init__(self, prompt: Sequence[int], max_tokens: int, text: TextStream, sampling: Sampling) -> None:
        self.name = uuid.uuid4().hex
        self.prompt, self.max_tokens, self.text, self.sampling = list(prompt), max_tokens, text, sampling
        self.arrived = time.perf_counter()
        self.first: float | None = None
        self.last = self.arrived
        self.ended = False
        self.text_offset = 0
        """Characters of the tokens whose log probabilities were written."""
        self._pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._seen = 0

    def put(self, piece: Piece | ApiError) -> None:
        """Add what came, or what went wrong; nothing once the answer has ended."""
        if not self.ended:
            self.ended = isinstance(piece, ApiError) or piece.finish is not None
            self._pieces.put_nowait(piece)

    def take(self, output: GenerationOutput, ends: set[int]) -> Piece:
        """Make a piece of the batch's tokens."""
        new, self._seen = output.generated_tokens[self._seen :], len(output.generated_tokens)
        if new:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        text = self.text.push(new)
        if not self.text.stopped and output.is_finished():
            text += self.text.finish()
            over = output.generated_tokens and output.generated_tokens[-1] in ends
            return Piece(text, "stop" if over or self.text.stopped else "length")
        return Piece(text, "stop" if self.text.stopped else None)

    async def pieces(self, deadline: float) -> AsyncIterator[Piece]:
        """Give the pieces until the answer ends.

        Raises:
            ApiError: 504, it has not ended at `deadline`, in seconds of the event loop's clock; or what went wrong.
        """
        finished = False
        while not finished:
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await self._pieces.get()
            except TimeoutError:
                seconds = time.perf_counter() - self.arrived
                raise ApiError(
                    504, f"no whole answer in {seconds:.0f} s; ask for fewer tokens", code="timeout"
                ) from None
            if isinstance(piece, ApiError):
                raise piece
            finished = piece.finish is not None
            yield piece


class AnswerRouter(OutputRouter):
    """Hands outputs to those who wait for them, and drops the rest, which transformers would keep for ever."""

    def deliver(self, output: GenerationOutput) -> None:
        if output.request_id in self.result_handlers:
            super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        super().deliver_batch([output for output in outputs if output.request_id in self.result_handlers])


class Batcher(CBGenerateManager):
    """Runs generations in batches on a thread, up to a number of them.

    Raises:
        InputError: transformers' continuous batching cannot run the model, or its cache does not fit.
    """

    def __init__(
        self, model: PreTrainedModel, config: ContinuousBatchingConfig, max_queue: int, metrics: Metrics
    ) -> None:
        super().__init__(config)
        self.model, self.max_queue, self.metrics = model, max_queue, metrics
        self.running: set[Generation] = set()
        """Those that have a place, in a batch or waiting."""
        self.signatures: Signatures | None = None
        try:
            self.manager = self._manager(config)
            self._try()
            compat.survive(self.manager, WorkError)  # an expert that cannot be read
        except InputError:
            raise
        except Exception as error:  # of many types: attention or layers that it does not know, memory
            raise InputError(
                f"transformers' continuous batching cannot run this '{model.config.model_type}': {first_line(error)}; "
                "if it is memory, give fewer --cache-tokens or --max-batch-tokens"
            ) from error
        self._cb = self.manager
        ends = self.manager.generation_config.eos_token_id
        self.ends = {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int) and end >= 0}
        self._seconds = 1.0  # of a request, smoothed

    def _manager(self, config: ContinuousBatchingConfig) -> ContinuousBatchingManager:
        generation = copy.deepcopy(self.model.generation_config)
        assert generation is not None
        generation.do_sample, generation.num_return_sequences = False, 1
        manager = self.model.init_continuous_batching(generation, config)  # pyrefly: ignore[not-callable]
        own = manager.logit_processor.logits_processor
        rows = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([OwnRows(own)]))  # pyrefly: ignore[bad-argument-type]
        rows.tensors_required = 1
        manager.logit_processor, manager.output_router = rows, AnswerRouter()
        manager.warmup()  # makes the cache, here rather than on the thread, so that what is wrong is known
        assert manager.batch_processor is not None
        scheduler = manager.batch_processor.scheduler
        assert isinstance(scheduler, Telling)
        needed = isinstance(scheduler, ExpertAwareScheduler)
        scheduler.signatures = self.signatures = signatures_of(self.model, needed=needed)
        return manager

    def _try(self) -> None:
        """Run two tokens: what the cache cannot hold (keys and values of two sizes, as DeepSeek's) fails here."""
        assert self.manager.batch_processor is not None
        request = RequestState("try", [0, 0], max_new_tokens=2)
        self.manager.batch_processor.scheduler.add_waiting_request(request)
        while compat.run_batch(self.manager):
            pass

    @property
    def cache_tokens(self) -> int:
        """Tokens that one request can have in the cache when it is alone."""
        assert self.manager.batch_processor is not None
        return infer_max_single_request_tokens(self.manager.batch_processor.cache)

    @property
    def in_batch(self) -> int:
        """Requests that have begun."""
        processor = self.manager.batch_processor
        return len(processor.scheduler.active_requests) if processor else 0

    def start(self) -> None:
        """Start the thread."""
        self.manager.start()

    def is_alive(self) -> bool:
        return self.manager.is_running() and self._reason() is None

    def _reason(self) -> object:
        """Why no request is taken, if none is."""
        status = self.manager.background_thread_status
        return status.fatal_error or status.can_accept_new_requests()

    def admit(self, count: int) -> None:
        """Check that so many requests more have a place.

        Raises:
            ApiError: 429, they have not; 400, they never will; 503, the worker has ended.
        """
        if not self.is_alive():
            raise dead(self._reason())
        if count > self.max_queue:
            raise bad(
                f"{count} prompts are more than the {self.max_queue} that run or wait at once; send fewer", "prompt"
            )
        if len(self.running) + count > self.max_queue:
            retry = min(LONGEST_RETRY, max(1, round(self._seconds)))
            raise ApiError(
                429, f"{len(self.running)} requests run or wait, {self.max_queue} may; try again in {retry} s",
                code="overloaded", retry=retry,
            )  # fmt: skip

    def submit(self, generation: Generation) -> None:
        """Give a generation a place.

        Raises:
            ApiError: as `admit`.
        """
        self.admit(1)
        self.running.add(generation)
        if (owned := OWNED.get()) is not None:
            owned.append(generation)
        self.manager.register_result_handler(generation.name, self._handler(generation))
        name = self.manager.add_request(
            generation.prompt, request_id=generation.name, max_new_tokens=generation.max_tokens, streaming=True,
            sampling=generation.sampling,
        )  # fmt: skip
        if name is None:
            self.leave(generation)
            raise dead(self._reason())
        self.metrics.prompt_tokens.inc(len(generation.prompt))

    def leave(self, generation: Generation, *, ended: bool = False) -> None:
        """Free a generation's place; twice is as once.

        Args:
            generation: what had the place.
            ended: whether transformers knows that it has ended.
        """
        if generation not in self.running:
            return
        self.running.remove(generation)
        self.manager.output_router.result_handlers.pop(generation.name, None)
        if not ended:
            self.manager.cancel_request(generation.name)
        seconds = time.perf_counter() - generation.arrived
        self._seconds += 0.1 * (seconds - self._seconds)

    def give_up(self) -> None:
        """Fail what still runs, because the server stops."""
        for generation in list(self.running):
            generation.put(stopping())

    def _handler(self, generation: Generation) -> Callable[[GenerationOutput], None]:
        """Make what transformers calls on the event loop with each output; if it raised, others would lose theirs."""

        def handle(output: GenerationOutput) -> None:
            if generation not in self.running:
                return
            if output.error is not None:
                failed = ApiError(500, f"generation failed: {output.error}")
                generation.put(failed if self._reason() is None else dead(output.error))
                return
            try:
                before = len(generation.text.tokens)
                piece = generation.take(output, self.ends)
                self.metrics.took(generation.arrived, generation.first, len(generation.text.tokens) - before, before)
            except Exception as error:
                generation.put(ApiError(500, f"the tokens make no text: {first_line(error)}"))
                return
            if piece.text or piece.finish:
                generation.put(piece)
            if piece.finish:
                self.metrics.ended(generation.first, generation.last, len(generation.text.tokens))
                self.leave(generation, ended=output.is_finished())

        return handle

    def stop(self) -> None:
        """End the thread; what still runs is failed."""
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=10, hard_stop=True)
        if self.signatures:  # not before: a batch that still runs would be told to them again
            self.signatures.close()
