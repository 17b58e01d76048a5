"""run(): an experiment by the library, who is told, and an experiment that trains nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from simulated import Simulated

from sparselth import data, machine
from sparselth.cli.progress import Lines
from sparselth.cli.screen import plan_json
from sparselth.cluster.torchrun import Group
from sparselth.config import EXPERIMENTS, Cell, Recipe, at_least, option
from sparselth.errors import Interrupted, SparselthError, UsageError
from sparselth.experiments.base import Experiment, Finished, Place, register
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Plan, Watcher
from sparselth.experiments.run import plan, run
from sparselth.files import save_arrays
from sparselth.runs import RunRecord, cell_path, read

Configs = Callable[..., ImpConfig]
SHORT: dict[str, Any] = {"levels": 1, "seeds": (0,), "recipe": Recipe(steps=20, lr=1e-3, eval_every=10)}


class Listener(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(f"note {text}")

    @contextmanager
    def begin(self, plan: Plan) -> Iterator[Watcher]:
        self.heard.append(f"begin {len(plan.finished)}")
        assert (plan.seconds is not None) == self.prices
        yield self
        self.heard.append("end")

    def complete(self, plan: Plan) -> None:
        self.heard.append(f"complete {len(plan.finished)}")

    def finished(self, worker: int, done: Finished) -> None:
        self.heard.append(f"finished {done.cell}")


@pytest.mark.parametrize("prices", [False, True])
def test_who_does_not_ask_for_the_price_does_not_wait_for_it(
    prices: bool, config: Configs, tmp_path: Path
) -> None:
    told = Listener()
    told.prices = prices  # `begin` holds the plan to it
    run(config(**SHORT, arms=("ticket",)), out=tmp_path / "run", workers=1, watcher=told)
    assert told.heard[0] == "begin 0"


def test_a_run_by_the_library_is_that_of_the_command_line(
    config: Configs,
    imp: Callable[..., RunRecord],
    run_contents: Callable[[Path], dict[str, bytes]],
    figures: bool,
) -> None:
    flags = "--levels 1 --seeds 0 --arms ticket,reinit --workers 1 --lr 0.001"
    ours = imp(*flags.split(), steps=20)
    asked = config(**SHORT, arms=("ticket", "reinit"))
    asked = replace(asked, device="auto", recipe=replace(asked.recipe, eval_every=100))
    told = Listener()
    theirs = run(asked, out=Path("library"), workers=1, watcher=told)
    assert theirs.config.device == "cpu"
    assert run_contents(Path("library")) == run_contents(ours.path)
    names = [*map(str, theirs.config.cells())]
    assert told.heard[0] == "begin 0"
    assert sorted(told.heard[1:-1]) == sorted(f"finished {name}" for name in names)
    assert told.heard[-1] == "end"
    assert (theirs.path / "figures" / "pixels.svg").exists()
    assert theirs.complete

    again = Listener()
    assert run(asked, out=Path("library"), watcher=again).points == theirs.points
    assert again.heard == ["complete 3"]


def test_an_unfinished_run_wants_resume_and_another_configuration_another_folder(
    config: Configs, tmp_path: Path
) -> None:
    asked = config(**SHORT, arms=("ticket",))

    class Stops(Watcher):
        def finished(self, worker: int, done: Finished) -> None:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        run(asked, out=tmp_path / "run", workers=1, watcher=Stops())
    with pytest.raises(SparselthError, match="1 of 2 cells are missing; add `resume` to go on"):
        run(asked, out=tmp_path / "run", workers=1)
    with pytest.raises(SparselthError, match=r"another rate \(0.2 there, 0.5 here\); choose another `out`"):
        run(replace(asked, rate=0.5), out=tmp_path / "run", workers=1)
    assert run(asked, out=tmp_path / "run", workers=1, resume=True).complete


def test_what_cannot_be_is_refused_before_anything_is_written(config: Configs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`workers` 0: expected 1 or more"):
        run(config(), out=tmp_path / "run", workers=0)
    with pytest.raises(UsageError, match="`levels` 0: expected 1 or more"):
        run(config(levels=0), out=tmp_path / "run")
    with pytest.raises(UsageError, match="`model` vgg19 takes images of 3 x 32 x 32, mnist5k has 1 x"):
        run(config(model="vgg19"), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_in_python_warns_of_what_a_user_must_know(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that nobody named and that cannot be had is another one."""

    def offline(name: str, folder: Path) -> None:
        raise SparselthError("no network")

    monkeypatch.setattr("sparselth.data.files.fetch", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSELTH_DATA", raising=False)
    with pytest.warns(
        UserWarning, match=r"NOT using MNIST: it cannot be downloaded \(no network\)\nbut mnist5k"
    ):
        planned = plan(config(**SHORT, dataset=""), out=str(tmp_path / "run"))
    assert planned.config.to_json()["dataset"] == "mnist5k"
    assert planned.path == tmp_path / "run"


def test_a_plan_names_folder_workers_and_limit(config: Configs) -> None:
    planned = plan(config(**SHORT), workers=3, replicas=100)
    assert planned.path == Path("runs") / planned.config.folder
    assert (planned.workers, planned.limit) == (3, 3)
    assert planned.seconds is None
    assert planned.why == "asked for"


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> type[Experiment]:
    """An experiment that trains nothing: the squares of numbers, each after the one before."""
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()))

    @register
    @dataclass(frozen=True, kw_only=True)
    class Squares(Experiment):
        """Squares, one after another."""

        name = "squares"
        count: int = option(3, "How many.", at_least(1))

        def cells(self) -> list[Cell]:
            return [Cell(0, "square", level) for level in range(self.count)]

        def needs(self, cell: Cell) -> tuple[Cell, ...]:
            return (Cell(0, "square", cell.level - 1),) if cell.level else ()

        def compute(self, cells: Sequence[Cell], place: Place) -> list[Finished] | None:
            for cell in cells:
                save_arrays(cell_path(place.run, cell), {}, {"square": cell.level**2})
            return [Finished(cell, {"square": cell.level**2}, [], {"train_seconds": 0.0}) for cell in cells]

        def said(self, line: dict[str, Any]) -> str:
            return f"{line['square']}"

        def table(self, record: RunRecord) -> str:
            return "squares " + " ".join(str(p["square"]) for p in record.points)

    return Squares


def test_an_experiment_that_trains_nothing(
    squares: type[Experiment],
    cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("squares", "--count", "4", "--out", "run")
    assert code == 0, err
    assert "squares 0 1 4 9" in out
    assert [line.split(";")[0] for line in err.splitlines() if line.startswith("[")] == [
        f"[{level + 1}/4] seed 0 square level {level}, {level**2}" for level in range(4)
    ]
    assert read(Path("run")).complete
    Path("run/cells/seed0-square-02.safetensors").unlink()
    assert cli("squares", "--resume", "--out", "run", "--quiet")[0] == 0
    shown = json.loads(cli("show", "run", "--json")[1])
    assert (shown["schema"], len(shown["points"])) == ("sparselth.squares/1", 4)
    planned = json.loads(cli("squares", "--dry-run", "--json")[1])
    assert (planned["cells"], planned["seconds"]) == (3, None)
    assert "squares: finished" in cli("ls", "runs", "--out", ".")[1]
    code, _, err = cli("squares", "--count", "0")
    assert (code, err) == (2, "sparselth: --count 0: expected 1 or more\n")
    code, _, err = cli("imp", "--resume", "--out", "run")
    assert code == 1
    assert "holds a run with another experiment (squares there, imp here)" in err


def test_run_hands_all_that_was_asked_for_to_the_plan(
    config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {
        "out": "there", "data_dir": "images", "workers": 3, "replicas": 4, "deterministic": True,
        "split": 2,
    }  # fmt: skip
    given: dict[str, Any] = {}

    def planned(config: ImpConfig, **more: Any) -> Plan:
        given.update(config=config, **more)
        raise Interrupted("enough")

    monkeypatch.setattr("sparselth.experiments.run.plan", planned)
    told = Listener()
    with pytest.raises(Interrupted):
        run(config(**SHORT), **asked, watcher=told)
    assert given == {"config": config(**SHORT), "note": told.note, **asked}


def test_a_plan_looks_for_the_data_where_it_is_told_to(
    config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    images = data.load("mnist5k", Path())

    def resolve(*where: Any) -> data.Images:
        looked.append(where)
        return images

    monkeypatch.setattr(data, "resolve", resolve)
    told = Listener()
    assert plan(config(**SHORT), data_dir="images", note=told.note).images is images
    plan(config(**SHORT, dataset=""), note=told.note)
    assert looked == [
        ("mnist5k", Path("images"), told.note, "mnist"),
        (None, None, told.note, "mnist"),
    ]


@pytest.mark.parametrize(("deterministic", "kernels"), [(False, "auto"), (True, "triton")])
def test_on_cuda_one_worker_trains_all_that_can_start_and_deterministic_by_our_kernels(
    deterministic: bool, kernels: str, config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "choose_device", lambda wanted: ("cuda", "it is said to be there"))
    planned = plan(config(**SHORT | {"seeds": (0, 1)}, device="auto"), deterministic=deterministic, workers=7)
    assert (planned.config.device, planned.config.kernels) == ("cuda", kernels)  # type: ignore[attr-defined]
    assert (planned.workers, planned.limit, planned.why) == (1, 6, "it is said to be there")
    assert planned.environment["break_even"] == {}


def test_on_cuda_a_rank_trains_no_more_at_once_than_its_share(
    config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many replicas are asked for: else one takes what all wait for."""
    monkeypatch.setattr(machine, "choose_device", lambda wanted: ("cuda", "it is said to be there"))
    monkeypatch.setattr("sparselth.cluster.torchrun._joined", Group(0, 2, 0, 2))
    six = config(**SHORT | {"seeds": (0, 1)}, device="auto")
    for replicas, limit in ((None, 3), (100, 3), (2, 2)):
        planned = plan(six, replicas=replicas)
        assert (planned.ranks, planned.workers, planned.limit) == (2, 2, limit)
    found = plan_json(planned, None)
    assert (found["workers"], found["ranks"], found["replicas"]) == (2, 2, 2)


def test_what_came_out_otherwise_is_told_and_takes_along_what_came_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})
    path, config = tmp_path / "run", Simulated(chains=(0, 1), levels=2)
    run(config, out=path, workers=1)
    cell_path(path, Cell(0, "number", 0)).unlink()
    told = Listener()
    monkeypatch.setattr(told, "again", lambda cells: told.heard.append(f"again {cells[0]}"))
    monkeypatch.setattr(Simulated, "machine", 1)
    record = run(config, out=path, workers=1, resume=True, watcher=told)
    assert told.heard == [
        f"note {NOTE}".replace("PATH", str(path)),
        "begin 5",
        "finished seed 0 number level 0",
        "again seed 0 number level 1",
        "finished seed 0 number level 1",
        "again seed 0 number level 2",
        "finished seed 0 number level 2",
        "end",
    ]
    assert (record.complete, record.damage) == (True, "")


NOTE = "note: PATH: cells/seed0-number-00.safetensors is missing; what is missing is computed again"


def test_progress_counts_what_is_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    config = Simulated(chains=(0,), levels=3)
    cells = config.cells()
    planned = Plan(config, None, Path("run"), "", 1, 1, {}, frozenset(cells[1:]))
    shown = Lines(planned)
    assert (shown.count, shown.total, shown.fraction) == (3, 4, 0.0)
    shown.finished(0, Finished(cells[0], {}, [], {}))
    assert (shown.count, shown.fraction) == (4, 1.0)
    shown.again(cells[1:3])
    assert capsys.readouterr().err.endswith("came out otherwise: seed 0 number level 1 and 1 more\n")
    assert (shown.count, round(shown.fraction, 6)) == (2, round(1 / 3, 6))
    for cell in cells[1:3]:
        shown.finished(0, Finished(cell, {}, [], {}))
    assert (shown.count, shown.fraction) == (4, 1.0)
