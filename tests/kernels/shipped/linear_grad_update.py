"""linear_grad_update: Adam and SGD, products in fp32 and in TF32, rows in fours and not."""

from __future__ import annotations

from typing import Any

from shipped import Aot, types_of
from sparselth.kernels.linear_grad_update import TILES, _kernel

_HYPER = dict.fromkeys(("beta1", "beta2", "rest1", "rest2", "eps", "decay"), "fp32")
_TYPES = _HYPER | {"log_beta1": "fp64", "log_beta2": "fp64", "lr_ptr": "*fp64"}
_TYPES |= {"bits_ptr": "*u8", "active_ptr": "*u8"}


def _aot(kind: str, moments: int, units: tuple[int, int, int], registers: int, narrow: int) -> Aot:
    """The kernel as the launcher starts it, dy and x batch-major."""
    tile = TILES[kind]
    constants: dict[str, Any] = dict(zip(("UNIT_DY", "UNIT_X", "UNIT_W"), units, strict=True))
    constants |= dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_B"), tile, strict=False))
    constants |= dict.fromkeys(("HAS_BITS", "HAS_BIAS", "HAS_ACTIVE", "stride_dyn", "stride_xk"), 1)
    constants |= {"MOMENTS": moments, "PRECISION": kind}
    signature = types_of(_kernel, constants, "*fp32", _TYPES)
    return Aot(
        kernel=_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name.endswith("_ptr")),
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=registers,
        narrow=narrow,
    )


# Narrow are the mask's bytes, the bias, the scalars, and dy where its rows are no multiples of 4 (ten
# classes); in the last configuration the weights too, for want of such rows.
AOT = [
    _aot("ieee", 2, (4, 4, 4), registers=128, narrow=20),
    _aot("ieee", 1, (4, 4, 4), registers=96, narrow=16),
    _aot("ieee", 2, (1, 4, 4), registers=160, narrow=50),  # on sm_80; on sm_90 125
    _aot("tf32", 2, (4, 4, 4), registers=128, narrow=20),
    _aot("ieee", 2, (1, 1, 1), registers=240, narrow=170),
]
