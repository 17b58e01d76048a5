"""One step of training: torch's own with its fused optimizer and our dense one beside the compressed one.

The error is that of the first gradient against float64 in norm, as `check` has it. How much is allowed is not
a matter of rounding alone: where an activation or a pool nearly ties, it falls either way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth import data
from sparselth.check import errors as errors_of
from sparselth.config import Recipe
from sparselth.data.batches import Batches, Resident
from sparselth.engine.break_even import break_even
from sparselth.engine.choose import prepare
from sparselth.engine.paths import choose
from sparselth.engine.state import Job, State
from sparselth.measure import memory
from sparselth.measure.case import (
    WHO,
    Call,
    Case,
    Result,
    Say,
    best_of,
    check_batches,
    conversion_of,
    race,
    random_case,
    row_of,
)
from sparselth.measure.memory import Memory, held
from sparselth.models import Model, get_model
from sparselth.models.torch import network
from sparselth.streams import stream

GRADIENT, GRADIENT_CONV = 1e-5, 1e-2  # the second where a pool may tie
STEPS = 20  # batches of training images, over and over


def bench_training(name: str, sparsity: float, batch: int, say: Say) -> Result:
    """One step of training: torch's own with fused Adam and our dense one beside the compressed one.

    The error is that of the first gradient against float64, in norm. Checks: that error, and that pruned
    weights and their moments are exactly zero after all steps.
    """
    check_batches([batch])
    model = get_model(name)
    case = random_case(model, sparsity)
    recipe = Recipe(steps=10**9, lr=1e-4, batch_size=batch, eval_every=10**9)
    resident = _training_images(model)
    say(f"{name}: steps of training, batch {batch}")
    steps = _steps(case, recipe, resident)
    first = _first_batch(model, resident, batch)
    reference = [_gradient(model, flat, first) for flat in (case.dense, case.pruned)]
    reference[1][: model.params.mask_size] *= case.mask
    convolves = model.convolves
    limit = GRADIENT_CONV if convolves else GRADIENT
    errors, footprints = {}, {}
    for label, step in steps.items():
        step.run()
        exact = reference[label == "sparselth"]
        errors[label], _ = errors_of(step.gradient(), exact, exact)
        footprints[label] = step.memory()
    times = race({label: step.run for label, step in steps.items()}, "cpu")
    dead = steps["sparselth"].dead_are_zero()

    wrong = {label for label, error in errors.items() if not error <= limit}
    if not dead:
        wrong.add("sparselth")
    best = best_of(times, wrong | {"sparselth"})
    rows = []
    for label, step in steps.items():
        ours, footprint = label == "sparselth", footprints[label]
        row = row_of(name, case.sparsity if ours else 0.0, label, batch, times, best)
        row |= {
            "weight_bytes": footprint.weights + footprint.indices,
            "dense_weight_bytes": footprints["torch"].weights,
            "gradient_bytes": footprint.gradients,
            "optimizer_bytes": footprint.optimizer,
            "peak_bytes": footprint.peak,
            "max_rel_error": errors[label] if math.isfinite(errors[label]) else None,
            "check": "failed" if label in wrong else "passed",
        }
        if ours:
            row |= conversion_of(step.seconds, times, best)
        rows.append(row)
    pair = {f"training, batch {batch}": (footprints["torch"], footprints["sparselth"])}
    facts = {"network": name, "kept": 1 - case.sparsity, "dead_are_zero": dead}
    notes = []
    if torch.cuda.is_available():
        notes.append("There is a GPU here, but steps of training are measured on the CPU.")
    return Result("training", "cpu", rows, pair, bool(wrong), facts, notes)


@dataclass
class Step:
    """One rival's step of training, on the same batches as the others'."""

    run: Call
    gradient: Callable[[], Tensor]  # after the first step, float64 [P]
    memory: Callable[[], Memory]
    seconds: float = 0.0  # to make it
    dead_are_zero: Callable[[], bool] = lambda: True


def _steps(case: Case, recipe: Recipe, resident: Resident) -> dict[str, Step]:
    """All rivals; "torch" and "sparselth" are always there."""
    full = case.model.params.full_mask()
    found = {"torch": _torch_step(case, recipe, resident, torch.contiguous_format)}
    if case.model.convolves:
        found["torch channels-last"] = _torch_step(case, recipe, resident, torch.channels_last)
    share = break_even(case.model, recipe.batch_size, choose("auto", "cpu").csr_linear.takes)
    found["sparselth dense"] = _our_step(case.model, case.dense, full, recipe, resident, share)
    found["sparselth"] = _our_step(case.model, case.pruned, case.mask, recipe, resident, share)
    return found


def _torch_step(case: Case, recipe: Recipe, resident: Resident, layout: torch.memory_format) -> Step:
    """Dense torch: images there as floats, its own autograd and fused optimizer."""
    model, net = case.model, network(case.model, case.dense).to(memory_format=layout)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum, fused=True)
    size, source = recipe.batch_size, Batches(resident, [WHO], recipe.batch_size)
    batches = []
    for step in range(min(STEPS, source.steps_per_epoch)):
        x, y = source.at(step)
        images = x[0].T.reshape(size, *model.input).contiguous(memory_format=layout)
        batches.append((images.clone(memory_format=torch.preserve_format), y.flatten().clone()))
    place = 0

    def run() -> None:
        nonlocal place
        x, y = batches[place % len(batches)]
        place += 1
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        optimizer.step()

    def gradient() -> Tensor:
        return _flat(model, [p.grad for p in net.parameters()])

    def measure() -> Memory:
        run()
        weights, gradients = held([*net.parameters()]), held([p.grad for p in net.parameters()])
        optimizer.zero_grad()
        added = memory.peak(run)  # the gradients among it
        moments = held([*optimizer.state.values()])
        return Memory(weights[0], 0, added - gradients[0], gradients[0], sum(moments))

    return Step(run, gradient, measure)


def _our_step(
    model: Model, flat: Tensor, mask: Tensor, recipe: Recipe, resident: Resident, share: Mapping[str, float]
) -> Step:
    """What `train.fit` does for a step of one network."""
    began = time.perf_counter()
    state = State.start(flat[None], recipe)
    steps = prepare(model, resident, [Job(WHO, state, mask)], recipe, "auto", share)
    seconds = time.perf_counter() - began
    per_epoch = min(STEPS, Batches(resident, [WHO], recipe.batch_size).steps_per_epoch)

    def run() -> None:
        steps.advance(state.step % per_epoch, 1, lambda: False)
        state.step += 1

    def gradient() -> Tensor:
        return state.expanded().moments[0][0].double() / (0.1 if recipe.optimizer == "adam" else 1)

    def measure() -> Memory:
        parts = steps.memory()
        buffers = parts.weights, parts.gradients, parts.moments, parts.layout
        weights, gradients, moments, layout = (sum(held(part)) for part in buffers)
        kept, bits = held(steps, but=(*buffers, parts.images, parts.kept))
        return Memory(weights, layout + bits, kept + memory.peak(run), gradients, moments)

    def dead_are_zero() -> bool:
        whole = state.expanded()
        return not any(
            bool(t[0, : model.params.mask_size][~mask].any()) for t in (whole.weights, *whole.moments)
        )

    return Step(run, gradient, measure, seconds, dead_are_zero)


def _gradient(model: Model, flat: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the mean cross-entropy, by torch's autograd in float64, [P]."""
    net, (x, y) = network(model, flat).double(), batch
    torch.autograd.backward(F.cross_entropy(net(x.double()), y))
    return _flat(model, [p.grad for p in net.parameters()])


def _flat(model: Model, tensors: Sequence[Tensor | None]) -> Tensor:
    """The parameters of a Sequential, layer by layer, as a float64 buffer [P]."""
    found = torch.zeros(model.params.size, dtype=torch.float64, device="cpu")
    specs = [spec for part in model.parts for spec in part[:2]]
    for spec, tensor in zip(specs, tensors, strict=True):
        assert tensor is not None
        found[spec.span] = tensor.detach().flatten()
    return found


def _first_batch(model: Model, resident: Resident, size: int) -> tuple[Tensor, Tensor]:
    x, y = Batches(resident, [WHO], size).at(0)
    return x[0].T.reshape(-1, *model.input), y.flatten()


def memory_of_training(case: Case, recipe: Recipe, resident: Resident) -> dict[str, tuple[Memory, Memory]]:
    share = break_even(case.model, recipe.batch_size, choose("auto", "cpu").csr_linear.takes)
    pair = (
        _torch_step(case, recipe, resident, torch.contiguous_format),
        _our_step(case.model, case.pruned, case.mask, recipe, resident, share),
    )
    for step in pair:
        step.run()
    return {f"training, batch {recipe.batch_size}": (pair[0].memory(), pair[1].memory())}


def _training_images(model: Model) -> Resident:
    """The digits inside the package, or as many random images where a model takes others."""
    resident = Resident(data.load(data.FALLBACK, data.ASSETS), "cpu", 100)
    if model.input != data.get_dataset(data.FALLBACK).shape:
        size, resident.shape = (len(resident.labels), math.prod(model.input)), model.input
        resident.images = torch.randint(
            256, size, dtype=torch.uint8, generator=stream(0, "bench", 0, "images"), device="cpu"
        )
        # bytes from 0 to 255 have a deviation of 74
        resident.scale = torch.full((size[1], 1), 1 / 74, dtype=torch.float32, device="cpu")
        resident.shift = torch.full((size[1], 1), -127.5 / 74, dtype=torch.float32, device="cpu")
    return resident
