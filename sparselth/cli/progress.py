"""What a person sees while cells run: rich bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sparselth.config import ImpConfig, Replica
from sparselth.experiments.imp import Finished
from sparselth.experiments.pool import Watcher
from sparselth.experiments.price import Price
from sparselth.models import get_model
from sparselth.pruning import ladder

HEARTBEAT_SECONDS = 20.0


@contextmanager
def progress(config: ImpConfig, price: Price, finished: set[Replica], quiet: bool) -> Iterator[Watcher]:
    """The watcher that fits stderr."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with Bars(config, price, finished) as bars:
            yield bars
    else:
        yield Lines(config, price, finished)


class Silent:
    """Says nothing."""

    def started(self, worker: int, cells: Sequence[Replica]) -> None: ...
    def evaluated(
        self, worker: int, cells: Sequence[Replica], step: int, accuracy: float, steps_per_second: float
    ) -> None: ...
    def finished(self, worker: int, done: Finished) -> None: ...
    def halved(self, cells: int, limit: int) -> None: ...
    def tick(self) -> None: ...


class _Progress(Silent):
    """Counts cells and foretells the end from the work that is done."""

    def __init__(self, config: ImpConfig, price: Price, finished: set[Replica]) -> None:
        cells = config.replicas()
        self.config = config
        self.cost = {who: price.batch_seconds(config, [who]) for who in cells if who not in finished}
        self.share: dict[Replica, float] = {}  # of the cells under way or done
        self.total, self.count = len(cells), len(finished)
        self.began = time.monotonic()
        model = get_model(config.model)
        rungs = ladder(model.params, config.levels, config.rate, config.scope)
        self.remaining = [sum(rung.values()) / model.params.prunable for rung in rungs]
        self.speed = 0.0

    def evaluated(
        self, worker: int, cells: Sequence[Replica], step: int, accuracy: float, steps_per_second: float
    ) -> None:
        self.share |= dict.fromkeys(cells, min(1.0, step / self.config.recipe.steps))
        self.speed = steps_per_second or self.speed

    def finished(self, worker: int, done: Finished) -> None:
        self.share[done.who] = 1.0
        self.count += 1

    @property
    def fraction(self) -> float:
        return sum(self.cost[who] * share for who, share in self.share.items()) / max(
            sum(self.cost.values()), 1e-9
        )

    @property
    def left(self) -> str:
        if self.fraction < 0.005:
            return "?"
        return duration((time.monotonic() - self.began) * (1 / self.fraction - 1))


class Lines(_Progress):
    """One line per finished cell, and a sign of life in between; for logs."""

    def __init__(self, config: ImpConfig, price: Price, finished: set[Replica]) -> None:
        super().__init__(config, price, finished)
        self.said = time.monotonic()

    def finished(self, worker: int, done: Finished) -> None:
        super().finished(worker, done)
        cell = done.cell
        speed = self.speed or self.config.recipe.steps / done.timings["train_seconds"]
        self._say(
            f"[{self.count}/{self.total}] {done.who}, {100 * cell['weights_remaining']:.1f} % left: "
            f"test {100 * cell['accuracy_at_early_stop']:.2f} % at step {cell['early_stop_step']:,}, "
            f"{100 * cell['final_accuracy']:.2f} % at the end; {speed:,.0f} steps/s, {self.left} to go"
        )

    def halved(self, cells: int, limit: int) -> None:
        self._say(f"out of memory with {cells} networks at once; going on with {limit}")

    def tick(self) -> None:
        if time.monotonic() - self.said > HEARTBEAT_SECONDS:
            self._say(f"[{self.count}/{self.total}] {100 * self.fraction:.0f} % done, {self.left} to go")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self.said = time.monotonic()


class Bars(_Progress):
    """A bar for the run and one for the cell of each worker."""

    def __init__(self, config: ImpConfig, price: Price, finished: set[Replica]) -> None:
        super().__init__(config, price, finished)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.bars = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.whole = self.bars.add_task("all cells", total=1.0, note="")
        self.rows: dict[int, Any] = {}
        self.shown: dict[int, Replica] = {}  # the first network of each row

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def started(self, worker: int, cells: Sequence[Replica]) -> None:
        self._row(worker, cells)
        self.tick()

    def evaluated(
        self, worker: int, cells: Sequence[Replica], step: int, accuracy: float, steps_per_second: float
    ) -> None:
        super().evaluated(worker, cells, step, accuracy, steps_per_second)
        if self.shown[worker] != cells[0]:
            self._row(worker, cells)
        speed = f"{steps_per_second:,.0f} steps/s" if steps_per_second else ""
        note = f"step {step:,}  validation {100 * accuracy:.2f} %  {speed}"
        self.bars.update(self.rows[worker], completed=step, note=note)
        self.tick()

    def halved(self, cells: int, limit: int) -> None:
        self.bars.console.print(f"out of memory with {cells} networks at once; going on with {limit}")

    def _row(self, worker: int, cells: Sequence[Replica]) -> None:
        """Show what a worker trains in place of what it trained before."""
        first = cells[0]
        text = f"{first} ({100 * self.remaining[first.level]:.1f} %)"
        text += f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        if worker in self.rows:
            self.bars.remove_task(self.rows[worker])
        self.rows[worker] = self.bars.add_task(text, total=self.config.recipe.steps, note="starting")
        self.shown[worker] = first

    def tick(self) -> None:
        self.bars.update(
            self.whole, completed=self.fraction, note=f"{self.count}/{self.total} cells, {self.left} to go"
        )


def duration(seconds: float) -> str:
    """`45 s`, `4 min 10 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
