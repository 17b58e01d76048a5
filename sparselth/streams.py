"""Random streams: one for every purpose, so that no draw depends on who else is trained.

Numbers are drawn on the CPU whatever the device, so that a seed means the same everywhere.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number(seed: int, arm: str, level: int, purpose: str, draw: int = 0) -> int:
    """What a generator of that purpose is seeded with, from 0 to below 2^63."""
    key = f"sparselth/{seed}/{arm}/{level}/{draw}/{purpose}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") & (2**63 - 1)


def stream(seed: int, arm: str, level: int, purpose: str, draw: int = 0) -> torch.Generator:
    """A fresh generator for one purpose ("init", "order/3", "mask", ...) of one replica."""
    return torch.Generator().manual_seed(number(seed, arm, level, purpose, draw))


def seed_everything(number: int, device: str = "cpu") -> None:
    """Let torch, numpy and Python draw from a seed on, wherever nobody gives them a generator."""
    torch.default_generator.manual_seed(number)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


@contextmanager
def drawing_apart(device: str = "cpu") -> Iterator[None]:
    """Whatever is drawn or seeded within, behind it the global generators stand where they stood."""
    python, arrays = random.getstate(), np.random.get_state()
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
