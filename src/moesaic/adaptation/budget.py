"""Make a selection run a wanted number of experts on average, on calibration tokens.

Shapes: N sequences, L tokens in one, T tokens, R ranks of experts, K experts that the router takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.modality import IS_IMAGE, tell_modality
from ..moe.adaptive import BlockRanker, Decision, decided_by
from ..routing.selection.base import Counting, LayerSample, Parameters, Ranking
from ..training.data import Samples
from ..training.expert_load import micro_batches

ROUNDS, TOLERANCE = 6, 0.005
"""Of calibration: hidden states change with the number of experts, so it is repeated until the number agrees."""
ERROR_TOKENS = 256
"""Of each layer, on which the error of fewer experts is measured."""


class Calibrated(NamedTuple):
    """A selection that runs the wanted number of experts."""

    selection: Counting
    parameters: list[Parameters]
    experts_per_token: float
    """On the calibration tokens."""


class Recorder:
    """Runs a model under a selection and keeps what its rule saw in each layer."""

    def __init__(self, rankers: Sequence[BlockRanker], selection: Counting, parameters: Sequence[Parameters]) -> None:
        self.rankers, self.selection, self.parameters = rankers, selection, parameters
        self.rankings: list[list[Ranking]] = [[] for _ in rankers]
        self.evidence: list[list[Tensor]] = [[] for _ in rankers]
        self.errors: list[list[Tensor]] = [[] for _ in rankers]
        self.run_experts, self.tokens = 0, 0
        self.is_image: list[Tensor] = []
        """Which tokens are parts of pictures, as far as the model tells."""

    def decide(self, number: int, ranking: Ranking, hidden_TD: Tensor) -> Decision:
        """Let the model run its own number of experts in the first round, later the selection's."""
        default = self.rankers[number].block.num_experts_per_tok
        if number == 0 and (is_image_T := IS_IMAGE.get()) is not None:
            self.is_image.append(is_image_T.cpu())
        evidence_TR = self.selection.evidence(ranking, hidden_TD, self.parameters[number])
        self.rankings[number].append(ranking.each(Tensor.cpu))
        self.evidence[number].append(evidence_TR.cpu())
        if self.selection.needs_errors and sum(map(len, self.errors[number])) < ERROR_TOKENS:
            self.errors[number].append(count_errors(self.rankers[number], ranking, hidden_TD[-ERROR_TOKENS:]))
        count_T = self.selection.counts(ranking, hidden_TD, self.parameters[number], default)
        self.run_experts += int(count_T.sum())
        self.tokens += len(count_T)
        return Decision(count_T)

    def mean(self) -> float:
        """Average the number of experts that ran, over tokens and layers."""
        return self.run_experts / max(1, self.tokens)

    def samples(self) -> list[LayerSample]:
        """Give what each layer's rule saw."""
        made, is_image_T = [], torch.cat(self.is_image) if self.is_image else None
        for number, ranker in enumerate(self.rankers):
            kept = self.rankings[number]
            index, scores, shares = (torch.cat(parts) for parts in zip(*(ranking[:3] for ranking in kept), strict=True))
            errors = torch.cat(self.errors[number]).mean(0) if self.errors[number] else None
            ranking = Ranking(index, scores, shares, kept[0].logarithmic)
            evidence = torch.cat(self.evidence[number])
            made.append(
                LayerSample(
                    ranking, evidence, ranker.block.num_experts_per_tok, self.parameters[number], errors, is_image_T
                )
            )
        return made


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    rankers: Sequence[BlockRanker],
    selection: Counting,
    parameters: Sequence[Parameters],
    mean: float,
    samples: Samples,
) -> Calibrated:
    """Find the selection's budget field, and what it calibrates in each layer, so that `mean` experts run a token.

    Where it cannot be met, as by one number for all tokens, the nearest is taken.
    """
    best = Calibrated(selection, list(parameters), float("inf"))
    now = best
    for _ in range(ROUNDS):
        recorder = Recorder(rankers, now.selection, now.parameters)
        told = tell_modality(model) if now.selection.by_modality else nullcontext()
        with told, decided_by(rankers, recorder.decide):
            run(model, samples)
        found = Calibrated(now.selection, now.parameters, recorder.mean())
        if abs(found.experts_per_token - mean) < abs(best.experts_per_token - mean):
            best = found
        if abs(found.experts_per_token / mean - 1) <= TOLERANCE:
            break
        fitted, values = found.selection.fit(recorder.samples(), mean)
        if fitted == now.selection and _same(values, now.parameters):
            break
        now = Calibrated(fitted, values, float("inf"))
    return best


def _same(one: Sequence[Parameters], other: Sequence[Parameters]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[n].cpu(), b[n].cpu()) for n in a)
        for a, b in zip(one, other, strict=True)
    )


def run(model: PreTrainedModel, samples: Samples) -> None:
    """Run a model on sequences, a few at a time, for what its hooks see."""
    for batch in micro_batches(samples):
        inputs = batch.inputs(model.device, model.dtype)
        model(input_ids=batch.tokens_NL.to(model.device), **inputs, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def count_errors(ranker: BlockRanker, ranking: Ranking, hidden_TD: Tensor) -> Tensor:
    """Compute `‖y_K - y_k‖² / ‖y_K‖²` for k = 1 ... K, y_k the output of the first k ranks, float32 [T, K].

    Raises:
        InputError: the experts cannot be run one by one.
    """
    block, tokens = ranker.block, len(hidden_TD)
    last = ranking.each(lambda part: part[-tokens:])
    default = min(block.num_experts_per_tok, ranker.ranks)
    outputs = []
    try:
        for slot in range(default):
            index_T1 = last.index_TN[:, slot : slot + 1]
            ones_T1 = torch.ones_like(index_T1, dtype=hidden_TD.dtype)
            outputs.append(block.experts(hidden_TD, index_T1, ones_T1).float())
    except TypeError as error:  # Llama-4's experts take tokens that are weighed before
        name = type(block.module).__name__
        raise InputError(f"the experts of {name} cannot be run one by one; use another --method") from error
    each_KTD = torch.stack(outputs)
    partial = [
        torch.einsum("ktd,tk->td", each_KTD[:count], ranker.weights(last, count)) for count in range(1, default + 1)
    ]
    size_T = partial[-1].square().sum(-1).clamp(min=1e-12)
    return torch.stack([(partial[-1] - part_TD).square().sum(-1) / size_T for part_TD in partial], dim=1).cpu()


def check_budget(mean: float, default: int, selection: Counting) -> None:
    """Check that so many experts can run on average.

    Raises:
        InputError: they cannot.
    """
    most = min(default, selection.at_most or default)
    if selection.at_least > most:
        raise InputError(
            f"at_least {selection.at_least} is more than the {most} experts that a token may run; lower it"
        )
    if not selection.at_least <= mean <= most:
        raise InputError(
            f"--target-active {mean / default:.3g} is {mean:.3g} of the model's {default} experts a token; give a "
            f"share from {selection.at_least / default:.3g} to {most / default:.3g}"
        )
