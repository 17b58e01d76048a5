"""block_conv2d: every tile, the small ones with channels that end within a block; blocks of every size;
split lists."""

from __future__ import annotations

from shipped import Aot, types_of
from sparselth.kernels._tiles import GROUP, Tile, precision
from sparselth.kernels.block_conv2d import TILES, _block_conv2d_kernel

# Registers, and narrow accesses: those of the bias and of the places. Large tiles take up to 224 registers
# on sm_80; on sm_90 those of 8 warps at most 128.
LIMITS = {"half": (224, 23), "tf32": (200, 23), "ieee": (128, 13)}


def _aot(kind: str, block: int, tile: Tile, even: bool = True, split: bool = False) -> Aot:
    """The kernel as `launch` starts it; channels of x and y are multiples of 16."""
    constants = {
        "GEOMETRY": ((3, 3), (2, 2), (1, 1), (1, 1)),
        "BLOCK": block,
        "HAS_BIAS": not split,
        "RELU": not split,
        "SPLIT": split,
        "EVEN_C": even,
        "BLOCK_M": tile.rows,
        "BLOCK_N": min(block, tile.columns),
        "DEPTH": min(block, tile.depth),
        "GROUP": GROUP,
        "PRECISION": precision(kind),
        "CORES": kind != "ieee",
        "UPCAST": False,
    }
    pointer = "*bf16" if kind == "half" else "*fp32"
    types = dict.fromkeys(("places_ptr", "starts_ptr", "order_ptr"), "*i32")
    types |= {"out_ptr": "*fp32"} if split else {}
    signature = types_of(_block_conv2d_kernel, constants, pointer, types)
    registers, narrow = LIMITS[kind]
    return Aot(
        kernel=_block_conv2d_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name.endswith("_ptr") or name in ("N", "C")),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=registers,
        narrow=narrow,
    )


def _shipped() -> list[Aot]:
    found = []
    for kind, tiles in TILES.items():
        found += [_aot(kind, max(64, t.columns), t, even=t.rows > 32) for t in tiles]
    half = TILES["half"]
    found += [_aot("half", 16, half[1]), _aot("half", 32, half[2]), _aot("half", 128, half[-1], split=True)]
    return found


AOT = _shipped()
