"""Seconds of candidates: raced against each other, and kept in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sparselth import __version__, clock
from sparselth.files import read_cache, write_cache
from sparselth.kernels.step_parts import Call

# Rounds and seconds of a race at least, and how many times the fastest's time what goes on may take
HEATS = (3, 0.03, 2.0), (7, 0.07, 1.1), (7, 0.2, 1.0)
SPREAD = 1.5  # times the lower quartile that an upper one may be for times to be kept
WAY = 3  # of measuring; times of another way are not used


class Times(dict[str, float]):
    """Seconds by name; not `steady` where they varied so much that other programs must have been at work."""

    steady = True


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
    found.steady = all(timings[name].high <= SPREAD * found[name] for name in final)
    return found


class Cache:
    """Times that were measured on this machine before, for batches of one size on one device (its key)."""

    def __init__(self, batch: int, device: str) -> None:
        self.batch, self.new = batch, False
        self.known: dict[str, dict[str, float]] = read_cache("convert")
        self.unsure: dict[str, dict[str, float]] = {}  # not for the file: measured among other programs
        self.suffix = (
            f", batch {batch}, {device}, torch {torch.__version__}, sparselth {__version__}, way {WAY}"
        )

    def times(
        self, key: str, calls: Mapping[str, Call], sample: Callable[[Call], clock.Sample]
    ) -> dict[str, float]:
        """Seconds of each call; what is unknown is measured by samples as `sample` makes them."""
        key += self.suffix
        known = self.unsure.get(key) or self.known.get(key)
        if not isinstance(known, dict) or not all(isinstance(known.get(name), float) for name in calls):
            known = seconds(calls, sample)
            if known.steady:
                self.known[key], self.new = known, True
            else:
                again = seconds(calls, sample)
                known = self.unsure[key] = {name: min(known[name], again[name]) for name in calls}
        return {name: known[name] for name in calls}

    def save(self) -> None:
        if self.new:
            write_cache("convert", self.known)
