"""The agenda, prices from recorded results, and batches for which memory is short."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselth.config import ImpConfig, Recipe, Replica
from sparselth.data.batches import Resident
from sparselth.errors import SparselthError
from sparselth.experiments import pool
from sparselth.experiments.price import Agenda, Price, needs, recorded, replica_bytes, widest
from sparselth.models import get_model
from sparselth.runs import RunRecord, read


def config(**changes: Any) -> ImpConfig:
    values: dict[str, Any] = {
        "model": "lenet-300-100",
        "dataset": "mnist5k",
        "seeds": (0, 1),
        "arms": ("ticket", "reinit", "random-mask"),
        "levels": 3,
        "rate": 0.2,
        "scope": "layer",
        "one_shot": False,
        "rewind": 0,
        "reinits": 1,
        "device": "cpu",
        "kernels": "auto",
        "recipe": Recipe(steps=1000, lr=1e-3, batch_size=60),
    }
    return ImpConfig(**values | changes)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("one_shot", [False, True])
def test_an_agenda_hands_out_every_cell_once_and_no_cell_early(limit: int, one_shot: bool) -> None:
    plan = config(one_shot=one_shot)
    agenda, done = Agenda(plan, ()), list[Replica]()
    while cells := agenda.next(limit):
        assert len(cells) <= limit
        assert all(needs(plan, who) in {None, *done} for who in cells)
        done += cells
        agenda.finished(cells)
    assert len(done) == len(set(done))
    assert set(done) == set(plan.replicas())


def test_batches_are_the_tickets_of_all_seeds_and_the_controls_beside_them() -> None:
    agenda = Agenda(config(), ())
    assert widest(config()) == 6
    assert agenda.next(100) == [Replica(0, "ticket", 0), Replica(1, "ticket", 0)]
    assert agenda.next(100) == []
    agenda.finished([Replica(0, "ticket", 0), Replica(1, "ticket", 0)])
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


def test_a_price_goes_through_the_schedule() -> None:
    plan = config(seeds=(0,), arms=("ticket",), levels=2)
    price = Price({1: 1e-3, 10: 4e-3}, (1.0, 0.5, 0.25), {1: 0.1, 10: 0.1}, 2.0, 100, 10)
    # 1000 steps of 1 ms, ten evaluations and twice the test images, which count double
    assert price.batch_seconds(plan, [Replica(0, "ticket", 0)]) == pytest.approx(1.0 + 1.4)
    assert price.run_seconds(plan, (), 1, 1) == pytest.approx(2.4 * 1.75)
    assert price.run_seconds(plan, {Replica(0, "ticket", 0)}, 1, 1) == pytest.approx(2.4 * 0.75)
    many = config(seeds=tuple(range(10)), arms=("ticket",), levels=2)
    assert price.run_seconds(many, (), 1, 10) == pytest.approx((4.0 + 1.4) * 1.75)
    assert price.run_seconds(many, (), 2, 1) == pytest.approx(5 * 2.4 * 1.75)
    assert price.run_bytes(many, 2, 1000) == 2 * (100 + 10 * 10)


def row(kind: str, replicas: int, seconds: float, **changes: Any) -> dict[str, Any]:
    shared = {"op": "train_step", "ours": True, "model": "lenet-300-100", "optimizer": "adam"}
    timed = {"batch_size": 60, "ways": {"graph": {"median_s": seconds}}}
    return shared | timed | {"kind": kind, "replicas": replicas} | changes


def test_prices_of_another_device_come_from_its_recorded_results(tmp_path: Path) -> None:
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
def test_results_that_are_not_there_are_named(content: str | None, says: str, tmp_path: Path) -> None:
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


def test_runs_are_the_same_at_any_number_of_replicas(
    imp: Callable[..., RunRecord], run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    flags = [
        "--levels",
        "1",
        "--seeds",
        "0-1",
        "--arms",
        "ticket,random-mask",
        "--workers",
        "1",
        "--kernels",
        "reference",
    ]
    found = {}
    for replicas in ("1", "3", "100"):
        record = imp(*flags, "--replicas", replicas, out=replicas, steps=20)
        files = run_contents(record.path)
        found[replicas] = {name.removeprefix(replicas): content for name, content in files.items()}
    assert found["1"] == found["3"] == found["100"]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def out_of_memory_in_a_capture() -> None:
    """As torch.cuda.graph ends: its exit raises, while the exception of the work is under way."""
    try:
        try:
            out_of_memory()
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        raise RuntimeError("no graph of a step") from error


@pytest.mark.parametrize("fails", [out_of_memory, out_of_memory_in_a_capture])
def test_a_batch_that_does_not_fit_is_halved(
    fails: Callable[[], None],
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    real = pool.train_cells

    def short(config: Any, run: Any, data: Any, cells: list[Replica], *rest: Any) -> Any:
        if len(cells) > 2:
            fails()
        return real(config, run, data, cells, *rest)

    monkeypatch.setattr(pool, "train_cells", short)
    monkeypatch.chdir(tmp_path)
    flags = "imp --model lenet-300-100 --dataset mnist5k --levels 1 --seeds 0-4 --arms ticket --workers 1"
    code, _, err = cli(*flags.split(" "), "--replicas", "5", "--steps", "10", "--out", "run")
    assert code == 0
    assert "out of memory with 5 networks at once; going on with 2" in err
    assert read(Path("run")).complete


def test_an_error_is_not_out_of_memory_for_its_chain() -> None:
    first, second = ValueError("wrong"), ValueError("wrong too")
    first.__context__, second.__cause__ = second, first  # a ring
    assert not pool._is_out_of_memory(first)


def test_prices_are_of_launches_as_long_as_those_of_training(
    digits: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 20 steps are one graph, steps by fives would be launched one by one."""
    asked: list[int] = []

    class Graphs:
        state_bytes, many = 0, 20

        def advance(self, step: int, steps: int, should_stop: Any) -> int:
            asked.append(steps)
            time.sleep(0.02)
            return steps

        def measure(self) -> tuple[list[float], list[float]]:
            return [1.0], [0.0]

    monkeypatch.setattr(pool, "prepare", lambda *_: Graphs())
    pool._price(config(), digits, {}, 1)
    assert asked[:2] == [1, 1]  # to compile, and behind it
    assert {*asked[2:]} == {20}


def test_one_network_that_does_not_fit_is_one_line(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def short(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "train_cells", short)
    code, out, err = cli(
        *[
            "imp",
            "--model",
            "lenet-300-100",
            "--dataset",
            "mnist5k",
            "--steps",
            "10",
            "--levels",
            "1",
            "--workers",
            "1",
            "-q",
            "--out",
            "run",
        ]
    )
    assert (code, out) == (1, "")
    assert "out of memory with one network on cpu; use a smaller --batch-size" in err
    assert len(err.strip().splitlines()) == 1
