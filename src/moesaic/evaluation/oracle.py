"""The best number of experts for each token, by enumeration: Duo-LLM's oracle (arXiv 2410.10846).

Shapes: T tokens, B Mixture-of-Experts blocks, C numbers of experts that are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..given import Limit, number
from ..moe.adaptive import BlockRanker, Decision, Ranked, decided_by, moe_blocks_of
from ..progress import Progress
from ..results import OracleInspection
from ..routing.selection.base import Ranking, bisected
from .experts import default_count, inspected_text, make_windows, run_window
from .perplexity import check_losses, window_losses


class OwnRanker(BlockRanker):
    """Ranks by what the router itself says, whatever rule is at work in the model."""

    def rank(
        self, hidden_TD: Tensor, output: tuple[Tensor, ...], reorder: Callable[[Ranking], Tensor] | None = None
    ) -> Ranked:
        if self.scores is not None:
            output = self.block.router.forward(hidden_TD)
        return super().rank(hidden_TD, output, reorder)


@dataclass
class Runs:
    """Runs windows with given numbers of experts, and tells how far it is."""

    model: PreTrainedModel
    rankers: Sequence[BlockRanker]
    tokens_NL: Tensor
    tell: Progress | None
    done: int = 0
    count: int = 0
    """Of all runs of a window."""

    def losses(self, counts_TB: Tensor) -> Tensor:
        """Compute all next-token losses with a number of experts for each token and block, float64 [T].

        Raises:
            WorkError: logits are not finite.
        """
        found = []
        for tokens_L, count_TB in zip(self.tokens_NL, counts_TB.split(self.tokens_NL.shape[1] - 1), strict=True):
            with run_counts(self.rankers, count_TB):
                found.append(window_losses(self.model, tokens_L).cpu().double())
            check_losses(found[-1], "the text", self.model.dtype)
            self.done += 1
            if self.tell:
                self.tell(self.done, self.count, "")
        return torch.cat(found)


def inspect_oracle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    window: int = 128,
    at_most: int | None = None,
    by_layer: bool = False,
    progress: Progress | None = None,
) -> OracleInspection:
    """Compare a model's numbers of experts with the best ones, found by trying all: Duo-LLM (arXiv 2410.10846).

    Each window runs once with every number n of experts, the same in all layers, which gives `loss[t, n]`. The oracle
    takes `argmin_n loss[t, n] + price n`, with the price at which its mean is that of the policy.

    The oracle sees the next token: part of what it wins is luck, and no policy reaches it. In the run with n the tokens
    before t have n experts too, not the numbers chosen for them; what comes of all choices at work at once is
    `oracle_loss_together`. The policy may differ by layer, which the oracle does with `by_layer` only.

    Args:
        model: any Mixture-of-Experts, as `load` gives it; the policy is the adapter or selection at work in it.
        tokenizer: the model's.
        text: a file of text or rows; None is the bundled held-out text of six domains.
        tokens: how many to look at; None is 1,024, or all of a shorter `text`.
        window: tokens in a window.
        at_most: the greatest number that is tried; None is the model's own, or the policy's mean if that is more.
        by_layer: whether to go on from the oracle's numbers with a number for each layer (`greedy`).
        progress: called with (finished, all) runs of a window, and a note.

    Raises:
        InputError: as `inspect_experts`, or `at_most` is less than what runs on average or more than can run.
    """
    blocks = moe_blocks_of(model)
    rankers = [OwnRanker(block) for block in blocks]
    ranks = max(ranker.ranks for ranker in rankers)
    if at_most is not None:
        number("at_most", at_most, Limit(1, ranks, hint="a whole number of experts"))
    cut = make_windows(model, tokenizer, inspected_text(text, tokens, window, 1_024), window)
    policy = [run_window(model, blocks, tokens_L) for tokens_L in cut.tokens_NL]
    counts_T = torch.cat([run.counts_TB for run in policy]).double().mean(1)
    losses_T = torch.cat([run.losses_T for run in policy]).double()
    tried_C = counts_to_try(counts_T, default_count(blocks), at_most, ranks)
    rounds = len(tried_C) + 1 + by_layer * (len(tried_C) * len(blocks) + 1)
    runs = Runs(model, rankers, cut.tokens_NL, progress, count=len(policy) * rounds)
    shape = len(losses_T), len(blocks)
    losses_TC = torch.stack([runs.losses(count.expand(shape)) for count in tried_C], dim=1)
    chosen_T = choose(losses_TC, tried_C, counts_T.mean().item())
    chosen_TB = tried_C[chosen_T][:, None].expand(shape)
    together_T = runs.losses(chosen_TB)
    layered = greedy(runs, chosen_TB, tried_C, counts_T.mean().item()) if by_layer else None
    return OracleInspection(
        text=cut.name, data_sha256=cut.data_sha256, tokens=len(losses_T), window=window,
        default_experts_per_token=default_count(blocks), counts=tried_C.tolist(),
        loss_by_count=losses_TC.mean(0).tolist(), **compare(losses_TC, tried_C, chosen_T, counts_T, losses_T)._asdict(),
        oracle_loss_together=together_T.mean().item(),
        by_layer_loss=None if layered is None else runs.losses(layered).mean().item(),
        experts_by_layer=None if layered is None else layered.double().mean(0).tolist(),
    )  # fmt: skip


def greedy(runs: Runs, start_TB: Tensor, tried_C: Tensor, mean: float) -> Tensor:
    """Choose a number of experts for each token and block, one block after the other, int64 [T, B].

    In each block all numbers are tried for all tokens, the other blocks as they are by then, and the best are taken at
    a mean of at most `mean` (`choose`). The best of one block after the other is not the best of all together.
    """
    counts_TB = start_TB.clone()
    for block in range(counts_TB.shape[1]):
        columns = []
        for count in tried_C:
            tried_TB = counts_TB.clone()
            tried_TB[:, block] = count
            columns.append(runs.losses(tried_TB))
        counts_TB[:, block] = tried_C[choose(torch.stack(columns, dim=1), tried_C, mean)]
    return counts_TB


def counts_to_try(counts_T: Tensor, default: int, at_most: int | None, ranks: int) -> Tensor:
    """List the numbers of experts to try, int64 [C]: from 1, or 0 if the policy runs none somewhere, to `at_most`.

    Raises:
        InputError: the policy runs more on average than `at_most`.
    """
    mean = counts_T.mean().item()
    most = min(ranks, max(default, math.ceil(mean))) if at_most is None else at_most
    if mean > most:
        raise InputError(
            f"--at-most {most} is less than the {mean:.2f} experts a token that run now, which is the oracle's budget; "
            f"give {math.ceil(mean)} or more"
        )
    return torch.arange(0 if counts_T.min() < 1 else 1, most + 1)


@contextmanager
def run_counts(rankers: Sequence[BlockRanker], count_TB: Tensor) -> Iterator[None]:
    """Let each token run a given number of experts in each block, or all that it has, while the context lasts."""

    def decide(block: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
        return Decision(count_TB[:, block].to(hidden_TD.device).clamp(max=ranking.index_TN.shape[1]))

    with decided_by(rankers, decide):
        yield


def choose(losses_TC: Tensor, cost_C: Tensor, mean: float) -> Tensor:
    """Choose a column for each token, of least summed loss at a mean cost of at most `mean`, int64 [T].

    `argmin_c loss[t, c] + price cost[c]`, the price bisected; no choice of the same cost has less loss (H. Everett,
    Operations Research 11, 1963). Of tokens that change at that very price as many change as the budget allows.
    """
    budget = mean * len(losses_TC) + 1e-9

    def at(price: float) -> Tensor:
        return (losses_TC + price * cost_C).argmin(1)

    chosen_T = at(0.0)
    if cost_C[chosen_T].sum() <= budget:
        return chosen_T
    most = 1 + (losses_TC.amax() - losses_TC.amin()).item()
    low, high = bisected(0.0, most, lambda price: bool(cost_C[at(price)].sum() > budget))
    chosen_T, more_T = at(high), at(low)
    rest = budget - cost_C[chosen_T].sum().item()
    for token in (chosen_T != more_T).nonzero()[:, 0].tolist():
        added = (cost_C[more_T[token]] - cost_C[chosen_T[token]]).item()
        if added <= rest:
            chosen_T[token], rest = more_T[token], rest - added
    return chosen_T


class Distance(NamedTuple):
    """How far a policy is from the oracle; the fields of `OracleInspection`."""

    experts_per_token: float
    loss: float
    fixed_loss: float
    oracle_experts_per_token: float
    oracle_loss: float
    policy_tokens: list[int]
    oracle_tokens: list[int]
    same: float
    mean_distance: float
    gap_closed: float | None


def compare(losses_TC: Tensor, cost_C: Tensor, chosen_T: Tensor, counts_T: Tensor, losses_T: Tensor) -> Distance:
    """Compare a policy with the oracle and with one number for all tokens, at the policy's mean."""
    mean, loss = counts_T.mean().item(), losses_T.mean().item()
    fixed, oracle = interpolate(losses_TC.mean(0), cost_C, mean), losses_TC.gather(1, chosen_T[:, None]).mean().item()
    best_T, rounded_T = cost_C[chosen_T], counts_T.round().long().clamp(int(cost_C[0]), int(cost_C[-1]))
    return Distance(
        experts_per_token=mean,
        loss=loss,
        fixed_loss=fixed,
        oracle_experts_per_token=best_T.double().mean().item(),
        oracle_loss=oracle,
        policy_tokens=[int((rounded_T == count).sum()) for count in cost_C],
        oracle_tokens=[int((best_T == count).sum()) for count in cost_C],
        same=(rounded_T == best_T).double().mean().item(),
        mean_distance=(counts_T - best_T).abs().mean().item(),
        gap_closed=(fixed - loss) / (fixed - oracle) if fixed - oracle > 1e-9 else None,
    )


def interpolate(loss_C: Tensor, cost_C: Tensor, mean: float) -> float:
    """Interpolate a loss linearly between the two whole numbers of experts around a mean."""
    below = min(max(0, math.floor(mean) - int(cost_C[0])), len(cost_C) - 1)
    above = min(below + 1, len(cost_C) - 1)
    return torch.lerp(loss_C[below], loss_C[above], mean - cost_C[below].item()).item()
