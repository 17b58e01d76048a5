"""masked_update: SGD without and with momentum, Nesterov's; Adam and AdamW."""

from __future__ import annotations

from shipped import Aot
from sparselth.kernels.masked_update import BLOCK, NARROW, WARPS, _update_kernel

_SIGNATURE = (
    {"table_ptr": "*i64", "chunk_ptr": "*i64", "active_ptr": "*u8"}
    | dict.fromkeys(("beta1", "beta2", "rest1", "rest2", "eps"), "fp32")
    | dict.fromkeys(("weight_decay", "log_beta1", "log_beta2"), "fp64")
)
AOT = [
    Aot(
        kernel=_update_kernel,
        signature=_SIGNATURE,
        constants={
            "MOMENTS": moments,
            "NESTEROV": nesterov,
            "DECOUPLED": decoupled,
            "BLOCK": BLOCK,
            "NARROW": NARROW,
        },
        aligned=("table_ptr", "chunk_ptr", "active_ptr"),
        num_warps=WARPS,
        num_stages=1,
        max_registers=80,
        narrow=(24, 28, 34)[moments],  # the tables, bytes of mask, and rounds of single weights
        waiting=(4, 6, 8)[moments],  # rounds of single weights: what a byte has nothing of is not read
    )
    for moments, nesterov, decoupled in (
        (0, False, False),
        (1, False, False),
        (1, True, False),
        (2, False, False),
        (2, False, True),
    )
]
