"""What experiments over several rewind steps share: `connectivity` and `rewinding`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from sparselth.config import Cell, like, option
from sparselth.experiments.imp import ImpConfig, leave_out
from sparselth.experiments.training import Training

START = "start"  # before the rewind step in the arm of the cell that trains to it
MOST_LEVEL, MOST_REWINDS = 100, 100


def levels_from(first: int, named: str = "") -> Callable[[tuple[int, ...]], str | None]:
    """A check of the field `levels`: different ones from `first`, which may have a name, to MOST_LEVEL."""

    def check(levels: tuple[int, ...]) -> str | None:
        different = levels and len(set(levels)) == len(levels)
        right = different and first <= min(levels) <= max(levels) <= MOST_LEVEL
        return None if right else f"expected different levels from {first}{named} to {MOST_LEVEL}"

    return check


@dataclass(frozen=True, kw_only=True)
class Rewound(Training):
    """Tickets of several rewind steps; the arm of a cell ends in its step, as in ticket-500."""

    has_usual: ClassVar[bool] = False

    model: str = like(Training, "model", "lenet-300-100")
    seeds: tuple[int, ...] = like(Training, "seeds", (0, 1, 2))
    rewind: tuple[int, ...] = option(  # type: ignore[assignment]  # several at once
        None,
        "Steps to go back to: 0,100,500, or in epochs, 0,2ep.  [default: 0, a 50th and a tenth of the steps]",
        ordered=False,
        extends=True,
        epochs=True,
    )
    levels: tuple[int, ...] = option(
        (0, 7),
        "Levels of pruning: 0 is the dense network.",
        levels_from(0, ", the dense network,"),
        ordered=False,
        extends=True,
    )
    rate: float = like(ImpConfig, "rate")
    scope: Literal["layer", "global"] = like(ImpConfig, "scope")
    exclude: tuple[str, ...] = like(ImpConfig, "exclude")

    def __post_init__(self) -> None:
        leave_out(self)
        super().__post_init__()
        steps = self.recipe.steps
        if self.rewind is None:
            object.__setattr__(self, "rewind", tuple(sorted({0, steps // 50, steps // 10})))
        elif all(type(k) is int for k in self.rewind):  # and no word for epochs
            object.__setattr__(self, "rewind", tuple(sorted(self.rewind)))

    def check(self) -> None:
        super().check()
        steps = self.recipe.steps
        right = self.rewind and len(set(self.rewind)) == len(self.rewind) <= MOST_REWINDS
        if not right or min(self.rewind) < 0 or max(self.rewind) >= steps:
            raise self.wrong(
                "rewind",
                f"expected different steps from 0 to {steps - 1}, because training ends at step {steps}",
            )

    def kind(self, cell: Cell) -> str:
        """What a cell is, the first word of its arm."""
        return cell.arm.partition("-")[0]

    def step_of(self, cell: Cell) -> int:
        """The rewind step that a cell is about, 0 where its arm names none."""
        return int(cell.arm.partition("-")[2] or 0)

    def rungs(self) -> list[dict[str, int]]:
        from sparselth.pruning import ladder

        return ladder(self.network.params, max(self.levels), self.rate, self.scope, self.exclude)
