"""Linear mode connectivity: when does training stop to depend on the order of its data (Frankle et al. 2020)?

    start     train to the rewind step k, once a seed
    from-k    two copies of its weights, each with a data order of its own, to the end; draw 0 is pruned by
              magnitude and goes back to step k, as a ticket, level by level
    path-k    the two of a level are ends of a straight line: how far above them its worst point is

A network is stable where that barrier of the error, its instability, is below 2 %. Copies begin with a fresh
optimizer and the learning rate of step k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparselth.config import Cell, at_least, option
from sparselth.experiments.base import Diverged, Finished, Place, register
from sparselth.experiments.imp import check_rungs
from sparselth.experiments.rewound import START, Rewound
from sparselth.experiments.training import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sparselth.data import Images
    from sparselth.data.batches import Resident
    from sparselth.runs import RunRecord

STABLE = 0.02  # of the error, below which a network is stable (Frankle et al. 2020, section 3)
FROM, PATH = "from", "path"  # before the rewind step in the arm of a cell
COPIES = (0, 1)  # draws of a network that differ in their data order


def _images(images: int | None) -> str | None:
    return None if images is None or images >= 1 else "expected 1 or more"


@register
@dataclass(frozen=True, kw_only=True)
class ConnectivityConfig(Rewound):
    """From which step on does a network, dense or a ticket, end in the same place whatever its data order?

    Trains to each rewind step, then two copies with different orders of the data, and measures the error
    along the straight line between them: the instability of Frankle et al. 2020, below 2 % where a network is
    stable. Levels above 0 are tickets, pruned by magnitude level by level and rewound to that step; their
    line to the dense network is measured, too. Ends with a table, figures and a folder that `sparselth show`
    reads; a run that was stopped goes on with `resume`.
    """

    name: ClassVar[str] = "connectivity"
    words: ClassVar[str] = "sparselth.report.connectivity"
    figures: ClassVar[str] = "sparselth.report.connectivity_figures"

    points: int = option(30, "Even points along a line, its ends among them.", at_least(3, most=1000))
    line_images: int | None = option(
        None,
        "Test images, and training images, that the error of a point is counted on, at most.  "
        "[default: 10,000, fewer where lines would take longer than training]",
        _images,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.line_images is None:
            steps, batch = self.recipe.steps, self.recipe.batch_size
            # a line looks at 2 * points * n images; two trainings are worth 6 * steps * batch of them
            most = max(1000, min(10_000, 3 * steps * batch // max(1, self.points)))
            object.__setattr__(self, "line_images", most)

    def check(self) -> None:
        super().check()
        check_rungs(self)

    # ---- cells

    def cells(self) -> list[Cell]:
        """Starts, copies, of levels in between one alone, and lines."""
        found, last = list[Cell](), max(self.levels)
        for seed in self.seeds:
            for k in self.rewind:
                first = Cell(seed, f"{START}-{k}", 0)
                found += [first] if k else []
                for level in range(last + 1):
                    both = level in self.levels
                    found += [self.other(first, FROM, level, draw) for draw in COPIES[: 1 + both]]
                    found += [self.other(first, PATH, level)] if both else []
        return found

    def other(self, cell: Cell, kind: str, level: int = 0, draw: int = 0) -> Cell:
        """Another cell of its seed and rewind step."""
        return Cell(cell.seed, f"{kind}-{self.step_of(cell)}", level, draw)

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        begun = (self.other(cell, START),) if self.step_of(cell) else ()
        if self.kind(cell) == START:
            return ()
        if self.kind(cell) == FROM:
            return (*begun, self.other(cell, FROM, cell.level - 1)) if cell.level else begun
        dense = (self.other(cell, FROM),) if cell.level else ()
        return (*dense, *(self.other(cell, FROM, cell.level, draw) for draw in COPIES))

    def urgency(self, cell: Cell) -> tuple[bool, bool, int]:
        """What others wait for first, by level."""
        kind = self.kind(cell)
        return kind != START, kind == PATH or cell.draw > 0, cell.level

    def start_step(self, cell: Cell) -> int:
        """Where training starts, as the price counts it: its steps are those until the end."""
        steps, k = self.recipe.steps, self.step_of(cell)
        return {START: steps - k, FROM: k}.get(self.kind(cell), steps)

    def rung(self, cell: Cell) -> int:
        return cell.level if self.kind(cell) == FROM else 0

    def start(self, cell: Cell, place: Place) -> tuple[Tensor, Tensor]:
        from sparselth.experiments.connectivity_jobs import start

        return start(self, cell, place)

    def beforehand(self, data: Resident) -> dict[Cell, float]:
        from sparselth.experiments.connectivity_jobs import seconds_of_lines

        return seconds_of_lines(self, data)

    def compute(self, cells: Sequence[Cell], place: Place) -> Sequence[Finished | Diverged] | None:
        from sparselth.experiments.connectivity_jobs import compute

        return compute(self, cells, place)

    # ---- what is said of it

    @property
    def method(self) -> str:
        """How the tickets are pruned, in a line."""
        scope = "over all layers" if self.scope == "global" else "by layer"
        return f"pruned by magnitude, {100 * self.rate:g} % a level {scope}"

    @property
    def how(self) -> str:
        """What is looked at, in a line."""
        left = [f"{100 * self.remaining()[level]:.1f}" for level in self.levels]
        tickets = f", {self.method}" if max(self.levels) else ""
        steps = f"step{'s' * (len(self.rewind) > 1)} {', '.join(f'{k:,}' for k in self.rewind)}"
        return f"two copies from {steps}; {', '.join(left)} % left{tickets}"

    def about(self, cell: Cell) -> str:
        return "" if self.kind(cell) == START else f"{100 * self.remaining()[cell.level]:.1f} %"

    def said(self, line: dict[str, Any]) -> str:
        if "instability" not in line:
            return super().said(line)
        return f"{100 * line['weights_remaining']:.1f} %: instability {100 * line['instability']:.2f} %"

    def plan(self, images: Images | None, finished: int) -> dict[str, str]:
        rows = super().plan(images, finished)
        seeds = f"seeds {', '.join(map(str, self.seeds))}"
        rows["cells"] = f"{seeds}; {counted(len(self.cells()), finished)}"
        more = {
            "copies": self.how,
            "lines": f"{self.points} points, {self.line_images:,} test and training images each at most",
        }
        return {"model": rows.pop("model")} | more | rows

    def told(self, record: RunRecord) -> list[dict[str, Any]]:
        """Lines alone: what stands at their ends is in the run's folder."""
        return [p for p in record.points if self.kind(Cell.of(p)) == PATH]
