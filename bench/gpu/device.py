"""What the device is and what it can do: the anchors of all floors."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from gpu.common import Here
from gpu.timing import l2_bytes, once
from oracle import (
    DTYPES,
    precision,
)
from sparselth import machine
from sparselth.kernels._triton import HAS_TRITON


def missing(interpret: bool) -> str | None:
    """Why nothing can be checked here."""
    if not HAS_TRITON:
        return "Triton cannot be imported"
    if not interpret and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device (--interpret checks in Triton's interpreter)"
    return None


def describe(here: Here) -> dict[str, Any]:
    facts = machine.environment()
    if here.device == "cpu":
        return facts
    p = torch.cuda.get_device_properties(0)
    return facts | {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": l2_bytes(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def anchors(here: Here) -> dict[str, Any]:
    """Bytes a second of a copy, read and written; FLOPs a second of a large square product, random data."""
    if here.device == "cpu":
        return {}
    n = min(2**30, torch.cuda.mem_get_info()[0] // 32)
    pair = torch.randn(2, n, device="cuda")
    copy = 8 * n / median(lambda: pair[0].copy_(pair[1]))
    rates, n = {}, here.pick(0, 4096, 8192)
    for part, dtype in DTYPES.items():
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        with precision(part):
            rates[part] = 2 * n**3 / median(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))  # type: ignore[misc]
    return {"copy_bytes_per_s": copy, "flops_per_s": rates}


def median(run: Any) -> float:
    for _ in range(3):
        run()
    return statistics.median(once(None, run) for _ in range(12))
