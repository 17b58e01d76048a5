"""What the device is and what it can do: the anchors of all floors, each a case of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu.common import Case, Here
from gpu.timing import l2_bytes, once
from oracle import DTYPES, Wrong, precision
from sparselth import machine
from sparselth.kernels._triton import HAS_TRITON, tl, triton

CHUNK = 4096  # floats that a program reads at a time: four 16-byte loads a thread


@triton.jit
def _read_kernel(x_ptr, total_ptr, rounds, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Program p reads chunks p, p + 1, ... of x, past the multiprocessor's own cache; the sums are kept."""
    p = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), dtype=tl.float32)
    for i in range(rounds):
        total += tl.load(x_ptr + (p + i) % CHUNKS * CHUNK + lanes, cache_modifier=".cg")
    tl.store(total_ptr + p, tl.sum(total))


def missing(here: Here) -> str | None:
    """Why nothing can be checked here."""
    if not HAS_TRITON:
        return "Triton cannot be imported"
    if here.size != "tiny" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device (--interpret rehearses on the CPU)"
    return None


def describe(here: Here) -> dict[str, Any]:
    if why := missing(here):
        return {"missing": why}
    facts = machine.environment()
    if here.device == "cpu":
        return {"device": facts}
    p = torch.cuda.get_device_properties(0)
    more = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": l2_bytes(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return {"device": facts | more}


def copying(here: Here) -> float:
    """Bytes a second, read and written, of a copy of 4 GiB or what there is."""
    n = here.pick(2**10, min(2**30, torch.cuda.mem_get_info()[0] // 32 if here.device == "cuda" else 0))
    pair = torch.randn(2, n, device=here.device)
    return 8 * n / median(here, lambda: pair[0].copy_(pair[1]))


def l2_reads(here: Here) -> float:
    """Bytes a second of reads that hit the L2 cache: 16 MiB again and again, by every multiprocessor."""
    chunks, rounds, programs = here.pick((4, 6, 3), (1024, 256, 0))
    if here.device == "cuda":  # all at once: 42 registers a thread leave room for 5 on a multiprocessor
        programs = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    x = torch.ones(chunks * CHUNK, device=here.device)
    total = torch.empty(programs, device=here.device)
    taken = median(here, lambda: _read_kernel[programs,](x, total, rounds, chunks, CHUNK, num_warps=8))
    if not (total == rounds * CHUNK).all():
        raise Wrong("not every chunk was read")
    return 4 * CHUNK * rounds * programs / taken


def products(here: Here, part: str) -> dict[str, float]:
    """FLOPs a second of a large square product of random numbers."""
    n = here.pick(16, 8192)
    a, b = (torch.randn(n, n, device=here.device).to(DTYPES[part]) for _ in range(2))
    c = torch.empty_like(a)
    with precision(part):
        return {part: 2 * n**3 / median(here, lambda: torch.mm(a, b, out=c))}


def median(here: Here, run: Callable[[], object]) -> float:
    """Seconds; on a CPU one, which nobody reads."""
    for _ in range(here.pick(1, 3)):
        run()
    return 1.0 if here.device == "cpu" else statistics.median(once(None, run) for _ in range(12))


def anchors(here: Here) -> Iterator[Case]:
    """The device itself first; then its rates, by the names that `Here.floor` looks up."""

    def rate(name: str, measure: Callable[[Here], Any]) -> dict[str, Any]:
        found = measure(here)
        return {"anchors": {name: found}} if here.device == "cuda" else {}

    yield Case("facts", "", partial(describe, here))
    yield Case("copy", "", partial(rate, "copy_bytes_per_s", copying))
    yield Case("reads from L2", "", partial(rate, "l2_bytes_per_s", l2_reads))
    for part in DTYPES:
        yield Case("product", part, partial(rate, "flops_per_s", partial(products, part=part)))
