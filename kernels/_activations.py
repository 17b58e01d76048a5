"""What may stand behind a layer of inference: the one table of native/activate.inc and its ops.

A number is a place in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order of native/activate.inc
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,  # x clamp(x + 3, 0, 6) / 6
    "hardsigmoid": F.hardsigmoid,  # clamp(x + 3, 0, 6) / 6
    "sigmoid": torch.sigmoid,
    "silu": F.silu,  # x sigmoid(x)
}


def number(activation: str) -> int:
    """Its place in the table; ValueError where it has none."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)}, got {activation!r}")
    return [*ACTIVATIONS].index(activation)
