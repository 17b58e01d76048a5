"""Memory that is used again, for what a step computes anew each time: fresh memory costs a page fault every
4 KB, which takes longer than to fill it.

A piece is free when nothing but this list holds its storage: no tensor, no view, nothing that autograd saved.
Pieces that were not asked for in a while are given back when a new one is needed. A piece is up to an eighth
larger than what was asked for, so that batches of nearly one size share pieces.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1 << 18  # floats: what is smaller comes from memory that the C library keeps
AGE = 256  # how many pieces may be asked for since a free one was, before it is given back

_USES = getattr(torch._C, "_storage_Use_Count", None)  # torch's own; without it nothing is known to be free
_LOCK = threading.Lock()
_PIECES: dict[int, list[_Piece]] = {}
_asked = 0


class _Piece:
    def __init__(self, size: int) -> None:
        self.storage = torch.empty(size, dtype=torch.float32, device="cpu").untyped_storage()
        self.size, self.last = size, 0

    @property
    def holders(self) -> tuple[int, int]:
        """How many hold the storage in C++ and in Python, as this very line counts them."""
        storage = self.storage
        return (_USES(storage._cdata) if _USES else 0), sys.getrefcount(storage)

    @property
    def lost(self) -> bool:
        """Whether it will never be free: another process may hold it, or its size was changed."""
        return self.storage.is_shared() or self.storage.nbytes() != 4 * self.size

    @property
    def free(self) -> bool:
        """Whether nobody else holds it, nor may in another process, nor has changed its size."""
        return _USES is not None and self.holders == _ALONE and not self.lost


_ALONE = _Piece(1).holders  # versions of Python and torch count differently


def take(shape: Sequence[int], strides: Sequence[int] | None = None) -> Tensor:
    """Uninitialised fp32 of this shape and, unless it is contiguous, these strides."""
    global _asked
    if strides is None:
        strides = [1]
        for n in reversed(shape[1:]):
            strides.insert(0, strides[0] * n)
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else 0
    if size < LEAST or _USES is None:
        return torch.empty_strided(tuple(shape), tuple(strides), dtype=torch.float32, device="cpu")
    size = -(-size // (part := 1 << size.bit_length() - 4)) * part
    with _LOCK:
        _asked += 1
        pieces = _PIECES.setdefault(size, [])
        piece = next((one for one in reversed(pieces) if one.free), None)
        if piece is None:
            _give_back()
            piece = _Piece(size)
            _PIECES.setdefault(size, []).append(piece)
        piece.last = _asked
        empty = torch.empty(0, dtype=torch.float32, device="cpu")
        return empty.set_(piece.storage, 0, tuple(shape), tuple(strides))


def held() -> int:
    """Bytes of all pieces, in use or free."""
    return sum(4 * size * len(pieces) for size, pieces in _PIECES.items())


def clear() -> None:
    """Give back all that is free."""
    with _LOCK:
        _give_back(everything=True)


def _give_back(everything: bool = False) -> None:
    oldest = _asked + 1 if everything else _asked - AGE
    for size, pieces in [*_PIECES.items()]:
        pieces[:] = [p for p in pieces if not p.lost and (p.last >= oldest or not p.free)]
        if not pieces:
            del _PIECES[size]
