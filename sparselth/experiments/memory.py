"""Memory that is short: how it is told from other errors, and what this process takes."""

from __future__ import annotations

import gc
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, a library under it, Triton or Python ran out of memory; they say it in many ways.

    Out of memory within the capture of a graph comes as an error of the capture, with its cause behind it.
    """
    words = ("out of memory", "can't allocate memory", "alloc_failed")
    chain, seen = [error], list[BaseException]()
    while chain:
        link = chain.pop()
        said = str(link).lower()
        if isinstance(link, torch.OutOfMemoryError | MemoryError) or any(word in said for word in words):
            return True
        seen.append(link)
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and e not in seen]
    return False


def free_memory() -> None:
    """Let go of what an error no longer holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resident_bytes() -> int:
    """Memory of this process, its part of shared pages included (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
