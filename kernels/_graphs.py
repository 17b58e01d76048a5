"""CUDA graphs of calls: to replay, and to time what the device alone needs.

A capture that breaks raises within torch.cuda.graph's exit, which then leaves the capture's stream current
and the allocator in the belief that the capture goes on: it would free no cached block from then on, not
even when memory is short (torch 2.11 to 2.14). `capture` puts both right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

Call = Callable[[], object]

WARM_UP = 2  # calls that compile and allocate before a capture


@lru_cache(maxsize=8)
def side(device: int) -> torch.cuda.Stream:
    """The stream of all warm-ups and captures: libraries keep a workspace for every stream they meet."""
    return torch.cuda.Stream(device)


def warm_up(call: Call, times: int = WARM_UP) -> None:
    """Calls on the stream of captures."""
    current, stream = torch.cuda.current_stream(), side(torch.cuda.current_device())
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    current.wait_stream(stream)


def capture(call: Call, calls: int = 1, pool: Any = None) -> torch.cuda.CUDAGraph:
    """`calls` calls in a row as a graph, in memory of its own or of `pool`; the call was warmed up before.

    Where it fails it raises, and all is as it was: the error may be that of the capture, and what broke it
    the error's context.
    """
    current, device = torch.cuda.current_stream(), torch.cuda.current_device()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side(device)):
            for _ in range(calls):
                call()
    except BaseException:
        torch.cuda.set_stream(current)
        _end(device, pool)
        torch.cuda.synchronize()
        raise
    return graph


def _end(device: int, pool: Any) -> None:
    """Let go of the pool of a capture that broke."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it broke before it began, or behind its end: then its graph lets go
        return
    torch._C._cuda_releasePool(device, pool)


def replayed(call: Call, calls: int) -> Call:
    """`calls` calls in a row as one: from a graph, or from Python where the call cannot be captured."""

    def plain() -> None:
        for _ in range(calls):
            call()

    warm_up(call)
    try:
        return capture(call, calls).replay
    except RuntimeError:
        return plain
