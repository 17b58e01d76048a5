"""Many networks on the same images: as one by one in float64, statistics anew, lines and barriers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.data.batches import Resident
from sparselth.engine import many
from sparselth.engine.dense import init_weights
from sparselth.engine.many import Many, barrier, line
from sparselth.engine.state import Stopped
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, Model, Node, ReLU, get_model
from sparselth.models.torch import network

NORMED = Model(
    "normed",
    (1, 28, 28),
    (
        Conv(4, 3, 1, 2),
        BatchNorm(),
        ReLU(),
        Conv(4, 3, 1),
        BatchNorm(),
        Node(Add(), (2, 4)),
        ReLU(),
        AvgPool(),
        Linear(10),
    ),
    {},
    "a residual block",
)


def drawn(model: Model, count: int) -> Tensor:
    rows = [init_weights(model, torch.Generator().manual_seed(i)) for i in range(count)]
    return torch.stack(rows)


def expected(model: Model, weights: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy in float64, statistics as they are."""
    output = network(model, weights).double().eval()(x.double()).detach()
    return float(F.cross_entropy(output, y)), float((output.argmax(1) == y).double().mean())


@pytest.mark.parametrize("kernels", ["auto", "reference", "autograd"])
def test_networks_are_what_each_is_alone(digits: Resident, kernels: str, monkeypatch: Any) -> None:
    model = get_model("lenet-300-100")
    monkeypatch.setitem(many.FLOATS, "cpu", 3 * 250 * (784 + 300 + 300 + 100 + 100 + 10))  # three at once
    weights, asked = drawn(model, 7), list[tuple[int, int]]()

    def make(i: int, j: int) -> Tensor:
        asked.append((i, j))
        return weights[i:j].clone()

    looked = Many(model, digits, 0, kernels)
    test, train = looked.measure(7, make, [looked.test(600), looked.training(400)])
    assert asked == [(0, 3), (3, 6), (6, 7)] if kernels != "autograd" else len(asked) == 7
    for found, (images, labels) in (
        (test, zip(*digits.sample(600).test_first(), strict=True)),
        (train, zip(*digits.training_first(0, 400), strict=True)),
    ):
        x, y = torch.cat(images), torch.cat(labels)
        for r in range(7):
            loss, accuracy = expected(model, weights[r], x, y)
            assert found[0][r] == pytest.approx(loss, rel=1e-6)
            assert found[1][r] == pytest.approx(accuracy, abs=1e-12)
    assert len(torch.cat([x for x, _ in digits.training_first(0, 400)])) == 400


def test_images_are_those_of_training_alone(digits: Resident) -> None:
    index = digits.split(3)[0][:40]
    ((x, y),) = digits.training_first(3, 40)
    assert torch.equal(y, digits.labels[index])
    ((last, _),) = digits.training(3, 40)
    assert torch.equal(last[0].T.reshape(x.shape), x)


@pytest.mark.parametrize("kernels", ["auto", "reference", "autograd"])
def test_statistics_are_means_over_batches(digits: Resident, kernels: str) -> None:
    weights = drawn(NORMED, 2)
    weights[:, NORMED.params.trained_size :] = 7.0  # nothing of it is left
    looked = Many(NORMED, digits, 1, kernels)
    found = weights.clone()
    looked.settled(found)
    n = NORMED.params.trained_size
    assert torch.equal(found[:, :n], weights[:, :n])
    batches = [x for x, _ in digits.training_first(1, many.BATCHES * 250)]
    assert len(batches) == many.BATCHES
    for r in range(2):
        net = network(NORMED, weights[r]).double().train()
        norms = [one for one in net.modules() if isinstance(one, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for x in batches:
                net(x.double())
        flat = torch.cat([torch.cat([one.running_mean, one.running_var]) for one in norms])  # type: ignore[list-item]
        own = torch.cat([found[r, spec.span] for spec in NORMED.params.statistics])
        assert float((own - flat).norm() / flat.norm()) < 1e-5
    x, y = (torch.cat(part) for part in zip(*digits.sample(500).test_first(), strict=True))
    (losses, accuracies), _ = looked.measure(
        2, lambda i, j: weights[i:j].clone(), [looked.test(500), looked.training(250)]
    )
    for r in range(2):
        loss, accuracy = expected(NORMED, found[r], x, y)
        assert losses[r] == pytest.approx(loss, rel=1e-5)
        assert accuracies[r] == pytest.approx(accuracy, abs=0.003)


def test_a_network_without_statistics_keeps_its_weights(digits: Resident) -> None:
    model = get_model("lenet-300-100")
    weights = drawn(model, 1)
    looked, before = Many(model, digits, 0), weights.clone()
    looked.settled(weights)
    assert looked.settles == []
    assert torch.equal(weights, before)


def test_a_line_meets_its_ends() -> None:
    start, end = torch.tensor([0.1, 3.0, -2.0]), torch.tensor([0.7, 1.0, 1e6])
    places = torch.linspace(0, 1, 5)
    found = line(start, end, places)(0, 5)
    assert torch.equal(found[0], start)
    assert torch.equal(found[-1], end)
    torch.testing.assert_close(found[1], 0.75 * start + 0.25 * end)
    assert torch.equal(line(start, end, places)(1, 3), found[1:3])
    same = line(start, start.clone(), torch.linspace(0, 1, 30))(0, 30)
    assert torch.equal(same, start.expand(30, 3))


def test_a_barrier_by_hand() -> None:
    """On the loss (w^2 - 1)^2 between its minima -1 and 1 it is 1, at 0; one of both sides has none."""
    w = line(torch.tensor([-1.0]), torch.tensor([1.0]), torch.linspace(0, 1, 31))(0, 31)[:, 0].double()
    assert barrier(((w * w - 1) ** 2).tolist()) == pytest.approx(1.0, abs=1e-12)
    assert barrier([0.1, 0.2, 0.4]) == pytest.approx(0.15)  # the higher end is above the mean of both
    assert barrier([0.3, 0.1, 0.3]) == 0.0
    assert barrier([0.02, 0.52, 0.04]) == pytest.approx(0.49)


def test_it_is_left_between_two_chunks(digits: Resident) -> None:
    model, asked = get_model("lenet-300-100"), [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 2

    looked = Many(model, digits, 0)
    with pytest.raises(Stopped):
        looked.measure(2, lambda i, j: drawn(model, 2)[i:j], [looked.test(1000)], stop)
    assert asked[0] == 3
