"""seed_conv2d: 3 x 3 filters in 16 bits, in TF32 and in fp32."""

from __future__ import annotations

from typing import Any

from shipped import Aot, types_of
from sparselth.kernels._tiles import precision
from sparselth.kernels.seed_conv2d import TILES, _half_kernel, _single_kernel


def _aot(name: str) -> Aot:
    half = name == "half"
    tile = TILES[name]
    own = {"BLOCK_N": tile.rows, "BLOCK_C": tile.depth, "PRECISION": precision(name)}
    constants: dict[str, Any] = {
        "HAS_BIAS": True,
        "KH": 3,
        "KW": 3,
        "BLOCK_P": tile.columns,
        **({"INTERPRET": False} if half else own),
    }
    kernel = _half_kernel if half else _single_kernel
    types = {"scale": "fp32", "words_ptr": "*i32"}
    return Aot(
        kernel=kernel,
        signature=types_of(kernel, constants, "*bf16" if half else "*fp32", types),
        constants=constants,
        aligned=("x_ptr", "words_ptr", "bias_ptr", "out_ptr", "P", "N", "C", "K", "words"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=255,
        narrow=110,  # columns are gathered
    )


AOT = [_aot(name) for name in TILES]
