"""Distillation of the model with its own number of experts: gradients through counts, straight-through; moesaic's own.

Shapes: T tokens, N ranks of experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ...moe.adaptive import Decision
from ...routing.selection.base import LayerSample, Learning, Ranking
from ...training.losses import Objective
from ..policy import Policy
from .base import Batch, Learner, Outcome, Steering, Update, likelihoods

TEACHER_LOGITS = 64
"""That are kept of the teacher for each token; the rest of the probability is one more class."""
EXPLORED = 0.02
"""Probability to run from which a rank is run, with factor 0, for its gradient."""
MICRO_TOKENS = 1_024
"""That run forth and back at once."""
SMOOTHING = 0.9
"""Of price and budget over steps."""


class Passed(NamedTuple):
    """What some sequences gave, forth and back."""

    loss: float
    """Summed over tokens, nats."""
    gap: float
    """Next-token loss above the teacher's, summed over tokens, nats."""
    layers: list[tuple[Tensor, Tensor]]
    """The evidence, and the leaf of the same values that has its gradient."""


@dataclass(frozen=True, kw_only=True)
class Distill(Learner):
    """`KL(default number of experts || chosen number) + λ E[n]`, the gradient of a count that of its probability.

    Each rank's weight is multiplied by `runs + keep - stop_gradient(keep)`, `keep` its probability to run, so that one
    backward pass says what every expert near the margin was worth to the prediction of this and all later tokens. λ is
    chosen in each step so that raising all thresholds together gains nothing: what is learnt is where to spend.
    """

    learning_rate: ClassVar[float] = 1e-3
    through_experts: ClassVar[bool] = True

    temperature: Annotated[float, Field(gt=0)] = 0.3
    """Width of the margin in which ranks learn, in standard deviations of the evidence."""

    def prepare(self, policy: Policy, steering: Steering, batch: Batch) -> None:
        spread: list[Tensor] = []

        def see(number: int, ranking: Ranking, hidden_TD: Tensor) -> None:
            evidence_TN = policy.selection.evidence(ranking, hidden_TD, policy.parameters[number])
            spread.append(evidence_TN[:, : 2 * policy.default].std())

        with torch.no_grad():
            policy.logits(batch.tokens_NL, policy.watch(see))
        found = float(torch.stack(spread).mean())
        steering.scale = found if found > 0 else 1.0

    def step(self, policy: Policy, steering: Steering, batch: Batch, update: Update) -> Outcome:
        selection, scored = policy.selection, max(1, int(batch.scored_NL[:, 1:].sum()))
        assert isinstance(selection, Learning)
        loss, gap, pull, cost = 0.0, 0.0, 0.0, 0.0
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        samples: list[LayerSample] = []
        size = max(1, MICRO_TOKENS // batch.tokens_NL.shape[1])
        for tokens_ML, scored_ML in zip(batch.tokens_NL.split(size), batch.scored_NL.split(size), strict=True):
            part, worse, layers = self.some(policy, tokens_ML, scored_ML, steering.scale, samples)
            loss, gap = loss + part / scored, gap + worse / scored
            for evidence_TN, leaf_TN in layers:
                gradient_TN = leaf_TN.grad if leaf_TN.grad is not None else torch.zeros_like(leaf_TN)
                count_TN = count_gradient(selection, leaf_TN.detach(), self.temperature * steering.scale)
                looser_TN = selection.looser(leaf_TN.detach())
                pull += float((gradient_TN * looser_TN).sum())
                cost += float((count_TN * looser_TN).sum())
                seen.append((evidence_TN, gradient_TN / scored, count_TN / scored))
        price = max(0.0, -pull / max(cost, 1e-12))
        steering.price = price if steering.price is None else SMOOTHING * steering.price + (1 - SMOOTHING) * price
        for evidence_TN, gradient_TN, count_TN in seen:
            evidence_TN.backward(gradient_TN + steering.price * count_TN)
        update()
        fitted, _ = selection.fit(samples, steering.mean)
        before, after = (getattr(s, selection.budget) for s in (selection, fitted))
        policy.selection = policy.selection.with_budget(SMOOTHING * before + (1 - SMOOTHING) * after)
        counts = [selection.within(selection.count(s.evidence_TN), s.evidence_TN.shape[1], s.default) for s in samples]
        return Outcome(loss, float(torch.cat(counts).double().mean()), gap)

    def some(
        self, policy: Policy, tokens_ML: Tensor, scored_ML: Tensor, scale: float, samples: list[LayerSample]
    ) -> Passed:
        """Run some sequences forth and back."""
        selection = policy.selection
        assert isinstance(selection, Learning)
        layers: list[tuple[Tensor, Tensor]] = []

        def decide(number: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
            still = ranking.each(Tensor.detach)
            evidence_TN = selection.evidence(still, hidden_TD.detach(), policy.parameters[number])
            leaf_TN = evidence_TN.detach().requires_grad_()
            layers.append((evidence_TN, leaf_TN))
            default = policy.rankers[number].block.num_experts_per_tok
            samples.append(LayerSample(still, evidence_TN.detach(), default, {}))
            return relaxed(selection, leaf_TN, default, self.temperature * scale)

        with torch.no_grad():
            teacher_MLV = policy.logits(tokens_ML, None)
            base = likelihoods(teacher_MLV, tokens_ML)
            kept = min(TEACHER_LOGITS, teacher_MLV.shape[-1])
            top = [logits.float().log_softmax(-1).topk(kept, dim=-1) for logits in teacher_MLV]
            del teacher_MLV
        with torch.enable_grad():
            logits_MLV = policy.logits(tokens_ML, decide)
            target_ML, counts_ML = (part.roll(-1, dims=1) for part in (tokens_ML, scored_ML))
            counts_ML[:, -1] = False  # nothing follows a sequence's last token
            likeliest = torch.cat([t.values for t in top]), torch.cat([t.indices for t in top])
            flat = logits_MLV.flatten(0, 1), target_ML.flatten(), counts_ML.flatten()
            loss: Tensor = Objective.apply(*flat, likeliest, 0.0, 1.0)
            loss.backward()
        gap = (base - likelihoods(logits_MLV.detach(), tokens_ML)) * scored_ML[:, 1:]
        return Passed(float(loss.detach()), float(gap.sum()), layers)


def relaxed(selection: Learning, evidence_TN: Tensor, default: int, temperature: float) -> Decision:
    """Decide as a selection does, with factors of 1 and 0 that have the gradient of the probability to run."""
    ranks = evidence_TN.shape[1]
    count_T = selection.within(selection.count(evidence_TN.detach()), ranks, default)
    rank_N = torch.arange(ranks, device=evidence_TN.device)
    runs_TN = (rank_N < count_T[:, None]).float()
    keep_TN = selection.keep(evidence_TN, temperature)
    certain_N = rank_N < selection.at_least
    keep_TN = keep_TN.where(~certain_N, 1.0)
    explored_T = (keep_TN.detach() > EXPLORED).sum(-1)
    most = int(selection.within(torch.tensor(ranks), ranks, default))
    return Decision(explored_T.maximum(count_T).clamp(max=most), runs_TN + keep_TN - keep_TN.detach())


def count_gradient(selection: Learning, evidence_TN: Tensor, temperature: float) -> Tensor:
    """Compute the gradient of the expected number of experts by the evidence, [T, N]."""
    with torch.enable_grad():
        leaf_TN = evidence_TN.clone().requires_grad_()
        rank_N = torch.arange(leaf_TN.shape[1], device=leaf_TN.device)
        free_N = (rank_N >= selection.at_least) & (rank_N < (selection.at_most or len(rank_N)))
        expected = (selection.keep(leaf_TN, temperature) * free_N).sum()
        return torch.autograd.grad(expected, leaf_TN)[0]
