from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparselth import pruning, train
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine import choose as engine_choose
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.engine.state import Batch, Job, State, Stopped, never
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.streams import stream
from sparselth.train import _evaluated, accuracies_on_test, fit, is_done

LENET = get_model("lenet-300-100")
TICKET = Cell(0, "ticket", 0)
ADAM = Recipe(steps=120, lr=1.2e-3, eval_every=50)
SGD = Recipe(steps=120, lr=0.05, optimizer="sgd", weight_decay=1e-3, eval_every=50)


def start(seed: int, recipe: Recipe, keep: float = 1.0) -> tuple[State, torch.Tensor]:
    weights = init_weights(LENET, stream(seed, "ticket", 0, "init"))
    mask = LENET.params.full_mask()
    if keep < 1:
        rung = {"all": round(keep * LENET.params.prunable)}
        mask = pruning.prune(LENET.params, weights[: LENET.params.mask_size], mask, rung)
        weights[: LENET.params.mask_size] *= mask
    return State.start(weights[None], recipe), mask


@pytest.mark.whole
@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
def test_pruned_weights_stay_zero_and_live_ones_move(digits: Resident, recipe: Recipe) -> None:
    state, mask = start(0, recipe, keep=0.2)
    before = state.weights.clone()
    fit(LENET, digits, [Job(TICKET, state, mask)], recipe)
    m = LENET.params.mask_size
    for t in (state.weights, *state.moments, state.best_weights):
        assert not t[0, :m][~mask].any()
    moved = (state.weights != before)[0, :m][mask]
    assert moved.double().mean() > 0.95
    assert state.weights[:, m:].any()


@pytest.mark.whole
@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize(("stop", "step"), [(1, 1), (49, 49), (50, 50), (51, 50), (77, 75), (125, 120)])
def test_stopping_anywhere_changes_no_bit(digits: Resident, recipe: Recipe, stop: int, step: int) -> None:
    """`should_stop` is asked before every step, and before each of two chunks of an evaluation."""
    whole, mask = start(0, recipe, keep=0.5)
    fit(LENET, digits, [Job(TICKET, whole, mask, keep_step=60)], recipe)
    state, _ = start(0, recipe, keep=0.5)
    calls = iter(range(1000))
    fit(
        LENET,
        digits,
        [Job(TICKET, state, mask, keep_step=60)],
        recipe,
        should_stop=lambda: next(calls) == stop,
    )
    assert state.step == step
    assert not is_done(Job(TICKET, state, mask), recipe)
    fit(LENET, digits, [Job(TICKET, state, mask, keep_step=60)], recipe)
    assert torch.equal(state.weights, whole.weights)
    assert torch.equal(state.best_weights, whole.best_weights)
    assert state.evaluations == whole.evaluations
    assert state.kept_weights is not None
    assert whole.kept_weights is not None
    assert torch.equal(state.kept_weights, whole.kept_weights)


@pytest.mark.whole
def test_early_stop_is_the_evaluation_of_least_validation_loss(digits: Resident) -> None:
    recipe = replace(ADAM, steps=600, lr=5e-3)  # overfits 3,500 images
    state, mask = start(0, recipe)
    fit(LENET, digits, [Job(TICKET, state, mask)], recipe)
    losses = {line["step"]: line["validation_loss"] for line in state.evaluations}
    assert list(losses) == list(range(50, 601, 50))
    assert state.best_step == min(losses, key=lambda step: losses[step]) < 600
    again, _ = start(0, recipe)
    stopped = replace(recipe, steps=state.best_step)
    fit(LENET, digits, [Job(TICKET, again, mask)], stopped)
    assert torch.equal(again.weights, state.best_weights)
    ((at_early_stop, final),) = accuracies_on_test(LENET, digits, [Job(TICKET, state, mask)])
    assert accuracies_on_test(LENET, digits, [Job(TICKET, again, mask)])[0][1] == at_early_stop
    assert final != at_early_stop


def test_of_equal_losses_the_first_is_the_early_stop() -> None:
    state, mask = start(0, ADAM)
    job = Job(TICKET, state, mask)
    for step, loss in ((50, 0.5), (100, 0.25), (120, 0.25)):
        state.step = step
        state.weights += 1
        _evaluated(job, loss, 0.75)
        if step == 100:
            best = state.weights.clone()
    assert (state.best_step, state.best_loss) == (100, 0.25)
    assert torch.equal(state.best_weights, best)


@pytest.mark.whole
@pytest.mark.parametrize("keep", [0, 20, 50, 60])
def test_kept_weights_are_those_of_their_step_and_stay(digits: Resident, keep: int) -> None:
    recipe = replace(ADAM, steps=80)
    state, mask = start(0, recipe, keep=0.5)
    fit(LENET, digits, [Job(TICKET, state, mask, keep_step=keep)], recipe)
    short, _ = start(0, recipe, keep=0.5)
    if keep:
        fit(LENET, digits, [Job(TICKET, short, mask)], replace(recipe, steps=keep))
    assert state.kept_weights is not None
    assert torch.equal(state.kept_weights, short.weights)
    assert not torch.equal(state.kept_weights, state.weights)


def test_the_learning_rate_is_that_of_the_step() -> None:
    recipe = Recipe(steps=100, lr=1.0, warmup=10, lr_drops=(50, 80))
    assert recipe.lr_at(0) == pytest.approx(0.1)
    assert recipe.lr_at(9) == recipe.lr_at(49) == 1.0
    assert recipe.lr_at(50) == pytest.approx(0.1)
    assert recipe.lr_at(99) == pytest.approx(0.01)


@pytest.mark.whole
def test_training_goes_on_with_the_rate_of_the_rewind_step(digits: Resident) -> None:
    recipe = Recipe(steps=40, lr=0.1, optimizer="sgd", lr_drops=(20,))
    state, mask = start(0, recipe)
    state.step = 30
    low = State.start(state.weights, recipe, 30)
    fit(LENET, digits, [Job(TICKET, low, mask, 30)], recipe)
    constant = State.start(state.weights, recipe, 30)
    fit(LENET, digits, [Job(TICKET, constant, mask, 30)], replace(recipe, lr=0.1 * 0.1, lr_drops=()))
    assert torch.equal(low.weights, constant.weights)


@pytest.mark.whole
def test_adam_corrects_its_bias_from_the_rewind_step(digits: Resident) -> None:
    recipe = replace(ADAM, steps=31)
    state, mask = start(0, recipe)
    before = state.weights.clone()
    state.step = 30
    fit(LENET, digits, [Job(TICKET, state, mask, 30)], recipe)
    moved = (state.weights - before).abs()[0, : LENET.params.mask_size]
    # a first Adam step moves every weight with a gradient by the learning rate
    assert moved[moved > 0].median() == pytest.approx(recipe.lr, rel=0.01)


SMALL = Model("small", (1, 28, 28), (Linear(20), ReLU(), Linear(10)), {}, "")
TINY = Model("tiny", (1, 28, 28), (MaxPool(7), Linear(4), ReLU(), Linear(10)), {}, "")
CONVS = Model("convs", (1, 28, 28), (Conv(2, 9), ReLU(), MaxPool(2), Linear(10)), {}, "")


ENGINES = [("reference", 0.0), ("torch", 0.0), ("torch", 2.0), ("auto", 2.0)]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("model", "kernels", "even"),
    [(model, *engine) for model in (SMALL, CONVS) for engine in ENGINES] + [(TINY, "triton", 0.0)],
)
def test_a_replica_that_diverges_is_left_and_the_others_go_on(
    model: Model, kernels: str, even: float, few: Resident
) -> None:
    """Through every engine: the others have the bits they have without it."""
    recipe, m = replace(ADAM, steps=2, eval_every=1, batch_size=2), model.params.mask_size
    found: dict[bool, list[Job]] = {}
    for blown in (True, False):
        jobs = []
        for seed in range(3):
            weights, mask = init_weights(model, stream(seed, "reinit", 4, "init")), model.params.full_mask()
            mask &= weights[:m].abs() > weights[:m].abs().median()
            weights[:m] *= mask * (1e25 if seed == 1 else 1.0)
            if seed != 1 or blown:
                jobs.append(Job(Cell(seed, "reinit", 4, 2), State.start(weights[None], recipe), mask))
        heard: list[int] = []

        def told(some: Sequence[Job], heard: list[int] = heard) -> None:
            heard += [job.who.seed for job in some]

        share = {s.name: even for s in model.weights}
        fit(model, few, jobs, recipe, kernels=kernels, break_even=share, on_evaluation=told)
        assert sorted(heard) == [0, 0, 2, 2]
        assert all(is_done(job, recipe) for job in jobs)
        found[blown] = jobs
    first, bad, last = found[True]
    assert first.diverged is last.diverged is None
    assert bad.diverged is not None
    assert bad.diverged.startswith("training diverged before step 1 (validation loss ")
    assert bad.diverged.endswith("; use a smaller `lr`")
    assert bad.state.step == 1
    assert not bad.state.evaluations
    for ours, theirs in zip((first, last), found[False], strict=True):
        assert torch.equal(ours.state.weights, theirs.state.weights)
        assert torch.equal(ours.state.best_weights, theirs.state.best_weights)
        assert ours.state.evaluations == theirs.state.evaluations
        assert len(ours.state.evaluations) == 2


# ---- the loop around an engine that costs nothing and says what it is asked


class Asked:
    """An engine: what it was asked, and how its steps and evaluations move two clocks."""

    state_bytes, many = 101, 1

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.processor, self.calls = 100.0, 7.0, list[tuple[int, ...]]()
        self.losses, self.costs = [[2.0, 3.0]] * 9, iter((2.0, 3.0, 5.0, 7.0, 11.0, 13.0))
        self.batches: list[Batch] = []
        monkeypatch.setattr(train.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(train.time, "process_time", lambda: self.processor)
        monkeypatch.setattr(train, "steps", self.of)
        monkeypatch.setattr(engine_choose, "trains_alone", lambda paths, device: False)

    def of(self, batch: Batch) -> Asked:
        self.batches.append(batch)
        assert len(self.batches) < 20, "it would never end"
        return self

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        self.calls.append((step, step + steps))
        cost = next(self.costs)
        for i in range(steps):
            if should_stop():
                return i
            self.processor += cost
            self.wall += 4 * cost
            for job in self.batches[-1].jobs:
                job.state.weights += 1
        return steps

    def measure(self, should_stop: Callable[[], bool]) -> tuple[list[float], list[float]]:
        if should_stop():
            raise Stopped
        self.wall += 10
        self.calls.append(())
        found, *self.losses = self.losses
        n = len(self.batches[-1].jobs)
        return found[:n], [0.5, 0.25][:n]


TOGETHER = "reference"
PLAN = Recipe(steps=10, lr=1.0, optimizer="sgd", eval_every=4)


def pair(*keep: int | None, recipe: Recipe = PLAN) -> list[Job]:
    """Two jobs of a seed each."""
    cells = [Cell(4, "reinit", 2, 1), Cell(5, "ticket", 3)]
    return [
        Job(who, start(who.seed, recipe)[0], LENET.params.full_mask(), 0, at)
        for who, at in zip(cells, keep or (None, None), strict=True)
    ]


def test_steps_evaluations_and_their_times(digits: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two networks share 2, 3, 5, 7 and 11 processor seconds a step, four times that by the wall."""
    engine, jobs, heard = Asked(monkeypatch), pair(3, 6), []
    first = [job.state.weights.clone() for job in jobs]

    def told(some: Sequence[Job]) -> None:
        heard.append([(job.who.seed, job.state.step) for job in some])
        engine.wall += 1000  # whoever listens is not training

    fit(LENET, digits, jobs, PLAN, kernels=TOGETHER, on_evaluation=told)
    assert engine.calls == [(0, 3), (3, 4), (), (4, 6), (6, 8), (), (8, 10), ()]
    assert heard == [[(4, step), (5, step)] for step in (4, 8, 10)]
    ((batch,),) = [engine.batches]
    assert (batch.model, batch.data, batch.recipe) == (LENET, digits, PLAN)
    assert batch.paths == choose(TOGETHER, "cpu")
    for job, begun, after in zip(jobs, first, (3, 6), strict=True):
        state = job.state
        assert state.kept_weights is not None
        torch.testing.assert_close(state.kept_weights, begun + after)
        assert state.step == 10
        assert state.pace == [9 / 8, 24 / 8, 22 / 4]
        assert state.step_seconds == 55 / 2
        assert state.seconds == (4 * 55 + 30) / 2
        assert state.bytes == 4 * LENET.params.size * 2 + 50  # weights, momentum, half of the engine's
        assert state.best_step == 4  # of equal losses the first
        torch.testing.assert_close(state.best_weights, begun + 4)
        lines = [line["step"] for line in state.evaluations]
        assert lines == [4, 8, 10]
    assert jobs[0].state.evaluations[1] == {
        "seed": 4, "arm": "reinit", "level": 2, "draw": 1, "step": 8,
        "validation_loss": 2.0, "validation_accuracy": 0.5,
    }  # fmt: skip
    assert jobs[1].state.evaluations[1]["validation_loss"] == 3.0


@pytest.mark.parametrize("kind", ["steps", "evaluation", "pause"])
def test_stopped_training_keeps_its_times_and_goes_on(
    kind: str, digits: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, jobs, asked = Asked(monkeypatch), pair(), iter(range(99))
    at = {"steps": 2, "evaluation": 4, "pause": 2}[kind]
    if kind == "pause":  # it is asked between steps alone
        fit(LENET, digits, jobs, PLAN, kernels=TOGETHER, should_pause=lambda: next(asked) == at)
    else:
        fit(LENET, digits, jobs, PLAN, kernels=TOGETHER, should_stop=lambda: next(asked) >= at)
    state = jobs[0].state
    assert (state.step, state.seconds, state.step_seconds) == (at, 4 * at, at)
    assert (state.evaluations, state.pace) == ([], [1.0] * (at == 4))
    assert next(asked) == at + 1  # asked once after it said so, and nothing was done
    engine.calls.clear()
    assert not any(is_done(job, PLAN) for job in jobs)
    fit(LENET, digits, jobs, PLAN, kernels=TOGETHER)
    assert engine.calls[0] == ((at, 4) if at < 4 else ())
    assert all(is_done(job, PLAN) for job in jobs)
    assert [line["step"] for line in state.evaluations] == [4, 8, 10]


def test_who_is_left_goes_on(digits: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, jobs, heard = Asked(monkeypatch), pair(), list[Any]()
    engine.losses[0] = [2.0, 1e9]
    fit(LENET, digits, jobs, PLAN, kernels=TOGETHER, on_evaluation=lambda some: heard.append(len(some)))
    assert engine.calls == [(0, 4), (), (4, 8), (), (8, 10), ()]
    assert (heard, [len(batch.jobs) for batch in engine.batches]) == ([1, 1, 1], [2, 1])
    assert (jobs[0].diverged, jobs[0].state.step) == (None, 10)
    assert jobs[1].diverged is not None
    assert (jobs[1].state.step, jobs[1].state.evaluations) == (4, [])


def test_who_is_behind_catches_up(digits: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, jobs = Asked(monkeypatch), pair()
    jobs[1].state.step = jobs[1].start_step = 3
    fit(LENET, digits, jobs, PLAN, kernels=TOGETHER)
    assert [len(batch.jobs) for batch in engine.batches] == [1, 2]
    assert engine.calls[:3] == [(0, 3), (3, 4), ()]
    engine, jobs = Asked(monkeypatch), pair()
    for job, evaluated in zip(jobs, (False, True), strict=True):
        job.state.step = 4
        job.state.evaluations = [{"step": 4}] * evaluated
    fit(LENET, digits, jobs, PLAN, kernels=TOGETHER)  # whose evaluation is due, too
    assert [[job.who.seed for job in batch.jobs] for batch in engine.batches] == [[4], [4, 5]]
    assert engine.calls[:2] == [(), (4, 8)]


def test_what_is_done_and_what_is_due() -> None:
    job = pair()[0]
    for step, lines, due, done in [
        *((0, [], False, False), (3, [], False, False), (4, [], True, False), (4, [4], False, False)),
        *((8, [4], True, False), (9, [8], False, False), (10, [8], True, False), (10, [10], False, True)),
        (12, [12], False, True),
    ]:
        job.state.step, job.state.evaluations = step, [{"step": line} for line in (0, *lines)[-len(lines) :]]
        job.state.evaluations *= bool(lines)
        assert (train._is_due(job, PLAN), is_done(job, PLAN)) == (due, done), (step, lines)
    job.start_step, job.state.step, job.state.evaluations = 4, 4, []
    assert not train._is_due(job, PLAN)  # a ticket begins behind the evaluation of its step
    job.diverged = "so it did"
    assert is_done(job, PLAN)


def test_training_enters_and_leaves_its_groups(digits: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, given, seen = pair(), list[Any](), list[Any]()

    def groups(*some: Any) -> Any:
        given.append(some)
        return [SimpleNamespace(enter=seen.append, leave=lambda: seen.append("left"))]

    def fails(*some: Any) -> None:
        seen.append(some[1:5])
        raise MemoryError

    monkeypatch.setattr(train, "groups", groups)
    monkeypatch.setattr(train, "_fit", fails)
    never_ = lambda: False  # noqa: E731
    even = {"fc1.weight": 0.5}
    with pytest.raises(MemoryError):
        fit(
            LENET,
            digits,
            jobs,
            PLAN,
            kernels="torch",
            break_even=even,
            on_evaluation=print,
            should_stop=never_,
        )
    assert given == [(LENET, jobs, "torch", even, digits)]
    assert seen == [PLAN, (digits, PLAN, print, never_), "left"]
    fit(LENET, digits, [], PLAN)
    assert len(given) == 1
    with pytest.raises(MemoryError):
        fit(LENET, digits, jobs, PLAN)
    assert given[1:] == [(LENET, jobs, "auto", None, digits)]


@pytest.mark.parametrize(
    ("loss", "spoilt", "bad"),
    [
        (999_999.0, None, False), (1e6, None, True), (float("nan"), None, True), (float("inf"), None, True),
        (0.5, "weights", True), (0.5, "moments", True),
    ],
)  # fmt: skip
def test_what_has_diverged_says_why_and_leaves_the_batch(
    loss: float, spoilt: str | None, bad: bool, digits: Resident
) -> None:
    jobs = pair()
    batch = Batch(LENET, digits, jobs, PLAN, choose("reference", "cpu"))
    state = batch.jobs[1].state
    state.step = 8
    state.weights[0, 0] = -7.0
    if spoilt == "weights":
        state.weights[0, 5] = float("nan")
    elif spoilt == "moments":
        state.moments[0][0, 5] = float("inf")
    train._find_diverged(batch, [0.25, loss])
    assert batch.jobs[0].diverged is None
    most = "nan" if spoilt == "weights" else "7"
    said = f"training diverged before step 8 (validation loss {loss:g}, weights up to {most}); "
    said += "use a smaller `lr`"
    assert batch.jobs[1].diverged == (said if bad else None)
    shares = state.weights.untyped_storage().data_ptr() == batch.weights.untyped_storage().data_ptr()
    assert shares != bad


def test_test_accuracies_are_of_each_job_at_early_stop_and_at_the_end(
    digits: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups need not be in the order of the jobs; what did not move behind early stop is tested once."""
    jobs, given, looked = [*pair(), *pair()], list[Any](), list[Any]()
    jobs[0].state.weights = jobs[0].state.weights + 1
    order = [id(job) for job in jobs]

    class Told:
        def __init__(self, *some: Job) -> None:
            self.jobs = some

        def networks(self, best: bool = False) -> Any:
            return [(order.index(id(job)), best) for job in self.jobs]

        def measure(self, *asked: Any) -> Any:
            looked.append(asked)
            return None, [i + 0.5 * best for i, best in asked[0]]

    def groups(*some: Any) -> Any:
        given.append(some)
        return [Told(*jobs[2:]), Told(*jobs[:2])]

    monkeypatch.setattr(train, "groups", groups)
    chunks: Any = object()
    monkeypatch.setattr(Resident, "test", lambda self: chunks)
    asked: Any = (lambda: True,)
    found = accuracies_on_test(LENET, digits, jobs, "torch", {"fc1.weight": 0.5}, *asked)
    assert found == [(0.5, 0), (1.5, 1), (2.5, 2.5), (3.5, 3.5)]
    assert given == [(LENET, jobs, "torch", {"fc1.weight": 0.5})]
    assert [rest for _, *rest in looked] == [[chunks, *asked]] * 3
    assert accuracies_on_test(LENET, digits, []) == []
    accuracies_on_test(LENET, digits, jobs)
    assert given[1:] == [(LENET, jobs, "auto", None)]
    assert looked[-1][2] is never
