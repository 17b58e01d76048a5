"""Masks as bits: one bit per weight, 1 = kept, 8 weights a byte, little-endian along the last axis."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bool [..., K] to bytes [..., ceil(K / 8)]; the bits behind K are 0."""
    return np.packbits(mask, axis=-1, bitorder="little")


def unpack(bits: NDArray[np.uint8], k: int) -> NDArray[np.bool_]:
    """Bytes [..., ceil(k / 8)] to bool [..., k]; another width raises ValueError."""
    if bits.shape[-1] != -(-k // 8):
        raise ValueError(f"expected {-(-k // 8)} bytes a row for {k} weights, got {bits.shape[-1]}")
    return np.unpackbits(bits, axis=-1, count=k, bitorder="little").astype(bool)
