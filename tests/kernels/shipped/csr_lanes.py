"""csr_lanes: widths of x and lanes a row, of each dtype; columns of 32 bits; x in tiles."""

from __future__ import annotations

from shipped import Aot, types_of
from sparselth.kernels.csr_lanes import WARPS, _lanes_kernel


def _aot(dtype: str, columns: int, lanes: int, tiles: bool = False, wide: bool = False) -> Aot:
    """Narrow are starts, rows, bias and y; of few columns, all that is read of x.

    64 registers let all THREADS run at once.
    """
    constants = {"HAS_BIAS": True, "RELU": True, "DTYPE": dtype, "WORDS_C": 8 if wide else 4}
    constants |= {"ROWS": 32 * WARPS // lanes, "LANES": lanes, "COLUMNS": columns}
    x = "*i16" if columns == 1 and dtype != "fp32" else "*i32"
    types = {"x_ptr": x, "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    signature = types_of(_lanes_kernel, constants, "*i32", types)
    if not tiles:  # one: Triton makes a constant of it
        del signature["tiles"]
        constants["tiles"] = 1
    beside = columns * (4 if dtype == "fp32" else 2)  # bytes
    return Aot(
        kernel=_lanes_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name.endswith("_ptr")),
        num_warps=WARPS,
        num_stages=1,
        max_registers=64 if beside <= 16 else 80,
        narrow=16 if beside >= 16 else 40,
    )


AOT = [
    *[_aot("bf16", columns, 16) for columns in (1, 4)],
    *[_aot("bf16", 8, lanes) for lanes in (8, 16, 32, 128)],
    *[_aot(dtype, 16, 16) for dtype in ("bf16", "fp16")],
    *[_aot("fp32", columns, 16) for columns in (1, 8)],
    _aot("fp16", 8, 32),
    _aot("bf16", 8, 32, wide=True),
    _aot("bf16", 16, 32, tiles=True),
    _aot("fp32", 8, 32, tiles=True, wide=True),
]
