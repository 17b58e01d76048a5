"""Random streams: one for every purpose, so that no draw depends on who else is trained.

Numbers are drawn on the CPU whatever the device, so that a seed means the same everywhere.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, arm: str, level: int, purpose: str, draw: int = 0) -> torch.Generator:
    """A fresh generator for one purpose ("init", "order/3", "mask", ...) of one replica."""
    key = f"sparselth/{seed}/{arm}/{level}/{draw}/{purpose}"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number & (2**63 - 1))
