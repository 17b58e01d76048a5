"""bitmask: pack and unpack, of full and of ragged rows, and count."""

from __future__ import annotations

from typing import Any

from shipped import Aot
from sparselth.kernels.bitmask import BLOCK, COUNT_BLOCK, _count_kernel, _pack_kernel, _unpack_kernel

_SIZES = {"n_bytes": "i64", "K": "i64"}


def _aot(kernel: Any, mask: str, ragged: bool, registers: int) -> Aot:
    aligned = ("mask_ptr", "bits_ptr") if ragged else ("mask_ptr", "bits_ptr", "n_bytes", "K")
    return Aot(
        kernel=kernel,
        signature={"mask_ptr": mask, "bits_ptr": "*u8", **_SIZES},
        constants={"BLOCK": BLOCK // 4 if ragged else BLOCK, "RAGGED": ragged},
        aligned=aligned,
        num_warps=4,
        num_stages=1,
        max_registers=registers,
        narrow=18 if ragged else 1,  # 8 bytes of bits a thread; in ragged rows single weights
    )


AOT = [
    _aot(_pack_kernel, "*fp32", ragged=False, registers=96),
    _aot(_pack_kernel, "*u8", ragged=False, registers=96),
    _aot(_pack_kernel, "*u8", ragged=True, registers=160),
    _aot(_unpack_kernel, "*u8", ragged=False, registers=64),
    _aot(_unpack_kernel, "*u8", ragged=True, registers=160),
    Aot(
        kernel=_count_kernel,
        signature={"a_ptr": "*i32", "b_ptr": "*i32", "out_ptr": "*i64", "W": "i64", "chunks": "i32"},
        constants={"BLOCK": COUNT_BLOCK, "XOR": True},
        aligned=("a_ptr", "b_ptr", "out_ptr", "W"),
        num_warps=4,
        num_stages=1,
        max_registers=96,
        narrow=3,  # the atomic
    ),
]
