"""Tokens into text as they come, up to a text that ends the answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ...models.tokenizer import REPLACEMENT, decoded

CONTEXT = 8
"""Tokens of a prompt that an answer's text may depend on."""


class TextStream:
    """The text of an answer: all that `push` and `finish` return is `decoded` of its tokens, cut at a stop.

    Text that may be the beginning of a stop is held back.

    Args:
        tokenizer: the model's.
        stops: texts that end the answer.
        prompt: tokens that the answer goes on from; nothing where it is an answer of its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._before = list(prompt[-CONTEXT:])
        self.tokens: list[int] = []
        self.stopped = False
        """Whether one of the stops has come; tokens after it are passed over."""
        self._tokenizer, self._stops = tokenizer, list(stops)
        self._decoded = ""
        """The text of all tokens but those of an unfinished character."""
        self._shown = 0
        self._whole = self._before  # tokens that the text of the next ones depends on
        self._unfinished: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; returns the text that is certain now."""
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            self._unfinished.append(token)
            before, after = self._decode(self._whole), self._decode([*self._whole, *self._unfinished])
            if len(after) > len(before) and not after.endswith(REPLACEMENT):
                self._decoded += after[len(before) :]
                self._whole, self._unfinished = self._unfinished, []
                self._look_for_stops()
        return self._show(len(self._decoded) if self.stopped else len(self._decoded) - self._held())

    def finish(self) -> str:
        """End the answer; returns the text that was held back."""
        if not self.stopped:
            whole = decoded(self._tokenizer, self._before, self.tokens)
            if whole.startswith(self._decoded[: self._shown]):
                self._decoded = whole
                self._look_for_stops()
        return self._show(len(self._decoded))

    def _decode(self, tokens: list[int]) -> str:
        return decoded(self._tokenizer, [], tokens)

    def _look_for_stops(self) -> None:
        found = [at for stop in self._stops if (at := self._decoded.find(stop, self._shown)) >= 0]
        if found:
            self._decoded, self.stopped = self._decoded[: min(found)], True

    def _held(self) -> int:
        """Count the characters at the end that a stop may begin with."""
        unseen = self._decoded[self._shown :]
        sizes = (size for stop in self._stops for size in range(1, len(stop)) if unseen.endswith(stop[:size]))
        return max(sizes, default=0)

    def _show(self, end: int) -> str:
        text = self._decoded[self._shown : end]
        self._shown = max(self._shown, end)
        return text
