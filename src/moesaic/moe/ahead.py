"""A router ahead of the model, at work: it has decided before the first layer runs.

It sees what the model is called with, and keeps keys and values of its own in the model's cache.

Shapes: N sequences, L tokens in one, S places of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import InputError
from ..models.families import text_tower
from ..routing._network import PregateNetwork, causal
from ..routing.base import Gate
from ..routing.pregate import connect_groups

NAME = "pregate"
"""Of the network in the module that holds the decoder layers."""


class PregateLayer(DynamicLayer):
    """Keys and values of the router ahead, behind those of the model's layers: reordered and cropped with them."""

    is_compileable = True  # or a static cache would no longer pass for one, and its empty places would be attended to


class CachingConfig(Protocol):
    """What the router ahead needs to know of a model's configuration."""

    use_cache: bool
    num_hidden_layers: int


@dataclass
class Ahead:
    """What runs before and after each forward pass of a model that is routed ahead."""

    network: PregateNetwork
    config: CachingConfig
    """The model's."""

    def before(
        self, tower: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Decide for all tokens of the pass.

        Raises:
            InputError: no token ids, a cache that other tokens went into, or decisions for another number of tokens.
        """
        network = self.network
        network.routings.clear()
        network.logits_TGE = None
        ids_NL = args[0] if args else kwargs.get("input_ids")
        if network.given_TGK is not None:
            if isinstance(ids_NL, Tensor) and ids_NL.numel() != len(network.given_TGK):
                raise InputError(
                    f"the decisions are for {len(network.given_TGK)} tokens, the model got {ids_NL.numel()}"
                )
            return None
        if not isinstance(ids_NL, Tensor):
            raise InputError(
                "this model is routed by token ids, ahead of its layers: call it with input_ids, not with "
                "inputs_embeds, or give decisions (model.pregate.decisions)"
            )
        if "cache" in kwargs:
            raise InputError(
                "continuous batching runs tokens of several requests at once: route them with "
                "model.pregate.route_tokens and run the model within model.pregate.decisions(...)"
            )
        use_cache = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is None and (self.config.use_cache if use_cache is None else use_cache):
            kwargs["past_key_values"] = DynamicCache(config=self.config)  # pyrefly: ignore[bad-argument-type]
        layer = own_layer(kwargs.get("past_key_values"), self.config.num_hidden_layers)
        seen = 0 if layer is None else layer.get_seq_length()
        given = kwargs.get("position_ids")
        assert given is None or isinstance(given, Tensor)
        places_L = torch.arange(seen, seen + ids_NL.shape[1], device=ids_NL.device)
        positions_NL = places_L[None] if given is None else given
        mask = attention_mask(kwargs.get("attention_mask"), seen, ids_NL.shape[1], ids_NL.device)
        if mask is None and not seen and given is not None:
            mask = packed(given)
        network.logits_TGE = network(ids_NL, positions_NL, mask, layer).flatten(0, 1)
        return args, kwargs

    def after(self, tower: nn.Module, args: object, output: object) -> None:
        """Forget the pass's decisions, so that nothing else is run by them."""
        self.network.logits_TGE = None
        self.network.routings.clear()


def own_layer(cache: object, layers: int) -> PregateLayer | None:
    """Find the router's layer in a model's cache, or put it behind the model's; None without a cache.

    Raises:
        InputError: a cache that is not a list of layers, or one that other tokens went into.
    """
    if cache is None:
        return None
    found = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or not isinstance(found, list):
        raise InputError(
            f"the router ahead keeps its own keys and values in the model's cache, and a {type(cache).__name__} has no "
            "place for them; use a DynamicCache, or model.pregate.decisions"
        )
    own = next((layer for layer in found if isinstance(layer, PregateLayer)), None)
    if own is None:
        while len(found) < layers and cache.layer_class_to_replicate is not None:
            found.append(cache.layer_class_to_replicate())
        own = PregateLayer()
        found.append(own)
    seen, others = own.get_seq_length(), int(cache.get_seq_length())
    if seen != others:
        raise InputError(
            f"the cache holds {others} tokens, of which the router ahead has seen {seen}: it was filled under "
            "decisions given by hand, or by another model; start from an empty cache"
        )
    return own


def attention_mask(mask: object, seen: int, queries: int, device: torch.device) -> Tensor | None:
    """Say which places the tokens attend to, bool [N, 1, L, S]; None: all before them and themselves.

    Args:
        mask: what the model is called with: of each place [N, S], as prepared for attention [N, 1, L, S], or by kind of
            layer.
        seen: places of the cache.
        queries: tokens.
        device: of the result.

    Raises:
        InputError: a mask of another kind, or for fewer places.
    """
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise InputError(f"the router ahead attends to all tokens; a mask of {', '.join(mask)} does not say which")
        mask = mask["full_attention"]
    if mask is None:
        return None
    places = seen + queries
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or mask.shape[-1] < places:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask is {shape}, expected [sequences, {places}]: one for each token so far")
    if mask.ndim == 2:
        keep_NS = mask[:, :places].bool()
    else:
        may = mask if mask.dtype == torch.bool else mask == 0
        keep_NS = may[:, 0, :, :places].any(1)
    if device.type == "cpu" and bool(keep_NS.all()):
        return None
    itself = torch.eye(queries, dtype=torch.bool, device=device)  # or a token of padding would see nothing
    itself = torch.cat([itself.new_zeros(queries, seen), itself], dim=1)
    return (causal(queries, places, device) & keep_NS[:, None, None]) | itself


def packed(positions_NL: Tensor) -> Tensor | None:
    """Keep texts apart that stand in one row, each with positions from its own start; None where there is one only."""
    begins_NL = positions_NL.diff(dim=1) != 1
    if not bool(begins_NL.any()):
        return None
    text_NL = nn.functional.pad(begins_NL.cumsum(1), (1, 0))
    same_NLL = text_NL[:, :, None] == text_NL[:, None]
    return same_NLL[:, None] & causal(text_NL.shape[1], text_NL.shape[1], text_NL.device)


def place_network(model: PreTrainedModel, network: PregateNetwork, gates: list[Gate | None]) -> None:
    """Put a network ahead of a model's layers, and let their gates read it."""
    tower = text_tower(model)
    setattr(tower, NAME, network)
    ahead = Ahead(network, model.config.get_text_config())
    handles = (
        tower.register_forward_pre_hook(ahead.before, with_kwargs=True),
        tower.register_forward_hook(ahead.after, always_call=True),
    )
    tower.pregate_handles = handles  # pyrefly: ignore[bad-argument-type]
    connect_groups(network, gates)


def network_of(model: PreTrainedModel) -> PregateNetwork | None:
    """Find the network ahead of a model's layers; None where each layer has a router of its own."""
    found = text_tower(model)._modules.get(NAME)
    return found if isinstance(found, PregateNetwork) else None


def drop_network(model: PreTrainedModel) -> None:
    """Take the network away from a model whose layers get routers of their own."""
    tower = text_tower(model)
    if network_of(model) is not None:
        for handle in getattr(tower, "pregate_handles", ()):
            handle.remove()
        delattr(tower, NAME)
