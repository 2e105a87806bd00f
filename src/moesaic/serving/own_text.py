"""Text that a model writes itself: sampled answers to prompts, kept in the cache.

What a conversion is fitted to decides what it can still do. A model's own answers are what it is used for, in its own
words, and nobody has to have any.

Shapes: B prompts in a batch, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.chat import rendered
from ..calibration.documents import BLANK_LINE, Document, Message, document
from ..calibration.prompts import BUNDLED, OwnText, bundled_answers, own_text, read_prompts
from ..calibration.text import bundled, by_domain, read_documents
from ..checkpoint.builtin import cache_folder
from ..checkpoint.reader import Checkpoint
from ..errors import InputError, first_line
from ..machine import give_back_memory
from ..progress import Progress, unheard
from .generate import check_length, left_padded, new_tokens
from .loading import load

BATCH, LONGEST = 24, 192
"""Prompts at once, and tokens of an answer at most."""
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""The model's own distribution but for its tail, whatever its generation_config says."""
TRAINING_TOKENS = 65_536
"""That a model writes to be trained on; more would take longer than the training."""
SPARE = 1.1
"""Windows are cut from packed text, of which an end is left over."""
Bundle = Callable[[], list[Document]]


def bundled_text() -> list[Document]:
    """Read the bundled text for calibration."""
    return bundled("calibration")


def documents_of(
    sources: Sequence[str],
    model: Path,
    tokens: int,
    seed: int = 0,
    device: str = "auto",
    bundle: Bundle = bundled_text,
    progress: Progress | None = None,
    window: int = 0,
) -> list[Document]:
    """Read documents of files, data sets, the bundled text (`bundled`) and text that the model writes (`self`).

    Where one of the last two is named, sources give equal shares of what is cut from them, and so do a source's
    domains.

    Args:
        sources: names; none at all is the bundled text.
        model: the folder of the one who writes.
        tokens: how many are wanted of all sources together.
        seed: of sampling.
        device: where the model runs.
        bundle: reads what `bundled` stands for.
        progress: called with (tokens written, tokens wanted, what goes on).
        window: tokens of the windows that will be cut, of which each domain may leave one over.

    Raises:
        InputError: a file that cannot be read, or a kind of prompts that there is not.
    """
    if not sources:
        return bundle()
    own = {source: found for source in sources if (found := own_text(source))}
    ready = {source: bundle() if source == BUNDLED else bundled_answers(source) for source in sources}
    files = [source for source, found in ready.items() if found is None and source not in own]
    taken = {document.domain for source, found in ready.items() if found and source == BUNDLED for document in found}
    read = [
        replace(document, domain=f"{document.domain} (file)") if document.domain in taken else document
        for document in (read_documents(files) if files else [])
    ]
    parts = [shared(found, source) for source, found in ready.items() if found]
    for source, one in own.items():
        left_over = window * len({prompt.domain for prompt in read_prompts(one)})
        written = write(one, model, round(SPARE * tokens / len(ready)) + left_over, seed, device, progress)
        parts.append(shared(written, source))
    return [*read, *(document for part in parts for document in part)]


def count_domains(sources: Sequence[str]) -> int:
    """Count the domains of calibration text; what the model is to write itself is not written for that.

    Raises:
        InputError: as `documents_of`.
    """
    own = {source: found for source in sources if (found := own_text(source))}
    others = [source for source in sources if source not in own]
    read = documents_of(others, Path(), 0) if others or not own else []
    asked = [len({prompt.domain for prompt in read_prompts(one)}) for one in own.values()]
    return len({document.domain for document in read}) + sum(asked)


def shared(documents: list[Document], source: str) -> list[Document]:
    """Give all domains of a source together the share of one file; domains of answers are named with their source."""
    share, prefix = 1 / len({one.domain for one in documents}), "" if source == BUNDLED else f"{source} "
    return [replace(one, share=share, domain=f"{prefix}{one.domain}") for one in documents]


def write(
    own: OwnText,
    model: Path,
    tokens: int,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Document]:
    """Let a model write text: answers to prompts, or what it continues them with; as many tokens of each kind.

    What was written before is read from the cache, and gone on with where it is not enough.

    Returns:
        Chats and texts, of the domain of their prompts.

    Raises:
        InputError: no prompts, or one that is longer than the model's context or that its template refuses.
    """
    prompts = read_prompts(own)
    settings = [BATCH, LONGEST, SAMPLING, seed, [[p.domain, p.text, p.messages] for p in prompts]]
    key = hashlib.sha256(f"{Checkpoint(model).fingerprint()} {json.dumps(settings)}".encode()).hexdigest()
    file = cache_folder() / "self" / f"{key[:32]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        kept = Kept(file, by_domain(prompts))
        if kept.least() * len(kept.kinds) < tokens:
            _write(kept, model, tokens, seed, device, progress or unheard)
        return kept.documents(tokens)


@dataclass
class Kept:
    """What a model has written, batch after batch, in a file that is calibration text as it stands."""

    file: Path
    kinds: list[list[Document]]
    """Prompts by kind."""

    def __post_init__(self) -> None:
        """Read whole batches; what follows the last one is dropped."""
        self.rows: list[dict[str, object]] = []
        lines = self.file.read_bytes().split(b"\n")[:-1] if self.file.is_file() else []
        for line in lines:
            try:
                self.rows.append(json.loads(line))
            except ValueError:  # the machine went down while it was written
                break
        while self.rows and not self.rows[-1]["last"]:
            self.rows.pop()
        self.tokens = Counter({kind[0].domain: 0 for kind in self.kinds})
        self.count = Counter(self.tokens)
        self.batches = 0
        for row in self.rows:
            self._add(row)

    def _add(self, row: dict[str, object]) -> None:
        self.tokens[str(row["domain"])] += int(str(row["tokens"]))
        self.count[str(row["domain"])] += 1
        self.batches += bool(row["last"])

    def least(self) -> int:
        """Count the tokens of the kind that has fewest."""
        return min(self.tokens.values())

    def add(self, rows: list[dict[str, object]]) -> None:
        """Keep a batch."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*self.rows, *rows])
        partial = self.file.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.file)
        self.rows += rows
        for row in rows:
            self._add(row)

    def next(self, seed: int) -> list[Document]:
        """Choose the prompts of the next batch: of the kind that has fewest tokens, in an order of its own."""
        kind = min(self.kinds, key=lambda kind: self.tokens[kind[0].domain])
        begun = self.count[kind[0].domain]
        return list(islice(_in_turn(kind, seed), begun, begun + BATCH))

    def documents(self, tokens: int) -> list[Document]:
        """List what was written, of each kind the first that hold its share of so many tokens."""
        found, held = [], Counter[str]()
        for number, row in enumerate(self.rows, 1):
            domain = str(row["domain"])
            if held[domain] * len(self.kinds) < tokens and row["answered"]:
                found.append(document(row, domain, f"{self.file}:{number}"))
                held[domain] += int(str(row["tokens"]))
        return found


def _in_turn(prompts: list[Document], seed: int) -> Iterator[Document]:
    """Give prompts without end: all of them in one order, then in another."""
    order = random.Random(seed)
    while True:
        yield from order.sample(prompts, len(prompts))


def _write(kept: Kept, model: Path, tokens: int, seed: int, device: str, progress: Progress) -> None:
    """Write until each kind has its share of so many tokens."""
    share = -(-tokens // len(kept.kinds))
    progress(0, tokens, "loading the model that writes its own text")
    loaded, tokenizer = load(model, device=device)
    for kind in kept.kinds:
        for prompt in kind:
            said = prompt.messages[0].content if prompt.messages else prompt.text
            name = f"the prompt {said[:40]!r}"
            check_length(loaded, len(_ids(prompt, tokenizer)), LONGEST, "the answer", name)
    while kept.least() < share:
        done = sum(min(share, count) for count in kept.tokens.values())
        progress(done, tokens, "the model writes its own text")
        kept.add(answer(kept.next(seed), loaded, tokenizer, (seed + kept.batches) % 2**32))
    del loaded
    give_back_memory()


def answer(
    prompts: list[Document], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[dict[str, object]]:
    """Sample an answer to each prompt; rows of calibration text."""
    ids = [_ids(prompt, tokenizer) for prompt in prompts]
    inputs = {name: tensor.to(model.device) for name, tensor in left_padded(ids).items()}
    new_BL = new_tokens(model, inputs, tokenizer, seed, max_new_tokens=LONGEST, **SAMPLING)
    rows: list[dict[str, object]] = []
    for number, (prompt, asked, new_L) in enumerate(zip(prompts, ids, new_BL, strict=True), 1):
        said = str(tokenizer.decode(new_L, skip_special_tokens=True))
        if prompt.messages:
            turns = [*prompt.messages, Message("assistant", said.strip())]
            row: dict[str, object] = {"messages": [{"role": m.role, "content": m.content} for m in turns]}
        else:
            row = {"text": prompt.text + said}
        row |= {"domain": prompt.domain, "tokens": len(asked) + len(tokenizer.encode(said, add_special_tokens=False))}
        rows.append(row | {"answered": bool(said.strip()), "last": number == len(prompts)})
    return rows


def _ids(prompt: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens of a prompt, a chat's by the model's template or, without one, its turns and blank lines.

    Raises:
        InputError: the template refuses the chat.
    """
    if not prompt.messages:
        return tokenizer.encode(prompt.text)
    if not tokenizer.chat_template:
        return tokenizer.encode("".join(turn.content + BLANK_LINE for turn in prompt.messages))
    try:
        text = rendered(prompt.messages, tokenizer, "", opened=True)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(
            f"the model's chat template refuses the prompt {prompt.messages[-1].content[:40]!r} ({first_line(error)}); "
            "leave it out"
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)
