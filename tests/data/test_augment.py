"""Images shifted and flipped: beside padding and cropping one by one, evenly drawn, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselth.config import Cell, Recipe
from sparselth.data import DatasetSpec, Images
from sparselth.data.augment import MOVES, SHIFT, SIDE, check, moves, sources
from sparselth.data.batches import Batches, Gather, Resident
from sparselth.engine.dense import init_weights
from sparselth.engine.state import Job, State
from sparselth.errors import UsageError
from sparselth.kernels._triton import INTERPRET
from sparselth.models import Linear, Model, ReLU
from sparselth.runs import RunRecord
from sparselth.streams import stream
from sparselth.train import fit

SHAPES = [(3, 8, 9), (1, 11, 8), (2, 32, 32)]
TICKET = Cell(0, "ticket", 0)


def moved(image: Tensor, move: int) -> Tensor:
    """One image [C, H, W] padded by 4, cropped at a place and mirrored, as every loader does it."""
    shift, mirrored = divmod(move, 2)
    down, right = divmod(shift, SIDE)
    height, width = image.shape[1:]
    cut = F.pad(image, [SHIFT] * 4)[:, down : down + height, right : right + width]
    return cut.flip(2) if mirrored else cut


def made(shape: tuple[int, ...], kind: str = "u", samples: int = 64) -> Resident:
    draw = np.random.default_rng(0)
    x: Any = draw.integers(1, 256, size=(samples, *shape)).reshape(samples, -1)
    x = x.astype(np.uint8) if kind == "u" else (x / 255).astype(np.float32)
    y = draw.integers(4, size=samples)
    spec = DatasetSpec(
        name="made", title="", shape=shape, classes=4, n_train=samples, n_test=9, mean=(0.4,), std=(0.3,)
    )
    return Resident(Images(spec, x, y, x[:9], y[:9], "", ""), "cpu", 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_move_is_a_crop_of_the_padded_image_and_a_flip(shape: tuple[int, ...]) -> None:
    image = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([image.flatten(), torch.zeros(1, dtype=torch.int64)])
    table = sources(shape)
    assert table.shape == (MOVES, image.numel()) == (162, image.numel())
    for move in range(MOVES):
        assert torch.equal(flat[table[move]].view(shape), moved(image, move))
    still = (SHIFT * SIDE + SHIFT) * 2
    assert torch.equal(table[still], torch.arange(image.numel()))


def test_shifts_are_even_and_half_of_the_images_are_mirrored() -> None:
    """Chi-square of 81 shifts below its 0.1 % quantile, of a million draws; flips within 4 deviations."""
    found = torch.cat([moves(Cell(seed, "ticket", 0), 3, 1000, 100).flatten() for seed in range(10)])
    n = len(found)
    shifts = torch.bincount(found // 2, minlength=81).double()
    assert len(shifts) == 81
    assert ((shifts - n / 81) ** 2 / (n / 81)).sum() < 124.8  # chi-square of 80 degrees
    assert abs((found % 2).sum() - n / 2) < 4 * (n / 4) ** 0.5
    both = torch.bincount(found, minlength=MOVES).double()
    assert ((both - n / MOVES) ** 2 / (n / MOVES)).sum() < 221.1  # of 161 degrees


@pytest.mark.parametrize("kind", ["u", "f"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_are_moved_images_padded_before_they_are_scaled(shape: tuple[int, ...], kind: str) -> None:
    data = made(shape, kind)
    who = [TICKET, Cell(1, "reinit", 2, 1)]
    batches = Batches(data, who, 5, "crop-flip")
    plain = Batches(data, who, 5)
    for step in (0, 10, 11, 40):
        order = batches.index(step)
        index, move = order % 64, order // 64
        assert torch.equal(index, plain.index(step))  # the order is that of images that stay
        raw = data.images[index].view(-1, *shape).double() / (255 if kind == "u" else 1)
        expected = torch.stack([moved(image, int(m)) for image, m in zip(raw, move, strict=True)])
        expected = ((expected - 0.4) / 0.3).view(2, 5, *shape)
        x, y = batches.first(step)
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(y.flatten(), data.labels[index])
        x, _ = batches.at(step)
        torch.testing.assert_close(x.mT.reshape(expected.shape).double(), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 200), st.integers(1, 50))
def test_a_moved_batch_depends_on_replica_and_step_alone(step: int, batch: int) -> None:
    data = made((3, 8, 9))
    together = Batches(data, [Cell(1, "reinit", 2, 1), TICKET], batch, "crop-flip")
    alone = Batches(data, [TICKET], batch, "crop-flip")
    together.at(7)
    x, y = together.at(step)
    ours, labels = alone.at(step)
    assert torch.equal(x[1], ours[0])
    assert torch.equal(y[1], labels[0])


def test_replicas_levels_draws_and_epochs_are_moved_apart() -> None:
    cells = [
        TICKET,
        Cell(1, "ticket", 0),
        Cell(0, "reinit", 0),
        Cell(0, "ticket", 1),
        Cell(0, "ticket", 0, 1),
    ]
    found = [moves(cell, 0, 20, 20) for cell in cells] + [moves(TICKET, 1, 20, 20)]
    for i, one in enumerate(found):
        assert all((one == other).double().mean() < 0.05 for other in found[:i])
        assert one.min() >= 0
        assert one.max() < MOVES


MODEL = Model("plain", (2, 8, 8), (Linear(8), ReLU(), Linear(4)), {}, "", classes=4)
RECIPE = Recipe(steps=6, lr=1e-2, batch_size=5, eval_every=3, augment="crop-flip")
KERNELS = ["auto", "torch", "autograd", *["triton"] * INTERPRET]


def trained(
    kernels: str, recipe: Recipe, data: Resident, replicas: int, stop: int | None = None
) -> list[Job]:
    """Jobs of 6 steps, stopped once at one; with "auto" compressed, some pixels without a reader."""
    jobs = []
    for seed in range(replicas):
        mask = MODEL.params.full_mask()
        mask[: 8 * 128].view(8, 128)[:, ::3] = False
        weights = init_weights(MODEL, stream(seed, "ticket", 0, "init"))
        weights[: MODEL.params.mask_size] *= mask
        jobs.append(Job(Cell(seed, "ticket", 1), State.start(weights[None], recipe), mask))
    even = {spec.name: 2.0 for spec in MODEL.weights}
    if stop is not None:
        asked = count()
        fit(
            *(MODEL, data, jobs, recipe),
            kernels=kernels,
            break_even=even,
            should_pause=lambda: next(asked) == stop,
        )
        assert any(0 < job.state.step < 6 for job in jobs)
    fit(MODEL, data, jobs, recipe, kernels=kernels, break_even=even)
    return jobs


@pytest.mark.parametrize("kind", ["u", "f"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_every_engine_sees_the_same_moved_images(kernels: str, replicas: int, kind: str) -> None:
    data = made((2, 8, 8), kind)
    held = [(x.clone(), y.clone()) for x, y in data.validation(0)]
    ours, right, still = (
        trained(kind_, recipe, data, replicas)
        for kind_, recipe in (
            (kernels, RECIPE),
            ("reference", RECIPE),
            ("reference", replace(RECIPE, augment="none")),
        )
    )
    for one, two, other in zip(ours, right, still, strict=True):
        torch.testing.assert_close(one.state.weights, two.state.weights, rtol=1e-4, atol=1e-5)
        assert one.state.best_loss == pytest.approx(two.state.best_loss, rel=1e-4)
        assert (one.state.weights - other.state.weights).abs().max() > 1e-3
    # what is evaluated is never moved
    fresh = made((2, 8, 8), kind)
    for (x, y), (xs, ys), (xt, yt) in zip(held, data.validation(0), fresh.validation(0), strict=True):
        assert torch.equal(x, xs)
        assert torch.equal(x, xt)
        assert torch.equal(y, ys)
        assert torch.equal(y, yt)
    index = data.split(0)[1][:4]
    x, _ = Gather(data, 1, 4)(index)
    assert torch.equal(x[0], fresh.validation(0)[0][0][0])


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("kernels", ["auto", "reference", "autograd"])
def test_stopping_anywhere_changes_no_bit(kernels: str, stop: int) -> None:
    data = made((2, 8, 8))
    whole, parts = (trained(kernels, RECIPE, data, 2, at) for at in (None, stop))
    for one, two in zip(whole, parts, strict=True):
        assert (one.state.step, two.state.step) == (6, 6)
        assert torch.equal(one.state.weights, two.state.weights)
        assert torch.equal(one.state.best_weights, two.state.best_weights)
        assert one.state.evaluations == two.state.evaluations
    alone = trained(kernels, RECIPE, data, 1)[0]
    assert torch.equal(alone.state.weights, whole[0].state.weights)


def test_a_run_resumes_to_the_same_bits(
    imp: Callable[..., RunRecord], run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    flags = ("--levels", "1", "--seeds", "0", "--augment", "crop-flip", "--workers", "1", "--rewind", "9")
    record = imp(*flags)
    assert record.config.recipe.augment == "crop-flip"
    whole = run_contents(record.path)
    plain = imp(*flags[:-4], "--augment", "none", *flags[-2:], out="plain")
    assert run_contents(plain.path)["cells.jsonl"] != whole["cells.jsonl"]
    for lost in ("seed0-ticket-01", "seed0-random-mask-01"):
        (record.path / "cells" / f"{lost}.safetensors").unlink()
    imp(*flags, "--resume")
    assert run_contents(record.path) == whole


@pytest.mark.parametrize(
    ("shape", "said"), [((784,), "samples of 784"), ((1, 1, 40), "samples of 1 x 1 x 40"), ((9, 9), "9 x 9")]
)
def test_what_is_no_image_is_not_moved(shape: tuple[int, ...], said: str) -> None:
    check("none", shape, "mine")
    check("crop-flip", (1, 8, 8), "mine")
    with pytest.raises(UsageError, match=said) as found:
        check("crop-flip", shape, "mine")
    assert "use `augment` none" in str(found.value)


def test_a_run_on_signals_is_refused(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = cli("imp", "--model", "mnist1d-mlp", "--augment", "crop-flip", "--quiet")
    assert code == 2
    assert said.startswith(
        "sparselth: --augment crop-flip: expected images [C, H, W] of 8 x 8 at least, mnist1d"
    )
