"""Proximal policy optimisation without a critic: Ada-K's own training (ICLR 2025, arXiv 2410.10456, §3).

Shapes: T tokens, D hidden size, N numbers of experts, S layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import InputError
from ...moe.adaptive import Decision
from ...routing.selection.ada_k import AdaK
from ...routing.selection.base import LayerSample, Learning, Ranking
from ...routing.selection.top_p import TopP
from ..policy import Policy
from .base import Batch, Learner, Outcome, Steering, Update, likelihoods

STEERING = 0.2
"""How far the price moves with the share of experts above the budget, a step."""


class Drawn(NamedTuple):
    """What one layer's policy drew."""

    hidden_TD: Tensor
    index_T: Tensor
    """Index of the number drawn among the policy's, which are 1, 2, ..."""
    log_prob_T: Tensor
    ran_T: Tensor
    """Experts that ran: that number within `at_least` and `at_most`."""


@dataclass(frozen=True, kw_only=True)
class PPO(Learner):
    """`-E min(r A, clip(r, 1 - ε, 1 + ε) A) + λ E[n]`, A the log-likelihood won by the counts that were drawn.

    Two forwards a step, with the default number of experts and with drawn ones; further epochs reuse what they gave.
    The paper gives neither γ nor ε; λ, 0.003 there, is steered so that the wanted number of experts is expected.
    """

    weight_decay: ClassVar[float] = 0.1
    decays: ClassVar[bool] = False
    trains_on_budget: ClassVar[bool] = False

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount over layers: of `γ^(L - l)` in layer l of L."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε: how far the ratio r may leave 1."""
    epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over what was drawn."""
    price: Annotated[float, Field(gt=0)] = 3e-3
    """λ at first, in nats an expert; then it is steered to the wanted number."""
    warm: Literal["p", "k", "none"] = "p"
    """Labels of the warm start: as many experts as reach a share p* of the router's mass (P-Warm), or all the default
    number (K-Warm)."""
    warm_budget: bool = False
    """Whether p* is chosen for the wanted number of experts; the paper's is for the default one."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the training that is the warm start."""

    def check(self, selection: Learning) -> None:
        if not isinstance(selection, AdaK):
            raise InputError(f"--learner ppo trains ada-k, not {type(selection).__name__}; use --learner distill")

    @property
    def warm_share(self) -> float:
        return 0.0 if self.warm == "none" else self.share

    def prepare(self, policy: Policy, steering: Steering, batch: Batch) -> None:
        steering.price = self.price
        if self.warm != "p":
            return
        samples: list[LayerSample] = []
        rule = TopP()

        def see(number: int, ranking: Ranking, hidden_TD: Tensor) -> None:
            default = policy.rankers[number].block.num_experts_per_tok
            samples.append(LayerSample(ranking, rule.evidence(ranking, hidden_TD, {}), default, {}))

        with torch.no_grad():
            policy.logits(batch.tokens_NL, policy.watch(see))
        fitted, _ = rule.fit(samples, steering.mean if self.warm_budget else policy.default)
        steering.scale = fitted.p

    def warm_step(self, policy: Policy, steering: Steering, batch: Batch, update: Update) -> Outcome:
        rule, losses, counts = TopP(p=steering.scale), [], []

        def see(number: int, ranking: Ranking, hidden_TD: Tensor) -> None:
            label_T = torch.full((len(hidden_TD),), policy.rankers[number].block.num_experts_per_tok)
            if self.warm == "p":
                label_T = rule.counts(ranking, hidden_TD, {}, policy.default)
            seen.append((number, ranking, hidden_TD, label_T.to(hidden_TD.device)))

        seen: list[tuple[int, Ranking, Tensor, Tensor]] = []
        with torch.no_grad():
            policy.logits(batch.tokens_NL, policy.watch(see))
        for number, ranking, hidden_TD, label_T in seen:
            logits_TN = policy.selection.evidence(ranking, hidden_TD, policy.parameters[number])
            losses.append(cross_entropy(logits_TN, label_T - 1))
            counts.append(label_T.double().mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        update()
        return Outcome(loss.item(), float(torch.stack(counts).mean()), 0.0)

    def step(self, policy: Policy, steering: Steering, batch: Batch, update: Update) -> Outcome:
        drawn: list[Drawn] = []

        def draw(number: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
            logits_TN = policy.selection.evidence(ranking, hidden_TD, policy.parameters[number])
            index_T1 = logits_TN.softmax(-1).cpu().multinomial(1, generator=batch.generator).to(logits_TN.device)
            log_prob_T = logits_TN.log_softmax(-1).gather(-1, index_T1)[:, 0]
            ran_T = policy.selection.within(1 + index_T1[:, 0], logits_TN.shape[1], policy.default)
            drawn.append(Drawn(hidden_TD, index_T1[:, 0], log_prob_T, ran_T))
            return Decision(ran_T)

        with torch.no_grad():
            base = likelihoods(policy.logits(batch.tokens_NL, None), batch.tokens_NL)
            won = likelihoods(policy.logits(batch.tokens_NL, draw), batch.tokens_NL) - base
        counts_T = batch.scored_NL[:, 1:].float()
        won_T = torch.nn.functional.pad(
            won * counts_T, (0, 1)
        ).flatten()  # the last token of a sequence predicts nothing
        scored_T = torch.nn.functional.pad(counts_T, (0, 1)).flatten()
        price = self.price if steering.price is None else steering.price
        loss, expected = torch.zeros(()), 0.0
        for _ in range(self.epochs):
            loss, mean = self.loss(policy, drawn, won_T, scored_T, price)
            loss.backward()
            update()
            expected = mean
        steering.price = steer(price, expected, steering.mean)
        gap = -float(won_T.sum() / scored_T.sum().clamp(min=1))
        ran = float(torch.stack([d.ran_T.double().mean() for d in drawn]).mean())
        return Outcome(loss.item(), ran, gap)

    def loss(
        self, policy: Policy, drawn: list[Drawn], won_T: Tensor, scored_T: Tensor, price: float
    ) -> tuple[Tensor, float]:
        """Compute the loss over all layers, and the mean number of experts that the policy expects."""
        depth, terms, expected = len(drawn), [], []
        for number, layer in enumerate(drawn):
            weight_ND = policy.parameters[number]["weight"]
            logits_TN = torch.nn.functional.linear(layer.hidden_TD.float(), weight_ND)
            log_probs_TN = logits_TN[:, : policy.rankers[number].ranks].log_softmax(-1)
            advantage_T = self.gamma ** (depth - 1 - number) * won_T
            ratio_T = (log_probs_TN.gather(-1, layer.index_T[:, None])[:, 0] - layer.log_prob_T).exp()
            gain_T = clipped_gain(ratio_T, advantage_T, self.clip)
            terms.append(-(gain_T * scored_T).sum() / scored_T.sum().clamp(min=1))
            ranks = log_probs_TN.shape[1]
            number_N = torch.arange(1, ranks + 1, device=log_probs_TN.device)
            number_N = policy.selection.within(number_N, ranks, policy.default)
            expected.append((log_probs_TN.exp() * number_N).sum(-1).mean())
        mean = torch.stack(expected).mean()
        return torch.stack(terms).mean() + price * mean, mean.item()


def clipped_gain(ratio_T: Tensor, advantage_T: Tensor, clip: float) -> Tensor:
    """Compute `min(r A, clip(r, 1 - ε, 1 + ε) A)`, PPO's surrogate (arXiv 1707.06347, §3)."""
    return torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - clip, 1 + clip) * advantage_T)


def steer(price: float, mean: float, wanted: float) -> float:
    """Raise the price of an expert where more run than wanted, lower it where fewer do."""
    return price * 2.0 ** (STEERING * max(-5.0, min(5.0, 10 * (mean / wanted - 1))))
