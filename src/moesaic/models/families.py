"""The only place that knows how families of models name their parts; families are told apart by structure.

A decoder layer is convertible when one of its children computes `down(act(gate(x)) * up(x))` from bias-free linear
layers whose names are one of `FFN_LAYOUTS`: `gate_proj`, `up_proj`, `down_proj` (Llama, Mistral, Qwen, Gemma, OLMo-2,
Granite, SmolLM), `gate_up_proj`, `down_proj` (Phi-3) or `w1`, `w3`, `w2` (LFM2). A family with other names needs one
more row there.

Shapes: T tokens, D hidden size, F neurons of the FFN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..compat import AutoClass, has_class_for, parameters_on_meta
from ..errors import InputError

ATTENTION = "self_attn"
"""A decoder layer's attention."""
LAYERS = "model.layers."
"""How the names of all layers' tensors begin in a text model's checkpoint."""
EXPERT_PARTS = (("gate_proj", "up_proj"), ("w1", "w3"), ("down_proj",), ("w2",))
"""What checkpoints call the matrices of one expert, in the order in which transformers joins them."""
EMBEDDINGS, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class FFNLayout(NamedTuple):
    """The names of a gated FFN's linear layers; `up` is None where `gate` holds both, gate rows first."""

    gate: str
    up: str | None
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(name for name in self if name is not None)


FFN_LAYOUTS = [
    FFNLayout("gate_proj", "up_proj", "down_proj"), FFNLayout("gate_up_proj", None, "down_proj"),
    FFNLayout("w1", "w3", "w2"),
]  # fmt: skip
"""What is recognised as a gated FFN, the first that fits."""


def empty(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make a model of a configuration whose parameters take no memory; its buffers are there."""
    with parameters_on_meta():
        model = auto_class(config).from_config(config, **({} if dtype is None else {"dtype": dtype}))
    model.tie_weights()
    return model


@dataclass(frozen=True)
class GatedFFN:
    """The weights of one dense FFN: `y = (act(x gate.T) * (x up.T)) down.T`."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    act_fn: Callable[[Tensor], Tensor]

    @property
    def intermediate_size(self) -> int:
        return self.gate_FD.shape[0]

    def take(self, neurons_I: Tensor) -> GatedFFN:
        """Take some of the neurons, as an FFN of their own."""
        return GatedFFN(self.gate_FD[neurons_I], self.up_FD[neurons_I], self.down_DF[:, neurons_I], self.act_fn)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Compute the activations of all neurons, `act(x gate.T) * (x up.T)`, [T, F]."""
        return self.act_fn(linear(x_TD, self.gate_FD)) * linear(x_TD, self.up_FD)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Compute the output of the dense FFN, [T, D]."""
        return linear(self.hidden(x_TD), self.down_DF)


def ffn_layout(module: nn.Module) -> FFNLayout | None:
    """Find out how a module names the parts of a gated FFN; None if it is none."""
    parts = {name for name, _ in module.named_children()}
    return next((layout for layout in FFN_LAYOUTS if parts.issuperset(layout.names)), None)


def ffn_name(layer: nn.Module) -> str:
    """Find the name of the decoder layer's gated FFN, e.g. `mlp`.

    Raises:
        InputError: the layer has none (the message lists what was found and what is missing), or its FFN has a bias.
    """
    for name, child in layer.named_children():
        if ffn_layout(child) is not None:
            parts = dict(child.named_children())
            biased = [p for p in parts if getattr(parts[p], "bias", None) is not None]
            if biased:
                raise InputError(f"the FFN '{name}' has a bias in {', '.join(biased)}; only bias-free FFNs convert")
            return name
    found = "; ".join(
        f"{name}: {type(child).__name__}({', '.join(n for n, _ in child.named_children())})"
        for name, child in layer.named_children()
    )
    raise InputError(
        f"{type(layer).__name__} has no dense gated FFN. Found {found}. Missing: one child with the linear layers "
        f"{' or '.join(', '.join(layout.names) for layout in FFN_LAYOUTS)}. Mixture-of-Experts and ungated models are "
        "not dense-convertible; moesaic prune and moesaic adapt make a Mixture-of-Experts cheaper."
    )


def gated_ffn(mlp: nn.Module) -> GatedFFN:
    """Read the weights of a dense FFN module, fused or not, as views."""
    layout = ffn_layout(mlp)
    assert layout is not None, f"{type(mlp).__name__} is no gated FFN"
    weights = {name.removesuffix(".weight"): weight.data for name, weight in mlp.named_parameters()}
    if layout.up is None:
        gate_FD, up_FD = weights[layout.gate].chunk(2)
    else:
        gate_FD, up_FD = weights[layout.gate], weights[layout.up]
    return GatedFFN(gate_FD, up_FD, weights[layout.down], activation(mlp))


def activation(mlp: nn.Module) -> nn.Module:
    """Find the FFN's activation module: the one child that is no linear layer; SiLU where the code has it in place.

    Raises:
        InputError: there are other parts, so the FFN is not just `down(act(gate(x)) * up(x))`.
    """
    others = {name: child for name, child in mlp.named_children() if not isinstance(child, nn.Linear)}
    if not others:
        return nn.SiLU()
    if len(others) != 1:
        raise InputError(f"{type(mlp).__name__} has {', '.join(others)} beside its linear layers; expected act")
    return next(iter(others.values()))


def auto_class(config: PreTrainedConfig) -> AutoClass:
    """Choose the auto class of a model: causal language models, or what also takes images.

    Raises:
        InputError: transformers has neither for it.
    """
    known: tuple[AutoClass, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)  # pyrefly: ignore[bad-assignment]
    found = [auto for auto in known if has_class_for(auto, type(config))]
    if not found:
        raise InputError(f"transformers has no causal language model of type '{config.model_type}'")
    return found[-1] if takes_pictures(config) else found[0]


def takes_pictures(config: PreTrainedConfig) -> bool:
    """Tell whether a model has a language tower beside others, as vision-language models do."""
    return config.get_text_config() is not config


def context_length(config: PreTrainedConfig) -> int:
    """Tell how many tokens a model sees at once; `sys.maxsize` where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Find the configuration of the causal language model in a model; of most, their own.

    Raises:
        InputError: the model takes images too, and transformers has no model of its text part alone.
    """
    found = config.get_text_config()
    if found is not config and not has_class_for(AutoModelForCausalLM, type(found)):  # pyrefly: ignore[bad-argument-type]
        raise InputError(
            f"the model is a {config.model_type}, which takes images too, and transformers has no model of its text "
            f"part alone ({found.model_type}); give the text model that it is built on"
        )
    return found


def text_tower(model: PreTrainedModel) -> nn.Module:
    """Find the module that holds the decoder layers of the text model; in a vision-language model one of its towers.

    Raises:
        InputError: there is no single stack of decoder layers for text (e.g. the model has an encoder).
    """
    text, base = model.config.get_text_config(), model.base_model
    for module in base.modules():
        own = getattr(module, "config", None)
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and (own is text or module is base):
            return module
    children = ", ".join(name for name, _ in base.named_children())
    raise InputError(
        f"{type(model).__name__} is not one stack of decoder layers: expected '{model.base_model_prefix}.layers', "
        f"found {children}. Text-only decoder models convert."
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """List the text model's decoder layers, which may be assigned to `text_tower(model).layers`.

    Raises:
        InputError: the model is not one stack of decoder layers (e.g. it has an encoder).
    """
    layers = text_tower(model).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def embedding_rows(model: PreTrainedModel) -> int:
    """Count the tokens that a model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return len(weight)


def layers_prefix(model: PreTrainedModel) -> str:
    """Find how the names of all decoder layers' parameters begin, e.g. `model.layers.`."""
    tower = text_tower(model)
    return next(name for name, module in model.named_modules() if module is tower) + ".layers."


def attention(layer: nn.Module) -> nn.Module | None:
    """Find a decoder layer's attention; None where tokens are mixed by something of another name."""
    return dict(layer.named_children()).get(ATTENTION)


def check_convertible(layers: Iterable[nn.Module]) -> None:
    """Check that every layer has a convertible FFN.

    Raises:
        InputError: one has none.
    """
    for layer in layers:
        activation(layer.get_submodule(ffn_name(layer)))


def settle_width(model: PreTrainedModel) -> int:
    """Read the width of the dense FFNs off the layers, and correct the configuration where it says another (LFM2).

    Raises:
        InputError: layers differ in it, or one has no convertible FFN.
    """
    check_convertible(decoder_layers(model))
    config, widths = model.config.get_text_config(), set[int]()
    for layer in decoder_layers(model):
        ffn = layer.get_submodule(ffn_name(layer))
        layout = ffn_layout(ffn)
        assert layout is not None
        widths.add(ffn.get_submodule(layout.down).get_parameter("weight").shape[1])
    if len(widths) > 1:
        raise InputError(f"the FFNs of {config.model_type} have {min(widths)} to {max(widths)} neurons; only layers of "
                         "one width convert")  # fmt: skip
    [width] = widths
    if width != config.intermediate_size:
        config.intermediate_size = width
        config.block_auto_adjust_ff_dim = False  # LFM2 would narrow it once more
    return width
