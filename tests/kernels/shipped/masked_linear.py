"""masked_linear: every tile, the large ones even, the small ones with ends to guard."""

from __future__ import annotations

from typing import Any

from shipped import Aot, types_of
from sparselth.kernels._tiles import Tile, precision
from sparselth.kernels.masked_linear import TILES, _product_kernel, _weight_grad_kernel

# Registers and narrow accesses. 128 registers let two IEEE programs share a multiprocessor. Narrow are the
# mask's bytes, the bias, and in TF32 the copies of dy and x for dw, which transpose on the way.
LIMITS = {"half": (200, 12), "tf32": (232, 136), "ieee": (128, 4)}


def _aot(kernel: Any, kind: str, tile: Tile, **constants: Any) -> Aot:
    """The kernel as the launchers start it; rows lie multiples of 16 apart, neighbours in a row 1."""
    product = kernel is _product_kernel
    blocks = ("BLOCK_M", "BLOCK_B", "BLOCK_C") if product else ("BLOCK_N", "BLOCK_K", "BLOCK_B")
    constants |= dict(zip(blocks, tile, strict=False))
    constants |= dict.fromkeys(("stride_vc",) if product else ("stride_dyn", "stride_xk"), 1)
    constants |= {"PRECISION": precision(kind), "UPCAST": False}
    bits = "mask_ptr" if product else "" if constants["SCORES"] else "factor_ptr"
    pointer = "*bf16" if kind == "half" else "*fp32"
    signature = types_of(kernel, constants, pointer, {bits: "*u8"})
    registers, narrow = LIMITS[kind]
    return Aot(
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(signature),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=registers,
        narrow=narrow,
    )


def _shipped() -> list[Aot]:
    found = []
    for kind, tiles in TILES.items():
        for tile, even in zip(tiles, (True, False), strict=True):
            for t in (False, True):
                flags = {"TRANSPOSED": t, "HAS_BIAS": not t, "EVEN_M": even, "EVEN_C": even}
                found.append(_aot(_product_kernel, kind, tile, **flags))
            scores = tile is TILES["half"][1]
            found.append(_aot(_weight_grad_kernel, kind, tile, SCORES=scores))
    return found


AOT = _shipped()
