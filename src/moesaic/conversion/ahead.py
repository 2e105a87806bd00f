"""What is decided for the whole model before its layers are converted: who is in which expert, and the router ahead.

The dense model runs over the calibration tokens, once for each thing that all layers must have said: which tokens are
alike, then what each layer's experts hold of each token. A router of token ids knows its decisions before any layer
runs, so that recovery is fitted to the very experts that will run.

Shapes: N sequences, L tokens in one, T = N L tokens, G groups of layers, E routed experts, K slots for experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..calibration.activations import LayerActivations
from ..calibration.layers import activations, layer_generator, tapped
from ..checkpoint.writer import ResumableOutput
from ..models.families import ffn_name
from ..moe.ahead import NAME
from ..moe.block import MoE
from ..partition import Partition
from ..partition.base import WholeModel
from ..progress import Progress
from ..results import RouterLesson
from ..routing._distil import Lesson
from ..routing._network import PregateNetwork
from ..routing.pregate import Pregate, PregateGate, group_of, network_from
from .prepare import Conversion

HIDDEN_FILE = "hidden-ahead.safetensors"
"""The file that holds it until the output is whole."""
ROUTER, LESSON, LAYER = "router.", "lesson", "layer."


@dataclass(frozen=True, kw_only=True)
class LookedAhead:
    """Each layer's partition, and the experts of all tokens where one router decides for the whole model."""

    partitions: list[Partition]
    network: PregateNetwork | None = None
    lesson: Lesson | None = None
    chosen: dict[str, Tensor] = field(default_factory=dict)
    """By the text's name, int64 [T, G, K]."""

    def of(self, text: str, layer: int) -> Tensor | None:
        """Find the experts of a text's tokens in a layer, [T, K]; None where the layer's own router decides."""
        found = self.chosen.get(text)
        return None if found is None else found[:, group_of(layer, len(self.partitions), found.shape[1])]

    def mark(self, sample: LayerActivations, layer: int) -> LayerActivations:
        """Tell a layer's calibration tokens, those that open a text too, which experts they run."""
        opening = sample.opening
        if opening is not None:
            opening = replace(opening, chosen_TK=self.of("opening", layer))
        return replace(sample, opening=opening, chosen_TK=self.of("calibration", layer))

    def tensors(self) -> dict[str, Tensor]:
        """List what is stored, by name."""
        found = {
            f"{LAYER}{index}.{f.name}": value
            for index, partition in enumerate(self.partitions)
            for f in fields(partition)
            if isinstance(value := getattr(partition, f.name), Tensor)
        }
        if self.network is not None and self.lesson is not None:
            found |= {ROUTER + name: tensor for name, tensor in self.network.state_dict().items()}
            found[LESSON] = torch.tensor(self.lesson, dtype=torch.float64)
        return found

    def written(self, conversion: Conversion) -> dict[str, Tensor]:
        """Name the router's weights as the converted model does."""
        prefix = conversion.layerwise.prefix.removesuffix("layers.") + f"{NAME}."
        return {} if self.network is None else {prefix + n: t for n, t in self.network.state_dict().items()}

    def record(self) -> RouterLesson | None:
        """Say what the router ahead is and what it learnt, for `metrics.json`."""
        if self.network is None or self.lesson is None:
            return None
        parameters = sum(p.numel() for p in self.network.parameters())
        return RouterLesson(groups=self.network.groups, parameters=parameters, **self.lesson._asdict())


@contextmanager
def following(moe: MoE, index_TK: Tensor | None) -> Iterator[None]:
    """Let a block run tokens by experts that are decided already, in their order; None: by its own gate."""
    gate = moe.gate
    if index_TK is None or not isinstance(gate, PregateGate):
        yield
        return
    gate.follow(index_TK)
    try:
        yield
    finally:
        gate.follow(None)


def look_ahead(conversion: Conversion, partial: ResumableOutput, report: Progress) -> LookedAhead | None:
    """Decide what is to be decided for the whole model, or read what an earlier run has decided; None: nothing is."""
    if not (isinstance(conversion.partitioner, WholeModel) or isinstance(conversion.router, Pregate)):
        return None
    if not conversion.plan.num_experts:
        return None
    conversion.layerwise.load_embeddings_and_head()
    if HIDDEN_FILE in partial.state.sha256:
        made = restored(conversion, load_file(partial.folder / HIDDEN_FILE))
    else:
        made = Planner(conversion, report).plan()
        partial.write(HIDDEN_FILE, made.tensors())  # the first layer's hidden states, which follow, make it count
    return with_decisions(conversion, made)


@torch.no_grad()
def with_decisions(conversion: Conversion, made: LookedAhead) -> LookedAhead:
    """Add the router's decisions on all texts of the conversion."""
    if made.network is None:
        return made
    tokens = conversion.tokens
    texts = {"calibration": tokens.calibration_NL, "validation": tokens.validation_NL, "opening": tokens.opening_M1}
    texts |= {"converted": tokens.held_out_NL}
    return replace(made, chosen={n: made.network.route(t).flatten(0, 1) for n, t in texts.items() if len(t)})


def restored(conversion: Conversion, stored: dict[str, Tensor]) -> LookedAhead:
    """Put together what `LookedAhead.tensors` gave."""
    parts: list[dict[str, Tensor]] = [{} for _ in conversion.layerwise.layers]
    for name, tensor in stored.items():
        if name.startswith(LAYER):
            index, _, part = name.removeprefix(LAYER).partition(".")
            parts[int(index)][part] = tensor
    partitions = [Partition(**part) for part in parts]
    if LESSON not in stored:
        return LookedAhead(partitions=partitions)
    network = new_network(conversion)
    network.to(conversion.dtype).load_state_dict(
        {n.removeprefix(ROUTER): t for n, t in stored.items() if n.startswith(ROUTER)}
    )
    return LookedAhead(partitions=partitions, network=network, lesson=Lesson(*stored[LESSON].tolist()))


def new_network(conversion: Conversion) -> PregateNetwork:
    """Make the router ahead as it is before it has learnt anything."""
    embeddings = conversion.layerwise.model.get_input_embeddings().weight.detach().float()
    return network_from(conversion.model_config, embeddings, conversion.config.seed).requires_grad_(False)


class Planner:
    """Runs the dense model over the calibration tokens, and makes partitions and router of what its layers say."""

    def __init__(self, conversion: Conversion, report: Progress) -> None:
        self.conversion, self.report = conversion, report
        self.count = len(conversion.layerwise.layers)
        self.router = conversion.router if isinstance(conversion.router, Pregate) else None

    def generator(self, index: int) -> torch.Generator:
        """Make the source of what is random in a layer, as the conversion of that layer has it."""
        return layer_generator(self.conversion.config.seed, index)

    @torch.no_grad()
    def plan(self) -> LookedAhead:
        """Cluster tokens, split every layer, teach the router; then again with the tokens where it sends them."""
        partitioner = self.conversion.partitioner
        chosen_TGK, rounds = None, 1
        if isinstance(partitioner, WholeModel):
            chosen_TGK = self.clusters(partitioner)[:, None]
            rounds += partitioner.repeats() if self.router else 0
        made = self.split(chosen_TGK, rounds > 1)
        for number in range(1, rounds):
            assert made.network is not None
            found = made.network.route(self.conversion.tokens.calibration_NL).flatten(0, 1)
            made = self.split(found, number < rounds - 1, made.network.float())
        return made

    def run(self, note: str, visit: Callable[[int, LayerActivations], None]) -> None:
        """Run the dense model over the calibration tokens, and show every layer's activations."""
        layerwise, tokens = self.conversion.layerwise, self.conversion.tokens
        hidden_NLD = layerwise.embed(tokens.calibration_NL)
        for index in range(self.count):
            self.report(0, self.count, f"{note}, layer {index}")
            with layerwise.layer(index) as layer:
                found = tapped(layerwise, index, layer, hidden_NLD, layer.get_submodule(ffn_name(layer)))
                visit(index, activations(layerwise, index, layer, found, tokens.domain_N))
            hidden_NLD = found.after_NLD

    def clusters(self, partitioner: WholeModel) -> Tensor:
        """Choose the experts of each calibration token in all layers, int64 [T, K]."""
        profiles: list[Tensor] = []

        def visit(index: int, sample: LayerActivations) -> None:
            profiles.append(partitioner.profile(sample, self.count, self.generator(index)))

        self.run("clustering tokens", visit)
        length = self.conversion.tokens.calibration_NL.shape[1]
        domain_T = self.conversion.tokens.domain_N.repeat_interleave(length).to(profiles[0].device)
        return partitioner.send(torch.cat(profiles, dim=1), domain_T, self.conversion.plan, self.generator(self.count))

    def split(
        self, chosen_TGK: Tensor | None, in_between: bool = False, network: PregateNetwork | None = None
    ) -> LookedAhead:
        """Split every layer's neurons, tokens being where they are said to be, and teach the router what they hold.

        A router that is to be taught again learns for a third of the steps, and goes on from there.
        """
        conversion, router, plan = self.conversion, self.router, self.conversion.plan
        if router:
            network = network or new_network(conversion)
            router = replace(router, steps=max(1, router.steps // 3)) if in_between else router
        groups = network.groups if network else 1
        partitions: list[Partition] = []
        target_TGE = torch.zeros(conversion.tokens.calibration_NL.numel(), groups, plan.num_experts)

        def visit(index: int, sample: LayerActivations) -> None:
            group = group_of(index, self.count, groups)
            if chosen_TGK is not None:
                sample = replace(sample, chosen_TK=chosen_TGK[:, min(group, chosen_TGK.shape[1] - 1)])
            partition = conversion.partitioner.split(sample, plan, self.generator(index))
            partitions.append(partition.to(torch.device("cpu")))
            if router:
                target_TGE[:, group] += router.target(sample, partition, plan.num_experts_per_tok).cpu()

        self.run("splitting neurons", visit)
        if router is None or network is None:
            return LookedAhead(partitions=partitions)
        self.report(0, self.count, "teaching the router")
        shape = (*conversion.tokens.calibration_NL.shape, groups, plan.num_experts)
        target_NLGE = (target_TGE / target_TGE.sum(-1, keepdim=True).clamp(min=1e-30)).view(shape)
        lesson = router.teach(network, conversion.tokens.calibration_NL, target_NLGE, conversion.config.seed)
        return LookedAhead(partitions=partitions, network=network.to(conversion.dtype), lesson=lesson)
