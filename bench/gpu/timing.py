"""Races: every rival in every round, by CUDA events, in three ways.

cold   what the device needs for a call whose operands no cache holds. Of `Copies`: calls on enough copies in
       turn, more than three times the L2 cache together, in one CUDA graph; nothing else is in the time. Of
       others: one call behind a read of four times the L2 cache (`sparselth.clock`; a write would leave dirty
       lines, whose way back to memory would count); the start of its graph, some microseconds, does count
graph  calls in a row in one graph, on the same operands: caches are as warm as they get
warm   calls in a row, launched from Python. A call that the host is too slow to launch in time is as slow as
       that: eager is what a user of eager sees

A rival that cannot be captured is launched from Python in its cold calls too; they say "captured": false.
"""

from __future__ import annotations

import itertools
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
ROUNDS = 25
MOST_COPIES = 40  # of operands that small, one call behind a read does as well

Run = Callable[[], object]


@dataclass(frozen=True)
class Copies:
    """A rival whose operands shall come from memory: `make()` is a call on a copy of them, of `bytes`."""

    make: Callable[[], Run]
    bytes: int


@dataclass(frozen=True)
class Way:
    """How a rival is timed: `run` takes `calls` calls, behind `before`."""

    run: Run
    calls: int = 1
    before: Run | None = None
    captured: bool = True


def race(
    here: Here, rivals: Mapping[str, Run | Copies], ours: str, no_graph: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """{rival: {way: {median_s, q1_s, q3_s, samples} or {none: why}}}; on a CPU all run once, untimed."""
    if here.device == "cpu":
        for rival in rivals.values():
            single(rival)()
        return {name: {} for name in rivals}
    flush = partial(clock.flush, clock.scratch())
    ready: dict[tuple[str, str], Way] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in rivals}
    for name, rival in rivals.items():
        try:
            ways = prepared(rival, flush, name not in no_graph)
        except Exception as error:
            if name == ours:
                raise
            ways = {"warm": first_line(error)}
        for way, how in ways.items():
            if isinstance(how, Way):
                ready[name, way] = how
            else:
                found[name][way] = {"none": how}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
    for _ in range(ROUNDS):
        for key, way in ready.items():
            taken = seconds[key]
            if len(taken) < 3 or sum(taken) * way.calls < SPENT:
                taken.append(once(way.before, way.run) / way.calls)
    for (name, word), taken in seconds.items():
        low, median, high = statistics.quantiles(taken, n=4)
        found[name][word] = {"median_s": median, "q1_s": low, "q3_s": high, "samples": len(taken)}
        if not ready[name, word].captured:
            found[name][word]["captured"] = False
    return found


def single(rival: Run | Copies) -> Run:
    return rival.make() if isinstance(rival, Copies) else rival


def prepared(rival: Run | Copies, flush: Run, captures: bool) -> dict[str, Way | str]:
    """Each way of a rival, or why it has none."""
    run = single(rival)
    run()
    run()
    estimate = once(None, run)
    calls = min(max(round(SAMPLE / max(estimate, 1e-7)), 1), 50)
    before = run if estimate < 0.01 else None  # what cold samples drove out comes back
    ways: dict[str, Way | str] = {"warm": Way(repeated(run, calls), calls, before, captured=False)}
    try:
        if not captures:
            raise RuntimeError("not captured")
        several = graphed(run, calls).replay
        ways["graph"] = Way(several, calls, several)
    except Exception as error:
        captures, ways["graph"] = False, first_line(error)
    count = 3 * l2_bytes() // rival.bytes + 1 if isinstance(rival, Copies) else MOST_COPIES + 1
    if count > MOST_COPIES:
        ways["cold"] = Way(graphed(run, 1).replay if captures else run, 1, flush, captures)
        return ways
    runs = [run, *(single(rival) for _ in range(count - 1))]
    for other in runs:
        other()
    calls = count * -(-calls // count)
    turns = itertools.cycle(runs)

    def turn() -> None:
        next(turns)()

    ways["cold"] = Way(
        graphed(turn, calls).replay if captures else repeated(turn, calls), calls, None, captures
    )
    return ways


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


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    shared = {"workload": workload, "floor_s": here.floor(least, part), **least}
    return [shared | {"rival": name, "ours": name == ours, "ways": ways} for name, ways in found.items()]


def median(rows: list[dict[str, Any]], rival: str, way: str) -> float | None:
    """Seconds of a rival, None where it was not timed that way."""
    ways = next(row["ways"] for row in rows if row["rival"] == rival)
    seconds: float | None = ways.get(way, {}).get("median_s")
    return seconds


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
