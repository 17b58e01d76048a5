"""block_linear: every tile, the small ones with K that ends within a block; several blocks a step;
lists that are split."""

from __future__ import annotations

from shipped import Aot, types_of
from sparselth.kernels._tiles import GROUP, SMALL, SUMMED, Tile, _sum_kernel, precision
from sparselth.kernels.block_linear import TILES, _block_linear_kernel

# Registers, and narrow accesses: those of the bias and of the columns. The large tiles take up to 200
# registers on sm_80; on sm_90 less than 128, and two programs of 8 warps share a multiprocessor. That of
# 256 x 128 has one for itself and may take almost all.
LIMITS = {"half": (200, 24), "tf32": (200, 24), "ieee": (128, 13)}
ALONE = 248


def _aot(kind: str, block: int, tile: Tile, even: bool = True, split: bool = False) -> Aot:
    """The kernel as `launch` starts it; rows of x and y lie multiples of 16 apart."""
    constants = {
        "BLOCK": block,
        "HAS_BIAS": not split,
        "RELU": not split,
        "SPLIT": split,
        "EVEN_K": even,
        "BLOCK_M": tile.rows,
        "BLOCK_N": min(block, tile.columns),
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "PRECISION": precision(kind),
        "CORES": kind != "ieee",
        "UPCAST": False,
    }
    pointer = "*bf16" if kind == "half" else "*fp32"
    types = dict.fromkeys(("columns_ptr", "starts_ptr", "order_ptr"), "*i32")
    types |= {"out_ptr": "*fp32"} if split else {}
    signature = types_of(_block_linear_kernel, constants, pointer, types)
    registers, narrow = LIMITS[kind]
    registers = ALONE if tile.rows * tile.columns == 256 * 128 else registers
    return Aot(
        kernel=_block_linear_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name not in ("B", "lists", "splits")),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=registers,
        narrow=narrow,
    )


def _shipped() -> list[Aot]:
    found = []
    for kind, tiles in TILES.items():
        found += [_aot(kind, max(64, t.columns), t, even=t.rows > SMALL) for t in tiles]
    half = TILES["half"]
    found += [_aot("half", 16, half[1]), _aot("half", 32, half[2]), _aot("half", 128, half[-1], split=True)]
    signature = dict.fromkeys(("parts_ptr", "bias_ptr", "out_ptr"), "*fp32")
    signature |= dict.fromkeys(("size", "N", "splits"), "i32")
    constants = {"HAS_BIAS": True, "RELU": True, "SIZE": SUMMED}
    summed = Aot(
        kernel=_sum_kernel,
        signature=signature,
        constants=constants,
        aligned=("parts_ptr", "bias_ptr", "out_ptr", "size", "N"),
        num_warps=4,
        num_stages=3,
        max_registers=64,
        narrow=0,
    )
    return [*found, summed]


AOT = _shipped()
