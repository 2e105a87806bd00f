"""The network ahead of a model: one causal transformer layer that reads token ids and scores experts (Read-ME, §3).

Shapes: N sequences, L tokens in one, S places of the cache, U tokens of the vocabulary, W width, H heads, A channels of
a head, T tokens, G groups of layers, E routed experts, K slots for experts in a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers.cache_utils import DynamicLayer

from ..errors import InputError

EPS, ROPE_BASE = 1e-6, 10_000.0
DECIDED = "decided"
"""Where all groups' decisions for a pass are kept."""


class PregateConfig(Protocol):
    """What the network needs to know of a model's configuration."""

    vocab_size: int
    num_experts: int
    router_hidden_size: int
    pregate_groups: int
    pregate_heads: int


class Chooser(Protocol):
    """Who turns a group's scores into experts: the gate of the group's first layer."""

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Choose experts, int64 [T, K]."""
        ...


class PregateNetwork(nn.Module):
    """Scores the experts of every group of layers for each token, from the ids of it and of those before it.

    Embedding, `x + attention(norm(x))`, `x + down(silu(up(norm(x))))`, norm, head. Read-ME's, but that attention is
    scaled by 1/√A, as everywhere else. It computes in float32 whatever its weights are in: a decision must not depend
    on who else is in the batch. Parameters are plain, so that nothing takes them for layers of the model.
    """

    def __init__(self, config: PregateConfig) -> None:
        super().__init__()
        width, self.groups, self.heads = config.router_hidden_size, config.pregate_groups, config.pregate_heads
        self.num_experts = config.num_experts
        shapes = {
            "norm_attention": (width,), "qkv": (3 * width, width),
            "qkv_bias": (3 * width,), "out": (width, width), "out_bias": (width,), "norm_ffn": (width,),
            "up": (width, width), "down": (width, width), "norm_head": (width,),
            "head": (self.groups * config.num_experts, width),
        }  # fmt: skip
        self.embed = nn.Parameter(torch.empty(config.vocab_size, width))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.choosers: tuple[Chooser, ...] = ()
        self.logits_TGE: Tensor | None = None
        """Of the tokens that run through the model now."""
        self.given_TGK: Tensor | None = None
        """Decisions by hand, which take the scores' place."""
        self.routings: dict[object, object] = {}
        """What gates made of them, one for all layers of a group."""
        self.requests: dict[object, DynamicLayer] = {}
        self._copies: dict[str, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Fill the weights: Kaiming's uniform ones for linear layers, norms 1, biases 0; a caller may set `embed`."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.startswith("norm"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                bound = (3 / parameter.shape[1]) ** 0.5
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)

    def full(self, name: str) -> Tensor:
        """Give a weight in float32; of one that is kept in less, a copy is made when it changes."""
        weight = self.get_parameter(name)
        if weight.dtype == torch.float32 or (weight.requires_grad and torch.is_grad_enabled()):
            return weight.float()
        if weight.is_inference():
            return weight.float()
        version = hash((weight._version, weight.data_ptr(), str(weight.device)))
        kept = self._copies.get(name)
        if kept is None or kept[0] != version:
            kept = self._copies[name] = version, weight.detach().float()
        return kept[1]

    def forward(
        self, input_ids_NL: Tensor, positions_NL: Tensor, mask: Tensor | None = None, past: DynamicLayer | None = None
    ) -> Tensor:
        """Score experts, float32 [N, L, G, E].

        Args:
            input_ids_NL: tokens.
            positions_NL: where they are in their texts, [N or 1, L].
            mask: which places each token attends to, bool [N or 1, 1, L, S]; None: those before it and itself.
            past: keys and values of earlier tokens, to which these are added.
        """
        with torch.autocast(input_ids_NL.device.type, enabled=False):
            x_NLW = self.embed[input_ids_NL].float()
            h_NLW = rms_norm(x_NLW, self.full("norm_attention"))
            qkv = linear(h_NLW, self.full("qkv"), self.full("qkv_bias"))
            query, key, value = qkv.view(*x_NLW.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            turn = rotations(positions_NL, query.shape[-1])
            query, key = rotate(query, turn), rotate(key, turn)
            alone = past is None or past.get_seq_length() == 0
            if past is not None:
                key, value = past.update(key, value)
            if mask is None and not alone and query.shape[2] > 1:
                mask = causal(query.shape[2], key.shape[2], query.device)
            causally = mask is None and alone and query.shape[2] > 1
            attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causally)
            x_NLW = x_NLW + linear(attended.transpose(1, 2).flatten(2), self.full("out"), self.full("out_bias"))
            h_NLW = rms_norm(x_NLW, self.full("norm_ffn"))
            x_NLW = x_NLW + linear(silu(linear(h_NLW, self.full("up"))), self.full("down"))
            logits = linear(rms_norm(x_NLW, self.full("norm_head")), self.full("head"))
        return logits.view(*x_NLW.shape[:2], self.groups, -1)

    def choose(self, logits_TGE: Tensor) -> Tensor:
        """Choose experts for every group of layers, int64 [T, G, K]; E stands for none where K varies."""
        parts = [chooser.choose(logits_TGE[:, g]) for g, chooser in enumerate(self.choosers)]
        most = max(part.shape[1] for part in parts)
        pad = [part.new_full((len(part), most - part.shape[1]), self.num_experts) for part in parts]
        return torch.stack([torch.cat(pair, dim=1) for pair in zip(parts, pad, strict=True)], dim=1)

    @torch.no_grad()
    def decided_TGK(self) -> Tensor | None:
        """Give the decisions that are in force for the pass that runs now, int64 [T, G, K], made once; else None."""
        if self.given_TGK is not None:
            return self.given_TGK
        if self.logits_TGE is None:
            return None
        found = self.routings.get(DECIDED)
        if not isinstance(found, Tensor):
            found = self.routings[DECIDED] = self.choose(self.logits_TGE)
        return found

    @torch.no_grad()
    def route(self, tokens_NL: Tensor) -> Tensor:
        """Choose experts for whole sequences, int64 [N, L, G, K]."""
        place_1L = torch.arange(tokens_NL.shape[1], device=self.embed.device)[None]
        found = [
            self.choose(self(tokens_BL.to(self.embed.device), place_1L).flatten(0, 1)).view(
                *tokens_BL.shape, self.groups, -1
            )
            for tokens_BL in tokens_NL.split(max(1, 2_048 // tokens_NL.shape[1]))
        ]
        return torch.cat(found)

    @torch.no_grad()
    def route_tokens(self, request_id: object, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Choose experts for a request's next tokens, int64 [tokens, G, K], and keep what later ones need.

        Call it with the prompt, then with each new token; a request that is over is to be forgotten (`forget`).

        Raises:
            InputError: no token, or one that the model does not know.
        """
        ids_1L = torch.as_tensor(token_ids, dtype=torch.int64, device=self.embed.device).view(1, -1)
        rows = len(self.embed)
        if not ids_1L.numel() or not 0 <= int(ids_1L.min()) <= int(ids_1L.max()) < rows:
            raise InputError(f"the tokens of request {request_id!r} are none, or not all from 0 to {rows - 1:,}")
        past = self.requests.setdefault(request_id, DynamicLayer())
        place_1L = torch.arange(ids_1L.shape[1], device=ids_1L.device)[None] + past.get_seq_length()
        return self.choose(self(ids_1L, place_1L, past=past)[0])

    def forget(self, request_id: object) -> None:
        """Drop what is kept of a request; nothing happens if there is none."""
        self.requests.pop(request_id, None)

    @contextmanager
    def decisions(self, index_TGK: Tensor) -> Iterator[None]:
        """Put decisions in force for the model's forward passes in the context, in place of computing them.

        Args:
            index_TGK: experts of each of the pass's tokens, in its order, for each group of layers, as `route_tokens`
                gives them; int64, the number of experts stands for none.

        Raises:
            InputError: of another shape or type, or an expert that there is not.
        """
        if index_TGK.ndim != 3 or index_TGK.shape[1] != self.groups or index_TGK.dtype != torch.int64:
            raise InputError(
                f"decisions are {index_TGK.dtype} of shape {list(index_TGK.shape)}, expected torch.int64 of shape "
                f"[tokens, {self.groups} groups of layers, experts a token]"
            )
        if index_TGK.numel() and not 0 <= int(index_TGK.min()) <= int(index_TGK.max()) <= self.num_experts:
            raise InputError(f"decisions name experts beyond the {self.num_experts} that there are")
        before, self.given_TGK = self.given_TGK, index_TGK
        self.routings.clear()
        try:
            yield
        finally:
            self.given_TGK = before
            self.routings.clear()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `weight * x / rms(x)`."""
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def rotations(positions_NL: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of rotary positions, [N, 1, L, A / 2] each."""
    inverse = ROPE_BASE ** (-torch.arange(0, channels, 2, device=positions_NL.device, dtype=torch.float32) / channels)
    angle = (positions_NL[..., None].float() * inverse)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the halves of each head's channels by the tokens' places (RoPE)."""
    (cos, sin), (first, second) = turn, x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal(queries: int, places: int, device: torch.device) -> Tensor:
    """Let each of the last `queries` places see itself and those before it, bool [1, 1, L, S]."""
    place_L = torch.arange(places - queries, places, device=device)
    return (torch.arange(places, device=device) <= place_L[:, None])[None, None]
