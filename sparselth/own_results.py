"""What `sparselth.imp` came to on a training function of one's own: points, tickets, a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparselth.report.stats import mean_interval

if TYPE_CHECKING:
    from sparselth.masks import Masks

Point = dict[str, Any]
OF_CELL = ("seed", "arm", "level", "draw", "weights_remaining", "seconds")


@dataclass(frozen=True, eq=False)
class Results:
    """What an experiment came to; printed, a table of the first metric.

    points: one a cell, {"seed", "arm", "level", "draw", "weights_remaining", "seconds"} and train's metrics.
    tickets: masks by (seed, level), of the level after the last, too; snapshots: by seed, where they go back.
    """

    points: list[Point]
    tickets: dict[tuple[int, int], Masks] = field(repr=False)
    snapshots: dict[int, dict[str, Any]] = field(repr=False)

    @property
    def metric(self) -> str:
        """The first of train's metrics."""
        return next(name for name in self.points[0] if name not in OF_CELL)

    def __str__(self) -> str:
        arms = list(dict.fromkeys(point["arm"] for point in self.points))
        levels = sorted({point["level"] for point in self.points})
        means = [["level", "weights", *arms]]
        gaps = [["level", *(f"ticket - {arm}" for arm in arms[1:])]]
        for level in levels:
            found = {arm: self._values(arm, level) for arm in arms}
            left = next(p["weights_remaining"] for p in self.points if p["level"] == level)
            means.append([str(level), f"{100 * left:.1f} %", *(_mean([*v.values()]) for v in found.values())])
            gaps.append(
                [
                    str(level),
                    *(
                        _mean(
                            [found["ticket"][s] - v for s, v in found[arm].items() if s in found["ticket"]],
                            "+",
                        )
                        for arm in arms[1:]
                    ),
                ]
            )
        seeds = len({point["seed"] for point in self.points})
        if seeds == 1:
            return "\n".join([*_aligned(means), f"{self.metric} of one seed: too few to tell arms apart"])
        told = f"{self.metric}, mean of {seeds} seeds and its 95 % interval; differences seed by seed"
        return "\n".join(
            [*_aligned(means), *(["", *_aligned(gaps[:1] + gaps[2:])] if arms[1:] else []), told]
        )

    def _values(self, arm: str, level: int) -> dict[int, float]:
        """By seed, where train gave it: its metrics may have other names at another level."""
        mine = [p for p in self.points if (p["arm"], p["level"]) == (arm, level)]
        return {p["seed"]: p[self.metric] for p in mine if self.metric in p}


def _mean(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def _aligned(rows: list[list[str]]) -> list[str]:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
