"""Triton, or a stand-in that lets kernel files be imported where Triton is missing.

INTERPRET: kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before import).
HAS_TRITON: kernels can be launched at all, in the interpreter or on a CUDA device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Aot:
    """One configuration a kernel ships with, for the compile gate (tests/kernels/test_compile.py).

    A kernel file lists them as AOT. `signature` gives the Triton type of every argument that is no
    constant ("*fp32", "*u8", "i32", ...); `aligned` names those that are multiples of 16.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    max_registers: int
    maxnreg: int | None = None  # as the launcher has it on sm_90
    narrow: int = 0  # global loads and stores of less than 16 bytes that are meant
    waiting: int = 0  # loads in a loop that wait for another load of the same turn, and are meant to


__all__ = ["GRID", "HAS_TRITON", "INTERPRET", "Aot", "tl", "triton", "within_grid"]
