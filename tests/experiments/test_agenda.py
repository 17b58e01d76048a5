"""The agenda: every cell once, none early, what others wait for first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparselth.config import Cell
from sparselth.experiments.agenda import Agenda, widest
from sparselth.experiments.imp import ImpConfig

Configs = Callable[..., ImpConfig]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("one_shot", [False, True])
def test_an_agenda_hands_out_every_cell_once_and_no_cell_early(
    config: Configs, limit: int, one_shot: bool
) -> None:
    plan = config(one_shot=one_shot)
    agenda, done = Agenda(plan, ()), list[Cell]()
    while cells := agenda.next(limit):
        assert len(cells) <= limit
        assert all({*plan.needs(cell)} <= {*done} for cell in cells)
        done += cells
        agenda.finished(cells)
    assert len(done) == len(set(done))
    assert set(done) == set(plan.cells())


def test_what_can_start_is_shared_among_idle_workers(config: Configs) -> None:
    agenda = Agenda(config(seeds=(0, 1, 2)), ())
    batches = [agenda.next(100, idle) for idle in (2, 1)]
    assert [[who.seed for who in batch] for batch in batches] == [[0, 1], [2]]
    agenda = Agenda(config(seeds=(0, 1, 2)), ())
    assert [len(agenda.next(1, 2)), len(agenda.next(1, 1))] == [1, 1]


def test_batches_are_the_tickets_of_all_seeds_and_the_controls_beside_them(config: Configs) -> None:
    agenda = Agenda(config(), ())
    assert widest(config()) == 6
    assert agenda.next(100) == [Cell(0, "ticket", 0), Cell(1, "ticket", 0)]
    assert agenda.next(100) == []
    agenda.finished([Cell(0, "ticket", 0), Cell(1, "ticket", 0)])
    first = agenda.next(4)  # memory for four: the tickets, because everything waits for them, and two more
    assert [who.arm for who in first] == ["ticket", "ticket", "reinit", "random-mask"]
    agenda.finished(first)
    second = agenda.next(4)
    assert [(who.arm, who.level) for who in second] == [
        ("ticket", 2),
        ("ticket", 2),
        ("reinit", 1),
        ("random-mask", 1),
    ]
    agenda.back(second)
    assert agenda.next(4) == second


def test_one_cell_at_a_time_unless_more_are_asked_for(config: Configs) -> None:
    assert Agenda(config(), ()).next() == [Cell(0, "ticket", 0)]


def test_the_widest_batch_has_no_limit(config: Configs) -> None:
    assert widest(config(seeds=tuple(range(500)), levels=2)) == 500 * 3
    assert widest(config(seeds=())) == 0


def test_what_is_finished_counts_when_what_it_needs_does(config: Configs) -> None:
    """Level 0 is damaged: what was computed from it waits for it, and so does what needs that."""
    plan = config(seeds=(0,), arms=("ticket",), levels=3)
    dense, first, second, third = plan.cells()
    for again in (False, True):
        agenda = Agenda(plan, [first, second])
        assert agenda.next(9) == [dense]
        agenda.finished([dense], [first] * again)  # whose bits came out the same, or otherwise
        if again:
            assert agenda.next(9) == [first]
            agenda.finished([first], [second])
            assert agenda.next(9) == [second]
            agenda.finished([second])
        assert agenda.next(9) == [third]
        agenda.finished([third])
        assert agenda.next(9) == []
