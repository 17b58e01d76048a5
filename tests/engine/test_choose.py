"""The one door: who trains together, and through which engine."""

from __future__ import annotations

import pytest
import torch

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.batch import DenseSteps
from sparselth.engine.choose import compressed_layers, groups, prepare
from sparselth.engine.compressed import CompressedSteps
from sparselth.engine.dense import Network, init_weights
from sparselth.engine.paths import choose
from sparselth.engine.replay import Replay
from sparselth.engine.state import Job, State
from sparselth.engine.vendor import VendorNetwork
from sparselth.kernels import _native
from sparselth.kernels._triton import INTERPRET
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.streams import stream

LENET, LENET5 = get_model("lenet-300-100"), get_model("lenet5")
FC = Model("fc", (1, 28, 28), (Linear(12), ReLU(), Linear(10)), {}, "")
ADAM = Recipe(steps=6, lr=1.2e-3, batch_size=7, eval_every=3)
native = pytest.mark.skipif(not _native.LIB, reason=_native.WHY)
interpreted = pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")


def job(model: Model, keep: float, seed: int = 0) -> Job:
    weights = init_weights(model, stream(seed, "ticket", 0, "init"))
    chance = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(seed))
    mask = model.params.full_mask() & (chance < keep)
    weights[: len(mask)] *= mask
    return Job(Cell(seed, "ticket", 1), State.start(weights[None], ADAM), mask)


def every(model: Model, share: float = 1.0) -> dict[str, float]:
    return {spec.name: share for spec in model.weights}


def test_layers_without_kernels_or_gain_stay_dense() -> None:
    paths = choose("auto", "cpu")
    mask = job(LENET, 0.1).mask
    assert compressed_layers(LENET, mask, every(LENET), paths)
    assert compressed_layers(LENET, mask, {}, paths) == frozenset()  # a chain of calls, all dense
    assert compressed_layers(LENET5, job(LENET5, 1.0).mask, {}, paths) is None
    assert compressed_layers(LENET, mask, every(LENET), choose("reference", "cpu")) is None
    pooled = Model("pooled", (1, 28, 28), (Conv(2, 3), MaxPool(3), Linear(10)), {}, "")
    mask = job(pooled, 0.1).mask
    assert not compressed_layers(pooled, mask, every(pooled), paths)


@pytest.mark.parametrize(
    "kernels",
    ["torch", "reference", pytest.param("native", marks=native), pytest.param("triton", marks=interpreted)],
)
def test_a_mask_alone_decides_who_trains_together(kernels: str) -> None:
    jobs = [job(LENET, keep, seed) for seed, keep in enumerate((1.0, 0.05, 0.6, 0.02))]
    found = [*groups(LENET, jobs, kernels, every(LENET, 0.3))]
    assert sorted(one.who.seed for group in found for one in group.jobs) == [0, 1, 2, 3]
    for group in found:
        for one in group.jobs:
            (alone,) = groups(LENET, [one], kernels, every(LENET, 0.3))
            assert alone.compressed == group.compressed
    compressed = {one.who.seed for group in found if group.compressed for one in group.jobs}
    assert compressed == (set() if kernels in ("reference", "triton") else {1, 3})
    sizes = sorted(len(group.jobs) for group in found)
    assert sizes == ([4] if kernels == "triton" else [1, 1, 1, 1])  # on a CPU one after another


@native
def test_the_engine_is_that_of_mask_and_paths(few: Resident) -> None:
    def engine(model: Model, keep: float, kernels: str, share: float) -> object:
        steps = prepare(model, few, [job(model, keep)], ADAM, kernels, every(model, share))
        return type(steps), type(steps.network) if isinstance(steps, DenseSteps) else None

    assert engine(LENET, 0.1, "auto", 0.3) == (CompressedSteps, None)
    assert engine(LENET, 0.5, "auto", 0.3) == (CompressedSteps, None)  # with no layer compressed
    assert engine(LENET5, 0.5, "auto", 0.3) == (DenseSteps, VendorNetwork)
    assert engine(LENET5, 0.1, "auto", 0.3) == (CompressedSteps, None)
    assert engine(LENET5, 0.1, "reference", 0.3) == (DenseSteps, Network)
    if INTERPRET:
        assert engine(FC, 0.1, "triton", 0.3) == (Replay, None)


@pytest.mark.parametrize("model", [LENET, LENET5], ids=lambda model: model.name)
@pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=native)])
def test_every_way_measures_the_same(model: Model, kernels: str, digits: Resident) -> None:
    one, chunks = job(model, 0.1), digits.test()[:3]
    weights = one.state.weights.clone()
    (dense,) = groups(model, [one], "reference")
    expected = dense.measure(weights, chunks)
    for share in (0.0, 1.0):
        (group,) = groups(model, [one], kernels, every(model, share))
        assert bool(group.compressed) == bool(share)
        loss, accuracy = group.measure(weights, chunks)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert accuracy == pytest.approx(expected[1], abs=2e-3)
    assert torch.equal(weights, one.state.weights)
