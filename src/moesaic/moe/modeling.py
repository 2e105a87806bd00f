"""moesaic's own format (`model_type: moesaic`): a family's own transformers classes with MoE blocks for FFNs.

For every dense configuration class there is one derived configuration and one derived model class, made on demand:
`LlamaConfig` gives `MoesaicLlamaConfig` and `MoesaicLlamaForCausalLM`. Attention, caches, generation, logits and
everything else are inherited, so that nothing of a family is written again here. `LlavaConfig` gives
`MoesaicLlavaConfig` and `MoesaicLlavaForConditionalGeneration`, whose language tower has the blocks; what the block
needs to know is then in `text_config`.
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from .. import compat
from ..errors import InputError
from ..models.families import activation, auto_class, decoder_layers, ffn_name
from ..models.modality import tell_modality
from ..plan import Plan
from ..routing._network import PregateNetwork
from ..routing.base import Gate
from ..routing.pregate import PregateGate
from . import kernels
from .ahead import network_of, place_network
from .block import MoE
from .experts import Experts

MODEL_TYPE = "moesaic"
DEFAULT_EXPERTS = "moesaic"
"""The experts implementation of `moe/kernels.py`."""


class MoesaicConfig(PreTrainedConfig):
    """Entry for `AutoConfig`: reads `dense_model_type` and hands over to that family's derived class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        family = config_dict.get("dense_model_type")
        if family not in CONFIG_MAPPING:
            raise InputError(f"config.json has dense_model_type {family!r}, expected a model type of transformers")
        dense = CONFIG_MAPPING[family]
        rule = {"sigmoid": "threshold", "norm": "relative"}.get(config_dict.get("router", ""))
        if "selection" not in config_dict and rule:  # written before selections had names
            config_dict = config_dict | {"selection": f"{rule}:threshold={config_dict.get('router_threshold', 0.0)}"}
        return config_class(dense).from_dict(config_dict, **kwargs)


BLOCK_FIELDS: dict[str, object] = {
    "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "n_shared_experts": 0,
    "shared_expert_intermediate_size": 0, "shared_expert_bias": False, "router": "linear", "router_hidden_size": 128,
    "pregate_groups": 0, "pregate_heads": 4, "norm_topk_prob": True, "selection": "top-k",
    "mlp_only_layers": None,
}  # fmt: skip
"""What a text configuration says of the block, and what it is where nothing is said."""


@cache
def config_class(dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Make the configuration class of moesaic's own format for a dense family's: its fields and the MoE's.

    Of a vision-language model those of the MoE are fields of its `text_config`.
    """
    fields: dict[str, object] = {"dense_model_type": dense.model_type}
    fields |= {} if has_towers(dense) else BLOCK_FIELDS
    kinds = {name: type(value) if value is not None else list[int] | None for name, value in fields.items()}
    namespace: dict[str, Any] = {**fields, "__annotations__": kinds}
    # the family's tensor-parallel plan names the dense FFN's layers
    namespace |= {"__module__": __name__, "model_type": MODEL_TYPE, "base_model_tp_plan": None}
    cls = type(f"Moesaic{dense.__name__}", (dense,), namespace)
    setattr(sys.modules[__name__], cls.__name__, cls)  # so that pickle finds it
    whole = AutoModelForImageTextToText if has_towers(dense) else AutoModelForCausalLM
    for auto in (whole, AutoModel):
        if not compat.has_class_for(auto, dense):  # pyrefly: ignore[bad-argument-type]
            continue
        auto.register(cls, model_class(auto, dense, cls))
    return cls


def has_towers(dense: type[PreTrainedConfig]) -> bool:
    """Tell whether models of a configuration have a language tower beside others, as vision-language models do."""
    return "text_config" in dense.sub_configs


def model_class(auto: Any, dense: type[PreTrainedConfig], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Make the model class of moesaic's own format for a family: `auto`'s own, FFNs replaced after `__init__`."""
    base = compat.class_for(auto, dense)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = compat.wish_experts_implementation(config) or DEFAULT_EXPERTS
        # the family's inner model class would refuse to choose: it has no experts of its own
        compat.set_experts_implementation(config, "eager")
        base.__init__(self, config, *args, **kwargs)
        compat.set_experts_implementation(config, self.get_correct_experts_implementation(requested))
        stay_dense = getattr(config.get_text_config(), "mlp_only_layers", None) or ()
        for index, layer in enumerate(decoder_layers(self)):
            if index in stay_dense:
                continue
            name = ffn_name(layer)
            act_fn = activation(layer.get_submodule(name))
            weight = next(layer.get_submodule(name).parameters())
            with torch.device(weight.device):
                moe = MoE(config.get_text_config(), act_fn).to(weight.dtype)
            if not weight.is_meta:
                moe.apply(lambda module: _init_weights(self, module))
            setattr(layer, name, moe)
        connect_gates(self)
        route_ahead(self)
        if any(isinstance(b.gate, Gate) and getattr(b.gate.selection, "by_modality", False) for b in moe_blocks(self)):
            tell_modality(self)

    def _init_weights(self: PreTrainedModel, module: torch.nn.Module) -> None:
        compat.init_weights(base, self, module)
        if isinstance(module, Experts):
            for weight in module.parameters():
                torch.nn.init.normal_(weight, std=self.config.get_text_config().initializer_range)

    def set_experts_implementation(self: PreTrainedModel, experts_implementation: str) -> None:
        base.set_experts_implementation(self, experts_implementation)
        # the family's tower has no experts of its own, so transformers would not tell it
        compat.set_experts_implementation(self.config, compat.experts_implementation(self.config))

    __init__.__annotations__ = {}  # vLLM checks arguments against them, and these are strings
    namespace: dict[str, Any] = {"__module__": __name__, "config_class": config}
    namespace |= {"__init__": __init__, "_init_weights": _init_weights, "pregate": property(network_of)}
    namespace |= {"set_experts_implementation": set_experts_implementation} if has_towers(dense) else {}
    namespace |= compat.ALLOW_EXPERTS
    cls = type(f"Moesaic{base.__name__}", (base,), namespace)
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def moe_blocks(model: PreTrainedModel) -> list[MoE]:
    """List the Mixture-of-Experts block of each layer of a model in moesaic's own format."""
    return [block for layer in decoder_layers(model) for block in layer.children() if isinstance(block, MoE)]


def moe_layers(model: PreTrainedModel) -> list[int]:
    """List the numbers of the layers that have such a block."""
    return [n for n, layer in enumerate(decoder_layers(model)) if any(isinstance(c, MoE) for c in layer.children())]


def connect_gates(model: PreTrainedModel) -> None:
    """Tell each gate which one is before it."""
    gates = [None, *(block.gate for block in moe_blocks(model))]
    for previous, gate in itertools.pairwise(gates):
        if gate is not None:
            gate.connect(previous)


def route_ahead(model: PreTrainedModel) -> None:
    """Give a model whose gates read a network ahead of its layers that network."""
    gates = [block.gate for block in moe_blocks(model)]
    if not any(isinstance(gate, PregateGate) for gate in gates):
        return
    config = model.config.get_text_config()
    if not 0 < config.pregate_groups <= len(gates):
        raise InputError(f"config.json has pregate_groups {config.pregate_groups}, expected 1 to {len(gates)}")
    weight = next(model.parameters())
    with torch.device(weight.device):
        network = PregateNetwork(config).to(weight.dtype)  # pyrefly: ignore[bad-argument-type]
    if network.embed.device.type != "meta":
        network.start(0)
    place_network(model, network, gates)


def moesaic_config(
    dense: PreTrainedConfig,
    plan: Plan,
    router: str = "linear",
    selection: str = "top-k",
    *,
    router_hidden_size: int = 128,
    pregate_groups: int = 0,
    pregate_heads: int = 4,
    norm_topk_prob: bool = True,
    shared_expert_bias: bool = False,
    mlp_only_layers: list[int] | None = None,
) -> Any:
    """Make the configuration of a dense model that is cut by a plan.

    Args:
        dense: the dense model's configuration; of a vision-language model the whole one.
        plan: the shape of each FFN.
        router: the router whose gate the blocks have.
        selection: the rule that says which experts run.
        router_hidden_size: width of what the gate has between the tokens and its scores, if it has a layer there.
        pregate_groups: groups of layers that a router ahead of the model decides for, if it has one.
        pregate_heads: attention heads of that router.
        norm_topk_prob: whether a router whose weights are shares divides them by their sum over those that run.
        shared_expert_bias: whether the shared expert adds a constant.
        mlp_only_layers: those that keep their dense FFN.
    """
    fields = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(key, None)
    cls: Any = config_class(type(dense))
    block = {
        "num_experts": plan.num_experts,
        "num_experts_per_tok": plan.num_experts_per_tok,
        "moe_intermediate_size": plan.width if plan.num_experts else 0,
        "n_shared_experts": plan.shared,
        "shared_expert_intermediate_size": plan.shared_width,
        "shared_expert_bias": shared_expert_bias,
        "router": router,
        "router_hidden_size": router_hidden_size,
        "pregate_groups": pregate_groups,
        "pregate_heads": pregate_heads,
        "norm_topk_prob": norm_topk_prob,
        "selection": selection,
        "mlp_only_layers": mlp_only_layers,
    }
    if has_towers(type(dense)):
        text = fields["text_config"]
        fields["text_config"] = text | {"dense_model_type": text["model_type"]} | block
    else:
        fields |= block
    config = cls(**fields)
    config.architectures = [compat.class_for(auto_class(config), cls).__name__]
    return config


# transformers' auto classes load our models once this module is imported
AutoConfig.register(MODEL_TYPE, MoesaicConfig, exist_ok=True)
kernels.register()
