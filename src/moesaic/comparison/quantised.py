"""Quantisation beside conversion, and both together: dense, smaller siblings and ours in llama.cpp's types.

Everybody's first way to a faster model is fewer bits. So each model is written in each type, decoded by llama.cpp in
turns, and its perplexity is measured on the very file, read back: llama.cpp's own but for activations, which it rounds
to 8 bits where weights are quantised.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint.gguf_source import unpack_file
from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space
from ..errors import InputError
from ..evaluation.cost import mean_share
from ..evaluation.inspect import prompt_tokens
from ..evaluation.perplexity import MeasuredPerplexity, check_protocol, perplexity
from ..formats.converted import Converted, dense_origin
from ..formats.gguf_support import K_QUANTS, block_size, check_k_quant, find_quantiser, gguf_format
from ..given import check, optional_path
from ..machine import free_memory, give_back_memory, machine, versions
from ..models.families import context_length
from ..models.integrity import read_config
from ..models.tokenizer import load_tokenizer
from ..plan import Plan
from ..progress import Progress, unheard
from ..results import QuantisedResult, QuantisedRow
from ..serving.loading import load
from .llama_cpp import Turns, check_gguf, take_turns

WINDOW = 2_048
"""Tokens of a window of scored text, where all contexts are as long."""
TYPES = ("f16", "q8_0", "q4_0")


class Entry(NamedTuple):
    """A model of the comparison."""

    kind: str
    """`dense`, `sibling` or `converted`."""
    name: str
    folder: Path
    plan: str | None
    ffn_active: float


class Quality(NamedTuple):
    """What perplexities are measured on."""

    text: Path | None
    window: int
    max_tokens: int | None


class Written(NamedTuple):
    """A model in one type."""

    entry: Entry
    outtype: str
    file: Path
    quality: MeasuredPerplexity


def compare_quantised(
    converted: Sequence[str | Path],
    python: Path,
    *,
    against: str | None = None,
    siblings: Sequence[str] = (),
    outtypes: Sequence[str] = TYPES,
    text: str | Path | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    prompt: int = 128,
    new: int = 32,
    rounds: int = 5,
    clock: str = "wall",
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> QuantisedResult:
    """Measure tokens a second and perplexity of models in llama.cpp's types.

    Args:
        converted: folders that moesaic made, of one dense model.
        python: a Python that has xllamacpp; see `find_llama_cpp`.
        against: the dense model; None: what the first was converted from.
        siblings: smaller dense models of the same tokenizer.
        outtypes: GGUF's types.
        text: what perplexity is measured on, by the `gptq` protocol; None: the bundled held-out text.
        window: tokens in a window; None: 2,048, or the shortest context of the models.
        max_tokens: tokens after which the perplexity stops.
        prompt: tokens before decoding.
        new: tokens decoded.
        rounds: timed turns of each file after one that warms up.
        clock: `wall`, or `cpu` where other work disturbs; see `take_turns`.
        scratch: a folder for files, which are kept there; None: they are removed.
        progress: called with (finished, all, what comes next).

    Raises:
        InputError: a model that llama.cpp does not run, or that has another tokenizer; before anything is measured.
        WorkError: llama.cpp failed.
    """
    check(max_tokens=max_tokens, prompt=prompt, new=new, rounds=rounds)
    entries = entries_of(list(map(str, converted)), against, siblings)
    quality = Quality(optional_path(text), window_within(entries, window), max_tokens)
    check_asked(entries, quality, outtypes)
    report, threads = progress or unheard, torch.get_num_threads()
    steps = len(entries) * len(outtypes)
    tokens = prompt_tokens(load_tokenizer(entries[0].folder), prompt)[0].tolist()
    with tempfile.TemporaryDirectory(prefix="moesaic-quantised-") as own:
        place = scratch or Path(own)
        place.mkdir(parents=True, exist_ok=True)
        check_space(place / "files", sum(4 * Checkpoint(entry.folder).size() for entry in entries))
        found = write_all(entries, outtypes, place, quality, lambda done, what: report(done, steps, what))
        report(len(found), steps, "speed in llama.cpp")
        timed = time_all(found, tokens, python, new=new, rounds=rounds, threads=threads, clock=clock)
    report(steps, steps, "done")
    first = found[0].quality
    return QuantisedResult(
        rows=on_front(timed.rows), protocol=first.protocol, window=quality.window, tokens=first.tokens,
        text=first.text, data_sha256=first.data_sha256, prompt=prompt, new=new, rounds=rounds, threads=threads,
        clock=clock, engine=timed.version, machine=machine(), versions=versions(),
    )  # fmt: skip


def write_all(
    entries: Sequence[Entry], outtypes: Sequence[str], place: Path, quality: Quality, report: Callable[[int, str], None]
) -> list[Written]:
    """Write each model in each type, where it is not yet, and measure the files' perplexities."""
    found: list[Written] = []
    for outtype in outtypes:
        for number, entry in enumerate(entries):
            report(len(found), f"{entry.name} in {outtype}")
            file = place / f"{number}-{entry.kind}-{Checkpoint(entry.folder).fingerprint()[:12]}-{outtype}.gguf"
            if not file.is_file():
                write_as(entry, file, outtype)
            found.append(Written(entry, outtype, file, file_quality(file, quality)))
    return found


def window_within(entries: Sequence[Entry], window: int | None) -> int:
    """Choose the tokens of a window that all models can see at once.

    Raises:
        InputError: more are asked for than one of them can.
    """
    contexts = {e.name: context_length(read_config(e.folder)) for e in entries}
    name, shortest = min(contexts.items(), key=lambda item: item[1])
    if window is None:
        return min(WINDOW, shortest)
    check(window=window)
    if window > shortest:
        raise InputError(f"--window {window} is more than the longest of '{name}', {shortest} tokens")
    return window


def check_asked(entries: Sequence[Entry], quality: Quality, outtypes: Sequence[str]) -> None:
    """Check before any work what is asked for.

    Raises:
        InputError: gguf is not installed, bad text, no such type, or a K-quant that cannot be made of a model.
    """
    check_gguf()
    from ..formats.gguf.writer import widths

    check_protocol(quality.text, "gptq", quality.window, quality.max_tokens)
    for outtype in outtypes:
        block_size(outtype)
        if outtype in K_QUANTS:
            find_quantiser(outtype)
            for source in (Converted(entry.folder) for entry in entries if entry.kind == "converted"):
                check_k_quant(outtype, *widths(source, gguf_format(source.config, source.has_bias())))


class Timed(NamedTuple):
    """Rows with speeds, and what ran them."""

    rows: list[QuantisedRow]
    version: str


def time_all(
    found: Sequence[Written],
    tokens: Sequence[int],
    python: Path,
    *,
    new: int,
    rounds: int,
    threads: int,
    clock: str,
) -> Timed:
    """Let files take turns; the first is the dense model in the first type."""
    rows, version = [], ""
    for group in races(found):
        files = [written.file for written in group]
        turns = take_turns(files, tokens, python, new=new, rounds=rounds, threads=threads, clock=clock)
        rows, version = [*rows, *rows_of(group, turns, found[0].quality.perplexity)], turns.version
    return Timed(rows, version)


def entries_of(converted: Sequence[str], against: str | None, siblings: Sequence[str]) -> list[Entry]:
    """List the models, dense ones first, having seen that all have one tokenizer.

    Raises:
        InputError: no model of ours, or one with other tokens.
    """
    ours = [Converted(resolve(name)) for name in converted]
    dense = against or dense_origin(converted[0])
    found = [Entry("dense", dense, resolve(dense), None, 1.0)]
    found += [Entry("sibling", name, resolve(name), None, 1.0) for name in siblings]
    for name, source in zip(converted, ours, strict=True):
        c = source.config
        groups = c.n_shared_experts + c.num_experts
        plan = Plan(c.n_shared_experts, c.num_experts_per_tok, groups, c.moe_intermediate_size)
        share = mean_share(c, plan.ffn_active(c.intermediate_size))
        found.append(Entry("converted", name, source.checkpoint.folder, str(plan), share))
    vocabularies = [load_tokenizer(entry.folder).get_vocab() for entry in found]
    for entry, vocabulary in zip(found, vocabularies, strict=True):
        if vocabulary != vocabularies[0]:
            raise InputError(
                f"'{entry.name}' has other tokens than '{found[0].name}', so their perplexities do not compare; leave "
                "it out"
            )
    return found


def write_as(entry: Entry, file: Path, outtype: str) -> None:
    """Write a model as GGUF."""
    from ..formats.gguf.dense import write_dense_gguf
    from ..formats.gguf.writer import write_gguf

    if entry.kind == "converted":
        write_gguf(Converted(entry.folder), file, outtype)
        return
    partial = file.with_suffix(".writing")
    write_dense_gguf(entry.folder, partial, outtype)
    partial.replace(file)


def file_quality(file: Path, quality: Quality) -> MeasuredPerplexity:
    """Measure the perplexity of a GGUF's weights, read back beside it and not into the cache."""
    folder = file.with_suffix(".read")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        unpack_file(file, folder)
        model, tokenizer = load(folder, dtype=torch.float32)  # llama.cpp's activations are float32
        return perplexity(model, tokenizer, **quality._asdict())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        give_back_memory()


def races(found: Sequence[Written]) -> list[list[Written]]:
    """Group files that take turns: all, or where they do not fit in memory together those of each type."""
    sizes = sum(written.file.stat().st_size for written in found)
    if sizes < free_memory(torch.device("cpu")) // 2:
        return [list(found)]
    return [
        [written for written in found if written.outtype == kind] for kind in dict.fromkeys(w.outtype for w in found)
    ]


def rows_of(group: Sequence[Written], turns: Turns, best: float) -> list[QuantisedRow]:
    """Put sizes, perplexities and speeds together; `best` is the perplexity of the dense model in the first type."""
    dense = {written.outtype: number for number, written in enumerate(group) if written.entry.kind == "dense"}
    rows = []
    for number, (entry, outtype, file, quality) in enumerate(group):
        decode, prefill = (turns.rate(number, dense[outtype], kind) for kind in ("decode", "prefill"))
        rows.append(
            QuantisedRow(
                kind=entry.kind, model=entry.name, plan=entry.plan, ffn_active=entry.ffn_active, outtype=outtype,
                bytes=file.stat().st_size, perplexity=quality.perplexity, perplexity_ratio=quality.perplexity / best,
                decode=decode, prefill=prefill, on_front=False,
            )
        )  # fmt: skip
    return rows


def on_front(rows: Sequence[QuantisedRow]) -> list[QuantisedRow]:
    """Mark rows that no other beats in both speed and perplexity."""

    def beaten(row: QuantisedRow) -> bool:
        mine = (row.decode.tokens_per_s, -row.perplexity)
        others = [(other.decode.tokens_per_s, -other.perplexity) for other in rows]
        return any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in others)

    return [QuantisedRow.from_dict(row.to_dict() | {"on_front": not beaten(row)}) for row in rows]
