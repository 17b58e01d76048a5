"""What the cases of all ops share. Each op has a file bench/gpu/NAME.py with up to four functions:

    smoke(here)       the op once at the shape of its target beside float64, in every dtype that a target is
                      about; and once captured in a CUDA graph, whose replay gives the bits of a plain call
    targets(here)     the figures of TARGETS in bench/gpu_check.py, each with the one rival that it needs
    large(here)       offsets beyond 2^31, grids beyond 65,535
    benchmarks(here)  every other time and rival: other shapes and dtypes, tuned or compiled rivals, tiles

Each yields `Case`s, cheap to make: whatever allocates or touches the device does so in `run`. All checks but
these are pytest's, in tests/kernels (tests/kernels/oracle.py is theirs and ours); they run on the device too.

A case gives back None, or a dict of facts for the results, of which three have a meaning:

    times     rows of gpu.timing.rows
    figures   {name: number or None}; names are unique within an op, and those of TARGETS are looked up there
    wrong     why a float64 check of what was timed failed: times and figures stay, but are marked

`judged(compare, ...)` runs a check and gives {} or {"wrong": why}: `return {"times": t, "figures": f} | why`.
A case that raises Wrong, or anything, has failed; Skip is no failure. A failure of another case takes nothing
from the times.

`here.size` is "full" on a device and "tiny" on a CPU, in Triton's interpreter, where each runs once, untimed
(`python bench/gpu_check.py --interpret --only NAME`): `here.pick(tiny, full)`. `here.anchors` holds measured
rates and may lack any of them: `here.floor`, `here.copying` and `ratio` then give None.

Rivals whose operands are to be streamed, not found in a cache, are `gpu.timing.Copies(make, bytes)`, with
`make()` giving a call on operands of its own, of so many bytes: their "cold" time is that of calls on enough
copies in turn, in one graph. For all others it is that of one call behind a read of clean memory. Floors and
figures: bytes as DRAM moves them (64-byte granules), and "l2_bytes" where the L2 cache bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from oracle import Wrong


@dataclass(frozen=True)
class Case:
    """Something to run, of a part of the op: a dtype, or whatever else its times are told apart by."""

    name: str
    part: str
    run: Callable[[], dict[str, Any] | None]
    seconds: float = 1.0  # about how long on a device; stopped after four times that and 45 s


@dataclass(frozen=True)
class Here:
    """Where the cases run."""

    device: str
    size: str
    anchors: dict[str, Any] = field(default_factory=dict)

    def pick(self, tiny: Any, full: Any) -> Any:
        return tiny if self.size == "tiny" else full

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def copying(self, count: float) -> float | None:
        """Seconds in which as many bytes are read and written by a copy."""
        rate = self.anchors.get("copy_bytes_per_s")
        return count / rate if rate else None

    def floor(self, least: Mapping[str, float], part: str) -> float | None:
        """Seconds that measured rates leave at best to `bytes`, `flops` and, where given, `l2_bytes`."""
        rates = self.anchors.get("flops_per_s", {})
        terms = [
            (least["bytes"], self.anchors.get("copy_bytes_per_s")),
            (least["flops"], rates.get(part, rates.get("ieee"))),
            (least.get("l2_bytes", 0), self.anchors.get("l2_bytes_per_s")),
        ]
        if any(amount and not rate for amount, rate in terms):
            return None
        return max((amount / rate for amount, rate in terms if rate), default=0.0)


def judged(check: Callable[..., object], *args: Any, **kwargs: Any) -> dict[str, str]:
    """{}, or {"wrong": why} where a check fails: what was timed then stands in the results, marked."""
    try:
        check(*args, **kwargs)
    except Wrong as why:
        return {"wrong": str(why)}
    return {}
