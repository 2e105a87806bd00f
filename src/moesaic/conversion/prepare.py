"""A conversion resolved and checked before any costly work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .. import registry
from ..calibration.windows import check_tokens
from ..checkpoint.facts import display_name
from ..checkpoint.sources import resolve
from ..checkpoint.writer import check_space, partial_folder
from ..compat import set_experts_implementation
from ..config import ConvertConfig
from ..errors import InputError
from ..formats.base import Format, MoesaicModelConfig, block_config
from ..formats.engines import LLAMA_CPP, format_for
from ..machine import versions
from ..models.devices import COMPUTE_DTYPE, choose_device, choose_dtype, compute_dtype, dtype_name
from ..models.families import takes_pictures
from ..models.integrity import read_config
from ..models.layerwise import LayerwiseModel
from ..models.tokenizer import load_tokenizer
from ..moe.modeling import DEFAULT_EXPERTS, moesaic_config
from ..partition import Partitioner
from ..partition.base import WholeModel
from ..plan import Plan, dense_layers
from ..recovery import Recovery
from ..results import EngineChoice
from ..routing import Router
from ..routing.pregate import Pregate
from ..routing.selection import Selection
from ..routing.selection.base import SMALLEST, Counting
from .engines import check_engine_wishes
from .gguf import check_gguf
from .pictures import tokenise_pictures
from .plans import choose_plan
from .tokens import ConversionTokens, check_domains, tokenise, with_text


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that can start: everything chosen, checked and tokenised."""

    model: str
    """As the user called it; a folder by its name alone."""
    source: Path
    config: ConvertConfig
    plan: Plan
    partitioner: Partitioner
    router: Router
    recovery: Recovery
    layerwise: LayerwiseModel
    """The dense model; it calculates in a dtype of its own."""
    dtype: torch.dtype
    """Of what is written."""
    whole_config: PreTrainedConfig
    """The converted model's transformers configuration."""
    format: Format
    """How it is written."""
    format_reason: str
    """Why that is no stock architecture though one was welcome, or nothing."""
    engine: EngineChoice | None
    """What it is like for the engine that is to run it; None: for any."""
    tokenizer: PreTrainedTokenizerBase
    tokens: ConversionTokens

    @property
    def model_config(self) -> MoesaicModelConfig:
        """The part of the configuration that says what the block is like: all, or that of the language tower."""
        return block_config(self.whole_config)

    @property
    def name(self) -> str:
        """Its cut, e.g. `coactivation S2A2E8`."""
        return f"{registry.text('partition', self.config.partition)} {self.plan}"

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that are converted; the others stay dense."""
        dense = set(self.model_config.mlp_only_layers or ())
        return [index for index in range(len(self.layerwise.layers)) if index not in dense]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What unfinished work must agree in to be gone on with."""
        return {
            "model": self.layerwise.checkpoint.fingerprint(),
            "calibration text": self.tokens.text_sha256,
            "tokens": self.tokens.fingerprint(),
            "configuration": hashlib.sha256(
                self.config.model_copy(update={"outtype": None}).to_yaml().encode()
            ).hexdigest(),
            "plan": f"{self.plan} of {self.plan.width}",
            "format": self.format.name,
            "device": self.layerwise.device.type,
            COMPUTE_DTYPE: dtype_name(self.layerwise.dtype),
            "version": " ".join(f"{name} {version}" for name, version in versions().items()),
        }

    def bytes_needed(self) -> int:
        """Count the bytes of disk that it takes: the output's weights, its last shard twice, and the hidden states."""
        checkpoint, config = self.layerwise.checkpoint, self.layerwise.config
        weights = checkpoint.size() * max(1.0, self.plan.memory_factor(config.intermediate_size))
        weights *= self.dtype.itemsize / checkpoint.dtype().itemsize
        if self.model_config.router == "pregate":
            weights += config.vocab_size * self.model_config.router_hidden_size * self.dtype.itemsize
        weights += self.format.copied_parameters(self.model_config).total * self.dtype.itemsize
        if self.engine and self.engine.engine == LLAMA_CPP:
            weights *= 3  # the GGUF, and what is read back of it
        hidden = self.tokens.count() * config.hidden_size * self.layerwise.dtype.itemsize
        return round(1.1 * weights) + 2 * hidden

    def check_space(self, output: Path) -> None:
        """Check that OUT's disk has room for what is not yet in `OUT.partial`.

        Raises:
            InputError: it has less.
        """
        partial = partial_folder(output)
        done = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        check_space(output, max(0, self.bytes_needed() - done))


def fingerprint(conversions: list[Conversion]) -> dict[str, str]:
    """Say what an unfinished output must agree in to be gone on with: all that the candidates may do."""
    prints = [conversion.fingerprint for conversion in conversions]
    return {key: " or ".join(dict.fromkeys(found[key] for found in prints)) for key in prints[0]}


def prepare(
    model: str | Path,
    config: ConvertConfig,
    compute: torch.dtype | None = None,
    layerwise: LayerwiseModel | None = None,
) -> Conversion:
    """Resolve and check everything that a conversion with a named partition needs.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        config: its partition is not `auto`.
        compute: the dtype to calculate in; None is the one that the machine is fast in.
        layerwise: the model if it is open already, so that its embeddings are in memory once.

    Raises:
        InputError: unknown model or method, a plan that does not fit, or unusable calibration text.
    """
    partitioner: Partitioner = registry.build("partition", config.partition)
    if config.active is None and config.plan is None and not partitioner.whole_experts:
        config = config.model_copy(update={"active": 0.5})
    router: Router = registry.build("router", config.router or partitioner.default_router)
    selection: Selection = registry.build("selection", config.selection or router.default_selection)
    chosen = {
        "router": config.router or partitioner.default_router, "selection": registry.spec(selection),
        "recovery": config.recovery or partitioner.default_recovery,
    }  # fmt: skip
    config = config.model_copy(update=chosen)
    recovery: Recovery = registry.build("recovery", config.recovery)
    check_methods(config, partitioner, router, selection)
    source = resolve(str(model))
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, source)
    compute = compute or compute_dtype(dtype, device)
    layerwise = layerwise or LayerwiseModel(source, compute, device, text_only=config.text_only)
    plan = choose_plan(config, partitioner, layerwise.config.intermediate_size)
    whole = moesaic_config(
        layerwise.model.config, plan, router.gate_name, registry.spec(selection),
        shared_expert_bias=partitioner.static,
        mlp_only_layers=layers_left_dense(config, partitioner, router, len(layerwise.layers)),
        **router.model_fields(layerwise.config),  # pyrefly: ignore[bad-argument-type]
    )  # fmt: skip
    model_config = block_config(whole)
    whole.dtype = model_config.dtype = dtype
    set_experts_implementation(whole, DEFAULT_EXPERTS)
    biased = router.has_bias and plan.num_experts > 0
    format, format_reason = format_for(config.engine, config.format, model_config, biased, whole)
    check_pictures(config, router, layerwise)
    window = min(config.window, layerwise.config.max_position_embeddings)
    tokenizer = load_tokenizer(source)
    config = with_text(config, layerwise, tokenizer)
    if partitioner.labelled:
        check_domains(config, plan)
    tokens = tokenise_pictures(source, config, window) if layerwise.takes_pictures else tokenise(source, config, window)
    engine = check_gguf(check_engine_wishes(config.engine, config.outtype), model_config, tokenizer)
    check_tokens(tokens.all(), layerwise.config.vocab_size, tokenizer)
    check_enough(tokens, plan)
    return Conversion(
        model=display_name(model, source), source=source, config=config, plan=plan, partitioner=partitioner,
        router=router, recovery=recovery, layerwise=layerwise, dtype=dtype, whole_config=whole, format=format,
        format_reason=format_reason, engine=engine, tokenizer=tokenizer, tokens=tokens,
    )  # fmt: skip


def check_enough(tokens: ConversionTokens, plan: Plan) -> None:
    """Check that there is a calibration token for each expert.

    Raises:
        InputError: there are fewer.
    """
    if (count := tokens.calibration_NL.numel()) < plan.num_experts:
        raise InputError(f"{count} calibration tokens are too few for {plan.num_experts} experts; raise --tokens")


def layers_left_dense(config: ConvertConfig, partitioner: Partitioner, router: Router, layers: int) -> list[int] | None:
    """Say which layers stay dense; None where all are converted.

    Raises:
        InputError: there are none such, or methods decide for all layers at once.
    """
    if config.dense_layers is None:
        return None
    found = dense_layers(config.dense_layers, layers)
    if isinstance(partitioner, WholeModel) or router.scope == "model":
        raise InputError(
            f"--dense-layers {config.dense_layers} leaves layers dense, and --partition "
            f"{registry.text('partition', config.partition)} with router {registry.text('router', config.router)} "
            "decides for all layers at once; drop it"
        )
    return found


def check_pictures(config: ConvertConfig, router: Router, layerwise: LayerwiseModel) -> None:
    """Check what is asked of pictures against whether the model takes any.

    Raises:
        InputError: the two do not go together.
    """
    whole = read_config(layerwise.checkpoint.folder)
    if config.text_only and not takes_pictures(whole):
        raise InputError(
            f"--text-only is for models that take pictures, and '{whole.model_type}' takes text; leave it out"
        )
    if layerwise.takes_pictures and router.scope == "model":
        raise InputError(
            f"router '{registry.text('router', config.router)}' decides by token ids alone, which say nothing of a "
            "picture; choose another router, or convert the text model alone with --text-only"
        )
    if not layerwise.takes_pictures and config.image_weight != ConvertConfig().image_weight:
        raise InputError(f"--image-weight {config.image_weight:g} is for models that take pictures; leave it out")


def check_weights(config: ConvertConfig, partitioner: Partitioner, router: Router) -> None:
    """Check that experts that are whole FFNs are averaged, and parts of one added up.

    Raises:
        InputError: they are not.
    """
    names = {name: registry.text(name, getattr(config, name)) for name in ("partition", "router", "recovery")}
    if partitioner.whole_experts and names["recovery"] != "none":
        raise InputError(
            f"with --partition {names['partition']} a model starts as the dense one, so --recovery {names['recovery']} "
            "has nothing to win back; drop it"
        )
    if partitioner.whole_experts and not router.averages:
        raise InputError(
            f"router '{names['router']}' adds experts up, and those of --partition {names['partition']} are whole "
            "FFNs; use --router softmax"
        )
    if router.averages and not (partitioner.whole_experts or partitioner.static):
        raise InputError(
            f"router '{names['router']}' averages experts, and those of --partition {names['partition']} are parts of "
            "a sum; use --router linear, or --partition upcycle"
        )


def check_methods(config: ConvertConfig, partitioner: Partitioner, router: Router, selection: Selection) -> None:
    """Check that methods go together, whatever the model is.

    Raises:
        InputError: they do not.
    """
    if router.scope == "model" and not isinstance(router, Pregate):
        raise InputError(
            f"router '{config.router}' decides ahead of the whole model, and of such a conversion fits 'pregate' only. "
            "Hand its decisions to the blocks (moesaic.models.moe_block.routed_by)"
        )
    if router.runs_all_experts and registry.text("recovery", config.recovery) != "none":
        raise InputError(f"router '{config.router}' ranks by norms that recovery changes; use it with --recovery none")
    if isinstance(selection, Counting) and selection.parameters(SMALLEST):
        name = registry.spec_name(type(selection))
        raise InputError(
            f"selection '{name}' has something to learn or to calibrate in each layer; convert without it, then: "
            f"moesaic adapt OUT ADAPTER --method {name}"
        )
    if selection.dynamic_top_k and router.has_bias and not isinstance(selection, Counting):
        raise InputError(
            f"selection '{config.selection}' compares scores with a threshold and does not read the intercept or "
            f"balance that router '{config.router}' fits; leave it out, e.g. --router linear:intercept=False"
        )
    check_weights(config, partitioner, router)
    if router.token_clusters and not partitioner.token_clusters:
        raise InputError(
            f"router '{config.router}' needs clusters of tokens (specialists:alternations=0); with "
            f"'{config.partition}' use 'linear'"
        )
