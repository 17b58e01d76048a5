"""Prices: measured here, from recorded results of another device, and through the agenda."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparselth.cli.progress import duration
from sparselth.cli.screen import plan_json, say_plan
from sparselth.config import Cell, Recipe
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.state import Job
from sparselth.errors import SparselthError
from sparselth.experiments import price as prices
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Plan
from sparselth.experiments.price import Price, recorded, replica_bytes
from sparselth.models import Model, get_model

Configs = Callable[..., ImpConfig]


def test_a_price_goes_through_the_schedule(config: Configs) -> None:
    plan = config(seeds=(0,), arms=("ticket",), levels=2)
    steps, looks = (1.0, 0.5, 0.25), (1.0, 0.75, 0.5)
    price = Price({1: 1e-3, 10: 4e-3}, steps, {1: 0.1, 10: 0.1}, looks, 2.0, 100, 10)
    # 1000 steps of 1 ms, ten evaluations and twice the test images, which count double
    assert price.batch_seconds(plan, [Cell(0, "ticket", 0)]) == pytest.approx(1.0 + 1.4)
    assert price.batch_seconds(plan, [Cell(0, "ticket", 2)]) == pytest.approx(0.25 + 1.4 * 0.5)
    assert price.run_seconds(plan, (), 1, 1) == pytest.approx(1.75 + 1.4 * 2.25)
    assert price.run_seconds(plan, {Cell(0, "ticket", 0)}, 1, 1) == pytest.approx(0.75 + 1.4 * 1.25)
    assert price.evaluation_share(plan, ()) == pytest.approx(1.4 * 2.25 / (1.75 + 1.4 * 2.25))
    many = config(seeds=tuple(range(10)), arms=("ticket",), levels=2)
    assert price.run_seconds(many, (), 1, 10) == pytest.approx(4.0 * 1.75 + 1.4 * 2.25)
    assert price.run_seconds(many, (), 2, 1) == pytest.approx(5 * (1.75 + 1.4 * 2.25))
    assert price.run_bytes(many, 2, 1000) == 2 * (100 + 10 * 10)


def row(kind: str, replicas: int, seconds: float, **changes: Any) -> dict[str, Any]:
    shared = {"op": "train_step", "ours": True, "model": "lenet-300-100", "optimizer": "adam"}
    timed = {"batch_size": 60, "ways": {"graph": {"median_s": seconds}}}
    return shared | timed | {"kind": kind, "replicas": replicas} | changes


def test_prices_of_another_device_come_from_its_recorded_results(config: Configs, tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    rows = [row("step", 1, 2e-5), row("step", 101, 2.2e-4)]
    rows += [row("evaluation", 1, 1e-3), row("evaluation", 101, 1e-3)]
    rows += [row("step", 1, 9.0, ours=False), row("step", 1, 9.0, model="lenet5")]
    file.write_text(json.dumps({"device": {"name": "A Device"}, "times": rows}))
    name, price = recorded(str(file), config())
    assert name == "A Device"
    assert price.batches == {1: 2e-5, 101: 2.2e-4}
    plan = config(seeds=tuple(range(51)), arms=("ticket",), levels=1)
    # 51 networks at once: half way along the line
    assert price.run_seconds(plan, (), 1, 1000) == pytest.approx(2 * (1000 * 1.2e-4 + 14 * 1e-3))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "nothing was recorded on such a device"),
        ("{", "cannot be read"),
        (json.dumps({"device": {"name": "x"}, "times": []}), "has no steps of lenet-300-100"),
        (
            json.dumps({"device": {"name": "x"}, "times": [row("step", 1, 1.0)]}),
            "it has lenet-300-100 with adam",
        ),
        (json.dumps({"device": {"name": "x"}, "times": [{}]}), "cannot be read"),
    ],
)
def test_results_that_are_not_there_are_named(
    config: Configs, content: str | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "gone.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SparselthError, match=says):
        recorded(str(file), config())


def test_the_command_line_prices_a_plan_on_another_device(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row("step", 1, 2e-5), row("evaluation", 1, 1e-3)]
    Path("there.json").write_text(json.dumps({"device": {"name": "A Device"}, "times": rows}))
    flags = [
        "imp",
        "--model",
        "lenet-300-100",
        "--dataset",
        "mnist5k",
        "--dry-run",
        "--steps",
        "100",
        "--levels",
        "2",
        "--seeds",
        "0,1",
    ]
    code, out, err = cli(*flags, "--price-on", "there.json")
    assert (code, out) == (0, "")
    assert "on A Device, up to 6 networks at once" in err
    code, out, _ = cli(*flags, "--price-on", "there.json", "--json")
    assert code == 0
    assert json.loads(out)["price_on"]["device"] == "A Device"
    code, _, err = cli(*flags, "--price-on", "no-such-device")
    assert code == 1
    assert "bench/gpu_check.py" in err
    code, _, err = cli(*[f for f in flags if f != "--dry-run"], "--price-on", "h200")
    assert code == 2
    assert "--dry-run" in err


def test_a_replica_takes_at_least_its_state() -> None:
    for name in ("lenet-300-100", "conv2"):
        model = get_model(name)
        for optimizer, arrays in (("adam", 4), ("sgd", 3)):
            recipe = Recipe(steps=1, lr=1.0, optimizer=optimizer)  # type: ignore[arg-type]
            assert replica_bytes(model, recipe) > 4 * arrays * model.params.size


def spin(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


@pytest.mark.parametrize(("most", "timed"), [(0.0, {250}), (0.5, {250, 500})])
def test_evaluation_is_timed_whole_or_on_a_batch_of_it(
    config: Configs, digits: Resident, monkeypatch: pytest.MonkeyPatch, most: float, timed: set[int]
) -> None:
    """500 validation images in batches of 250: where both take long one batch is timed, and counts twice."""
    monkeypatch.setattr(prices, "LOOK", most)
    looked: list[int] = []

    class Fake:
        state_bytes, many = 0, 1

        def __init__(self, data: Resident) -> None:
            self.data = data

        def advance(self, step: int, steps: int, should_stop: Any) -> int:
            spin(0.002 * steps)
            return steps

        def measure(self) -> tuple[list[float], list[float]]:
            chunks = self.data.validation(0)
            looked.append(sum(x.shape[2] for x, _ in chunks))
            spin(0.03 * len(chunks))
            return [1.0], [0.0]

    monkeypatch.setattr(prices, "prepare", lambda model, data, *_: Fake(data))
    price, _ = prices.measured(config(seeds=(0,)), digits, {}, 1)
    assert set(looked) == timed
    assert price.batches[1] == pytest.approx(0.002, rel=0.2)
    assert price.validation[1] == pytest.approx(0.06, rel=0.2)
    assert price.test_share == 2  # test images for a validation image
    share = price.evaluation_share(config(seeds=(0,)), ())
    assert share == pytest.approx(14 * 0.06 / (14 * 0.06 + 1000 * 0.002), rel=0.2)
    assert digits.n_validated == 500  # who trains looks at all


def test_steps_and_evaluations_of_sparse_networks_are_timed_each(
    config: Configs, digits: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half the weights a step takes half as long, an evaluation as long as of the dense network."""

    now = 0.0

    class Fake:
        state_bytes, many = 0, 1

        def __init__(self, share: float) -> None:
            self.share = share

        def advance(self, step: int, steps: int, should_stop: Any) -> int:
            nonlocal now
            now += 0.004 * self.share * steps
            return steps

        def measure(self) -> tuple[list[float], list[float]]:
            nonlocal now
            now += 0.02
            return [1.0], [0.0]

    def fake(model: Model, data: Resident, jobs: list[Job], *more: Any) -> Fake:
        return Fake(float(jobs[0].mask.float().mean()))

    monkeypatch.setattr(prices, "prepare", fake)
    monkeypatch.setattr(time, "process_time", lambda: now)
    plan = config(seeds=(0,), arms=("ticket",), rate=0.5, levels=2)
    price, _ = prices.measured(plan, digits, {"fc1.weight": 1.0}, 1)
    assert price.levels == pytest.approx(plan.remaining())
    assert price.looks == pytest.approx((1.0, 1.0, 1.0))


def test_a_cell_that_trains_nothing_costs_what_it_takes_instead(
    config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImpConfig, "start_step", lambda self, cell: self.recipe.steps if cell.level else 0)
    plan, first = config(levels=1), Cell(0, "ticket", 1)
    price = Price({1: 1e-3}, (1.0, 1.0), {1: 0.1}, (1.0, 1.0), 2.0, 0, 0)
    assert price.batch_seconds(plan, [first]) == pytest.approx(4 * 0.1)  # it looks at the test images
    assert replace(price, before={first: 3.0}).batch_seconds(plan, [first]) == 3.0


def test_a_busy_machine_is_known_and_said(
    config: Configs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quiet = Price({1: 1e-3}, (1.0, 1.0), {1: 0.1}, (1.0, 1.0), 2.0, 100, 10)
    for busy, workers, times in (
        (0.0, 2, 1),
        (1.0, 1, 1),
        (1.0, 2, 1.5),
        (2.0, 2, 2),
        (1.5, 1, 1.25),
        (1.0, 9, 1.5),
    ):
        assert replace(quiet, busy=busy, cores=2).slowdown(workers) == pytest.approx(times)
    short = config(levels=1)
    planned = Plan(short, load("mnist5k", Path()), tmp_path, "asked for", 2, 1, {}, price=quiet)
    alone = planned.seconds
    assert alone is not None
    say_plan(planned)
    assert "busy " not in capsys.readouterr().err
    beside = replace(planned, price=replace(quiet, busy=2.0, cores=2))
    assert beside.seconds == pytest.approx(2 * alone)
    say_plan(beside)
    err = capsys.readouterr().err
    assert f"\nbusy     others ask for 2.0 of 2 cores now; without them {duration(alone)}\n" in err
    assert f"\nprice    about {duration(2 * alone)} (" in err
    assert "58 % of it evaluation" in " ".join(err.split())
    assert max(map(len, err.splitlines())) <= 80
    assert plan_json(beside, None)["busy_cores"] == 2.0


def test_prices_are_of_launches_as_long_as_those_of_training(
    config: Configs, digits: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 20 steps are one graph, steps by fives would be launched one by one."""
    asked: list[int] = []

    class Graphs:
        state_bytes, many = 0, 20

        def advance(self, step: int, steps: int, should_stop: Any) -> int:
            asked.append(steps)
            spin(0.02)
            return steps

        def measure(self) -> tuple[list[float], list[float]]:
            return [1.0], [0.0]

    monkeypatch.setattr(prices, "prepare", lambda *_: Graphs())
    prices.measured(config(), digits, {}, 1)
    assert asked[:2] == [1, 1]  # to compile, and behind it
    assert {*asked[2:]} == {20}
