"""What engines keep is counted by kind, each byte once; running out of memory is known by what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparselth.config import Cell, Recipe
from sparselth.data.batches import Resident
from sparselth.engine.choose import prepare
from sparselth.engine.dense import init_weights
from sparselth.engine.memory import is_out_of_memory
from sparselth.engine.state import Job, State
from sparselth.kernels._triton import INTERPRET
from sparselth.measure.memory import held
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU
from sparselth.streams import stream

FC = Model("fc", (1, 28, 28), (Linear(12), ReLU(), Linear(10)), {}, "")
CONVS = Model("convs", (1, 28, 28), (Conv(2, 9), ReLU(), MaxPool(2), Linear(10)), {}, "")
ADAM = Recipe(steps=6, lr=1.2e-3, batch_size=3, eval_every=3)
ENGINES = [
    ("auto", 1.0),
    ("auto", 0.0),
    ("torch", 1.0),
    ("reference", 0.0),
    pytest.param("triton", 0.0, marks=pytest.mark.skipif(not INTERPRET, reason="the interpreter is off")),
]


@pytest.mark.parametrize(("kernels", "share"), ENGINES)
@pytest.mark.parametrize("recipe", [ADAM, replace(ADAM, optimizer="sgd")], ids=["adam", "sgd"])
@pytest.mark.parametrize("model", [FC, CONVS], ids=lambda model: model.name)
def test_what_an_engine_keeps(
    model: Model, recipe: Recipe, kernels: str, share: float, few: Resident
) -> None:
    weights = init_weights(model, stream(0, "ticket", 0, "init"))
    mask = model.params.full_mask() & (
        torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(0)) < 0.1
    )
    weights[: len(mask)] *= mask
    state = State.start(weights[None], recipe)
    jobs = [Job(Cell(0, "ticket", 1), state, mask)]
    steps = prepare(model, few, jobs, recipe, kernels, {s.name: share for s in model.weights})
    steps.advance(0, 1, lambda: False)
    parts = steps.memory()
    size = 4 * state.weights.numel()
    if state.layout is not None and share:  # else a chain of calls, all dense
        assert size < 4 * model.params.size / 4
    assert held(parts.weights) == (size, 0)
    assert held(parts.moments) == (len(state.moments) * size, 0)
    fused = kernels == "triton" and model is FC  # never writes a gradient
    assert held(parts.gradients) == (0 if fused else size, 0)
    assert (sum(held(parts.layout)) > 0) == (state.layout is not None)
    assert sum(held(few)) < sum(held(parts.images))  # the data set and the batch
    # all that the engine reaches, and not one storage twice
    every = (parts.weights, parts.gradients, parts.moments, parts.layout, parts.images, parts.kept)
    rest = held(steps, but=every)
    together = held(steps, *every)
    assert tuple(a + b for a, b in zip(rest, held(*every), strict=True)) == together


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_known_behind_other_errors(error: Exception) -> None:
    assert is_out_of_memory(error)
    for link in ("__cause__", "__context__"):
        outer = RuntimeError("operation failed due to a previous error during capture")
        assert not is_out_of_memory(outer)
        setattr(outer, link, error)
        assert is_out_of_memory(outer)


def test_an_error_is_not_out_of_memory_for_its_chain() -> None:
    first, second = ValueError("wrong"), ValueError("wrong too")
    first.__context__, second.__cause__ = second, first  # a ring
    assert not is_out_of_memory(first)
