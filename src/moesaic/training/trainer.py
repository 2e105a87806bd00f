"""The training loop: steps over the samples, held-out loss on the way, the best state kept, resumable.

Shapes: N sequences, B of them in a step, L tokens in one, T = N L tokens, V vocabulary, E routed experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from ..config import FinetuneConfig
from ..models.families import decoder_layers, ffn_name
from ..models.moe_block import count_load
from ..moe.block import MoE
from ..moe.modeling import moe_blocks, moe_layers
from ..results import ExpertLoad, StepRecord
from . import losses as objective
from .data import Samples
from .expert_load import (
    MICRO_TOKENS,
    balance_loss,
    held_out_loss,
    move_bias,
    no_loads,
    selection_loss,
    summary,
    watched,
)
from .locality import locality_loss
from .loop import StepLoop
from .parameters import check_gradients, gather, part, put_back, shard, trainable, whole
from .prepare import Finetuning
from .state import SavedTraining, TrainingState

log = logging.getLogger("moesaic")
CLIP = 1.0
BETAS = (0.9, 0.95)
WEIGHTS = {"lm": (1.0, 0.0), "distill": (0.0, 1.0), "both": (0.5, 0.5)}
"""Of the next token's loss and of the distance from the teacher, by objective."""
SELECTION_BIAS = "e_score_correction_bias"

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Of the optimizer's state: not in shards."""

Report = Callable[[StepRecord, float, float], None]
"""Called with a step's record, the share of the training that is done, and the last held-out loss."""


class Trainer(StepLoop[FinetuneConfig]):
    """One training: what it trains, on what, and how it goes on."""

    def __init__(self, run: Finetuning, model: PreTrainedModel, module: nn.Module) -> None:
        config, method, accelerator = run.config, run.method, run.accelerator
        self.config, self.method, self.accelerator, self.dtype = config, method, accelerator, run.dtype
        self.folder, self.train, self.held, self.teacher = run.folder, run.train, run.held, run.teacher
        self.model, self.blocks = model, moe_blocks(model)
        for name, parameter in module.named_parameters():
            if config.shard or name.endswith(SELECTION_BIAS):
                # a shard has one dtype; and in bfloat16 small steps of balancing would be lost
                parameter.data = parameter.data.float()
        if config.shard:
            shard(module, decoder_layers(model), accelerator)
        rate = method.learning_rate if config.learning_rate is None else config.learning_rate
        router = method.router_learning_rate if config.router_learning_rate is None else config.router_learning_rate
        if config.router_learning_rate is None and {part(name) for name in trainable(module)} == {"router"}:
            router = router if config.learning_rate is None else rate  # there is nothing else that it could be for
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trainable(module).items():
            groups.setdefault(router if part(name) == "router" else rate, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": lr, "initial_lr": lr} for lr, parameters in groups.items()],
            betas=BETAS, weight_decay=0.0,
        )  # fmt: skip
        self.module = module if config.shard else accelerator.prepare(module)
        self.optimizer = accelerator.prepare(optimizer)
        self.named = trainable(module)
        self.kept = self.named | {n: p for n, p in module.named_parameters() if n.endswith(SELECTION_BIAS)}

    def fit(self, state: TrainingState, clock: Callable[[], float], report: Report) -> TrainingState:
        """Train until the steps or minutes are over or the held-out loss has stopped falling; the best is stored."""
        start, latest = clock() - state.seconds, state.held_out
        while (progress := self.progress(state)) < 1 and state.stale < self.config.patience:
            row = self.step(state, progress)
            if not math.isfinite(row.loss + row.layer_loss + row.gradient_norm):
                log.warning("step %d: the loss or its gradient is not finite, so training stops", state.step + 1)
                break
            state.step += 1
            before, state.seconds = state.seconds, self.agreed(clock() - start)
            row = replace(row, step=state.step, seconds=state.seconds, step_seconds=state.seconds - before)
            state.history.append(row)
            if self.progress(state) >= (state.evaluated + 1) / self.config.evaluations:
                state.evaluated = int(self.progress(state) * self.config.evaluations)
                latest, load = self.evaluate(self.held)
                if not math.isfinite(latest):
                    log.warning("step %d: the held-out loss is not finite, so training stops", state.step)
                    state.history.pop()
                    break
                row = state.history[-1] = replace(row, held_out=latest, load=load)
                state.seconds = self.agreed(clock() - start)
                self.remember(state, selection_loss(latest, load, self.config.locality))
            if self.accelerator.is_main_process:
                self.folder.log(row)
            report(row, min(1.0, self.progress(state)), latest)
        return state

    def remember(self, state: TrainingState, held_out: float) -> None:
        """Keep the state on disk, and the weights if they are the best so far."""
        state.stale = 0 if held_out < state.least else state.stale + 1
        state.least = min(state.least, held_out)
        best = held_out < state.held_out
        if best:
            state.held_out, state.best_step = held_out, state.step
        kept, optimizer = gather(self.kept), get_optimizer_state_dict(self.module, self.inner, options=WHOLE)
        if self.accelerator.is_main_process:
            if best:
                self.folder.keep_best(state.step, kept)
            self.folder.save(state, kept, optimizer)
        self.accelerator.wait_for_everyone()

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer in accelerate's wrapping."""
        return self.optimizer.optimizer

    def restore(self, found: SavedTraining[TrainingState]) -> TrainingState:
        """Put back what `RunFolder.load` found: weights, optimizer; returns where the training was."""
        put_back(self.kept, found.tensors)
        set_optimizer_state_dict(self.module, self.inner, found.optimizer, options=WHOLE)
        return found.state

    def step(self, state: TrainingState, progress: float) -> StepRecord:
        """Take one step on `batch` sequences; returns what is logged of it."""
        rate, alone = self.method.rate(progress, self.config.warmup), self.method.router_alone(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        index_B = self.sequences(state.step)
        whole_batch = self.train.take(index_B)
        scored, tokens = max(1, whole_batch.scored()), whole_batch.count()
        own = index_B[self.accelerator.process_index :: self.accelerator.num_processes]
        training_mode(self.module, [] if self.method.alternates else self.blocks)
        loads = no_loads(self.blocks, self.accelerator.device)
        total = torch.zeros(2, device=self.accelerator.device)
        size = max(1, MICRO_TOKENS // self.train.tokens_NL.shape[1])
        parts = [part for index_M in own.split(size) for part in self.train.alike(index_M)]
        for number, batch in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, extra = self.router_loss(batch, loads) if alone else self.loss(batch, loads)
                loss, extra = loss / scored, extra / (tokens * max(1, len(self.blocks)))
                # processes' gradients are averaged, and ours are sums
                self.accelerator.backward((loss + extra) * self.accelerator.num_processes)
                total += torch.stack([loss.detach(), extra.detach()])
        if state.step == 0:
            router_only = {n: p for n, p in self.named.items() if part(n) == "router"}
            check_gradients(router_only if alone else self.named)
        norm = self.accelerator.clip_grad_norm_(list(self.named.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loads = [self.accelerator.reduce(load_E) for load_E in loads]
        loss, extra = self.accelerator.reduce(total).tolist()
        if self.config.balance == "bias":
            move_bias(self.blocks, loads, self.config.balance_step)
        return StepRecord(
            loss=loss,
            layer_loss=extra,
            gradient_norm=whole(norm).item() if isinstance(norm, Tensor) else 0.0,
            learning_rate=rate,
            tokens=tokens,
            load=summary(loads, tokens),
        )

    def loss(self, batch: Samples, loads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum (the objective, the layers' own losses) of some sequences over tokens, nats; counts experts' loads."""
        device = self.accelerator.device
        tokens_ML, inputs = batch.tokens_NL.to(device), batch.inputs(device, self.dtype)
        dense = self.dense_ffns()
        extra: list[Tensor] = []

        def watch(layer: int, block: MoE, x_TD: Tensor, index_TK: Tensor) -> None:
            loads[layer] += count_load(index_TK, len(loads[layer]))
            if self.config.balance == "loss":
                gate, experts = block.routed
                even = balance_loss(gate.exact_scores(x_TD, experts), index_TK)
                extra.append(self.config.balance_weight * len(x_TD) * even)
            if self.config.locality and not self.method.alternates:
                gate, experts = block.routed
                near = locality_loss(gate.exact_scores(x_TD.detach(), experts), index_TK, tokens_ML.shape[1])
                extra.append(self.config.locality * near)
            own = self.method.layer_loss(block, x_TD, index_TK, dense[layer] if dense else None)
            if own is not None:
                extra.append(own)

        with watched(self.blocks, watch), self.autocast():
            output = self.module(
                input_ids=tokens_ML, **inputs, use_cache=False, output_hidden_states=self.config.match > 0
            )
            if self.config.match:
                assert self.teacher is not None
                theirs = self.teacher.hidden(tokens_ML, inputs)
                apart = objective.layer_distance(output.hidden_states[1:], theirs)
                extra.append(self.config.match * len(self.blocks) * apart)
        top = None
        if self.config.objective != "lm":
            assert self.teacher is not None
            tops = [self.teacher.top(batch.take(torch.tensor([row]))) for row in range(len(batch))]
            top = tuple(torch.cat(part) for part in zip(*tops, strict=True))
        lm, distill = WEIGHTS[self.config.objective]
        scored_ML, target_ML = (part.roll(-1, dims=1) for part in (batch.scored_NL.to(device), tokens_ML))
        scored_ML[:, -1] = False  # nothing follows a sequence's last token
        flat = (output.logits.flatten(0, 1), target_ML.flatten(), scored_ML.flatten())
        loss: Tensor = objective.Objective.apply(*flat, top, lm, distill)
        return loss, torch.stack(extra).sum() if extra else loss.new_zeros(())

    def router_loss(self, batch: Samples, loads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the loss of a router that learns alone over the tokens of some sequences, nats; counts experts' loads."""
        assert self.teacher is not None
        tokens_ML = batch.tokens_NL.to(self.accelerator.device)
        with self.autocast():
            taught = self.method.router_step(self.model, tokens_ML, self.teacher.model, self.config.locality)
        for load_E, index_TK in zip(loads, taught.chosen, strict=True):
            load_E += count_load(index_TK, len(load_E))
        return taught.loss, taught.loss.new_zeros(())

    def dense_ffns(self) -> list[nn.Module]:
        """List the teacher's FFNs, for methods that look at them."""
        if not self.method.needs_dense:
            return []
        assert self.teacher is not None
        layers = decoder_layers(self.teacher.model)
        return [layers[index].get_submodule(ffn_name(layers[index])) for index in moe_layers(self.model)]

    def autocast(self) -> AbstractContextManager[object]:
        """Compute products in the model's half precision, if it has one, though what learns is float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, self.dtype)

    def evaluate(self, samples: Samples) -> tuple[float, ExpertLoad]:
        """Measure (next-token loss in nats a token, how evenly the experts are used) on some samples."""
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        own = samples.take(torch.arange(process, len(samples), count))
        with self.autocast():
            found = held_out_loss(self.module, self.blocks, own, self.accelerator.device, self.dtype)
        total = found.total
        if count > 1:
            total = self.accelerator.reduce(total.to(self.accelerator.device))
        loads = [self.accelerator.reduce(load_E) for load_E in found.loads]
        load = summary(loads, samples.count(), self.agreed(found.kept))
        return total.item() / samples.scored(), load


def training_mode(module: nn.Module, blocks: list[MoE]) -> None:
    """Set gates to training mode, all else to use: no dropout, for the teacher says exactly what to learn."""
    module.eval()
    for block in blocks:
        if block.gate is not None:
            block.gate.train()
