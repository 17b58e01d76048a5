"""seed_linear: the fast kernel in 16 bits at each width, the general one both ways, scores."""

from __future__ import annotations

from typing import Any

from shipped import Aot, types_of
from sparselth.kernels._tiles import precision
from sparselth.kernels.seed_linear import (
    COLUMNS,
    TILES,
    WARPS,
    _half_kernel,
    _product_kernel,
    _score_grad_kernel,
)

NARROW = {
    "half": 8,
    "tf32": 56,
    "ieee": 16,
}  # bits of the mask; v, whose columns a product in TF32 takes one by one
POINTERS = {"half": "*bf16", "tf32": "*fp32", "ieee": "*fp32"}


def _half(columns: int, split: bool, even: bool) -> Aot:
    constants: dict[str, Any] = {
        "HAS_BIAS": not split,
        "EVEN_K": even,
        "BLOCK_B": columns,
        "INTERPRET": False,
        **({"bias_ptr": None} if split else {}),
    }
    types = {"scale": "fp32", "words_ptr": "*i32", "out_ptr": "*fp32" if split else "*bf16"}
    pointers = tuple(name for name in ("x_ptr", "words_ptr", "bias_ptr", "out_ptr") if name not in constants)
    return Aot(
        kernel=_half_kernel,
        signature=types_of(_half_kernel, constants, "*bf16", types),
        constants=constants,
        aligned=(*pointers, "N", "K", "words", "stride_xb"),
        num_warps=WARPS,
        num_stages=COLUMNS[columns],
        max_registers=128 if columns < 64 else 208,
        narrow=0 if even else 4,
    )


def _general(name: str, transposed: bool) -> Aot:
    tile = TILES[name]
    constants = {
        "TRANSPOSED": transposed,
        "HAS_BIAS": not transposed,
        "BLOCK_M": tile.rows,
        "BLOCK_B": tile.columns,
        "BLOCK_C": tile.depth,
        "PRECISION": precision(name),
        "INTERPRET": False,
        **({"bias_ptr": None} if transposed else {}),
    }
    types = {"scale": "fp32", "words_ptr": "*i32"}
    pointers = tuple(name for name in ("v_ptr", "words_ptr", "bias_ptr", "out_ptr") if name not in constants)
    return Aot(
        kernel=_product_kernel,
        signature=types_of(_product_kernel, constants, POINTERS[name], types),
        constants=constants,
        aligned=(*pointers, "M", "C", "words", "stride_vb"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=255,
        narrow=NARROW[name],
    )


def _scores(name: str) -> Aot:
    tile = TILES[name]
    constants = {
        "BLOCK_N": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_B": tile.depth,
        "PRECISION": precision(name),
        "INTERPRET": False,
    }
    return Aot(
        kernel=_score_grad_kernel,
        signature=types_of(
            _score_grad_kernel, constants, POINTERS[name], {"scale": "fp32", "out_ptr": "*fp32"}
        ),
        constants=constants,
        aligned=("dy_ptr", "x_ptr", "out_ptr", "N", "K", "stride_dyb", "stride_xb"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=255,
        narrow=96 if name == "tf32" else 0,  # of dy^T, whose rows a product in TF32 takes one by one
    )


AOT = [
    *(_half(columns, split, even) for columns in COLUMNS for split, even in ((True, True), (False, False))),
    *(_general(name, transposed) for name in TILES for transposed in (False, True)),
    *(_scores(name) for name in TILES),
]
