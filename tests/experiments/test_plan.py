"""The plan of a run foretells what is missing; who listens and does nothing is told nothing wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulated import Simulated

from sparselth.config import Cell
from sparselth.experiments.base import Diverged, Finished
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Plan, Watcher

DENSE, TICKET = Cell(0, "ticket", 0), Cell(1, "ticket", 0)


class Priced:
    """A price that writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def run_seconds(self, *asked: Any) -> float:
        self.asked.append(asked)
        return 8.0

    def run_bytes(self, *asked: Any) -> int:
        self.asked.append(asked)
        return 77

    def slowdown(self, workers: int) -> float:
        self.asked.append((workers,))
        return 1.5


def test_a_plan_s_price_is_of_the_cells_that_will_be_computed(config: Callable[..., ImpConfig]) -> None:
    price: Any = Priced()
    asked = config()
    of = Plan(asked, None, Path("run"), "", 3, 5, {}, frozenset({DENSE}), frozenset({TICKET}), price)
    assert of.seconds == 12.0  # beside others
    assert of.bytes == 77
    assert price.asked == [(asked, {DENSE, TICKET}, 3, 5), (3,), (asked, 3, 5)]
    without = Plan(asked, None, Path("run"), "", 3, 5, {})
    trains_nothing = Plan(Simulated(), None, Path("run"), "", 3, 5, {}, price=price)
    for plan in (without, trains_nothing):
        assert (plan.seconds, plan.bytes) == (None, None)
        assert plan.finished == plan.lost == frozenset()


class Costs(Simulated):
    """Three cells whose cost is known: 1, 2 and 4 seconds, or not."""

    known = True

    def seconds(self, cell: Cell) -> float | None:
        return 2.0**cell.level if self.known or cell.level < 2 else None


def test_what_trains_nothing_takes_as_long_as_its_cells_that_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Costs(chains=(0,), levels=2)
    first, _, last = asked.cells()
    for workers, done, lost, seconds in (
        (1, [], [], 7.0),
        (2, [], [], 4.0),  # the longest of them
        (3, [], [], 4.0),
        (1, [first], [], 6.0),
        (1, [first], [last], 2.0),
        (1, asked.cells(), [], None),
    ):
        plan = Plan(asked, None, Path("run"), "", workers, 5, {}, frozenset(done), frozenset(lost))
        assert plan.seconds == seconds
    monkeypatch.setattr(Costs, "known", False)
    assert Plan(asked, None, Path("run"), "", 1, 5, {}).seconds is None
    assert Plan(asked, None, Path("run"), "", 1, 5, {}, frozenset({last})).seconds == 3.0


def test_who_only_warns_warns_of_what_it_is_told_and_of_what_diverged() -> None:
    told = Watcher()
    with pytest.warns(UserWarning, match=r"^another set is taken$") as caught:
        told.note("another set is taken")
    assert str(caught[0].message) == "another set is taken"
    why = "training diverged before step 3"
    for without, more in (([], ""), ([DENSE, TICKET], "; 2 cells need it")):
        with pytest.warns(UserWarning, match=why) as caught:
            told.diverged(0, Diverged(DENSE, why), without)
        assert str(caught[0].message) == f"seed 0 ticket level 0: {why}{more}"


def test_a_warning_is_of_the_caller_s_line() -> None:
    """Not under mutmut, whose calls lie in between."""
    with pytest.warns(UserWarning, match="another set") as caught:
        Watcher().note("another set is taken")
    assert caught[0].filename == __file__


def test_of_all_else_nothing_is_said() -> None:
    told, plan = Watcher(), Plan(Simulated(), None, Path("run"), "", 1, 1, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with told.begin(plan) as within:
            assert within is told
        told.complete(plan)
        told.started(0, [DENSE])
        told.evaluated(0, [DENSE], 1, 0.5, 2.0)
        told.finished(0, Finished(DENSE, {}, [], {}))
        told.again([DENSE])
        told.stopping()
        told.halved(4, 2)
        told.tick()
    assert not told.prices
