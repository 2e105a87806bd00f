"""The training of how many experts run: steps over the samples, resumable; the model itself is frozen.

Shapes: N sequences, B of them in a step, L tokens in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..config import AdaptConfig
from ..errors import WorkError
from ..moe.adaptive import attach
from ..moe.counting import mean_experts
from ..results import AdaptStep
from ..routing.selection.base import Counting, Parameters
from ..training.data import Samples
from ..training.expert_load import held_out_loss
from ..training.loop import StepLoop
from ..training.parameters import put_back
from ..training.schedule import schedule
from ..training.state import RunFolder, SavedTraining, StepState
from ..training.trainer import CLIP
from .budget import Calibrated, calibrate
from .learners import Learner
from .learners.base import Batch, Steering
from .policy import Policy

Report = Callable[[AdaptStep, float], None]
"""Called with a step's record and the share of the training that is done."""


@dataclass(kw_only=True)
class AdaptState(StepState):
    """Where a training of `adapt` is; `best_step` is that after which the start was kept."""

    steering: Steering
    budget: float = 0.0
    """Of the selection in training, its budget field."""
    start_budget: float | None = None
    """Of the selection as training started; None before that."""
    start_experts: float = 0.0
    """That ran then for a token."""
    start_loss: float = math.inf
    """Held-out loss of the selection as training started, nats a token."""
    saved: int = 0
    """How often the state was kept."""
    history: list[AdaptStep] = field(default_factory=list)


@dataclass
class Measured:
    """What a selection does on held-out text."""

    loss: float
    """Nats a token."""
    experts_by_layer: list[float]
    experts_by_modality: dict[str, float] | None = None

    @property
    def experts_per_token(self) -> float:
        """Mean over layers."""
        return sum(self.experts_by_layer) / len(self.experts_by_layer)


@torch.no_grad()
def measure(
    model: PreTrainedModel, held: Samples, selection: Counting | None = None, parameters: list[Parameters] | None = None
) -> Measured:
    """Measure held-out loss and experts a token, under a selection or with the model's own number."""
    losses = []

    def run() -> None:
        losses.append(held_out_loss(model, [], held, model.device, model.dtype)[0].item())

    if selection is None:
        experts = mean_experts(model, run)
    else:
        with attach(model, selection, parameters):
            experts = mean_experts(model, run)
    return Measured(losses[0] / held.scored(), experts.by_layer, experts.by_modality)


@dataclass
class AdaptTrainer(StepLoop[AdaptConfig]):
    """One training of a policy."""

    config: AdaptConfig
    learner: Learner
    policy: Policy
    train: Samples
    held: Samples
    accelerator: Accelerator
    folder: RunFolder[AdaptState]
    calibration: Samples

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            list(self.policy.named().values()), lr=1.0, betas=(0.9, 0.99), weight_decay=self.learner.weight_decay
        )

    def begin(self, mean: float, found: SavedTraining[AdaptState] | None) -> AdaptState:
        """Start, or go on from what was kept."""
        if found is None:
            state = AdaptState(steering=Steering(mean=mean))
            batch = self.batch(torch.arange(min(len(self.train), self.config.batch)), 0)
            self.learner.prepare(self.policy, state.steering, batch)
        else:
            state = found.state
            put_back(self.policy.named(), found.tensors)
            self.optimizer.load_state_dict(found.optimizer)
            self.policy.selection = self.policy.selection.with_budget(state.budget)
        if self.accelerator.is_main_process:
            self.folder.start_log(state.history)
        return state

    def fit(self, state: AdaptState, clock: Callable[[], float], report: Report) -> AdaptState:
        """Train until the steps or minutes are over."""
        begun = clock() - state.seconds
        while self.progress(state) < 1:
            progress = self.progress(state)
            if state.start_budget is None and progress >= self.learner.warm_share:
                self.keep_start(state)
            row = replace(self.step(state, progress), step=state.step + 1)
            if not math.isfinite(row.loss):
                raise WorkError(
                    f"step {row.step}: the loss is not finite; lower --learning-rate, or use --dtype float32"
                )
            state.step += 1
            state.seconds = self.agreed(clock() - begun)
            row = replace(row, seconds=state.seconds)
            state.history.append(row)
            if self.accelerator.is_main_process:
                self.folder.log(row)
            if self.progress(state) >= (state.saved + 1) / self.config.evaluations:
                state.saved = int(self.progress(state) * self.config.evaluations)
                self.save(state)
            report(row, min(1.0, self.progress(state)))
        if state.start_budget is None:
            self.keep_start(state)
        return state

    def keep_start(self, state: AdaptState) -> None:
        """Calibrate the selection as it starts, measure it, and keep it: what training must surpass."""
        found = self.calibrated(state.steering.mean)
        measured = measure(self.policy.model, self.held, found.selection, found.parameters)
        state.start_loss, state.start_experts = measured.loss, measured.experts_per_token
        state.start_budget = getattr(found.selection, found.selection.budget)
        state.best_step = state.step
        if self.learner.trains_on_budget:
            self.policy.selection = found.selection
        if self.accelerator.is_main_process:
            self.folder.keep_best(state.step, {n: p.detach().clone() for n, p in self.policy.named().items()})
        self.save(state)

    def calibrated(self, mean: float) -> Calibrated:
        """Bring the selection, as it is now, to the budget."""
        policy = self.policy
        return calibrate(policy.model, policy.rankers, policy.selection, policy.values(), mean, self.calibration)

    def save(self, state: AdaptState) -> None:
        """Keep where the training is."""
        state.budget = getattr(self.policy.selection, self.policy.selection.budget)
        if self.accelerator.is_main_process:
            named = {name: p.detach().clone() for name, p in self.policy.named().items()}
            self.folder.save(state, named, self.optimizer.state_dict())
        self.accelerator.wait_for_everyone()

    def batch(self, index_B: Tensor, step: int) -> Batch:
        """Take sequences, and a generator of the step's and the process's own."""
        part, device = self.train.take(index_B), self.accelerator.device
        seed = (self.config.seed * 1_000_003 + step) * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(seed % 2**63)
        return Batch(part.tokens_NL.to(device), part.scored_NL.to(device), generator)

    def step(self, state: AdaptState, progress: float) -> AdaptStep:
        """Take one step on `batch` sequences, shared by the processes."""
        index_B = self.sequences(state.step)
        own = index_B[self.accelerator.process_index :: self.accelerator.num_processes]
        batch, warm = self.batch(own, state.step), progress < self.learner.warm_share
        share = progress / self.learner.warm_share if warm else progress
        rate = schedule(share, 0.05) if warm or self.learner.decays else 1.0
        given = self.learner.learning_rate if self.config.learning_rate is None else self.config.learning_rate
        unit = state.steering.scale if self.learner.trains_on_budget else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate * given * unit
        take = self.learner.warm_step if warm else self.learner.step
        found = take(self.policy, state.steering, batch, self.update)
        device = self.accelerator.device
        if self.accelerator.num_processes > 1:
            self.agree(state)
        loss, experts, gap = self.accelerator.reduce(torch.tensor(found, device=device), "mean").tolist()
        return AdaptStep(
            step=0, seconds=0.0, loss=loss, experts_per_token=experts, price=state.steering.price or 0.0, gap=gap,
            learning_rate=rate, tokens=len(index_B) * self.train.tokens_NL.shape[1],
        )  # fmt: skip

    def agree(self, state: AdaptState) -> None:
        """Average over processes what each steered by its own sequences."""
        selection, device = self.policy.selection, self.accelerator.device
        own = torch.tensor([state.steering.price or 0.0, getattr(selection, selection.budget)], device=device).double()
        price, budget = self.accelerator.reduce(own, "mean").tolist()
        state.steering.price = price
        self.policy.selection = self.policy.selection.with_budget(budget)

    def update(self) -> None:
        """Average gradients over processes, clip them, and take one step of the optimizer."""
        parameters = [p for p in self.policy.named().values() if p.grad is not None]
        for parameter in parameters:
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
