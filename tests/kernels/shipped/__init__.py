"""What the compile gate (test_compile.py) checks: a file for each op with Triton kernels, its list AOT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Aot:
    """One configuration a kernel ships with.

    `signature` gives the Triton type of every argument that is no constant ("*fp32", "*u8", "i32", ...);
    `aligned` names those that are multiples of 16.
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


def types_of(
    kernel: Any, constants: Mapping[str, Any], pointer: str, types: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The type of every argument but `constants`: its own, else `pointer` where it is one, else "i32"."""
    known = types or {}
    return {
        name: known.get(name, pointer if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
