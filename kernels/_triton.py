"""Triton, or a stand-in that lets kernel files be imported where Triton is missing.

INTERPRET: kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before import).
HAS_TRITON: kernels can be launched at all, in the interpreter or on a CUDA device.
"""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Missing:
        """Stands for any name of Triton; `jit` hands the function back, calling anything else fails."""

        def __getattr__(self, name: str) -> Any:
            return _Missing()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and callable(args[0]):
                return args[0]
            return _Missing()

    triton = tl = _Missing()
    HAS_TRITON = False

GRID = 65_535  # programs along the second axis of a CUDA grid, or the third, at most
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def within_grid(replicas: int) -> list[slice]:
    """All replicas, in as many launches as they take where each has its own place along the second axis."""
    return [slice(start, start + GRID) for start in range(0, replicas, GRID)]


__all__ = ["GRID", "HAS_TRITON", "INTERPRET", "tl", "triton", "within_grid"]
