"""Batches of replicas: what one computes is, to the bit, what it computes alone, at any R, with anyone.

Behind the tests of the CPU and of the interpreter are those of trainings.py: small models in the interpreter,
those of the paper on a CUDA device.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainings
from oracle import DEVICE, pick, precision
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Batches, Event, Orders, Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.layers import BiasReLU, PartsPool
from sparselth.engine.paths import choose
from sparselth.engine.replay import MANY, Replay
from sparselth.engine.state import Batch, Job, State
from sparselth.kernels import masked_conv2d, replica_parts
from sparselth.kernels._triton import INTERPRET
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, Node, ReLU, get_model
from sparselth.streams import stream
from sparselth.train import accuracies_on_test, fit

LENET = get_model("lenet-300-100")
SMALL = Model("small", (1, 28, 28), (Linear(20), ReLU(), Linear(10)), {}, "")
CONVS = Model("convs", (1, 28, 28), (Conv(2, 9), ReLU(), MaxPool(2), Linear(12), ReLU(), Linear(10)), {}, "")
NORMS = Model(
    "norms",
    (1, 28, 28),
    (
        *(Conv(2, 9), BatchNorm(), MaxPool(2), ReLU(), Conv(3, 3), BatchNorm(), ReLU(), AvgPool()),
        *(Linear(12), BatchNorm(), ReLU(), Linear(10)),
    ),
    {},
    "",
)
FEW_CONVS = replace(CONVS, name="few-convs", layers=(MaxPool(4), Conv(2, 3), *CONVS.layers[1:]))
FEW_NORMS = replace(NORMS, name="few-norms", layers=(MaxPool(4), Conv(2, 3), BatchNorm(), *NORMS.layers[6:]))
RESIDUAL = replace(
    NORMS,
    name="residual",
    layers=(
        *(MaxPool(4), Conv(2, 3, 1), ReLU(), Conv(3, 3, 1, 2), ReLU(), Conv(3, 3, 1)),
        *(Node(Conv(3, 1, 0, 2), (2,)), Node(Add(), (5, 6)), ReLU()),
        *(Linear(6), ReLU(), Linear(6), ReLU(), Node(Add(), (10, 12)), Linear(10)),
    ),
)
ADAM = Recipe(steps=6, lr=1.2e-3, batch_size=7, eval_every=3)
SGD = replace(ADAM, lr=0.05, optimizer="sgd", weight_decay=1e-3)
interpreted = pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")


def job(model: Model, recipe: Recipe, seed: int, keep: float, start: int = 0, arm: str = "ticket") -> Job:
    """A cell with random weights and a random mask that keeps about `keep` of them."""
    who = Cell(seed, arm, 1)
    weights = init_weights(model, stream(seed, arm, 1, "init"))
    mask = model.params.full_mask()
    chance = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(seed))
    mask &= chance < keep
    weights[: model.params.mask_size] *= mask
    return Job(who, State.start(weights[None], recipe, start), mask, start)


def same(ours: Job, alone: Job) -> None:
    a, b = ours.state, alone.state
    for found, expected in zip(
        (a.weights, a.best_weights, *a.moments), (b.weights, b.best_weights, *b.moments), strict=True
    ):
        assert torch.equal(found, expected), ours.who
    assert a.evaluations == b.evaluations
    assert (a.step, a.best_step, a.best_loss) == (b.step, b.best_step, b.best_loss)


cells = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from([1.0, 0.5, 0.1, 0.02]),
        st.sampled_from([0, 0, 2, 5]),
        st.sampled_from(["ticket", "reinit", "random-mask"]),
    ),
    min_size=1,
    max_size=7,
    unique_by=lambda cell: (cell[0], cell[3]),
)


@pytest.mark.host
@pytest.mark.parametrize("kernels", ["auto", "torch", "reference"])
@pytest.mark.parametrize("model", [LENET, CONVS, NORMS, RESIDUAL], ids=lambda model: model.name)
@given(cells=cells, recipe=st.sampled_from([ADAM, SGD, replace(SGD, momentum=0.0)]))
@settings(max_examples=6)
def test_a_replica_of_any_batch_equals_itself_alone(
    kernels: str, model: Model, cells: list[tuple[int, float, int, str]], recipe: Recipe, few: Resident
) -> None:
    share = {spec.name: 0.3 for spec in model.weights}
    jobs = [job(model, recipe, *cell) for cell in cells]
    fit(model, few, jobs, recipe, kernels=kernels, break_even=share)
    together = accuracies_on_test(model, few, jobs, kernels, share)
    for found, cell, pair in zip(jobs, cells, together, strict=True):
        alone = job(model, recipe, *cell)
        fit(model, few, [alone], recipe, kernels=kernels, break_even=share)
        same(found, alone)
        assert accuracies_on_test(model, few, [alone], kernels, share) == [pair]


@pytest.mark.host
@interpreted
@pytest.mark.parametrize(
    ("model", "recipe", "replicas"),
    [
        (SMALL, ADAM, 3),
        (SMALL, replace(SGD, momentum=0.0), 2),
        (FEW_CONVS, SGD, 2),
        (FEW_NORMS, SGD, 2),
        (RESIDUAL, SGD, 2),
    ],
    ids=["small-adam", "small-sgd", "few-convs", "few-norms", "residual"],
)
def test_a_replica_of_a_triton_batch_equals_itself_alone(
    model: Model, recipe: Recipe, replicas: int, few: Resident
) -> None:
    recipe = replace(recipe, steps=2, eval_every=2, batch_size=3)
    cells = [(seed, (1.0, 0.3, 0.1)[seed], (0, 1, 0)[seed]) for seed in range(replicas)]
    jobs = [job(model, recipe, *cell) for cell in cells]
    fit(model, few, jobs, recipe, kernels="triton")
    for found, cell in zip(jobs, cells, strict=True):
        alone, reference = job(model, recipe, *cell), job(model, recipe, *cell)
        fit(model, few, [alone], recipe, kernels="triton")
        same(found, alone)
        fit(model, few, [reference], recipe, kernels="reference")
        expected = reference.state
        # a batch norm of three images divides rounding by what may be a small deviation
        bound = 1e-4 if model.norms else 1e-5
        for ours, right in zip(
            (found.state.weights, *found.state.moments), (expected.weights, *expected.moments), strict=True
        ):
            assert (ours - right).norm() <= bound * right.norm()
        assert found.state.best_loss == pytest.approx(expected.best_loss, rel=bound)


class Queue:
    """A device that is as late as it may be: it does nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], object]] = []
        self.done = 0

    def put(self, what: Callable[[], object]) -> None:
        self.queued.append(what)

    def run(self, until: int) -> None:
        while self.done < until:
            self.queued[self.done]()
            self.done += 1

    def event(self) -> Event:
        return Place(self)


class Place:
    """An event in its queue; one that was never recorded has passed."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, 0

    def record(self) -> None:
        self.at = len(self.queue.queued)

    def synchronize(self) -> None:
        self.queue.run(self.at)


class Late:
    """A tensor of that device."""

    def __init__(self, queue: Queue, of: Tensor) -> None:
        self.queue, self.of = queue, of

    def fill_(self, value: int) -> None:
        self.queue.put(lambda: self.of.fill_(value))

    def copy_(self, other: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.queue.put(lambda: self.of.copy_(other))


class AtOnce:
    """An executor whose thread is as quick as it may be."""

    def submit(self, call: Callable[[int], int], epoch: int) -> Future[int]:
        future: Future[int] = Future()
        future.set_result(call(epoch))
        return future


@pytest.mark.host
@pytest.mark.parametrize("an_epoch", [5, 8, 20, 21, 40, 41])
@pytest.mark.parametrize("stretch", [1000, 13])
def test_every_step_reads_the_order_of_its_epoch(an_epoch: int, stretch: int, few: Resident) -> None:
    """The host side of a replay over a device that lags behind as far as the host lets it."""
    queue, epochs = Queue(), 6
    batches = Batches(few, [Cell(0, "ticket", 0), Cell(1, "ticket", 0)], 1)
    batches.steps_per_epoch = an_epoch
    replay: Any = object.__new__(Replay)
    replay.batches, replay.many, replay.flight, replay.event = batches, MANY, [], queue.event
    replay.orders = orders = Orders(batches, epochs, queue.event)
    order, clock, seen = orders.order, torch.zeros(1, dtype=torch.int64), []
    replay.clock, replay.orders.order, replay.orders.thread = Late(queue, clock), Late(queue, order), AtOnce()

    def steps(count: int) -> None:
        for _ in range(count):
            seen.append(order[:, int(clock) % an_epoch].clone())
            clock.add_(1)

    replay.run = {n: partial(queue.put, partial(steps, n)) for n in (1, MANY)}
    for step in range(0, epochs * an_epoch, stretch):
        assert replay.advance(step, min(stretch, epochs * an_epoch - step), lambda: False) > 0
    queue.run(len(queue.queued))
    assert len(seen) == epochs * an_epoch
    drawn = [batches.draw(epoch) for epoch in range(epochs)]
    wrong = [
        i for i, index in enumerate(seen) if not torch.equal(index, drawn[i // an_epoch][:, i % an_epoch])
    ]
    assert not wrong


@pytest.mark.host
def test_host_memory_that_a_stream_reads_is_in_two_places() -> None:
    """`Orders` guards what it fills again by events; magnitude_threshold's is new at every call, a batch
    decoded from files, too, and torch's allocator keeps it until it was read."""
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "sparselth").rglob("*.py"), *(root / "kernels").glob("*.py")]
    found = {f.name for f in files for word in ("pin_memory", "non_blocking") if word in f.read_text()}
    assert found == {"batches.py", "magnitude_threshold.py", "streamed.py"}


class Launches(TorchDispatchMode):
    """What a step launches: torch's kernels by their operator, ours by their name, in the interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        super().__init__()
        self.found, self.ours, grid = Counter[str](), False, interpreter.GridExecutor
        plain = grid.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.found[executor.fn.__name__] += 1
            self.ours = True
            try:
                return plain(executor, *args, **kwargs)
            finally:
                self.ours = False

        monkeypatch.setattr(grid, "__call__", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        views = any(t.alias_info is not None and not t.alias_info.is_write for t in func._schema.returns)
        if not self.ours and not views and "empty" not in str(func):
            self.found[str(func)] += 1
            if "baddbmm" in str(func) and args[0].data_ptr() != kwargs.get("out", args[0]).data_ptr():
                self.found["a bias that is copied first"] += 1
        return func(*args, **kwargs)


def by_default(
    model: Model, recipe: Recipe, few: Resident, until: int
) -> tuple[Replay, list[Tensor], list[Job]]:
    """The default paths of CUDA, interpreted: a replay behind so many steps, its weights and moments; and the
    same jobs by the reference."""
    found, right = ([job(model, recipe, seed, keep) for seed, keep in ((0, 1.0), (1, 0.3))] for _ in range(2))
    fit(model, few, right, recipe, kernels="reference")
    batch = Batch(model, few, found, recipe, choose("auto", "cuda"))
    replay, tensors = Replay(batch), [batch.weights, *batch.moments]
    replay.advance(0, until, lambda: False)
    return replay, tensors, right


def near(replay: Replay, tensors: list[Tensor], right: list[Job], bound: float) -> None:
    expected = zip(*([o.state.weights, *o.state.moments] for o in right), strict=True)
    for ours, theirs in zip(tensors, expected, strict=True):
        assert (ours - torch.cat(theirs)).norm() <= bound * torch.cat(theirs).norm()
    losses = [one.state.evaluations[-1]["validation_loss"] for one in right]
    assert replay.measure()[0] == pytest.approx(losses, rel=bound)


@pytest.mark.host
@interpreted
@pytest.mark.parametrize(
    ("layers", "biases"),
    [
        ((Conv(4, 3, 1), ReLU(), Conv(3, 3), ReLU(), MaxPool(2), Linear(12), ReLU(), Linear(10)), 3),
        ((Conv(2, 9), MaxPool(2), ReLU(), Linear(10)), 0),
        ((Conv(2, 9), BatchNorm(), ReLU(), Conv(3, 3), ReLU(), AvgPool(), Linear(10)), 1),
    ],
    ids=["conv2", "cnn", "norms"],
)
def test_images_lie_as_convolutions_give_them(
    layers: tuple[Any, ...], biases: int, few: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels-last: no gradient is copied into another order first, where no batch norm asks for it."""
    model = replace(SMALL, name="images", layers=layers)
    recipe = replace(SGD, steps=2, eval_every=2, batch_size=3)
    norms = any(isinstance(layer, BatchNorm) for layer in layers)
    plain, seen = masked_conv2d.wgrad, []

    def wgrad(dy: Tensor, *rest: Any) -> Tensor:
        seen.append(dy.permute(0, 1, 3, 4, 2).is_contiguous())
        return plain(dy, *rest)

    monkeypatch.setattr(masked_conv2d, "wgrad", wgrad)
    replay, tensors, right = by_default(model, recipe, few, 2)
    assert len(seen) == 2 * sum(isinstance(layer, Conv) for layer in layers)
    assert norms or all(seen)
    assert sum(isinstance(layer, BiasReLU) for layer in replay.network.layers) == biases
    pools = [layer for layer in replay.network.layers if isinstance(layer, PartsPool)]
    assert [pool.cuts for pool in pools] == {8: [True], 4: [False], 7: []}[len(layers)]
    near(replay, tensors, right, 1e-4 if norms else 1e-5)


@pytest.mark.host
@interpreted
def test_shortcuts_on_the_default_paths_of_cuda(few: Resident) -> None:
    """The bias of a product is left to a ReLU only where that is all that reads it."""
    recipe = replace(SGD, steps=2, eval_every=2, batch_size=3)
    replay, tensors, right = by_default(RESIDUAL, recipe, few, 2)
    added = [isinstance(layer, BiasReLU) for layer in replay.network.layers]
    assert [i for i, late in enumerate(added) if late] == [2, 4, 10, 12]
    near(replay, tensors, right, 1e-5)


@pytest.mark.host
def test_replicas_one_by_one_come_in_another_order() -> None:
    """And the bias is added all the same, and pooled."""
    y, bias = torch.randn(2, 3, 4, 4, 5), torch.randn(2, 3)
    right = torch.relu(y + bias[:, :, None, None, None])
    assert torch.equal(BiasReLU(bias).forward(y.clone()), right)
    pool = PartsPool(2, torch.zeros(2, 3, 2, 2, 5), torch.zeros(2, 3, 4, 4, 5), cuts=True)
    dy = torch.randn(2, 3, 2, 2, 5)
    assert torch.equal(pool.forward(right), replica_parts.reference_max_pool(right, 2))
    dx = replica_parts.reference_max_pool_backward(dy, right, 2, cuts=True)
    assert torch.equal(pool.backward(dy), dx)


@pytest.mark.host
@interpreted
@pytest.mark.parametrize("recipe", [ADAM, SGD], ids=["adam", "sgd"])
def test_a_step_of_cuda_is_fifteen_launches_and_right(
    recipe: Recipe, few: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default paths of CUDA, in the interpreter: 3 products forward, 2 back, 3 updates, 7 small ones."""
    model = replace(SMALL, name="three", layers=(Linear(20), ReLU(), Linear(12), ReLU(), Linear(10)))
    recipe = replace(recipe, steps=3, eval_every=3, batch_size=5)
    replay, tensors, right = by_default(model, recipe, few, 2)
    with Launches(monkeypatch) as launches:
        replay._step()
    assert launches.found == {
        "_begin_kernel": 1,
        "_gather_kernel": 1,
        "aten.bmm.out": 5,
        "_bias_relu_kernel": 2,
        "_cross_entropy_grad_kernel": 1,
        "aten.threshold_backward.grad_input": 2,
        "_kernel": 3,  # of linear_grad_update
    }
    near(replay, tensors, right, 1e-5)


@pytest.mark.host
def test_replicas_see_their_own_images_and_rates(digits: Resident) -> None:
    """Replicas that are alike in all but one thing come out different."""
    jobs = [job(SMALL, ADAM, 0, 1.0) for _ in range(3)]
    jobs[1].who = Cell(0, "ticket", 2)  # another order of the images
    jobs[2].state.step = jobs[2].start_step = 3  # fewer steps
    fit(SMALL, digits, jobs, ADAM, kernels="reference")
    first, *others = (tuple(job.state.weights[0, :100].tolist()) for job in jobs)
    assert len({first, *others}) == 3


@pytest.mark.host
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("model", [LENET, NORMS], ids=lambda model: model.name)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_batch_goes_on_to_the_same_bits(
    kernels: str, model: Model, stop: int, digits: Resident
) -> None:
    cells = [(0, 1.0, 0), (1, 0.1, 0), (2, 0.5, 2)]
    whole, stopped = ([job(model, ADAM, *cell) for cell in cells] for _ in range(2))
    fit(model, digits, whole, ADAM, kernels=kernels)
    calls = iter(range(1000))
    fit(model, digits, stopped, ADAM, kernels=kernels, should_stop=lambda: next(calls) >= stop)
    assert min(job.state.step for job in stopped) < ADAM.steps
    fit(model, digits, stopped, ADAM, kernels=kernels)
    for found, expected in zip(stopped, whole, strict=True):
        same(found, expected)


on_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="Triton's interpreter is off")
by_part = pytest.mark.parametrize("part", trainings.MODELS)
by_kernels = pytest.mark.parametrize("kernels", pick(["triton"], ["auto", "triton"]))


@pytest.fixture
def ieee() -> Iterator[None]:
    """fp32 products without TF32; what captured graphs hold goes behind the test."""
    with precision("ieee"):
        yield
    gc.collect()


@on_triton
@by_part
@by_kernels
def test_a_training_is_beside_the_reference(part: str, kernels: str, ieee: None) -> None:
    trainings.beside_the_reference(part, kernels)


@on_triton
@by_part
@by_kernels
def test_graphs_are_the_launches_that_they_hold(part: str, kernels: str, ieee: None) -> None:
    trainings.beside_single_launches(part, kernels)


@on_triton
@by_part
@by_kernels
def test_who_is_not_active_stays(part: str, kernels: str, ieee: None) -> None:
    trainings.idle(part, kernels)


@on_triton
@by_part
def test_a_stopped_training_goes_on_to_the_same_bits(part: str, ieee: None) -> None:
    trainings.stopped(part)


@on_triton
@by_part
@by_kernels
def test_in_company_and_alone(part: str, kernels: str, ieee: None) -> None:
    many = {"fc": 100, "cnn": 15, "conv2": 7}
    trainings.alone(part, kernels, pick(2, many[part]))


@on_triton
@pytest.mark.parametrize("part", pick(["fc"], ["fc", "cnn"]))
def test_epochs_of_8_steps(part: str, ieee: None) -> None:
    trainings.short_epochs(part)
