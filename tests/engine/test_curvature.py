"""Lanczos and products with the Hessian against dense float64 Hessians; directions and planes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.data.batches import Resident
from sparselth.engine import planes
from sparselth.engine.curvature import Hessian, lanczos
from sparselth.engine.dense import init_weights
from sparselth.engine.many import Many, direction, square
from sparselth.engine.planes import behind_first, measure_plane
from sparselth.engine.state import Stopped
from sparselth.models import BatchNorm, Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.models.torch import network
from sparselth.params import matrix
from sparselth.streams import stream

SMALL = Model("small", (1, 28, 28), (MaxPool(7), Linear(6), ReLU(), Linear(10)), {}, "")
NORMED = Model(
    "normed", (1, 28, 28), (MaxPool(4), Conv(3, 3, 1), BatchNorm(), ReLU(), MaxPool(3), Linear(10)), {}, ""
)


def drawn(model: Model, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [P] with half of them pruned, and their mask."""
    weights = init_weights(model, torch.Generator().manual_seed(seed))
    kept = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = model.params.full_mask() & kept
    weights[: len(mask)] *= mask
    for spec in model.params.trained:  # what training moves: biases, batch norms
        weights[spec.span] += 0.3 * torch.randn(spec.numel, generator=torch.Generator().manual_seed(3))
    return weights, mask


def dense(model: Model, weights: Tensor, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian [n, n] over everything that is trained, rows and columns of pruned weights 0, float64."""
    net, params = network(model, weights).double().eval(), model.params
    named = dict(net.named_parameters())
    own = {"scale": "weight", "shift": "bias"}
    names = []
    for spec in params.weights + params.trained:
        layer, _, last = spec.name.rpartition(".")
        names.append(f"{layer}.{own.get(last, last)}")
    shapes = [named[name].shape for name in names]

    def loss(vector: Tensor) -> Tensor:
        parts = {
            name: vector[spec.span].view(shape)
            for name, spec, shape in zip(names, params.weights + params.trained, shapes, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(net, parts, x.double()), y)

    start = weights[: params.trained_size].double()
    found = torch.autograd.functional.hessian(loss, start)
    live = torch.zeros(params.trained_size, dtype=torch.float64)
    live[: len(mask)] = mask.double()
    for spec in params.trained:
        live[spec.span] = 1
    return found * live * live[:, None]


@pytest.mark.parametrize("model", [SMALL, NORMED], ids=lambda model: model.name)
def test_products_and_eigenvalues_are_those_of_the_dense_hessian(digits: Resident, model: Model) -> None:
    weights, mask = drawn(model)
    chunks = digits.training_first(0, 300)  # of 250 and of 50
    x, y = (torch.cat(part) for part in zip(*chunks, strict=True))
    whole, ours = dense(model, weights, mask, x, y), Hessian(model, 0, weights, mask, chunks)
    vector = torch.randn(len(whole), generator=torch.Generator().manual_seed(2))
    expected = whole @ vector.double()
    assert float((ours(vector) - expected).norm() / expected.norm()) < 1e-5
    values = torch.linalg.eigvalsh(whole)
    found = lanczos(ours, vector * ours.live, 60, 1e-5)
    assert found.values[0] == pytest.approx(float(values[-1]), rel=1e-4)
    assert found.converged
    assert not ours(vector)[: len(mask)][~mask].any()
    full = Hessian(model, 0, weights, model.params.full_mask(), chunks)
    assert lanczos(full, vector * full.live, 60, 1e-5).values[0] > found.values[0] * (1 - 1e-6)


def test_lanczos_finds_the_ends_of_a_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(80, 80, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.linspace(-3, 5, 78, dtype=torch.float64), torch.tensor([9.0, -7.0])])
    operator = (basis * values) @ basis.T
    start = torch.randn(80, generator=generator, dtype=torch.float64)
    found = lanczos(lambda v: operator @ v, start, 80, 1e-10)
    assert found.values[0] == pytest.approx(9, rel=1e-9)
    assert found.steps < 60
    assert abs(found.values[0] - 9) <= found.bound + 1e-12
    whole = lanczos(lambda v: operator @ v, start, 80, -1.0)
    assert len(whole.values) == 80
    torch.testing.assert_close(
        torch.tensor(whole.values, dtype=torch.float64), values.sort(descending=True)[0]
    )


def test_lanczos_ends_where_nothing_is_left() -> None:
    """Of a multiple of 1 every vector is an eigenvector; of 0 too."""
    start = torch.ones(30)
    for factor in (4.0, 0.0):
        found = lanczos(lambda v, f=factor: f * v, start)
        assert found.values[0] == pytest.approx(factor, abs=1e-5)
        assert found.steps == 1
    assert lanczos(lambda v: 2 * v, torch.ones(1)).values == [2.0]


def test_products_are_left_between_two_chunks(digits: Resident) -> None:
    weights, mask = drawn(SMALL)
    asked = iter([False, True])
    hessian = Hessian(SMALL, 0, weights, mask, digits.training_first(0, 500), lambda: next(asked))
    with pytest.raises(Stopped):
        hessian(hessian.live)


def test_directions_are_normalised_by_filter() -> None:
    weights, mask = drawn(NORMED)
    matrix(NORMED.weights[0], mask)[1] = False
    matrix(NORMED.weights[0], weights)[1] = 0
    one, same, other = (direction(NORMED.params, weights, mask, stream(0, "x", 0, str(i))) for i in (0, 0, 1))
    assert torch.equal(one, same)
    assert not one[NORMED.params.mask_size :].any()
    assert not one[: len(mask)][~mask].any()
    for spec in NORMED.weights:
        rows, own = matrix(spec, one), matrix(spec, weights)
        torch.testing.assert_close(rows.norm(dim=1), own.norm(dim=1))
    cosine = F.cosine_similarity(one, other, dim=0)
    assert 1e-6 < abs(float(cosine)) < 0.5
    filters = one[NORMED.weights[0].span].view(3, -1)
    assert not filters[1].any()  # a dead filter stays


def test_a_square_meets_its_centre() -> None:
    places = square(5, 0.5)
    assert places.shape == (25, 2)
    assert places[12].tolist() == [0, 0]
    assert places[0].tolist() == [-0.5, -0.5]
    assert places[1].tolist() == [-0.5, -0.25]
    assert places[-1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["lenet-300-100", "normed", "small"])
def test_a_plane_is_its_networks(digits: Resident, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"normed": NORMED, "small": SMALL}.get(name) or get_model(name)
    weights, mask = drawn(model)
    many, places = Many(model, digits, 0), square(3, 1.0)
    one, other = (direction(model.params, weights, mask, stream(0, "x", 0, str(i))) for i in (0, 1))
    basis, chunks = torch.stack([weights, one, other]), many.training(300)
    assert (behind_first(model) is not None) == (name == "lenet-300-100")
    losses, accuracies = measure_plane(many, basis, places, chunks)
    monkeypatch.setattr(planes, "behind_first", lambda model: None)
    plain = measure_plane(many, basis, places, chunks)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert accuracies == pytest.approx(plain[1], abs=0.004)
    for i in (0, 4, 7):
        a, b = places[i].double()
        here = (weights.double() + a * one.double() + b * other.double()).float()[None]
        many.settled(here)
        x, y = (torch.cat(part) for part in zip(*digits.training_first(0, 300), strict=True))
        output = network(model, here[0]).double().eval()(x.double()).detach()
        assert losses[i] == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-4)
