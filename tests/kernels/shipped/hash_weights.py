"""hash_weights: each law, with and without a generation for each weight."""

from __future__ import annotations

from shipped import Aot, types_of
from sparselth.kernels.hash_weights import LAWS, TILE, _weights_kernel


def _aot(law: str, many: bool, columns: int) -> Aot:
    block_k = min(columns, TILE)
    constants = {
        "LAW": law,
        "GENERATIONS": many,
        "BLOCK_N": TILE // block_k,
        "BLOCK_K": block_k,
        **({} if many else {"generations_ptr": None}),
        **({} if law == "normal" else {"quantiles_ptr": None}),
    }
    types = {"out_ptr": "*fp32", "scale": "fp32"}
    pointers = tuple(name for name in ("generations_ptr", "out_ptr") if name not in constants)
    return Aot(
        kernel=_weights_kernel,
        signature=types_of(_weights_kernel, constants, "*i32", types),
        constants=constants,
        aligned=(*pointers, "columns"),
        num_warps=4,
        num_stages=1,
        max_registers=96,
        narrow=32 if law == "normal" else 0,  # two places of the table a weight
    )


AOT = [_aot(law, many, 4096) for law in LAWS for many in (False, True)] + [_aot(LAWS[0], False, 32)]
