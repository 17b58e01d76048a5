"""--kernels: what it chooses, what it refuses, and that every choice trains the same network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparselth import pruning
from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine import paths as dispatch
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.errors import UsageError
from sparselth.models import MODELS, Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.runs import RunRecord
from sparselth.streams import stream
from sparselth.train import fit

ADAM = Recipe(steps=2, lr=1.2e-3, batch_size=3, eval_every=2, weight_decay=1e-3)
SGD = replace(ADAM, optimizer="sgd", lr=0.05)
TICKET = Cell(0, "ticket", 1)


def trained(name: str, data: Resident, recipe: Recipe, kernels: str) -> tuple[State, torch.Tensor]:
    model = get_model(name)
    weights = init_weights(model, stream(0, "ticket", 0, "init"))
    rung = pruning.ladder(model.params, 1, 0.7, "layer")[1]
    mask = pruning.prune(model.params, weights[: model.params.mask_size], model.params.full_mask(), rung)
    weights[: model.params.mask_size] *= mask
    state = State.start(weights[None], recipe)
    fit(model, data, [Job(TICKET, state, mask)], recipe, kernels=kernels)
    return state, mask


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("lenet-300-100", SGD), ("lenet5", replace(ADAM, steps=1, eval_every=1))],
    ids=["lenet-300-100-sgd", "lenet5-adam"],
)
def test_triton_trains_what_the_reference_trains(name: str, recipe: Recipe, few: Resident) -> None:
    (ours, mask), (reference, _) = (trained(name, few, recipe, k) for k in ("triton", "reference"))
    for found, expected in zip(
        (ours.weights, *ours.moments), (reference.weights, *reference.moments), strict=True
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert not found[0, : len(mask)][~mask].any()
    assert ours.best_loss == pytest.approx(reference.best_loss, rel=1e-5)


SMALL = Model(
    "small-convs",
    (1, 28, 28),
    (Conv(3, 5), MaxPool(2), ReLU(), Conv(4, 5), MaxPool(2), ReLU(), Linear(12), ReLU(), Linear(10)),
    {"short": ADAM},
    "",
)


def test_imp_through_triton_gives_the_numbers_of_the_reference(
    imp: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS.things, SMALL.name, SMALL)
    flags = f"--model {SMALL.name} --levels 1 --seeds 0 --arms ticket --batch-size 1 --eval-images 50"
    ours, reference = (
        imp(*flags.split(" "), "--kernels", kernels, out=kernels, steps=1)
        for kernels in ("triton", "reference")
    )
    for found, expected in zip(ours.points, reference.points, strict=True):
        assert found["kept"] == expected["kept"]
        for key in ("validation_loss_at_early_stop", "final_accuracy"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_is_dense_torch(device: str) -> None:
    paths = vars(dispatch.choose("reference", device))
    assert {path.takes for path in paths.values()} == {"torch", "none"}
    assert all(path.why for path in paths.values())


@pytest.mark.parametrize(("kernels", "built"), [("auto", True), ("auto", False), ("torch", True)])
def test_a_cpu_trains_sparse_layers_compressed(
    kernels: str, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not built:
        monkeypatch.setattr(dispatch._native, "LIB", None)
    elif dispatch._native.LIB is None:
        pytest.skip(dispatch._native.WHY)
    paths = dispatch.choose(kernels, "cpu")
    native = built and kernels == "auto"
    assert paths.csr_linear.takes == ("native" if native else "torch")
    assert paths.sparse_conv2d.takes == ("native" if native else "none")
    assert paths.masked_linear.takes == "torch"


def test_native_kernels_that_were_not_built_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._native, "LIB", None)
    monkeypatch.setattr(dispatch._native, "WHY", "not built: no compiler")
    with pytest.raises(UsageError, match="not built: no compiler"):
        dispatch.choose("native", "cpu")


def test_cuda_takes_triton_where_it_is_faster() -> None:
    paths = dispatch.choose("auto", "cuda")
    assert paths.masked_linear.takes == "torch"  # the zeros lie in the weights
    assert paths.masked_conv2d.takes == "auto"
    assert {paths.masked_update.takes, paths.magnitude_threshold.takes, paths.bitmask.takes} == {"triton"}


@pytest.mark.parametrize(
    ("name", "hint"), [("HAS_TRITON", "Triton is not installed"), ("INTERPRET", "TRITON_INTERPRET=1")]
)
def test_triton_that_cannot_run_is_refused_in_one_line(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr(dispatch, name, False)
    with pytest.raises(UsageError, match=hint):
        dispatch.choose("triton", "cpu")
    code, out, err = cli("imp", "--dataset", "mnist5k", "--kernels", "triton", "--device", "cpu", "-q")
    assert (code, out) == (2, "")
    assert hint in err
    assert len(err.strip().splitlines()) == 1
