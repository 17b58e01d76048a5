"""What an experiment hands to training, cell by cell, and what it keeps of what training found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teams import together
from torch import Tensor

from sparselth import pruning, tickets
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State, Stopped
from sparselth.engine.team import Team
from sparselth.errors import SparselthError
from sparselth.experiments import jobs
from sparselth.experiments.base import Finished, Place
from sparselth.experiments.imp import ImpConfig
from sparselth.files import load_arrays, save_arrays
from sparselth.frozen import METHODS, Frozen
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
        values = {
            "levels": 1,
            "seeds": (1,),
            "arms": ("ticket", "reinit", "random-mask", "random-reinit"),
            "reinits": 2,
            "recipe": RECIPE,
        }
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
    jobs.save_state(tmp_path / "state", state, {"config": "0"})
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
        now[0] += 30.0

    def save(file: Path, state: State, where: dict[str, Any]) -> None:
        assert file == checkpoint_path(place.run, DENSE)
        assert where["config"] == asked.digest
        saved.append((state.step, state.weights.shape[1]))

    monkeypatch.setattr(jobs, "save_state", save)
    recipe = replace(RECIPE, steps=18)
    asked = plan(recipe=recipe)
    even = dict.fromkeys((spec.name for spec in PARAMS.weights), 2.0)
    assert asked.compute([DENSE], replace(place, break_even=even, evaluated=evaluated)) is not None
    assert saved == [(9, PARAMS.size), (18, PARAMS.size)]


# ---- checkpoints: what is written, and what is gone on from


def state_of(steps: int = 3, optimizer: str = "adam", **more: Any) -> State:
    """A state between the start and the end of RECIPE, every field another."""
    recipe = replace(RECIPE, optimizer=optimizer)
    state = State.start(drawn(DENSE)[None], recipe, steps, more.pop("generations", None))
    state.best_step, state.best_loss, state.seconds, state.step_seconds = 2, 0.5, 7.0, 6.0
    state.pace, state.evaluations, state.bytes = [0.25, 1], [{"step": 3, "validation_loss": 0.5}], 78
    for name, value in more.items():
        setattr(state, name, value)
    return state


def test_a_checkpoint_says_whose_it_is_and_holds_generations(tmp_path: Path) -> None:
    file, draws = tmp_path / "seed1-ticket-00.safetensors", torch.arange(PARAMS.mask_size).int()[None]
    state = state_of(generations=draws)
    state.best_generations = draws + 1
    state.kept_weights = state.weights + 2
    jobs.save_state(file, state, {"config": "abc", "cell": "of somebody else"})
    arrays, header = load_arrays(file)
    assert header == {
        "schema": "sparselth.checkpoint/1", "cell": "seed1-ticket-00", "config": "abc", "step": 3,
        "best_loss": 0.5, "best_step": 2, "evaluations": state.evaluations, "seconds": 7.0,
        "step_seconds": 6.0, "pace": [0.25, 1], "bytes": 78,
    }  # fmt: skip
    assert set(arrays) == {
        *("weights", "best_weights", "moments/0", "moments/1", "kept_weights"),
        *("generations", "best_generations"),
    }
    found = jobs._load_state(file, "cpu")
    assert found.bytes == 78
    assert found.generations is not None
    assert found.best_generations is not None
    assert torch.equal(found.generations, draws)
    assert torch.equal(found.best_generations, draws + 1)
    with pytest.raises(SparselthError, match=r"larger than 1,000 bytes"):
        jobs._load_state(file, "cpu", 1000)
    save_arrays(file, arrays, {name: value for name, value in header.items() if name != "bytes"})
    assert jobs._load_state(file, "cpu").bytes == 0  # as older versions wrote it
    for name in ("step", "best_loss", "pace"):
        save_arrays(file, arrays, {key: value for key, value in header.items() if key != name})
        with pytest.raises(SparselthError, match=rf"{file.name}: is no checkpoint \('{name}'\)"):
            jobs._load_state(file, "cpu")


NONE: dict[str, dict[str, Any]] = {
    "before its start": {"step": 1},
    "behind the end": {"step": 7},
    "a step that is none": {"step": True},
    "a best step before its start": {"best_step": 1},
    "a best step behind the end": {"best_step": 7},
    "a best step that is none": {"best_step": 2.0},
    "a loss that is none": {"best_loss": None},
    "seconds that are none": {"seconds": "7"},
    "step seconds that are none": {"step_seconds": True},
    "bytes that are none": {"bytes": None},
    "a pace that is none": {"pace": 0.25},
    "a pace of something else": {"pace": [0.25, None]},
    "evaluations that are none": {"evaluations": {}},
    "an evaluation that is none": {"evaluations": [{"step": 3}, []]},
    "an evaluation of no step": {"evaluations": [{"step": 3.0}]},
    "an evaluation without a step": {"evaluations": [{"steps": 3}]},
    "another network": {"weights": torch.zeros(1, 9)},
    "doubles": {"weights": drawn(DENSE)[None].double()},
    "best weights of another": {"best_weights": torch.zeros(9)},
    "kept weights of another": {"kept_weights": torch.zeros(9)},
    "a moment of another": {"moments": [torch.zeros(1, PARAMS.size), torch.zeros(9)]},
    "another optimizer": {"moments": [torch.zeros(1, PARAMS.size)]},
    "generations of nothing": {"generations": torch.zeros(1, PARAMS.mask_size).int()},
    "best generations of nothing": {"best_generations": torch.zeros(1, PARAMS.mask_size).int()},
}


@pytest.mark.parametrize("change", NONE.values(), ids=NONE)
def test_what_is_no_state_of_the_cell_is_not_gone_on_from(change: dict[str, Any]) -> None:
    begin = state_of(2)
    assert jobs._goes_on(state_of(), begin, RECIPE, None)
    assert not jobs._goes_on(state_of(**change), begin, RECIPE, None)


def test_what_a_state_of_the_cell_may_be() -> None:
    begin, whole = state_of(2), RECIPE.steps
    for change in ({"step": 2}, {"step": whole, "best_step": whole}, {"pace": []}, {"evaluations": []}):
        assert jobs._goes_on(state_of(**change), begin, RECIPE, None), change
    kept = {"kept_weights": begin.weights}
    for keep, change, goes_on in [(3, {}, True), (4, {}, True), (2, {}, False), (2, kept, True)]:
        assert jobs._goes_on(state_of(**change), begin, RECIPE, keep) == goes_on
    draws = torch.zeros(1, PARAMS.mask_size).int()
    strong = state_of(2, generations=draws)
    assert jobs._goes_on(state_of(generations=draws + 1), strong, RECIPE, None)
    for name in ("generations", "best_generations"):
        for other in (None, draws.long(), draws[0]):
            assert not jobs._goes_on(state_of(**{"generations": draws} | {name: other}), strong, RECIPE, None)


def test_a_cell_begins_at_its_mask_and_goes_on_from_a_checkpoint_that_fits(place: Place) -> None:
    mask = PARAMS.full_mask() & (torch.arange(PARAMS.mask_size) % 3 > 0)
    cut = drawn(DENSE)
    cut[: len(mask)] *= mask
    frozen = METHODS["iterand"].frozen(1)

    def begun(frozen: Frozen | None = None) -> Job:
        return jobs.job(DENSE, place, RECIPE, (mask.clone(), drawn(DENSE)), 2, 4, frozen)

    found = begun()
    assert torch.equal(found.state.weights, cut[None])
    assert (found.state.step, found.start_step, found.keep_step, found.frozen) == (2, 2, 4, None)
    assert (found.who, found.state.generations) == (DENSE, None)
    assert len(found.state.moments) == 1
    assert torch.equal(found.mask, mask)
    assert begun(METHODS["edge-popup"].frozen(1)).state.generations is None
    strong = begun(frozen)
    assert strong.frozen is frozen
    for draws in (strong.state.generations, strong.state.best_generations):
        assert draws is not None
        assert (draws.dtype, draws.shape, int(draws.count_nonzero())) == (torch.int32, (1, len(mask)), 0)
    file = checkpoint_path(place.run, DENSE)
    jobs.save_state(file, state_of(5, "sgd", kept_weights=cut[None]), {"config": "0"})
    assert begun().state.step == 5
    assert begun(frozen).state.step == 2
    jobs.save_state(file, state_of(5, "sgd"), {"config": "0"})
    assert begun().state.step == 2  # the weights of step 4 are not there
    jobs.save_state(file, state_of(5, "sgd", kept_weights=cut[None]), {"config": "0"})
    most = 32 * PARAMS.size + jobs.CHECKPOINT_BYTES
    assert most > file.stat().st_size
    with file.open("r+b") as out:
        out.truncate(most + 1)  # a hole, which takes no room
    with pytest.MonkeyPatch.context() as patch:
        asked: list[Any] = []
        patch.setattr(jobs, "_load_state", lambda *some: asked.append(some) or state_of(5, "sgd"))
        begun()
        assert asked == [(file, "cpu", most)]
    file.write_bytes(b"torn")
    assert begun().state.step == 2


def test_between_long_steps_a_checkpoint_is_two_minutes_old_at_most(
    plan: Configs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before every step, and not before the first of a stretch: a step is taken in between."""
    now, said, saved, stops = [1000.0], list[bool](), list[tuple[int, float]](), [False]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])

    def steps(model: Any, data: Any, some: Sequence[Job], recipe: Recipe, **how: Any) -> None:
        assert (how["kernels"], how["break_even"]) == ("torch", {"fc1.weight": 0.25})
        while some[0].state.step < recipe.steps:
            said.append(how["should_pause"]())
            if said[-1] or how["should_stop"]():
                return
            now[0] += 60.0
            some[0].state.step += 1

    def save(file: Path, state: State, where: dict[str, Any]) -> None:
        saved.append((state.step, now[0]))

    monkeypatch.setattr(jobs, "fit", steps)
    monkeypatch.setattr(jobs, "save_state", save)
    monkeypatch.setattr(jobs, "is_done", lambda job, recipe: job.state.step == recipe.steps)
    monkeypatch.setattr(jobs, "accuracies_on_test", lambda *_: [(0.5, 0.5)])
    asked = plan(kernels="torch")
    place = replace(place, break_even={"fc1.weight": 0.25}, should_stop=lambda: stops[0])
    assert asked.compute([DENSE], place) is not None
    assert said == [False, False, False, True, False, False, False]
    assert saved == [(3, 1180.0)]
    now[0], said[:], saved[:] = 0.0, [], []
    stops[0] = True
    assert asked.compute([DENSE], place) is None
    assert (said, [step for step, _ in saved]) == ([False], [0])


def test_between_two_checkpoints_lies_a_step(
    plan: Configs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two minutes are over before the first: it would never end."""
    now, said = [0.0], list[bool]()
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])

    def steps(model: Any, data: Any, some: Sequence[Job], recipe: Recipe, **how: Any) -> None:
        now[0] += 130.0  # to compile
        said.append(how["should_pause"]())
        some[0].state.step += 1
        said.append(how["should_pause"]())

    monkeypatch.setattr(jobs, "fit", steps)
    monkeypatch.setattr(jobs, "save_state", lambda *_: None)
    monkeypatch.setattr(jobs, "is_done", lambda job, recipe: job.state.step == recipe.steps)
    monkeypatch.setattr(jobs, "accuracies_on_test", lambda *_: [(0.5, 0.5)])
    assert plan().compute([DENSE], place) is not None
    assert said == [False, True] * RECIPE.steps


@pytest.mark.host
def test_of_a_team_one_says_when_to_save_and_saves(
    plan: Configs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though by the clocks of the others it is never time, or always; all take the same steps."""
    monkeypatch.setattr(jobs, "accuracies_on_test", lambda *_: [(0.5, 0.5)])

    def work(team: Team) -> Any:
        saved = list[int]()
        jobs.PAUSE_SECONDS = 0.0 if team.leads == (now == "leads") else 1e9
        monkeypatch.setattr(jobs, "save_state", lambda file, state, where: saved.append(state.step))
        found = plan(kernels="autograd").compute([DENSE], replace(place, team=team))
        return saved, found and [done.cell for done in found]

    now = "leads"
    assert together(work) == [([1, 2, 3, 4, 5], [DENSE]), ([], [])]
    now = "follows"
    assert together(work) == [([], [DENSE]), ([], [])]
    assert cell_path(place.run, DENSE).exists()


def test_what_diverges_has_no_checkpoint_and_no_file_and_the_others_have(
    plan: Configs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is stopped while images are tested."""
    some = [Cell(1, arm, 0, draw) for draw, arm in enumerate(("a", "b", "c"))]
    ours = [Job(cell, state_of(6, "sgd"), PARAMS.full_mask()) for cell in some]
    ours[1].diverged = "training diverged"
    written: list[Cell] = []

    def finish(model: Any, job: Job, place: Any, where: Any, early: float, final: float) -> Any:
        assert (model, where) == (LENET, {"config": "0"})
        written.append(job.who)
        return Finished(job.who, {"early": early, "final": final}, [], {})

    def found(model: Any, data: Any, going: Sequence[Job], *rest: Any) -> list[tuple[float, float]]:
        assert [job.who for job in going] == [some[0], some[2]]
        return [(0.1, 0.2), (0.3, 0.4)]

    def stopped(*_: Any) -> Any:
        raise Stopped

    def compute() -> Any:
        return jobs.train(LENET, ours, RECIPE, "auto", place, {"config": "0"}, finish)

    monkeypatch.setattr(jobs, "accuracies_on_test", stopped)
    assert compute() is None
    names = [checkpoint_path(place.run, some[i]).name for i in (0, 2)]
    assert sorted(file.name for file in (place.run / "checkpoints").iterdir()) == names
    assert not written
    monkeypatch.setattr(jobs, "accuracies_on_test", found)
    bad, *good = compute()
    assert (bad.cell, bad.why) == (some[1], "training diverged")
    assert [(one.cell, one.line) for one in good] == [
        (some[0], {"early": 0.1, "final": 0.2}),
        (some[2], {"early": 0.3, "final": 0.4}),
    ]
    assert written == [some[0], some[2]]


def test_a_line_counts_what_is_kept_and_names_its_clock(place: Place) -> None:
    mask = PARAMS.full_mask() & (torch.arange(PARAMS.mask_size) % 4 == 0)
    state = state_of(6, kept_weights=drawn(TICKET)[None] + 1)
    state.weights[0, : len(mask)] *= mask
    done = jobs.finished(LENET, Job(TICKET, state, mask), place, {"model": LENET.name}, 0.5, 0.25)
    assert done.line["kept"] == {"fc1.weight": 58800, "fc2.weight": 7500, "fc3.weight": 250}
    assert done.line["weights_remaining"] == 0.25
    assert done.line["dense_state_bytes"] == 4 * PARAMS.size * 4  # Adam has two moments
    assert done.timings == {"train_seconds": 7.0, "step_seconds": 0.625, "clock": "processor"}
    content, _ = tickets.read(cell_path(place.run, TICKET), PARAMS)
    assert content.rewound is not None
    assert state.kept_weights is not None
    for spec in PARAMS.all:
        assert np.array_equal(content.weights[spec.span], state.weights[0][spec.span])
        assert np.array_equal(content.rewound[spec.span], state.kept_weights[0][spec.span])
    assert np.array_equal(content.mask, mask)
    state.pace = []
    assert jobs.told(LENET, Job(TICKET, state, mask), {}, 0.5, 0.25).timings["step_seconds"] == 0.0
