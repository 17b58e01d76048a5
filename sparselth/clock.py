"""Races: every rival in every round, so that whatever disturbs the machine disturbs all of them alike.

The order of each round is drawn anew, since who follows whom decides what lies in the caches. A sample is
one function that does some work and gives its seconds per call:

wall   on a CPU, several calls in a row on the same memory, one more before them that is not timed: caches
       are warm where they are large enough
cold   on CUDA, one call behind a read of four times the second-level cache: a write would leave lines there
       that go back to memory within the call, and count in its time. From a CUDA graph where the call can be
       captured, so that the time is the device's, else launched from Python; the start of the graph, some
       microseconds, counts in all rivals
warm   on CUDA, several calls in a row, from a graph where that can be
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from sparselth.kernels._graphs import replayed

Call = Callable[[], object]
Sample = Callable[[], float]

ROUNDS, SECONDS = 7, 0.12  # of a race: at least so many rounds, and go on for so long
FEWEST, SHARE = 5, 0.4  # a slow rival leaves with so many samples once they took so many seconds
MOST = 200  # rounds
SAMPLE = 2e-4  # seconds that the calls of one sample should last at least
WAIT = 0.1  # of a sample's time: a sample that waited longer for a processor was disturbed by others
_mark = [0.0, 0.0]  # seconds waited, and the clock's, where the timed part of a sample began
LONG = 0.02  # seconds of a call that no earlier one makes faster


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    samples: int
    disturbed: float = field(default=0.0, compare=False)  # share of the samples that waited for a processor

    @property
    def spread(self) -> float:
        """From the first quartile to the third."""
        return self.high - self.low


class Race:
    """Rivals that take turns; with `watch` it is noted which samples waited for a processor."""

    def __init__(
        self, rivals: Mapping[str, Sample], share: float | None = SHARE, watch: bool = False
    ) -> None:
        self.rivals, self.share, self.watch = dict(rivals), share, watch
        self.seconds: dict[str, list[float]] = {name: [] for name in rivals}
        self.waits: dict[str, list[bool]] = {name: [] for name in rivals}
        self.spent = dict.fromkeys(rivals, 0.0)
        self.order, self.draw = list(rivals), random.Random(0)

    def round(self) -> None:
        """One sample of each; not of those that are slow and have enough, where there is a share of time."""
        self.draw.shuffle(self.order)
        for name in self.order:
            if self.share is None or len(self.seconds[name]) < FEWEST or self.spent[name] < self.share:
                if self.watch:
                    mark()
                began = time.perf_counter()
                self.seconds[name].append(self.rivals[name]())
                ended = time.perf_counter()
                self.spent[name] += ended - began
                self.waits[name].append(self.watch and waited() - _mark[0] > WAIT * (ended - _mark[1]))

    def only(self, names: Collection[str], more: float = 0.0) -> Race:
        """The same race between some of the rivals, with `more` seconds for slow ones."""
        share = None if self.share is None else self.share + more
        some = Race({name: self.rivals[name] for name in self.rivals if name in names}, share, self.watch)
        some.seconds, some.waits, some.spent = self.seconds, self.waits, self.spent
        return some

    def timings(self, skip: int = 0) -> dict[str, Timing]:
        """Medians and quartiles, without the first `skip` rounds."""
        found = {}
        for name in self.rivals:
            values = self.seconds[name][skip:]
            low, median, high = statistics.quantiles(values, n=4)
            waits = self.waits[name][skip:]
            found[name] = Timing(median, low, high, len(values), sum(waits) / len(waits))
        return found


def rounds(race: Race, least: int = ROUNDS, seconds: float = SECONDS) -> None:
    """At least so many rounds (slow rivals: FEWEST), and go on for about so many seconds."""
    began = time.perf_counter()
    for done in range(MOST):
        if done >= least and time.perf_counter() - began >= seconds:
            break
        race.round()


def waited() -> float:
    """Seconds that threads of this process were ready to run and had no processor; 0 where nobody counts."""
    total = 0
    with suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError, IndexError, ValueError):  # a thread that has ended; a system without them
                file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
                try:
                    total += int(os.read(file, 64).split()[1])
                finally:
                    os.close(file)
    return total / 1e9


def mark() -> None:
    """Here begins what is timed of a sample: who waited before was not disturbed."""
    _mark[:] = waited(), time.perf_counter()


def wall(call: Call, calls: int = 1, before: Call | None = None) -> Sample:
    """`calls` calls in a row by the processor's clock, behind `before`."""

    def sample() -> float:
        if before:
            before()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    return sample


def warm_wall(call: Call) -> Sample:
    """`wall` with as many calls as a sample needs, behind an untimed one; the call has run before."""
    taken = wall(call)()
    if taken < LONG:
        taken = min(taken, wall(call)())
    calls = min(max(round(SAMPLE / max(taken, 1e-7)), 1), 1000)
    return wall(call, calls, call if taken < LONG else None)


def cold(call: Call, scratch: torch.Tensor) -> Sample:
    """One call after `scratch` was read."""
    return _events(partial(flush, scratch), replayed(call, 1), 1)


def warm(call: Call) -> Sample:
    """Calls in a row that together last for a sample."""
    taken = _events(call, call, 1)()
    calls = min(max(round(SAMPLE / max(taken, 1e-7)), 1), 50)
    several = replayed(call, calls)
    return _events(several, several, calls)


def scratch() -> torch.Tensor:
    """What `cold` reads: four times the second-level cache."""
    size = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return torch.zeros(size, dtype=torch.float32, device="cuda")


def flush(scratch: torch.Tensor) -> None:
    """Fill the caches with clean lines of `scratch`."""
    scratch.sum()


def _events(before: Call, call: Call, calls: int) -> Sample:
    """Seconds on the device from the end of `before` to the end of `call`, which is `calls` calls."""

    def sample() -> float:
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        before()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / calls

    return sample
