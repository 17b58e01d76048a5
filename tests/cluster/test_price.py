"""What a sweep is foretold to take: its runs by steps of one of them, on workers that take the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from inline import SETTINGS, Inline

from sparselth.cluster import price as prices
from sparselth.cluster.executor import How
from sparselth.cluster.grid import Grid
from sparselth.cluster.price import Cost, cost, wall
from sparselth.cluster.sweep import Planned, plan_sweep, sweep
from sparselth.experiments.plan import Plan
from sparselth.experiments.price import Price


def planned(grid: Grid, out: Path, executor: Inline) -> Planned:
    return plan_sweep(grid, out=out, resume=True, executor=executor, how=How(), told=lambda text: None)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Steps take 1 ms, at the last level a quarter; evaluations nothing. The plans whose steps are timed."""
    found = list[Plan]()

    def fake(plan: Plan) -> Plan:
        found.append(plan)
        levels = len(plan.config.rungs())  # type: ignore[attr-defined]
        shares = tuple(1 - 0.75 * level / (levels - 1) for level in range(levels))
        return replace(plan, price=Price({1: 1e-3}, shares, {1: 0.0}, shares, 1.0, 0, 0))

    monkeypatch.setattr(prices, "priced", fake)
    return found


def test_workers_take_the_next_run() -> None:
    assert wall([3.0, 1.0, 1.0, 2.0], 2) == 4.0
    assert wall([3.0, 1.0], 9) == 3.0
    assert wall([], 2) == 0.0


def test_runs_of_like_steps_are_priced_by_one_of_them(
    rates: Grid, inline: Inline, tmp_path: Path, timed: list[Plan]
) -> None:
    found = cost(planned(replace(rates, axes={"lr": [0.1, 0.01]}), tmp_path, inline), How())
    assert len(timed) == 1
    # two seeds, 60 dense steps and 60 of a quarter
    assert found is not None
    assert found.runs == pytest.approx({"lr=0.1": 0.15, "lr=0.01": 0.15})
    assert (found.together, found.wall) == pytest.approx((0.3, 0.15))
    steps = cost(planned(replace(rates, axes={"batch_size": [10, 60]}), tmp_path / "b", inline), How())
    assert len(timed) == 3
    assert steps is not None


def test_levels_in_between_cost_what_lies_in_between(
    rates: Grid, inline: Inline, tmp_path: Path, timed: list[Plan]
) -> None:
    """Steps of the sparsest run are timed: at rate 0.5 half of the weights are left, at 0.2 four fifths."""
    found = cost(planned(rates, tmp_path, inline), How())
    assert len(timed) == 1
    half, fifth = timed[0].config.remaining()[1], 1 - timed[0].config.remaining()[1]  # type: ignore[attr-defined]
    assert half == pytest.approx(0.5, abs=0.01)
    share = 1 - 0.75 * 0.2 / fifth
    assert found is not None
    assert found.runs["rate=0.5"] == pytest.approx(2 * 0.06 * 1.25)
    assert found.runs["rate=0.2"] == pytest.approx(2 * 0.06 * (1 + share), rel=0.01)


def test_what_is_finished_costs_nothing(
    rates: Grid, inline: Inline, tmp_path: Path, timed: list[Plan]
) -> None:
    one = replace(rates, axes={"rate": [0.5]}, settings=SETTINGS | {"seeds": (0,)})
    sweep(one, out=tmp_path / "sweep", executor=Inline())
    assert cost(planned(one, tmp_path / "sweep", inline), How()) == Cost({}, 0.0)
    more = replace(one, settings=SETTINGS | {"seeds": (0,), "levels": 2})
    found = cost(planned(more, tmp_path / "sweep", inline), How())
    assert found is not None
    assert found.together == pytest.approx(0.06 / 4)  # level 2 alone


def test_without_a_gpu_or_a_price_it_is_not_known(rates: Grid, inline: Inline, tmp_path: Path) -> None:
    here = planned(rates, tmp_path, inline)
    assert cost(replace(here, device="cuda"), How()) is None
    untold = SimpleNamespace(
        name="x", identity=dict, extends=list, cells=lambda: [0, 1], seconds=lambda _: None
    )
    run = replace(here.missing[0], config=untold)
    assert cost(replace(here, missing=[run]), How()) is None
    told = replace(run, name="b", config=SimpleNamespace(**vars(untold) | {"seconds": lambda cell: 2.5}))
    found = cost(replace(here, missing=[told, replace(told, name="c")]), How())
    assert found == Cost({"b": 5.0, "c": 5.0}, 5.0)
