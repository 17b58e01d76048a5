"""What a person sees while cells run: rich bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sparselth.cli.options import as_flags
from sparselth.config import Cell
from sparselth.experiments.base import Diverged, Finished
from sparselth.experiments.plan import Plan, Watcher
from sparselth.experiments.training import Training

HEARTBEAT_SECONDS = 20.0


@contextmanager
def progress(plan: Plan, quiet: bool) -> Iterator[Watcher]:
    """The watcher that fits stderr."""
    if quiet:
        yield Quiet()
    elif sys.stderr.isatty():
        with Bars(plan) as bars:
            yield bars
    else:
        yield Lines(plan)


class Quiet(Watcher):
    """Says nothing; what diverged is told in the end."""

    def diverged(self, worker: int, done: Diverged, without: Sequence[Cell]) -> None:
        pass


class _Progress(Watcher):
    """Counts cells and foretells the end from the work that is done."""

    def __init__(self, plan: Plan) -> None:
        config, price, cells = plan.config, plan.price, plan.config.cells()
        self.config = config
        self.steps = config.recipe.steps if isinstance(config, Training) else 1
        self.cost = {cell: 1.0 for cell in cells if cell not in plan.finished | plan.lost}
        if price and isinstance(config, Training):
            self.cost = {cell: price.batch_seconds(config, [cell]) for cell in self.cost}
        elif not isinstance(config, Training):
            self.cost = {cell: config.seconds(cell) or 1.0 for cell in self.cost}
        self.share: dict[Cell, float] = {}  # of the cells under way
        self.since: dict[Cell, float] = {}  # of those that do not say how far they are
        self.all, self.over = sum(self.cost.values()), 0.0  # cost of all cells, of those done
        self.total, self.count = len(cells), len(plan.finished)
        self.began = time.monotonic()

    def started(self, worker: int, cells: Sequence[Cell]) -> None:
        if not isinstance(self.config, Training):
            self.since |= dict.fromkeys(cells, time.monotonic())

    def evaluated(
        self, worker: int, cells: Sequence[Cell], step: int, accuracy: float, steps_per_second: float
    ) -> None:
        if isinstance(self.config, Training):
            self.share |= dict.fromkeys(cells, min(1.0, step / self.steps))

    def finished(self, worker: int, done: Finished) -> None:
        self.share.pop(done.cell, None)
        self.since.pop(done.cell, None)
        self.over += self.cost.get(done.cell, 0.0)
        self.count += 1

    def again(self, cells: Sequence[Cell]) -> None:
        self.count -= len(cells)
        self.cost |= dict.fromkeys(cells, self.all / max(len(self.cost), 1))
        self.all = sum(self.cost.values())

    def diverged(self, worker: int, done: Diverged, without: Sequence[Cell]) -> None:
        for cell in (done.cell, *without):
            self.share.pop(cell, None)
            self.over += self.cost.pop(cell, 0.0)
        what = f"; {len(without)} cells that need it are not computed" if without else ""
        self._say(as_flags(f"{done.cell}: {done.why}{what}"))

    def stopping(self) -> None:
        self._say("writing checkpoints; another signal ends at once")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @property
    def fraction(self) -> float:
        under_way = sum(self.cost.get(cell, 0.0) * share for cell, share in self.share.items())
        now = time.monotonic()
        under_way += sum(min(0.9 * self.cost.get(cell, 0.0), now - at) for cell, at in self.since.items())
        return (self.over + under_way) / max(self.all, 1e-9)

    @property
    def left(self) -> str:
        if self.fraction < 0.005:
            return "?"
        return duration((time.monotonic() - self.began) * (1 / self.fraction - 1))


class Lines(_Progress):
    """One line per finished cell, and a sign of life in between; for logs."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.said = time.monotonic()

    def finished(self, worker: int, done: Finished) -> None:
        super().finished(worker, done)
        said = self.config.said(done.line)
        self._say(f"[{self.count}/{self.total}] {done.cell}{', ' * bool(said)}{said}; {self.left} to go")

    def again(self, cells: Sequence[Cell]) -> None:
        super().again(cells)
        self._say(_again(cells))

    def halved(self, cells: int, limit: int) -> None:
        self._say(f"out of memory with {cells} networks at once; going on with {limit}")

    def tick(self) -> None:
        if time.monotonic() - self.said > HEARTBEAT_SECONDS:
            self._say(f"[{self.count}/{self.total}] {100 * self.fraction:.0f} % done, {self.left} to go")

    def _say(self, text: str) -> None:
        super()._say(text)
        self.said = time.monotonic()


BAR, NOTE = (8, 24), 31  # columns of a bar, least and most, and of what stands behind it


class Bars(_Progress):
    """A bar for the run and one for the cell of each worker; where there is no room names end in dots."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(stderr=True)
        longest = len(self._name([max(self.cost, key=lambda cell: len(str(cell)))] * plan.limit))
        bar = min(max(console.width - 2 - NOTE - longest, BAR[0]), BAR[1])
        name = min(longest, max(console.width - 2 - NOTE - bar, 1))
        self.bars = Progress(
            TextColumn(
                "{task.description}", table_column=Column(no_wrap=True, width=name, overflow="ellipsis")
            ),
            BarColumn(bar_width=bar),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
        )
        self.whole = self.bars.add_task("all cells", total=1.0, note="")
        self.rows: dict[int, Any] = {}
        self.shown: dict[int, Cell] = {}  # the first network of each row

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def started(self, worker: int, cells: Sequence[Cell]) -> None:
        super().started(worker, cells)
        self._row(worker, cells)
        self.tick()

    def evaluated(
        self, worker: int, cells: Sequence[Cell], step: int, accuracy: float, steps_per_second: float
    ) -> None:
        super().evaluated(worker, cells, step, accuracy, steps_per_second)
        if self.shown[worker] != cells[0]:
            self._row(worker, cells)
        speed = f"  {steps_per_second:,.0f} steps/s" if steps_per_second else ""
        note = f"{step:,}: {100 * accuracy:.2f} %{speed}"
        self.bars.update(self.rows[worker], completed=step, note=note)
        self.tick()

    def again(self, cells: Sequence[Cell]) -> None:
        super().again(cells)
        self.bars.console.print(_again(cells))

    def halved(self, cells: int, limit: int) -> None:
        self._say(f"out of memory with {cells} networks at once; going on with {limit}")

    def _say(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)

    def _row(self, worker: int, cells: Sequence[Cell]) -> None:
        """Show what a worker trains in place of what it trained before."""
        if worker in self.rows:
            self.bars.remove_task(self.rows[worker])
        self.rows[worker] = self.bars.add_task(self._name(cells), total=self.steps, note="starting")
        self.shown[worker] = cells[0]

    def _name(self, cells: Sequence[Cell]) -> str:
        about = self.config.about(cells[0])
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        return f"{cells[0]}" + (f" ({about})" if about else "") + more

    def tick(self) -> None:
        self.bars.update(
            self.whole, completed=self.fraction, note=f"{self.count}/{self.total} cells, {self.left} to go"
        )


def _again(cells: Sequence[Cell]) -> str:
    rest = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return f"computed again, because what they were computed from came out otherwise: {cells[0]}{rest}"


def duration(seconds: float) -> str:
    """`45 s`, `4 min 10 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
