"""magnitude_threshold: what reads weights, of full and of ragged rows, and what reads lists."""

from __future__ import annotations

from shipped import Aot
from sparselth.kernels.magnitude_threshold import (
    BLOCK,
    LIST,
    _finish_kernel,
    _open_kernel,
    _sample_kernel,
    _sweep_kernel,
)


def _aot(pointer: str, ragged: bool, registers: int, narrow: int) -> list[Aot]:
    """The kernels that read weights."""
    sizes = {"masked_bytes": "i32", "K": "i32", "first": "i32", "stride_wr": "i64", "stride_mr": "i64"}
    aligned: tuple[str, ...] = ("w_ptr", "mask_ptr", "plan_ptr", "first", "stride_wr")
    if not ragged:
        aligned += ("K", "stride_mr")
    return [
        Aot(
            kernel=_sample_kernel,
            signature={"w_ptr": pointer, "mask_ptr": "*u8", "keys_ptr": "*i32", "places_ptr": "*i64"}
            | {"n": "i32", "numel": "i32", "step": "i32", "at": "i32", "samples": "i32", **sizes},
            constants={"BLOCK": LIST, "RAGGED": ragged},
            aligned=tuple(name for name in aligned if name != "plan_ptr")
            + ("keys_ptr", "places_ptr", "step"),
            num_warps=4,
            num_stages=1,
            max_registers=64,
            narrow=32,
        ),
        Aot(
            kernel=_sweep_kernel,
            signature={"w_ptr": pointer, "mask_ptr": "*u8", "plan_ptr": "*i64", "bits_ptr": "*u8"}
            | {"bracket_ptr": "*i64", "n_bytes": "i32", "capacity": "i32", "stride_br": "i64", **sizes},
            constants={"BLOCK": BLOCK // 2 if ragged else BLOCK, "RAGGED": ragged},
            aligned=(*aligned, "bits_ptr", "bracket_ptr", "stride_br") + (() if ragged else ("n_bytes",)),
            num_warps=8,
            num_stages=1,
            max_registers=registers,
            narrow=narrow,
        ),
    ]


AOT = [
    # narrow: the pivots, the bytes of bits and masks, and single members, a loop that is unrolled by 8 with
    # Triton 3.6; in ragged rows the weights, too
    *_aot("*fp32", ragged=False, registers=64, narrow=24),
    *_aot("*fp32", ragged=True, registers=128, narrow=36),
    *_aot("*bf16", ragged=False, registers=64, narrow=24),
    Aot(
        kernel=_open_kernel,
        signature={"keys_ptr": "*i32", "order_ptr": "*i64", "places_ptr": "*i64", "plan_ptr": "*i64"}
        | {"bracket_ptr": "*i64", "samples": "i32", "capacity": "i32"},
        constants={"BLOCK": LIST},
        aligned=("keys_ptr", "order_ptr", "places_ptr", "plan_ptr", "bracket_ptr"),
        num_warps=4,
        num_stages=1,
        max_registers=64,
        narrow=13,
    ),
    Aot(
        kernel=_finish_kernel,
        signature={"bracket_ptr": "*i64", "plan_ptr": "*i64", "bits_ptr": "*i32", "thresholds_ptr": "*fp32"}
        | {"capacity": "i32", "stride_br": "i64", "stride_tr": "i32"},
        constants={"BLOCK": LIST},
        aligned=("bracket_ptr", "plan_ptr", "bits_ptr"),
        num_warps=4,
        num_stages=1,
        max_registers=64,
        narrow=21,
    ),
]
