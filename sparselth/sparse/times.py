"""Seconds of candidates: raced against each other, and kept in the user's cache folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparselth import __version__, clock
from sparselth.files import read_cache, write_cache
from sparselth.kernels.step_parts import Call

# Rounds and seconds of a race at least, and how many times the fastest's time what goes on may take
HEATS = (3, 0.03, 2.0), (7, 0.07, 1.1), (7, 0.2, 1.0)
SPREAD = 1.5  # times the lower quartile that an upper one may be; above it times are measured again next time
WAY = 7  # of measuring and of what is kept; times of another way are not used


class Times(dict[str, float]):
    """Seconds by name, and how much those that decide varied: much where other programs are at work."""

    spread = 1.0

    @property
    def steady(self) -> bool:
        return self.spread <= SPREAD


def seconds(calls: Mapping[str, Call], sample: Callable[[Call], clock.Sample] = clock.warm_wall) -> Times:
    """The lower quartile of the seconds of each, all in turn: other programs only ever make a call slower.

    `sample` makes samples of a call. Who is far behind leaves early; the fastest and what comes close to it
    go on for longest.
    """
    for call in calls.values():
        call()
    race = clock.Race({name: sample(call) for name, call in calls.items()}, share=None)
    found = Times()
    for rounds, limit, near in HEATS:
        clock.rounds(race, rounds, limit)
        timings = race.timings()
        found.update((name, timing.low) for name, timing in timings.items())
        best = min(found.values(), default=0.0)
        final = [name for name in timings if found[name] <= near * best]
        if len(final) < 2:
            break
        race = race.only(final)
    found.spread = max((timings[name].high / max(found[name], 1e-9) for name in final), default=1.0)
    return found


class Cache:
    """Times that were measured on this machine before, for batches of one size on one device (its key).

    What was measured among other programs is kept with its spread, and measured again by the next process.
    """

    def __init__(self, batch: int, device: str) -> None:
        self.batch, self.new = batch, False
        self.known = read_cache("convert")
        self.unsure: dict[str, Times] = {}  # that this process has measured, and measures no more
        self.suffix = (
            f", batch {batch}, {device}, torch {torch.__version__}, sparselth {__version__}, way {WAY}"
        )

    def times(
        self, key: str, calls: Mapping[str, Call], sample: Callable[[Call], clock.Sample]
    ) -> dict[str, float]:
        """Seconds of each call; what is unknown or unsure is measured by samples as `sample` makes them."""
        key += self.suffix
        found = self.unsure.get(key) or _kept(self.known.get(key))
        if found is None or not (found.steady or key in self.unsure) or not found.keys() >= calls.keys():
            found = seconds(calls, sample)
            if not found.steady:
                found = self.unsure[key] = _least(found, seconds(calls, sample))
            self.known[key], self.new = {"seconds": found, "spread": round(found.spread, 3)}, True
        return {name: found[name] for name in calls}

    def save(self) -> None:
        if self.new:
            write_cache("convert", self.known)


def _kept(data: Any) -> Times | None:
    """Times as a cache file has them; None where they are none."""
    try:
        found = Times({name: float(value) for name, value in data["seconds"].items()})
        found.spread = float(data["spread"])
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return None
    right = all(0 < value < math.inf for value in (*found.values(), found.spread))
    return found if right else None


def _least(some: Times, others: Times) -> Times:
    """Of two measurements of the same calls the least seconds, with the spread of the steadier one."""
    found = Times({name: min(value, others[name]) for name, value in some.items()})
    found.spread = min(some.spread, others.spread)
    return found
