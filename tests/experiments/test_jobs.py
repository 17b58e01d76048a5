"""What an experiment hands to training, cell by cell, and what it keeps of what training found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.experiments import jobs
from sparselth.experiments.arms import ARMS
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig
from sparselth.files import load_arrays
from sparselth.models import get_model
from sparselth.runs import cell_path, checkpoint_path
from sparselth.streams import stream
from sparselth.train import fit

Configs = Callable[..., ImpConfig]
LENET = get_model("lenet-300-100")
PARAMS = LENET.params
DENSE, TICKET = Cell(1, "ticket", 0), Cell(1, "ticket", 1)
RECIPE = Recipe(steps=6, lr=0.05, batch_size=20, optimizer="sgd", weight_decay=1e-3, eval_every=3)


@pytest.fixture
def place(few: Resident, tmp_path: Path) -> Place:
    for name in ("cells", "checkpoints"):
        (tmp_path / name).mkdir()
    return Place(tmp_path, few, {})


@pytest.fixture
def plan(config: Configs) -> Configs:
    """All arms of one level, of seed 1, with two draws; six steps of training."""

    def call(**changes: Any) -> ImpConfig:
        values = {"levels": 1, "seeds": (1,), "arms": tuple(ARMS), "reinits": 2, "recipe": RECIPE}
        return config(**values | changes)

    return call


def drawn(cell: Cell) -> Tensor:
    return init_weights(LENET, stream(cell.seed, cell.arm, cell.level, "init", cell.draw))


def after(steps: int, place: Place) -> Tensor:
    """The weights [P] of the dense network after so many of its steps."""
    state = State.start(drawn(DENSE)[None], RECIPE)
    if steps:
        assert place.data is not None
        fit(LENET, place.data, [Job(DENSE, state, PARAMS.full_mask())], replace(RECIPE, steps=steps))
    return state.weights[0]


def handed(config: ImpConfig, place: Place, cells: Sequence[Cell]) -> dict[str, Any]:
    """What `fit` is given when `cells` are computed; it takes no step."""
    given: dict[str, Any] = {}

    def idle(model: Any, data: Any, jobs: Any, recipe: Any, **more: Any) -> None:
        given.update(model=model, data=data, jobs={job.who: job for job in jobs}, recipe=recipe, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "fit", idle)
        assert config.compute(cells, place) is None  # as if it was stopped
    for cell in cells:
        checkpoint_path(place.run, cell).unlink()
    return given


@pytest.mark.parametrize("rewind", [0, 4])
def test_every_cell_trains_from_its_own_mask_weights_and_step(
    rewind: int, plan: Configs, place: Place
) -> None:
    asked = plan(rewind=rewind)
    (first,) = handed(asked, place, [DENSE])["jobs"].values()
    assert torch.equal(first.state.weights[0], drawn(DENSE))
    assert torch.equal(first.mask, PARAMS.full_mask())
    assert (first.state.step, first.start_step, first.keep_step) == (0, 0, rewind)

    assert asked.compute([DENSE], place) is not None
    found, _ = tickets.read(cell_path(place.run, DENSE), PARAMS)
    trained, kept = torch.from_numpy(found.weights), after(rewind, place)
    rung = pruning.ladder(PARAMS, 1, 0.2, "layer")[1]
    mask = pruning.prune(PARAMS, trained[: PARAMS.mask_size], PARAMS.full_mask(), rung, "reference")
    controls = [cell for cell in asked.cells() if cell.level]
    assert len(controls) == 6
    given = handed(asked, place, controls)["jobs"]
    assert list(given) == controls
    for cell, job in given.items():
        fresh, shuffled = "reinit" in cell.arm, "random" in cell.arm
        at = stream(1, cell.arm, 1, "mask", cell.draw)
        expected = pruning.shuffle(PARAMS, mask, at) if shuffled else mask
        weights = drawn(cell) if fresh else kept.clone()
        weights[: len(mask)] *= expected
        assert torch.equal(job.mask, expected), cell
        assert torch.equal(job.state.weights[0], weights), cell
        assert torch.equal(job.state.best_weights[0], weights), cell
        assert not any(moment.any() for moment in job.state.moments)
        step = 0 if fresh else rewind
        assert (job.state.step, job.start_step, job.keep_step) == (step, step, None), cell


def test_without_rewinding_a_ticket_goes_back_to_the_initial_weights_to_the_bit(
    plan: Configs, place: Place
) -> None:
    assert plan().compute([DENSE], place) is not None
    _, weights = plan().start(TICKET, place)
    assert torch.equal(weights, init_weights(LENET, stream(1, "ticket", 0, "init")))


def test_training_gets_the_run_s_recipe_kernels_data_and_listeners(plan: Configs, place: Place) -> None:
    told: list[Any] = []
    place = replace(place, break_even={"fc1.weight": 0.25}, evaluated=told.append, should_stop=lambda: False)
    given = handed(plan(kernels="torch"), place, [DENSE])
    assert (given["model"], given["data"], given["recipe"]) == (LENET, place.data, RECIPE)
    assert (given["kernels"], given["break_even"]) == ("torch", {"fc1.weight": 0.25})
    assert given["should_stop"] is place.should_stop
    given["on_evaluation"]([*given["jobs"].values()])
    assert [job.who for job in told[0]] == [DENSE]


def test_a_finished_cell_says_what_training_found(
    plan: Configs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(kernels="torch", rewind=4)
    place = replace(place, break_even={"fc1.weight": 0.25})
    tested: list[Any] = []

    def accuracies(model: Any, data: Any, jobs: Sequence[Job], *rest: Any) -> list[tuple[float, float]]:
        tested.extend([model, data, *rest])
        jobs[0].state.seconds, jobs[0].state.pace, jobs[0].state.bytes = 8.0, [3.0, 1.0, 2.0], 77
        jobs[0].state.best_step, jobs[0].state.best_loss = 3, 0.125
        return [(0.75, 0.5)]

    monkeypatch.setattr(jobs, "accuracies_on_test", accuracies)
    done = asked.compute([DENSE], place)
    assert done is not None
    assert tested == [LENET, place.data, "torch", {"fc1.weight": 0.25}, place.should_stop]
    (found,) = done
    assert found.cell == DENSE
    assert found.line == {
        "weights_remaining": 1.0,
        "kept": {spec.name: spec.numel for spec in PARAMS.weights},
        "early_stop_step": 3,
        "validation_loss_at_early_stop": 0.125,
        "accuracy_at_early_stop": 0.75,
        "final_accuracy": 0.5,
        "state_bytes": 77,
        "dense_state_bytes": 4 * PARAMS.size * 3,  # weights, gradients, momentum
    }
    assert [line["step"] for line in found.evaluations] == [3, 6]
    assert found.timings["train_seconds"] == 8.0
    assert found.timings["step_seconds"] == 2.0
    header = load_arrays(cell_path(place.run, DENSE))[1]
    said = {name: header[name] for name in ("model", "dataset", "config", "cell", "rewind_step")}
    assert said == {
        "model": "lenet-300-100",
        "dataset": "mnist5k",
        "config": asked.digest,
        "cell": "seed1-ticket-00",
        "rewind_step": 4,
    }


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize(
    "even", [{}, dict.fromkeys(("fc1.weight", "fc2.weight"), 1.0)], ids=["dense", "compressed"]
)
def test_a_stopped_cell_goes_on_from_all_that_its_checkpoint_holds(
    stop: int, even: dict[str, float], plan: Configs, place: Place, few: Resident, tmp_path: Path
) -> None:
    """Stopped at a step, or died behind an evaluation: lines and files are those of a cell that was not."""
    asked, place = plan(rewind=2), replace(place, break_even=even)
    whole = Place(tmp_path / "whole", few, even)
    for name in ("cells", "checkpoints"):
        (whole.run / name).mkdir(parents=True)
    for cell in (DENSE, TICKET):
        calls = iter(range(100))
        steps = stop - 2 * cell.level  # a ticket begins at the rewind step
        stopping = replace(place, should_stop=lambda calls=calls, steps=steps: next(calls) >= steps)
        if steps > 0:
            assert asked.compute([cell], stopping) is None
            assert checkpoint_path(place.run, cell).exists()
        (resumed,), (expected,) = asked.compute([cell], place) or (), asked.compute([cell], whole) or ()
        assert resumed.line == expected.line
        assert resumed.evaluations == expected.evaluations
        names = [cell_path(run, cell).read_bytes() for run in (place.run, whole.run)]
        assert names[0] == names[1]


def test_a_checkpoint_brings_every_part_of_a_state_back(tmp_path: Path) -> None:
    state = State.start(drawn(DENSE)[None], replace(RECIPE, optimizer="adam"), 2)
    state.moments[0] += 1
    state.moments[1] += 2
    state.best_weights += 3
    state.kept_weights = state.weights + 4
    state.best_loss, state.best_step, state.seconds, state.step_seconds = 0.5, 3, 7.0, 6.0
    state.pace, state.evaluations = [0.25, 0.5], [{"step": 3, "validation_loss": 0.5}]
    jobs._save_state(tmp_path / "state", state, {"config": "0"})
    found = jobs._load_state(tmp_path / "state", "cpu")
    for name in ("step", "best_loss", "best_step", "evaluations", "seconds", "step_seconds", "pace"):
        assert getattr(found, name) == getattr(state, name), name
    for name in ("weights", "best_weights", "kept_weights"):
        assert torch.equal(getattr(found, name), getattr(state, name)), name
    assert all(map(torch.equal, found.moments, state.moments))


def test_a_checkpoint_is_written_when_the_last_one_is_a_minute_old(
    plan: Configs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind an evaluation; what trains in the compressed domain is written as it is outside."""
    now, saved = [0.0], list[tuple[int, int]]()
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])

    def evaluated(some: Sequence[Job]) -> None:
        now[0] += 40.0

    def save(file: Path, state: State, where: dict[str, Any]) -> None:
        assert file == checkpoint_path(place.run, DENSE)
        assert where["config"] == asked.digest
        saved.append((state.step, state.weights.shape[1]))

    monkeypatch.setattr(jobs, "_save_state", save)
    recipe = replace(RECIPE, steps=15)
    asked = plan(recipe=recipe)
    even = dict.fromkeys((spec.name for spec in PARAMS.weights), 2.0)
    assert asked.compute([DENSE], replace(place, break_even=even, evaluated=evaluated)) is not None
    assert saved == [(6, PARAMS.size), (12, PARAMS.size)]
