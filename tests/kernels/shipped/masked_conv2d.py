"""masked_conv2d: the products of four layers, and the small kernels at their largest."""

from __future__ import annotations

from typing import Any

import torch

from shipped import Aot
from sparselth.kernels.masked_conv2d import (
    POINTERS,
    Geometry,
    _conv_kernel,
    _list_kernel,
    _pack_kernel,
    _sum_kernel,
    _tile,
    _wgrad_kernel,
    _wgrad_tile,
)

TYPES = {"mask_ptr": "*u8", "slab_ptr": "*fp32"} | dict.fromkeys(
    ("occupied_ptr", "live_ptr", "count_ptr"), "*i32"
)
MULTIPLES = ("OUT", "IN", "N", "C", "K", "stride_xr", "stride_dr", "stride_wr")  # of 16, in layers like that


def _aot(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    limits: tuple[int, int],
    even: bool = True,
    warps: int = 4,
    stages: int = 3,
) -> Aot:
    """`limits` are registers and narrow accesses."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {n: TYPES.get(n, POINTERS[dtype]) if n.endswith("_ptr") else "i32" for n in names}
    return Aot(
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(n for n in names if n.endswith("_ptr") or (even and n in MULTIPLES)),
        num_warps=warps,
        num_stages=stages,
        max_registers=limits[0],
        narrow=limits[1],
    )


def _shipped() -> list[Aot]:
    found = [_aot(_list_kernel, torch.float32, {"BLOCK": 256}, (32, 5))]
    g = Geometry((3, 3), (2, 2), (1, 1), (1, 1))
    # narrow are all pixels of one channel, and for dw in TF32 the copies that transpose on the way
    for dtype, precision, c, n, conv, dw in (
        (torch.float32, "tf32", 1, 6, (128, 44), (64, 27)),
        (torch.float32, "tf32", 256, 256, (200, 21), (176, 208)),
        (torch.float32, "ieee", 256, 256, (128, 6), (112, 32)),
        (torch.bfloat16, "ieee", 256, 256, (200, 21), (224, 64)),
    ):
        product = {"GEOMETRY": tuple(g), "PRECISION": precision, "UPCAST": False}
        for transposed, out, inner in ((False, n, c), (True, c, n)):
            tile = _tile(dtype, precision, out, inner)
            constants = product | tile.blocks() | {"TRANSPOSED": transposed, "HAS_BIAS": not transposed}
            constants["ONE_TAP"] = inner % tile.k == 0
            found.append(_aot(_conv_kernel, dtype, constants, conv, c > 1, tile.warps, tile.stages))
        tile = _wgrad_tile(dtype, precision, n, c, 9 * c)
        constants = product | tile.blocks() | {"H": 28, "W": 28, "P": 14, "Q": 14}
        constants["ONE_TAP"] = c % tile.k == 0
        found.append(_aot(_wgrad_kernel, dtype, constants, dw, c > 1, tile.warps, tile.stages))
    for transposed in (False, True):
        cut = {"TAPS": 9, "TRANSPOSED": transposed, "BLOCK_N": 128, "BLOCK_K": 64}
        found.append(_aot(_pack_kernel, torch.bfloat16, cut, (64, 33), warps=16))
    found.append(_aot(_sum_kernel, torch.float32, {"TAPS": 9, "BYTES": 128}, (48, 65)))
    return found


AOT = _shipped()
