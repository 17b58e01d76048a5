"""replica_parts: each kernel at a layer of LeNet or Conv-2."""

from __future__ import annotations

from shipped import Aot
from sparselth.kernels.replica_parts import (
    BLOCK,
    LANES,
    PIXELS,
    ROWS,
    _begin_kernel,
    _bias_relu_kernel,
    _cross_entropy_grad_kernel,
    _gather_kernel,
    _max_pool_backward_kernel,
    _max_pool_kernel,
)


def _aot(
    kernel: object, types: str, constants: dict[str, object], warps: int, registers: int, narrow: int
) -> Aot:
    """`types`: the Triton types of the arguments that are no constants, in turn; integers are multiples of 16
    where marked with a dot."""
    names = [name for name in kernel.arg_names if name not in constants]  # type: ignore[attr-defined]
    signature = dict(zip(names, types.replace(".", "").split(), strict=True))
    aligned = tuple(
        name for name, kind in zip(names, types.split(), strict=True) if kind[0] == "*" or kind[-1] == "."
    )
    return Aot(
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=aligned,
        num_warps=warps,
        num_stages=1,
        max_registers=registers,
        narrow=narrow,
    )


# Narrow are scalars, places, labels, biases, and all of begin_step and of ten logits in a row.
AOT = [
    _aot(_begin_kernel, "*i64 *fp64 *fp32 *fp64 *fp32 *i64 i32 i32 i32", {"LANES": LANES}, 1, 40, 30),
    _aot(
        _gather_kernel,
        "*u8 *i64 *fp32 *fp32 *i64 *i64 *fp32 *i64 i32 i32. i32",
        {"PIXELS": PIXELS},
        2,
        80,
        8,
    ),
    _aot(_bias_relu_kernel, "*fp32 *fp32 i32 i32. i32", {"BLOCK": BLOCK}, 4, 48, 8),
    _aot(_max_pool_kernel, "*fp32 *fp32 i32. i32. i32.", {"SIZE": 2, "BLOCK": BLOCK}, 4, 48, 0),
    _aot(
        _max_pool_backward_kernel,
        "*fp32 *fp32 *fp32 *fp32 i32 i32. i32. i32. i32. i32. i32. i32.",
        {"stride_c": 1, "CUTS": True, "SIZE": 2, "BLOCK": BLOCK},
        4,
        64,
        0,
    ),
    _aot(
        _cross_entropy_grad_kernel,
        "*fp32 *fp32 *i64 *fp32 i32 i32 i32 i32 i32 i32 i32",
        {"stride_c": 1, "stride_dc": 1, "HAS_BIAS": True, "ROWS": ROWS, "CLASSES": 16},
        4,
        64,
        40,
    ),
]
