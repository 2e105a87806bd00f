"""How many experts run for which tokens, of any Mixture-of-Experts, whatever decides it.

Shapes: N windows, L tokens of one, T tokens, B Mixture-of-Experts blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import Document
from ..calibration.text import bundled, by_domain, read_documents, text_hash
from ..calibration.windows import check_tokens, labelled_windows
from ..checkpoint.reader import Checkpoint
from ..errors import InputError
from ..formats.converted import without_weights
from ..given import check, optional_path
from ..models.families import context_length, embedding_rows
from ..models.moe_block import MoEBlock, Routing
from ..moe.adaptive import moe_blocks_of
from ..progress import Progress
from ..results import ExpertGroup, ExpertsInspection, Passage, PassageToken
from .perplexity import BUNDLED, check_losses, window_losses
from .tokens import KINDS, TokenText, token_texts

QUARTERS = ("easiest quarter", "second quarter", "third quarter", "hardest quarter")
PASSAGE_TOKENS = 192


class Windows(NamedTuple):
    """The text that a model is looked at on."""

    tokens_NL: Tensor
    domain_N: Tensor
    domains: list[str]
    name: str
    data_sha256: str


class Run(NamedTuple):
    """What a window's run showed, of all tokens but the last."""

    counts_TB: Tensor
    """Routed experts that ran, int64."""
    losses_T: Tensor
    """Of predicting the next token, nats, float32."""


def inspect_experts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    window: int = 256,
    progress: Progress | None = None,
) -> ExpertsInspection:
    """Count the routed experts that each token runs: by layer, kind of token, domain and difficulty.

    Args:
        model: any Mixture-of-Experts, as `load` gives it, with an adapter or a selection at work or not.
        tokenizer: the model's.
        text: a file of text or rows; None is the bundled held-out text of six domains.
        tokens: how many to look at; None is 4,096, or all of a shorter `text`.
        window: tokens in a window.
        progress: called with (finished, all) windows, and a note.

    Raises:
        InputError: the model is dense, no such text, text shorter than one window, or a window beyond the model's.
    """
    blocks = moe_blocks_of(model)
    cut = make_windows(model, tokenizer, inspected_text(text, tokens, window), window)
    runs, texts = [], []
    for done, tokens_L in enumerate(cut.tokens_NL):
        runs.append(run_window(model, blocks, tokens_L))
        texts.append(token_texts(tokens_L[:-1].tolist(), tokenizer))
        if progress:
            progress(done + 1, len(cut.tokens_NL), "")
    counts_TB, losses_T = (torch.cat(parts) for parts in zip(*runs, strict=True))
    kind_T = torch.tensor([KINDS.index(token.kind) for window_texts in texts for token in window_texts])
    domain_T = cut.domain_N.repeat_interleave(window - 1)
    quarter_T = losses_T.argsort().argsort() * len(QUARTERS) // len(losses_T)
    return ExpertsInspection(
        text=cut.name,
        data_sha256=cut.data_sha256,
        tokens=len(losses_T),
        window=window,
        default_experts_per_token=default_count(blocks),
        num_experts=max(block.num_experts for block in blocks),
        varies=bool((counts_TB != counts_TB[0]).any()),
        experts_per_token=counts_TB.double().mean().item(),
        loss=losses_T.double().mean().item(),
        layers=[block.layer for block in blocks],
        experts_by_layer=counts_TB.double().mean(0).tolist(),
        by_kind=groups(kind_T, KINDS, counts_TB, losses_T),
        by_domain=groups(domain_T, cut.domains, counts_TB, losses_T),
        by_difficulty=groups(quarter_T, QUARTERS, counts_TB, losses_T),
        passage=make_passage(blocks, runs[0], texts[0]),
    )


def inspect_passage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Passage:
    """Count the experts that each token of one passage of the bundled held-out text runs in each layer.

    Raises:
        InputError: the model is dense.
    """
    blocks = moe_blocks_of(model)
    window = min(PASSAGE_TOKENS + 1, context_length(model.config))
    tokens_L = make_windows(
        model, tokenizer, InspectedText(bundled("heldout"), BUNDLED, window, False), window
    ).tokens_NL[0]
    return make_passage(blocks, run_window(model, blocks, tokens_L), token_texts(tokens_L[:-1].tolist(), tokenizer))


@dataclass(frozen=True)
class InspectedText:
    """Documents that were read, and how many tokens of them are wanted."""

    documents: Sequence[Document]
    name: str
    tokens: int
    or_less: bool
    """Whether a text that has fewer tokens will do."""


def inspected_text(text: str | Path | None, tokens: int | None, window: int, default: int = 4_096) -> InspectedText:
    """Read the text to look at, before any costly work.

    Raises:
        InputError: no such file, nothing in it, or numbers that are none.
    """
    given = optional_path(text)
    check(tokens=tokens, window=window)
    if tokens is not None and tokens < window:
        raise InputError(f"--tokens {tokens} is less than one window of {window}; lower --window")
    wanted = max(default, window) if tokens is None else tokens
    if given is None:
        return InspectedText(bundled("heldout"), BUNDLED, wanted, or_less=False)
    if not isfile(given):
        raise InputError(f"no text file '{given}'")
    return InspectedText(read_documents([str(given)]), given.name, wanted, or_less=tokens is None)


def make_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: InspectedText, window: int
) -> Windows:
    """Cut a text into windows.

    Raises:
        InputError: the text is shorter than one, or the model's context is, or a token has no embedding.
    """
    if window > (longest := context_length(model.config)):
        raise InputError(f"--window {window} is more than the model's longest, {longest} tokens")
    try:
        tokens_NL, domain_N = labelled_windows(text.documents, tokenizer, text.tokens, window)
    except InputError:
        if not text.or_less:
            raise
        tokens_NL, domain_N = labelled_windows(text.documents, tokenizer, None, window)
    check_tokens(tokens_NL, embedding_rows(model), tokenizer)
    domains = [group[0].domain for group in by_domain(text.documents)]
    return Windows(tokens_NL, domain_N, domains, text.name, text_hash(text.documents))


def default_count(blocks: Sequence[MoEBlock]) -> int:
    """Tell how many experts the routers take by themselves, the most of all blocks."""
    return max(block.num_experts_per_tok for block in blocks)


def check_mixture(folder: Path) -> None:
    """Check by its configuration that a model has experts, before it is loaded.

    Raises:
        InputError: it is dense.
    """
    moe_blocks_of(without_weights(Checkpoint(folder)))


def run_window(model: PreTrainedModel, blocks: Sequence[MoEBlock], tokens_L: Tensor) -> Run:
    """Run one window, and see what each router decides in the end.

    Raises:
        WorkError: logits are not finite.
    """
    counts: list[Tensor] = [torch.empty(0)] * len(blocks)

    def watch(number: int, experts: int) -> Callable[[Tensor, Routing], None]:
        def see(hidden_TD: Tensor, routing: Routing) -> None:
            counts[number] = routing.runs(experts).sum(-1).cpu()

        return see

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.watch(watch(number, block.num_experts)).remove)
        losses_T = window_losses(model, tokens_L).cpu()
    check_losses(losses_T, "the text", model.dtype)
    return Run(torch.stack(counts, dim=1), losses_T)


def groups(of_T: Tensor, names: Sequence[str], counts_TB: Tensor, losses_T: Tensor) -> dict[str, ExpertGroup]:
    """Average over the tokens of each group; groups without tokens are left out."""
    found = {}
    for number, name in enumerate(names):
        of = of_T == number
        if of.any():
            found[name] = ExpertGroup(
                tokens=int(of.sum()),
                experts_per_token=counts_TB[of].double().mean().item(),
                loss=losses_T[of].double().mean().item(),
            )
    return found


def make_passage(blocks: Sequence[MoEBlock], run: Run, texts: Sequence[TokenText]) -> Passage:
    """Take the first tokens of a window as a passage to be shown."""
    tokens = [
        PassageToken(text=token.text, kind=token.kind, experts=counts, loss=loss)
        for token, counts, loss in zip(texts, run.counts_TB.tolist(), run.losses_T.tolist(), strict=True)
    ]
    return Passage(
        layers=[block.layer for block in blocks],
        default_experts_per_token=default_count(blocks),
        tokens=tokens[:PASSAGE_TOKENS],
    )
