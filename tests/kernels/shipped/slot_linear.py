"""slot_linear: every tile with x in rows and even K, and the smallest with all ends to guard."""

from __future__ import annotations

from typing import Any

from shipped import Aot, types_of
from sparselth.kernels.slot_linear import FINISH, TILES, WARPS, Tile, _finish_kernel, _slot_kernel


def _aot(tile: Tile, unit: str, even: bool, registers: int, narrow: int) -> Aot:
    constants: dict[str, Any] = {
        "EVEN_K": even,
        "BLOCK_B": tile.columns,
        "CHUNKS": tile.chunks,
        "ENTRIES": tile.entries,
        "INTERPRET": False,
        unit: 1,
    }
    types = {"rows_ptr": "*u8", "columns_ptr": "*u16", "residual_ptr": "*bf16", "x_ptr": "*bf16"}
    types |= {"out_ptr": "*fp32"}
    signature = types_of(_slot_kernel, constants, "*i32", types)
    loose = () if even else ("B", "N", "K")
    return Aot(
        kernel=_slot_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name not in ("chunks", "parts", "units_a_part", *loose)),
        num_warps=WARPS,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        max_registers=registers,
        narrow=narrow,
    )


# Registers and narrow accesses: one x a gathered number where x has rows, and what the residual's lists take.
# Up to 128 registers let two programs share a multiprocessor; those of Tile.registers are for sm_90 alone.
LIMITS = {16: (128, 24), 32: (176, 32), 64: (224, 59), 128: (224, 59)}


def _shipped() -> list[Aot]:
    found = [
        _aot(tile, unit, True, *LIMITS[tile.columns]) for tile in TILES for unit in ("stride_xk", "stride_xb")
    ]
    found.append(_aot(TILES[0], "stride_xk", False, 128, 40))
    finish = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "B": "i32", "N": "i32"}
    constants = {"PARTS": 4, "HAS_BIAS": True, "RELU": True, "BLOCK": FINISH}
    found.append(
        Aot(
            kernel=_finish_kernel,
            signature=finish,
            constants=constants,
            aligned=("parts_ptr", "bias_ptr", "y_ptr", "N"),
            num_warps=4,
            num_stages=3,
            max_registers=64,
        )
    )
    return found


AOT = _shipped()
