"""Answers as OpenAI's clients know them: whole ones and the chunks of a stream."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...models.tokenizer import REPLACEMENT, token_bytes
from .batching import Generation, Piece
from .sampling import TokenChoice

Object = dict[str, object]
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Writer:
    """Writes the answers of one request."""

    name: str
    model: str
    chat: bool
    tokenizer: PreTrainedTokenizerBase

    def _answer(self, kind: str, choices: list[Object], counts: Object | None) -> Object:
        head: Object = {"id": self.name, "object": kind, "created": int(time.time()), "model": self.model}
        head["choices"] = choices
        return head if counts is None else head | {"usage": counts}

    def whole(self, generations: Sequence[Generation], texts: Sequence[str], ends: Sequence[str]) -> Object:
        """Write a whole answer, a choice for each prompt."""
        choices: list[Object] = []
        for index, (generation, text, end) in enumerate(zip(generations, texts, ends, strict=True)):
            said: Object = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            logprobs = self.logprobs(generation, 0, len(generation.text.tokens))
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": end})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._answer(kind, choices, usage(generations))

    def first(self, index: int) -> str:
        """Write the chunk that begins a chat's answer."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, index: int, piece: Piece, logprobs: Object | None) -> str:
        """Write a chunk of an answer."""
        said: Object = {"text": piece.text}
        if self.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._event([{"index": index, **said, "logprobs": logprobs, "finish_reason": piece.finish}])

    def usage(self, generations: Sequence[Generation]) -> str:
        """Write the chunk with the numbers of tokens, which ends a stream that asks for it."""
        return self._event([], usage(generations))

    def _event(self, choices: list[Object], counts: Object | None = None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return f"data: {json.dumps(self._answer(kind, choices, counts))}\n\n"

    def logprobs(self, generation: Generation, start: int, end: int) -> Object | None:
        """Write the logarithms of the probabilities of an answer's next tokens, if they were asked for."""
        if generation.sampling.top_logprobs is None:
            return None
        choices = generation.sampling.choices[start:end]
        if self.chat:
            return {"content": [self._token(choice) for choice in choices], "refusal": None}
        texts = [self._text(choice.token) for choice in choices]
        top = [{self._name(token): logprob for token, logprob in choice.top} for choice in choices]
        logprobs = [choice.logprob for choice in choices]
        *offsets, generation.text_offset = itertools.accumulate(map(len, texts), initial=generation.text_offset)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _token(self, choice: TokenChoice) -> Object:
        pairs = [(choice.token, choice.logprob), *choice.top]
        said: list[Object] = []
        for token, logprob in pairs:
            text = self._text(token)
            found = token_bytes(self.tokenizer, token, text)
            said.append({"token": text, "logprob": logprob, "bytes": None if found is None else list(found)})
        return said[0] | {"top_logprobs": said[1:]}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _name(self, token: int) -> str:
        r"""Write a token so that no two are alike: a part of a character by its bytes, `bytes:\xe6`."""
        text = self._text(token)
        found = token_bytes(self.tokenizer, token, text)
        if REPLACEMENT not in text or found is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def usage(generations: Sequence[Generation]) -> Object:
    """Count the tokens of prompts and answers."""
    prompt = sum(len(generation.prompt) for generation in generations)
    answer = sum(len(generation.text.tokens) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
