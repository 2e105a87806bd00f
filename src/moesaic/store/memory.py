"""How much memory experts get: `512MB`, `30%` of them, or what is free."""

from __future__ import annotations

import math
import re

import torch

from ..errors import InputError
from ..given import shown
from ..machine import free_memory

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)
SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
AUTO_SHARE = 0.7
"""Of the memory that is free once the rest of the model is loaded; the others' is for tokens and the system."""


def check_expert_memory(given: object) -> None:
    """Check how much memory experts are to get, before anything costly.

    Raises:
        InputError: neither bytes, nor a share, nor `auto`.
    """
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return
    if isinstance(given, str):
        share = SHARE.fullmatch(given.strip())
        if given == "auto" or (share and 0 < float(share[1]) <= 100):
            return
        if (size := SIZE.fullmatch(given.strip())) and float(size[1]) > 0:
            return
    raise InputError(
        f"--expert-memory is {shown(given)}; give bytes such as 512MB or 2GiB, a share of all experts such as 30%, or "
        "auto"
    )


def expert_memory_bytes(given: str | int, all_experts: int, device: torch.device) -> int:
    """Turn what was given into bytes, those of all experts at most.

    Args:
        given: bytes, or a text that `check_expert_memory` accepts.
        all_experts: the bytes of all experts.
        device: whose memory it is.
    """
    if isinstance(given, int):
        return min(given, all_experts)
    text = given.strip()
    if text == "auto":
        return min(all_experts, int(AUTO_SHARE * free_memory(device)))
    if share := SHARE.fullmatch(text):
        return min(all_experts, math.ceil(all_experts * float(share[1]) / 100))
    size = SIZE.fullmatch(text)
    assert size, given
    return int(min(float(all_experts), float(size[1]) * UNITS[(size[2] or "").lower()]))


def slots_within(given: str | int, expert_bytes: int, experts: int, least: int, device: torch.device) -> int:
    """Say how many experts the fast tier holds.

    Args:
        given: how much memory.
        expert_bytes: of one expert.
        experts: that the model has.
        least: experts that one token runs in one layer.
        device: whose memory it is.

    Raises:
        InputError: less than these.
    """
    found = expert_memory_bytes(given, expert_bytes * experts, device) // expert_bytes
    if found < least:
        share = math.ceil(1000 * least / experts) / 10
        raise InputError(
            f"--expert-memory {given} holds {found} experts of {expert_bytes:,} bytes; give room for the {least} that "
            f"one token runs in a layer: {math.ceil(expert_bytes * least / 1e4) / 100:g}MB, or {share:g}%"
        )
    return found
