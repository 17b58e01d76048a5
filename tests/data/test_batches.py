from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselth.config import Cell
from sparselth.data import DatasetSpec, Images, get_dataset, load
from sparselth.data.batches import Batches, Done, Orders, Resident
from sparselth.errors import UsageError
from sparselth.streams import stream

TICKET = Cell(0, "ticket", 0)


def indices(batches: Batches, epoch: int) -> torch.Tensor:
    """Image indices of an epoch by replica, [R, steps * B]."""
    return batches.draw(epoch).flatten(1)


def test_split_is_by_seed_and_complete(digits: Resident) -> None:
    train, validation = digits.split(0)
    assert len(train) == digits.n_train == 3500
    assert len(validation) == digits.n_validation == 500
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(4000))
    assert torch.equal(digits.split(0)[0], train)
    order = torch.randperm(4000, generator=stream(0, "data", 0, "split"))  # the same in every version
    assert torch.equal(torch.cat([validation, train]), order)
    assert not torch.equal(digits.split(1)[0], train)


def test_every_epoch_is_a_new_order_of_the_training_images(digits: Resident) -> None:
    batches = Batches(digits, [TICKET, Cell(0, "reinit", 3), Cell(1, "ticket", 0)], 60)
    assert batches.steps_per_epoch == 58
    for epoch in range(3):
        for r, seen in enumerate(indices(batches, epoch)):
            assert seen.unique().numel() == 58 * 60
            assert set(seen.tolist()) <= set(digits.split([0, 0, 1][r])[0].tolist())
    a, b, c = indices(batches, 0)
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, indices(batches, 1)[0])


def test_an_order_is_drawn_from_the_stream_of_its_cell_and_epoch(few: Resident) -> None:
    cell = Cell(2, "reinit", 3, 1)
    (found,) = indices(Batches(few, [cell], 8), 4)
    train = few.split(2)[0]
    drawn = torch.randperm(len(train), generator=stream(2, "reinit", 3, "order/4", 1))
    assert torch.equal(found, train[drawn])


def test_images_of_four_seeds_are_kept_for_validation() -> None:
    digits = Resident(load("mnist5k", Path()), "cpu", 250)
    for some in (digits, digits.sample(100)):
        assert some.validation(0) is some.validation(0)
        assert some.validation.cache_info().maxsize == 4


@given(st.integers(0, 300), st.integers(1, 70))
def test_a_batch_depends_on_replica_and_step_alone(step: int, batch: int) -> None:
    digits = Resident(load("mnist5k", Path()), "cpu", 250)
    among = [Cell(1, "reinit", 2, 1), TICKET]
    together, alone = Batches(digits, among, batch), Batches(digits, [TICKET], batch)
    together.at(0)
    x, y = together.at(step)
    ours, labels = alone.at(step)
    assert torch.equal(x[1], ours[0])
    assert torch.equal(y[1], labels[0])


def test_batches_are_the_scaled_images(digits: Resident) -> None:
    batches = Batches(digits, [TICKET], 60)
    x, y = batches.at(57)
    chosen = indices(batches, 0)[0][57 * 60 :]
    spec = load("mnist5k", Path()).spec
    expected = (digits.images[chosen].double() / 255 - spec.mean[0]) / spec.std[0]
    torch.testing.assert_close(x[0].T.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[0, 0], digits.labels[chosen])
    seen = torch.cat([x for x, _ in digits.validation(0)], 2)
    assert seen.shape == (1, 784, 500)
    expected = (digits.images[digits.split(0)[1]].double() / 255 - spec.mean[0]) / spec.std[0]
    torch.testing.assert_close(seen[0].T.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_every_channel_is_scaled_by_its_own_mean_and_deviation(kind: str) -> None:
    spec = replace(get_dataset("cifar10"), mean=(0.5, 0.25, 0.75), std=(0.25, 0.5, 0.125))
    draw, n = np.random.default_rng(0), 3 * 32 * 32
    pixels: Any = draw.integers(256, size=(16, n), dtype=np.uint8)
    labels, whole = draw.integers(10, size=16), 255.0
    if kind == "floats":
        pixels, whole = pixels.astype(np.float32) / 255, 1.0
    data = Resident(Images(spec, pixels, labels, pixels[:5], labels[:5], "", ""), "cpu", 2)
    channels = torch.from_numpy(pixels).double().view(16, 3, 1024) / whole
    expected = torch.stack([(channels[:, c] - spec.mean[c]) / spec.std[c] for c in range(3)], 1).flatten(1)
    batches = Batches(data, [TICKET, Cell(1, "ticket", 0)], 4)
    x, y = batches.at(1)
    chosen = batches.index(1)
    torch.testing.assert_close(x.mT.flatten(0, 1).double(), expected[chosen], rtol=1e-5, atol=1e-5)
    assert torch.equal(y.flatten(), data.labels[chosen])
    seen = torch.cat([x for x, _ in data.validation(0)], 2)[0].T
    torch.testing.assert_close(seen.double(), expected[data.split(0)[1]], rtol=1e-5, atol=1e-5)
    tested = torch.cat([x for x, _ in data.test()], 2)[0].T
    torch.testing.assert_close(tested.double(), expected[:5], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in data.test()], 2).flatten(), data.labels[:5])


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("inputs", ["unit", "norm"])
def test_inputs_in_0_to_1_and_of_norm_1(inputs: str, augment: str) -> None:
    """In training, validation and test, laid out either way; black stays 0, also where it is moved in."""
    pixels = np.random.default_rng(0).integers(256, size=(16, 3072), dtype=np.uint8)
    pixels[3] = 0
    labels = np.arange(16) % 10
    images = Images(get_dataset("cifar10"), pixels, labels, pixels[:5], labels[:5], "", "")
    data = Resident(images, "cpu", 2, inputs=inputs)
    expected = torch.from_numpy(pixels).double() / 255
    if inputs == "norm":
        expected /= expected.norm(dim=1, keepdim=True).clamp(min=1e-9)
    shown = torch.cat([expected, torch.zeros(16, 1, dtype=torch.float64)], 1)
    batches = Batches(data, [TICKET], 4, augment)
    for step in range(3):
        index = batches.index(step)
        move, which = (index // 16, index % 16) if augment != "none" else (None, index)
        right = expected[which] if move is None else shown[which].gather(1, data.sources[move])
        x, _ = batches.at(step)
        torch.testing.assert_close(x[0].T.double(), right, rtol=1e-6, atol=1e-7)
        x, _ = batches.first(step)
        torch.testing.assert_close(x[0].flatten(1).double(), right, rtol=1e-6, atol=1e-7)
    validated, tested = expected[data.split(0)[1]], expected[:5]
    for last, first, right in (
        (data.validation(0), data.validation_first(0), validated),
        (data.test(), data.test_first(), tested),
    ):
        seen = torch.cat([x for x, _ in last], 2)[0].T
        torch.testing.assert_close(seen.double(), right, rtol=1e-6, atol=1e-7)
        seen = torch.cat([x for x, _ in first]).flatten(1)
        torch.testing.assert_close(seen.double(), right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_shares_side_by_side_are_the_batch(augment: str) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(32, 3072), dtype=np.uint8)
    labels = np.arange(32) % 10
    data = Resident(Images(get_dataset("cifar10"), pixels, labels, pixels, labels, "", ""), "cpu", 2)
    whole = Batches(data, [TICKET, Cell(1, "ticket", 0)], 7, augment)
    parts = [Batches(data, whole.replicas, 7, augment, share) for share in (slice(0, 3), slice(3, 7))]
    for step in (0, 5, 2):
        for way in (Batches.first, Batches.at):
            x, y = way(whole, step)
            some = [way(part, step) for part in parts]
            images, batch = (1, 1) if way is Batches.first else (2, 2)
            assert torch.equal(torch.cat([x for x, _ in some], images), x)
            assert torch.equal(torch.cat([y for _, y in some], batch), y)
        assert all(torch.equal(part.labels(step), whole.first(step)[1]) for part in parts)


def test_inputs_that_make_no_sense_are_refused() -> None:
    labels, spec = np.zeros(16, np.int64), get_dataset("mnist")
    floats = np.ones((16, 784), np.float32)
    given = Images(spec, floats, labels, floats, labels, "", "")
    with pytest.raises(UsageError, match="`inputs` unit: expected images of bytes, mnist has floats"):
        Resident(given, "cpu", 2, inputs="unit")
    assert Resident(given, "cpu", 2, inputs="norm").images.norm(dim=1).tolist() == pytest.approx([1] * 16)
    words = replace(given, spec=replace(spec, tokens=True), train_images=np.ones((16, 784), np.int64))
    with pytest.raises(UsageError, match="`inputs` norm: expected images of bytes, mnist has tokens"):
        Resident(words, "cpu", 2, inputs="norm")


def test_batch_larger_than_the_data_is_named(digits: Resident) -> None:
    with pytest.raises(UsageError, match="`batch_size` 3501: expected at most the 3500 training images"):
        Batches(digits, [TICKET], 3501)


def test_an_evaluation_may_look_at_fewer_images() -> None:
    """The first validation images, the test images evenly spread; training sees what it always does."""
    images = load("mnist5k", Path())
    whole, few = Resident(images, "cpu", 60), Resident(images, "cpu", 60, 100)
    assert [whole.n_validated, whole.n_tested] == [500, 1000]
    for some in (few, whole.sample(100)):
        assert [some.n_validated, some.n_tested, some.n_train] == [100, 100, 3500]
        for ours, theirs in zip(some.split(3), whole.split(3), strict=True):
            assert torch.equal(ours, theirs)
        x, y = (torch.cat(parts, dim=2) for parts in zip(*some.validation(3), strict=True))
        rest, labels = (torch.cat(parts, dim=2) for parts in zip(*whole.validation(3), strict=True))
        assert torch.equal(x, rest[:, :, :100])
        assert torch.equal(y, labels[:, :, :100])
        tested = torch.cat([labels for _, labels in some.test()], dim=2).flatten()
        assert torch.equal(tested, torch.from_numpy(images.test_labels)[::10])
    assert sum(x.shape[2] for x, _ in whole.test()) == 1000
    assert sum(x.shape[2] for x, _ in Resident(images, "cpu", 60, 9999).test()) == 1000


def test_orders_are_drawn_an_epoch_ahead_into_a_buffer_that_was_copied(few: Resident) -> None:
    batches, heard = Batches(few, [TICKET, Cell(1, "ticket", 0)], 8), list[str]()
    draw = batches.draw

    class Noted:
        def __init__(self) -> None:
            self.name = len(events)
            events.append(self)

        def record(self) -> None:
            heard.append(f"{self.name} copied")

        def synchronize(self) -> None:
            heard.append(f"{self.name} waited for")

    def noted(epoch: int) -> torch.Tensor:
        heard.append(f"draw {epoch}")
        return draw(epoch)

    events: list[Noted] = []
    batches.draw = noted  # type: ignore[method-assign]
    orders = Orders(batches, 3, Noted)
    assert (orders.order.dtype, orders.order.shape) == (torch.int64, (2, 7, 8))
    first = orders.order
    for epoch in (0, 0, 1, 2, 2):
        orders.enter(epoch)
        assert torch.equal(orders.order, draw(epoch))
        orders.next[1].result()
        assert f"draw {min(epoch + 1, 2)}" in heard  # before it is entered
    assert orders.order is first
    assert len(orders.host) == len(orders.copied) == 2
    orders.thread.shutdown()
    assert heard == [
        *("draw 0", "0 waited for", "0 copied", "draw 1", "1 waited for", "1 copied"),
        *("draw 2", "0 waited for", "0 copied"),
    ]


@pytest.mark.parametrize("epochs", [(0, 1), (1, 2), (5, 2, 8)])
def test_orders_begin_at_any_epoch(epochs: tuple[int, ...], few: Resident) -> None:
    batches = Batches(few, [TICKET], 8)
    orders = Orders(batches, 9, Done)
    for epoch in epochs:
        orders.enter(epoch)
        assert torch.equal(orders.order, batches.draw(epoch))
    orders.thread.shutdown()


def kinds(shape: tuple[int, ...], labels: tuple[int, ...], tokens: bool = False) -> Resident:
    """Made-up data of 40 samples to train on and 7 to test, of which a batch of an evaluation has 3."""
    draw, k = np.random.default_rng(0), int(np.prod(shape))
    spec = DatasetSpec(
        name="made", title="", shape=shape, classes=None, n_train=40, n_test=7, tokens=tokens, std=(2.0,)
    )
    x: Any = draw.integers(900, size=(47, k)) if tokens else draw.normal(size=(47, k)).astype(np.float32)
    y: Any = draw.integers(900, size=(47, *labels)) if labels else draw.normal(size=47).astype(np.float32)
    return Resident(Images(spec, x[:40], y[:40], x[40:], y[40:], "", ""), "cpu", 3)


@pytest.mark.parametrize("shape", [(3, 4, 5), (60,), (12, 5)])
def test_batch_first_are_the_same_numbers(shape: tuple[int, ...]) -> None:
    data = kinds(shape, ())
    assert data.labels.dtype == torch.float32
    batches = Batches(data, [TICKET, Cell(1, "ticket", 0)], 7)
    for step in (0, 4, 5):
        last, targets = (t.clone() for t in batches.at(step))
        x, y = batches.first(step)
        assert (x.shape, y.shape, x.dtype) == ((2, 7, *shape), (2, 7), torch.float32)
        assert torch.equal(x.reshape(2, 7, -1).mT, last)
        assert torch.equal(y, targets[:, 0])
    for ours, theirs in ((data.validation_first(1), data.validation(1)), (data.test_first(), data.test())):
        assert [x.shape for x, _ in ours] == [(xs.shape[2], *shape) for xs, _ in theirs]
        for (x, y), (xs, ys) in zip(ours, theirs, strict=True):
            assert torch.equal(x.flatten(1).T, xs[0])
            assert torch.equal(y, ys[0, 0])
    assert data.validation_first(1) is data.validation_first(1)


@pytest.mark.parametrize("labels", [(9,), (1,)])
def test_tokens_stay_what_they_are(labels: tuple[int, ...]) -> None:
    data = kinds((9,), labels, tokens=True)
    batches = Batches(data, [TICKET, Cell(1, "ticket", 0)], 7)
    x, y = batches.first(3)
    chosen = batches.index(3).view(2, 7)
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    assert torch.equal(x, data.images[chosen])
    assert torch.equal(y, data.labels[chosen])
    ((x, y), *_), test = data.validation_first(0), data.test_first()
    held = data.split(0)[1][:3]
    assert torch.equal(x, data.images[held])
    assert torch.equal(y, data.labels[held])
    assert [x.shape for x, _ in test] == [(3, 9), (3, 9), (1, 9)]
