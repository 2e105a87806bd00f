"""moesaic's own format (`model_type: moesaic`): a family's own transformers classes with MoE blocks for FFNs.

For every dense configuration class there is one derived configuration and one derived model class, made on demand:
`LlamaConfig` gives `MoesaicLlamaConfig` and `MoesaicLlamaForCausalLM`. Attention, caches, generation, logits and
everything else are inherited, so that nothing of a family is written again here.
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .. import compat
from ..errors import InputError
from ..models.families import activation, decoder_layers, ffn_name
from ..plan import Plan
from . import kernels
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


@cache
def config_class(dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Make the configuration class of moesaic's own format for a dense family's: its fields and the MoE's."""
    moe_fields = {
        "dense_model_type": (str, dense.model_type),
        "num_experts": (int, 0),
        "num_experts_per_tok": (int, 0),
        "moe_intermediate_size": (int, 0),
        "n_shared_experts": (int, 0),
        "shared_expert_intermediate_size": (int, 0),
        "shared_expert_bias": (bool, False),
        "router": (str, "linear"),
        "router_hidden_size": (int, 128),
        "selection": (str, "top-k"),
    }
    namespace: dict[str, Any] = {name: default for name, (_, default) in moe_fields.items()}
    namespace["__annotations__"] = {name: kind for name, (kind, _) in moe_fields.items()}
    # the family's tensor-parallel plan names the dense FFN's layers
    namespace |= {"__module__": __name__, "model_type": MODEL_TYPE, "base_model_tp_plan": None}
    cls = type(f"Moesaic{dense.__name__}", (dense,), namespace)
    setattr(sys.modules[__name__], cls.__name__, cls)  # so that pickle finds it
    for auto in (AutoModelForCausalLM, AutoModel):
        if not compat.has_class_for(auto, dense):  # pyrefly: ignore[bad-argument-type]
            continue
        auto.register(cls, model_class(auto, dense, cls))
    return cls


def model_class(auto: Any, dense: type[PreTrainedConfig], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Make the model class of moesaic's own format for a family: `auto`'s own, FFNs replaced after `__init__`."""
    base = compat.class_for(auto, dense)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = compat.wish_experts_implementation(config) or DEFAULT_EXPERTS
        # the family's inner model class would refuse to choose: it has no experts of its own
        compat.set_experts_implementation(config, "eager")
        base.__init__(self, config, *args, **kwargs)
        compat.set_experts_implementation(config, self.get_correct_experts_implementation(requested))
        for layer in decoder_layers(self):
            name = ffn_name(layer)
            act_fn = activation(layer.get_submodule(name))
            weight = next(layer.get_submodule(name).parameters())
            with torch.device(weight.device):
                moe = MoE(config, act_fn).to(weight.dtype)
            setattr(layer, name, moe.apply(lambda module: _init_weights(self, module)))
        connect_gates(self)

    def _init_weights(self: PreTrainedModel, module: torch.nn.Module) -> None:
        compat.init_weights(base, self, module)
        if isinstance(module, Experts):
            for weight in module.parameters():
                torch.nn.init.normal_(weight, std=self.config.initializer_range)

    __init__.__annotations__ = {}  # vLLM checks arguments against them, and these are strings
    namespace: dict[str, Any] = {"__module__": __name__, "config_class": config}
    namespace |= {"__init__": __init__, "_init_weights": _init_weights} | compat.ALLOW_EXPERTS
    cls = type(f"Moesaic{base.__name__}", (base,), namespace)
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def moe_blocks(model: PreTrainedModel) -> list[MoE]:
    """List the Mixture-of-Experts block of each layer of a model in moesaic's own format."""
    return [block for layer in decoder_layers(model) for block in layer.children() if isinstance(block, MoE)]


def connect_gates(model: PreTrainedModel) -> None:
    """Tell each gate which one is before it."""
    gates = [None, *(block.gate for block in moe_blocks(model))]
    for previous, gate in itertools.pairwise(gates):
        if gate is not None:
            gate.connect(previous)


def moesaic_config(
    dense: PreTrainedConfig,
    plan: Plan,
    router: str = "linear",
    selection: str = "top-k",
    *,
    router_hidden_size: int = 128,
    shared_expert_bias: bool = False,
) -> Any:
    """Make the configuration of a dense model that is cut by a plan.

    Args:
        dense: the dense model's configuration.
        plan: the shape of each FFN.
        router: the router whose gate the blocks have.
        selection: the rule that says which experts run.
        router_hidden_size: width of what the gate has between the tokens and its scores, if it has a layer there.
        shared_expert_bias: whether the shared expert adds a constant.
    """
    fields = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(key, None)
    cls: Any = config_class(type(dense))
    config = cls(
        **fields,
        num_experts=plan.num_experts,
        num_experts_per_tok=plan.num_experts_per_tok,
        moe_intermediate_size=plan.width if plan.num_experts else 0,
        n_shared_experts=plan.shared,
        shared_expert_intermediate_size=plan.shared_width,
        shared_expert_bias=shared_expert_bias,
        router=router,
        router_hidden_size=router_hidden_size,
        selection=selection,
    )
    config.architectures = [compat.class_for(AutoModelForCausalLM, cls).__name__]  # pyrefly: ignore[bad-argument-type]
    return config


# transformers' auto classes load our models once this module is imported
AutoConfig.register(MODEL_TYPE, MoesaicConfig, exist_ok=True)
kernels.register()
