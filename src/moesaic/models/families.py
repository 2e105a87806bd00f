"""The only place that knows where a dense model keeps its gated FFNs; families are told apart by structure.

A decoder layer is convertible when one of its children computes `down(act(gate(x)) * up(x))` from bias-free linear
layers named `gate_proj`, `up_proj`, `down_proj` (Llama, Mistral, Qwen, Gemma, OLMo-2, Granite, SmolLM) or
`gate_up_proj`, `down_proj` (Phi-3).

Shapes: T tokens, D hidden size, F neurons of the FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ..errors import InputError

SEPARATE = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")


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
        """The FFN of some of the neurons."""
        return GatedFFN(self.gate_FD[neurons_I], self.up_FD[neurons_I], self.down_DF[:, neurons_I], self.act_fn)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Activations of all neurons, `act(x gate.T) * (x up.T)`, shape [T, F]."""
        return self.act_fn(linear(x_TD, self.gate_FD)) * linear(x_TD, self.up_FD)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Output of the dense FFN, shape [T, D]."""
        return linear(self.hidden(x_TD), self.down_DF)


def ffn_name(layer: nn.Module) -> str:
    """The name of the decoder layer's gated FFN, e.g. `mlp`.

    Raises:
        InputError: the layer has none; the message lists what was found and what is missing.
    """
    for name, child in layer.named_children():
        parts = dict(child.named_children())
        if all(p in parts for p in SEPARATE) or all(p in parts for p in FUSED):
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
        f"{', '.join(SEPARATE)} or {', '.join(FUSED)}. Mixture-of-Experts and ungated models are not dense-convertible."
    )


def gated_ffn(mlp: nn.Module) -> GatedFFN:
    """The weights of a dense FFN module, fused or not, as views."""
    weights = {name.removesuffix(".weight"): weight.data for name, weight in mlp.named_parameters()}
    if "gate_up_proj" in weights:
        gate_FD, up_FD = weights["gate_up_proj"].chunk(2)
    else:
        gate_FD, up_FD = weights["gate_proj"], weights["up_proj"]
    return GatedFFN(gate_FD, up_FD, weights["down_proj"], activation(mlp))


def activation(mlp: nn.Module) -> nn.Module:
    """The FFN's activation module: the one child that is no linear layer.

    Raises:
        InputError: there are other parts, so the FFN is not just `down(act(gate(x)) * up(x))`.
    """
    others = {name: child for name, child in mlp.named_children() if not isinstance(child, nn.Linear)}
    if len(others) != 1:
        raise InputError(
            f"{type(mlp).__name__} has {', '.join(others) or 'nothing'} beside its linear layers; expected act"
        )
    return next(iter(others.values()))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        InputError: the model is not one stack of decoder layers (e.g. it has an encoder or several towers).
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        children = ", ".join(name for name, _ in model.base_model.named_children())
        raise InputError(
            f"{type(model).__name__} is not one stack of decoder layers: expected '{model.base_model_prefix}.layers', "
            f"found {children}. Text-only decoder models convert."
        )
    return layers


def check_convertible(layers: Iterable[nn.Module]) -> None:
    """Raises InputError unless every layer has a convertible FFN."""
    for layer in layers:
        activation(layer.get_submodule(ffn_name(layer)))


def scale_logits(model: PreTrainedModel, factor: float) -> str:
    """Multiply the logits by a factor through the final norm's weight; the name of that parameter.

    Norms are told apart by what they do: `weight * x / rms(x)`, or Gemma's `(1 + weight) * x / rms(x)`.
    """
    norm: nn.Module = model.base_model.norm  # pyrefly: ignore[bad-assignment]
    weight = norm.get_parameter("weight")
    ones = torch.ones_like(weight)
    gain = norm(ones)
    offset = (gain - weight).float().mean().round().item()
    weight.data.copy_((weight.float() + offset) * factor - offset)
    if not torch.allclose(norm(ones).float(), gain.float() * factor, rtol=0.02, atol=1e-3):
        raise AssertionError(f"{type(norm).__name__} does not multiply by its weight")
    return f"{model.base_model_prefix}.norm.weight"
