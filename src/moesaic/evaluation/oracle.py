"""The best number of experts for each token, by enumeration: Duo-LLM's oracle (arXiv 2410.10846).

Shapes: T tokens, B Mixture-of-Experts blocks, C numbers of experts that are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..given import Limit, number
from ..moe.adaptive import BlockRanker, Decision, Ranked, decided_by, moe_blocks_of
from ..results import OracleInspection
from ..routing.selection.base import Ranking
from .experts import default_count, make_windows, read_text, run_window
from .perplexity import check_losses, window_losses

BISECTIONS = 60


class OwnRanker(BlockRanker):
    """Ranks by what the router itself says, whatever rule is at work in the model."""

    def rank(self, hidden_TD: Tensor, output: tuple[Tensor, ...]) -> Ranked:
        if self.scores is not None:
            output = self.block.router.forward(hidden_TD)
        return super().rank(hidden_TD, output)


def inspect_oracle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    window: int = 128,
    at_most: int | None = None,
    progress: Callable[..., None] | None = None,
) -> OracleInspection:
    """Compare a model's numbers of experts with the best ones, found by trying all: Duo-LLM (arXiv 2410.10846).

    Each window runs once with every number n of experts, the same in all layers, which gives `loss[t, n]`. The oracle
    takes `argmin_n loss[t, n] + price n`, with the price at which its mean is that of the policy.

    Three things to know. The oracle sees the next token, so that part of what it wins is luck, and no policy reaches
    it. In the run with n the tokens before t have n experts too, not the numbers chosen for them; what comes of all
    choices at work at once is `oracle_loss_together`. And the policy may differ by layer, which the oracle does not.

    Args:
        model: any Mixture-of-Experts, as `load` gives it; the policy is the adapter or selection at work in it.
        tokenizer: the model's.
        text: a file of text or rows; None is the bundled held-out text of six domains.
        tokens: how many to look at; None is 1,024, or all of a shorter `text`.
        window: tokens in a window.
        at_most: the greatest number that is tried; None is the model's own, or the policy's mean if that is more.
        progress: called with (finished, all) runs of a window.

    Raises:
        InputError: as `inspect_experts`, or `at_most` is less than what the policy runs on average or more than there
            are experts.
    """
    blocks = moe_blocks_of(model)
    rankers = [OwnRanker(block) for block in blocks]
    ranks = max(ranker.ranks for ranker in rankers)
    if at_most is not None:
        number("at_most", at_most, Limit(1, ranks, hint="how many experts a token can run, a whole number"))
    cut = make_windows(model, tokenizer, read_text(text, tokens, window, 1_024), window)
    policy = [run_window(model, blocks, tokens_L) for tokens_L in cut.tokens_NL]
    counts_T = torch.cat([run.counts_TB for run in policy]).double().mean(1)
    losses_T = torch.cat([run.losses_T for run in policy]).double()
    tried = counts_to_try(counts_T, default_count(blocks), at_most, ranks)
    done, runs = len(policy), len(policy) * (len(tried) + 2)

    def run(counts: Tensor) -> Tensor:
        """Compute all losses with a number of experts for each token, int64 [T]."""
        nonlocal done
        found = []
        for tokens_L, count_T in zip(cut.tokens_NL, counts.split(window - 1), strict=True):
            with run_counts(rankers, count_T):
                found.append(window_losses(model, tokens_L).cpu().double())
            check_losses(found[-1], "the text", model.dtype)
            done += 1
            if progress:
                progress(done, runs)
        return torch.cat(found)

    losses_TC = torch.stack([run(torch.full((len(losses_T),), count)) for count in tried], dim=1)
    chosen_T = choose(losses_TC, torch.tensor(tried), counts_T.mean().item())
    together_T = run(torch.tensor(tried)[chosen_T])
    return OracleInspection(
        text=cut.name, data_sha256=cut.data_sha256, tokens=len(losses_T), window=window,
        default_experts_per_token=default_count(blocks), counts=tried, loss_by_count=losses_TC.mean(0).tolist(),
        **compare(losses_TC, torch.tensor(tried), chosen_T, counts_T, losses_T)._asdict(),
        oracle_loss_together=together_T.mean().item(),
    )  # fmt: skip


def counts_to_try(counts_T: Tensor, default: int, at_most: int | None, ranks: int) -> list[int]:
    """List the numbers of experts to try: from 1, or 0 if the policy runs none somewhere, to `at_most`.

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
    return list(range(0 if counts_T.min() < 1 else 1, most + 1))


@contextmanager
def run_counts(rankers: Sequence[BlockRanker], count_T: Tensor) -> Iterator[None]:
    """Let each token run a given number of experts in all blocks, or all that a block has, while the context lasts."""

    def decide(block: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
        return Decision(count_T.to(hidden_TD.device).clamp(max=ranking.index_TN.shape[1]))

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
    low, high = 0.0, 1 + (losses_TC.amax() - losses_TC.amin()).item()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_C[at(middle)].sum() > budget else (low, middle)
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
