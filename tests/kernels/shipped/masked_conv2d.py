"""masked_conv2d: the products of four layers, and the small kernels at their largest."""

from __future__ import annotations

from typing import Any

from shipped import Aot, types_of
from sparselth.kernels._tiles import precision
from sparselth.kernels.masked_conv2d import (
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
    pointer: str,
    constants: dict[str, Any],
    limits: tuple[int, int],
    even: bool = True,
    warps: int = 4,
    stages: int = 3,
) -> Aot:
    """`limits` are registers and narrow accesses."""
    signature = types_of(kernel, constants, pointer, TYPES)
    return Aot(
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(n for n in signature if n.endswith("_ptr") or (even and n in MULTIPLES)),
        num_warps=warps,
        num_stages=stages,
        max_registers=limits[0],
        narrow=limits[1],
    )


def _blocks(*sizes: int) -> dict[str, Any]:
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True))


def _shipped() -> list[Aot]:
    found = [_aot(_list_kernel, "*fp32", {"BLOCK": 256}, (32, 5))]
    g = Geometry((3, 3), (2, 2), (1, 1), (1, 1))
    # narrow are all pixels of one channel, and for dw in TF32 the copies that transpose on the way
    for kind, c, n, conv, dw in (
        ("tf32", 1, 6, (128, 44), (64, 27)),
        ("tf32", 256, 256, (200, 21), (176, 208)),
        ("ieee", 256, 256, (128, 6), (112, 32)),
        ("half", 256, 256, (200, 21), (224, 64)),
    ):
        pointer = "*bf16" if kind == "half" else "*fp32"
        product = {"GEOMETRY": tuple(g), "PRECISION": precision(kind), "UPCAST": False}
        for transposed, out, inner in ((False, n, c), (True, c, n)):
            tile = _tile(kind, out, inner)
            constants = product | _blocks(*tile[:3]) | {"TRANSPOSED": transposed, "HAS_BIAS": not transposed}
            constants["ONE_TAP"] = inner % tile.depth == 0
            found.append(_aot(_conv_kernel, pointer, constants, conv, c > 1, tile.warps, tile.stages))
        tile = _wgrad_tile(kind, n, c, 9 * c)
        constants = product | _blocks(tile.depth, tile.rows, tile.columns)
        constants |= {"H": 28, "W": 28, "P": 14, "Q": 14}
        constants["ONE_TAP"] = c % tile.columns == 0
        found.append(_aot(_wgrad_kernel, pointer, constants, dw, c > 1, tile.warps, tile.stages))
    for transposed in (False, True):
        cut = {"TAPS": 9, "TRANSPOSED": transposed, "BLOCK_N": 128, "BLOCK_K": 64}
        found.append(_aot(_pack_kernel, "*bf16", cut, (64, 33), warps=16))
    found.append(_aot(_sum_kernel, "*fp32", {"TAPS": 9, "BYTES": 128}, (48, 65)))
    return found


AOT = _shipped()
