"""Races: every rival in every round, by CUDA events, in four ways.

cold        one call behind a read of four times the L2 cache (`sparselth.clock`), launched from Python
warm        several calls in a row, launched from Python
graph       several calls in a CUDA graph, replayed: what the device alone needs
cold graph  one call in a graph behind such a read; the start of the graph, some microseconds, counts

A call that the host is too slow to launch in time is as slow as that: eager is what a user of eager sees.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu.common import Here
from oracle import graphed
from sparselth import clock

SAMPLE = 2e-4  # seconds that calls in a row should last at least
SPENT = 0.4  # seconds after which a slow rival leaves the race, if it has 3 samples

Run = Callable[[], object]


@dataclass(frozen=True)
class Copies:
    """A rival whose operands shall come from memory: `make()` is a call on a copy of them, of `bytes`."""

    make: Callable[[], Run]
    bytes: int


def race(
    here: Here, rivals: Mapping[str, Run | Copies], ours: str, no_graph: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """{rival: {way: {median_s, q1_s, q3_s, samples} or {none: why}}}; on a CPU all run once, untimed."""
    rivals = {name: rival.make() if isinstance(rival, Copies) else rival for name, rival in rivals.items()}
    if here.device == "cpu":
        for run in rivals.values():
            run()
        return {name: {} for name in rivals}
    flush = partial(clock.flush, clock.scratch())
    starts: dict[tuple[str, str], tuple[Run | None, Run, int]] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in rivals}
    for name, run in rivals.items():
        try:
            run()
            run()
        except Exception as error:
            if name == ours:
                raise
            found[name]["warm"] = {"none": str(error).splitlines()[0]}
            continue
        estimate = once(None, run)
        calls = min(max(round(SAMPLE / max(estimate, 1e-7)), 1), 50)
        before = run if estimate < 0.01 else None  # what the cold sample flushed comes back
        starts[name, "cold"] = flush, run, 1
        starts[name, "warm"] = before, repeated(run, calls), calls
        if name in no_graph:
            found[name]["graph"] = {"none": "not captured"}
            continue
        try:
            several, single = graphed(run, calls), graphed(run, 1)
        except Exception as error:
            torch.cuda.synchronize()
            found[name]["graph"] = {"none": str(error).splitlines()[0]}
            continue
        starts[name, "graph"] = several.replay, several.replay, calls
        starts[name, "cold graph"] = flush, single.replay, 1
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in starts}
    for _ in range(here.pick(1, 12, 25)):
        for key, (before, run, calls) in starts.items():
            taken = seconds[key]
            if len(taken) < 3 or sum(taken) * calls < SPENT:
                taken.append(once(before, run) / calls)
    for (name, way), taken in seconds.items():
        low, median, high = statistics.quantiles(taken, n=4)
        found[name][way] = {"median_s": median, "q1_s": low, "q3_s": high, "samples": len(taken)}
    return found


def once(before: Run | None, run: Run) -> float:
    """Seconds on the device from the end of `before` to the end of `run`."""
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def repeated(run: Run, calls: int) -> Run:
    def several() -> None:
        for _ in range(calls):
            run()

    return several


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def rows(
    here: Here,
    workload: str,
    least: Mapping[str, int],
    part: str,
    ours: str,
    rivals: Mapping[str, Run | Copies],
    no_graph: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """A race as rows of the results."""
    found = race(here, rivals, ours, no_graph)
    return [
        {"workload": workload, "rival": name, "ours": name == ours, "floor_s": here.floor(least, part)}
        | {"bytes": least["bytes"], "flops": least["flops"], "ways": ways}
        for name, ways in found.items()
    ]


def median(rows: list[dict[str, Any]], rival: str, way: str) -> float | None:
    """Seconds of a rival, None where it was not timed that way."""
    ways = next(row["ways"] for row in rows if row["rival"] == rival)
    seconds: float | None = ways.get(way, {}).get("median_s")
    return seconds


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
