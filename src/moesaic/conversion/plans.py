"""Shapes near a wanted budget: what each costs, how fast it could be, and which engines run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedConfig

from .. import registry
from ..checkpoint.builtin import NAMES
from ..checkpoint.sources import HUB_ID, resolve
from ..config import ConvertConfig
from ..errors import InputError
from ..evaluation.cost import active_weights, body_weights, sizes
from ..formats.base import MoesaicModelConfig, block_config
from ..formats.choose import engines_of
from ..formats.engines import LLAMA_CPP, format_for, good_for, loaders
from ..formats.gguf_support import K_BLOCK, gguf_format
from ..given import check, place
from ..models.families import empty, settle_width
from ..models.integrity import model_on_meta, read_config
from ..moe.modeling import moesaic_config
from ..partition import Partitioner
from ..plan import FEWEST, FINE, Plan, disjoint_plan, parse_plan, specialists_plan
from ..results import PlanChoice, Plans
from .engines import check_engine_wishes, plan_for

STEPS = (256, 128, 64, 32)
"""Widths of experts that kernels and quantised blocks like, the most useful first."""
NEAR = 0.04
"""How far from the wanted share of the FFN a shape may be."""
MOST = 64
"""Disjoint groups; more are slow everywhere."""
BLOCKS = {"q4_k": K_BLOCK, "q8_0": 32, "f16": 1}
"""Types of GGUF by the width that experts must be a multiple of."""
K_TYPES = ("q4_k",)


def plans(
    model: str, active: float = 0.5, memory_factor: float = 1.0, engine: str | None = None, outtype: str | None = None
) -> Plans:
    """List shapes for a dense model near a budget, specialists first; only its configuration is read.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        active: the ffn share wanted, above 0 and at most 1.
        memory_factor: size of all experts relative to the dense FFN.
        engine: the engine that is to run it, one of `formats.engines.ENGINES`; only what it loads is listed, those
            shapes first between which `convert --for` chooses.
        outtype: llama.cpp's type of weights; None: the one that measurements say.

    Raises:
        InputError: no such model, a budget that no shape fits, or an engine that loads none of them.
    """
    check(active=active, memory_factor=memory_factor)
    taken = check_engine_wishes(engine, outtype)
    model = place(model)
    hub = HUB_ID.fullmatch(model) and model not in NAMES and not Path(model).exists()
    folder = Path(model) if hub else resolve(model)  # of a repository only the configuration is fetched
    config = read_config(folder)
    dense = model_on_meta(config, folder)
    size, weights = settle_width(dense), (active_weights(dense), body_weights(dense))
    shapes = [*specialist_shapes(active, memory_factor, size), *disjoint_shapes(active, size)]
    if taken:
        shapes = [("coactivation", plan_for(taken, active, size)), *shapes]
        with suppress(InputError):  # blocks of the type may be too wide for them
            shapes = [("specialists", specialists_plan(active, memory_factor, size, taken.multiple)), *shapes]
    choices, errors = [], []
    for partition, plan in dict.fromkeys(shapes):
        try:
            choices.append(choice(config, weights, partition, plan, engine))
        except InputError as error:
            if engine is None:
                raise
            errors.append(error)
    if not choices:
        raise errors[0]
    return Plans(model=model, intermediate_size=size, active=active, choices=choices, engine=taken)


def specialist_shapes(active: float, memory_factor: float, size: int) -> Iterator[tuple[str, Plan]]:
    """List what `--active` gives, and the best shape of each step of width."""
    yield "specialists", specialists_plan(active, memory_factor, size)
    for step in STEPS:
        shapes = []
        for width in range(step, size, step):
            for shared in range(1, 9):
                experts = int(memory_factor * size / width + 1e-6) - shared
                miss = abs((shared + 1) * width / size - active)
                if miss <= NEAR and experts >= 2:
                    shapes.append(
                        (experts < FEWEST, round(miss / 0.01), shared, Plan(shared, 1, shared + experts, width))
                    )
        if shapes:
            yield "specialists", min(shapes, key=lambda shape: shape[:3])[3]


def disjoint_shapes(active: float, size: int) -> Iterator[tuple[str, Plan]]:
    """List what `--active` gives, and groups of each width that divides the FFN."""
    yield "coactivation", disjoint_plan(active, size)
    for step in STEPS:
        if size % step == 0 and 4 <= size // step <= MOST:
            plan = disjoint_plan(active, size, step)
            if (
                abs(plan.ffn_active(size) - active) <= NEAR
                and plan.shared
                and plan.num_experts > plan.num_experts_per_tok
            ):
                yield "coactivation", plan


def choice(
    config: PreTrainedConfig, dense: tuple[float, float], partition: str, plan: Plan, engine: str | None = None
) -> PlanChoice:
    """Describe one shape, in the format that an engine loads.

    Args:
        config: the dense model's.
        dense: the dense model's weights that a step reads, and those of them that are not the head's.
        partition: how it is cut.
        plan: the shape.
        engine: None is any.

    Raises:
        InputError: it loads none.
    """
    routed_bias = partition == "coactivation"
    whole = moesaic_config(config, plan)
    model_config = block_config(whole)
    size = model_config.intermediate_size
    format, reason = format_for(engine, "auto", model_config, routed_bias, whole)
    converted = empty(whole)
    copied_active = format.copied_parameters(model_config).active
    counted = sizes(converted, plan, format)
    gguf = gguf_types(model_config, plan, routed_bias) if model_config is whole else []
    return PlanChoice(
        partition=partition,
        plan=str(plan),
        expert_width=plan.width,
        ffn_active=plan.ffn_active(size),
        memory_factor=counted.memory_factor,
        total_parameters=counted.total_parameters,
        active_parameters=counted.active_parameters,
        decode_limit=dense[0] / (active_weights(converted) + copied_active),
        prefill_limit=dense[1] / (body_weights(converted) + copied_active),
        format=format.name,
        format_reason=reason,
        engines=engines_of(format, whole) or ["transformers with moesaic"],
        good_for=good_for(plan.width, [*([LLAMA_CPP] if gguf else []), *loaders(format, whole)]),
        gguf=gguf,
        options=f"--partition {partition} --plan {plan} --expert-width {plan.width}",
    )


def gguf_types(config: MoesaicModelConfig, plan: Plan, routed_bias: bool) -> list[str]:
    """List the types of GGUF that hold a shape."""
    try:
        gguf_format(config, routed_bias)
    except InputError:
        return []
    widths = (plan.width, plan.shared_width)
    types = [kind for kind, block in BLOCKS.items() if not any(width % block for width in widths)]
    if config.hidden_size % K_BLOCK:  # of attention and experts' inputs llama-quantize makes other types
        types = [kind + " in part" if kind in K_TYPES else kind for kind in types]
    return types


def choose_plan(config: ConvertConfig, partitioner: Partitioner, intermediate_size: int) -> Plan:
    """Choose the shape that a configuration asks for.

    Raises:
        InputError: contradictory wishes or a shape that does not fit the FFN.
    """
    _check_wishes(config, partitioner)
    if partitioner.whole_experts:
        whole = partitioner.shape(1.0, 1.0, intermediate_size)
        assert whole is not None, "a partition into whole FFNs says how many"
        return whole
    if config.plan is not None:
        plan = parse_plan(config.plan, intermediate_size, config.expert_width, partitioner.overlapping)
        if partitioner.overlapping and plan.num_experts_per_tok != 1:
            raise InputError(
                f"specialists run one at a time: plan '{plan}' must say A1, e.g. S{plan.shared}A1E{plan.groups}"
            )
    else:
        assert config.active is not None
        own = partitioner.shape(config.active, config.memory_factor, intermediate_size)
        taken = check_engine_wishes(config.engine, config.outtype)
        if own is not None:
            plan = own
        elif partitioner.overlapping:
            multiple = taken.multiple if taken else 1
            plan = specialists_plan(config.active, config.memory_factor, intermediate_size, multiple)
        elif taken and config.expert_width is None:
            plan = plan_for(taken, config.active, intermediate_size)
        else:
            plan = disjoint_plan(config.active, intermediate_size, config.expert_width, config.fine)
    return plan.as_static() if partitioner.static else plan


def _check_no_shape(config: ConvertConfig) -> None:
    """Check that no shape is asked for of experts that are whole FFNs.

    Raises:
        InputError: one is.
    """
    for name in ("active", "plan", "expert_width", "memory_factor", "fine"):
        value = getattr(config, name)
        if value != ConvertConfig.model_fields[name].default:
            shown = "" if value is True else f" {value}"
            raise InputError(
                f"experts of --partition {registry.text('partition', config.partition)} are whole FFNs, so "
                f"--{name.replace('_', '-')}{shown} has no say; drop it (upcycle:experts=4,active=2 says how many)"
            )


def _check_wishes(config: ConvertConfig, partitioner: Partitioner) -> None:
    """Check that options do not contradict each other.

    Raises:
        InputError: they do.
    """
    if partitioner.whole_experts:
        _check_no_shape(config)
        return
    if config.plan is not None and config.active is not None:
        raise InputError("--plan fixes what --active would choose; give one of them")
    if config.memory_factor != 1 and not partitioner.overlapping:
        raise InputError(
            f"--memory-factor {config.memory_factor} needs experts that overlap; use --partition specialists"
        )
    if config.memory_factor != 1 and config.plan is not None:
        raise InputError("--plan fixes how many experts there are, so --memory-factor has no say; give one of them")
    if partitioner.overlapping and config.expert_width is not None and config.plan is None:
        raise InputError("a specialist's width follows from --active; drop --expert-width, or fix a --plan too")
    if config.fine and config.engine:
        raise InputError(f"--for {config.engine} chooses how fine the groups are, so --fine has no say; drop one")
    if config.fine and (partitioner.overlapping or config.plan is not None or config.expert_width is not None):
        other = next((name for name in ("plan", "expert_width") if getattr(config, name) is not None), "partition")
        raise InputError(
            f"--fine asks for about {FINE[1]} disjoint groups, --{other.replace('_', '-')} {getattr(config, other)} "
            "for something else; give one of them"
        )
