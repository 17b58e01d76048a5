"""SNIP, GraSP, SynFlow and ERK: against float64 computed another way, their laws, users' modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth import pruning
from sparselth.engine.dense import init_weights
from sparselth.errors import SparselthError
from sparselth.models import Add, AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, Node, ReLU, get_model
from sparselth.models.module import module_model
from sparselth.scores import SCORES, Batch, ranked
from sparselth.scores.gradients import CHUNK
from sparselth.streams import stream

CHAIN = Model(
    "chain", (2, 8, 8), (Conv(4, 3, 1), MaxPool(2), ReLU(), Conv(5, 3), ReLU(), Linear(6), ReLU(), Linear(3)),
    {}, "", classes=3,
)  # fmt: skip
RESIDUAL = Model(
    "residual", (2, 6, 6),
    (Conv(4, 3, 1), BatchNorm(), ReLU(), Conv(4, 3, 1), BatchNorm(), Node(Add(), (2, 4)), ReLU(), AvgPool(),
     Linear(3)),
    {}, "", classes=3,
)  # fmt: skip
MODULE = """
from torch import nn


def make(classes):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.5), nn.Linear(144, 6), nn.LayerNorm(6), nn.ReLU(),
                         nn.Linear(6, classes))


def words(classes):
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, classes))
"""


def batch(model: Model, n: int = 12) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, *model.input, generator=draw), torch.randint(3, (n,), generator=draw)


def drawn(model: Model) -> Tensor:
    """Weights, biases and norms that are all something."""
    weights = init_weights(model, stream(0, "ticket", 0, "init"))
    draw = torch.Generator().manual_seed(2)
    for spec in model.params.trained:
        weights[spec.span] += 0.1 * torch.randn(spec.numel, generator=draw)
    return weights


def scored(name: str, model: Model, weights: Tensor, mask: Tensor, data: Batch | None = None) -> Tensor:
    more = data or batch(model), torch.Generator().manual_seed(0)
    return SCORES[name].of(model, weights, mask, *more, start=lambda: 2 * weights)


def chain(model: Model, flat: Tensor, x: Tensor) -> Tensor:
    """What CHAIN computes, by hand."""
    w = {spec.name: flat[spec.span].view(spec.shape) for spec in model.params.all}
    x = F.relu(F.max_pool2d(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=1), 2))
    x = F.relu(F.conv2d(x, w["conv2.weight"], w["conv2.bias"])).flatten(1)
    return F.linear(F.relu(F.linear(x, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])


def residual(model: Model, flat: Tensor, x: Tensor) -> Tensor:
    """What RESIDUAL computes in training, by hand."""
    w = {spec.name: flat[spec.span].view(spec.shape) for spec in model.params.all}

    def norm(x: Tensor, i: int) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        y = centred / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * w[f"norm{i}.scale"][:, None, None] + w[f"norm{i}.shift"][:, None, None]

    x = F.relu(norm(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=1), 1))
    x = F.relu(x + norm(F.conv2d(x, w["conv2.weight"], w["conv2.bias"], padding=1), 2))
    return F.linear(x.mean((2, 3)), w["fc1.weight"], w["fc1.bias"])


NETWORKS: dict[str, tuple[Model, Callable[[Model, Tensor, Tensor], Tensor]]] = {
    "chain": (CHAIN, chain),
    "residual": (RESIDUAL, residual),
}


def masked(model: Model) -> Tensor:
    """A mask that has lost a third."""
    mask = model.params.full_mask()
    return mask & (torch.rand(len(mask), generator=torch.Generator().manual_seed(3)) > 0.33)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("net", NETWORKS)
def test_snip_is_the_weight_times_its_gradient(net: str) -> None:
    model, forward = NETWORKS[net]
    weights, mask, (x, y) = drawn(model), masked(model), batch(model)
    flat = weights.double().clone()
    flat[: len(mask)] *= mask
    flat.requires_grad_()
    F.cross_entropy(forward(model, flat, x.double()), y).backward()
    expected = (flat * flat.grad).detach().abs()[: len(mask)]
    found = scored("snip", model, weights, mask, (x, y))
    assert off(found, expected) < 2e-6
    assert not found[~mask].any()


@pytest.mark.parametrize("net", NETWORKS)
def test_grasp_is_the_weight_times_hessian_times_gradient(net: str) -> None:
    """The Hessian as a matrix, of the loss at temperature 200."""
    model, forward = NETWORKS[net]
    weights, mask, (x, y) = drawn(model), masked(model), batch(model)
    flat, n = weights.double().clone(), len(mask)
    flat[:n] *= mask
    rest = flat[n:]

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(forward(model, torch.cat([w, rest]), x.double()) / 200, y)

    w = flat[:n].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(loss, w)
    (gradient,) = torch.autograd.grad(loss(w), w)
    expected = (w * (hessian @ gradient)).detach()
    assert off(scored("grasp", model, weights, mask, (x, y)), expected) < 2e-5


def test_what_grasp_keeps_first_is_what_the_gradient_loses_most_by() -> None:
    """|g|^2 falls by 2 w (H g) to first order as a weight is scaled down: the sign of the paper's S(-w)."""
    model = CHAIN
    weights, mask, (x, y) = drawn(model), CHAIN.params.full_mask(), batch(model)
    found = scored("grasp", model, weights, mask, (x, y))

    def power(flat: Tensor) -> float:
        flat = flat.double().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(chain(model, flat, x.double()) / 200, y), flat)
        return float(g[: len(mask)].square().sum())

    for place in (int(found.argmax()), int(found.argmin())):
        less = weights.double().clone()
        less[place] *= 1 - 1e-4
        change = (power(weights.double()) - power(less)) / 1e-4
        assert change == pytest.approx(2 * float(found[place]), rel=1e-2)


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_several_batches_give_the_mean_gradient(name: str) -> None:
    model, (x, y) = CHAIN, batch(CHAIN, 2 * CHUNK + 3)
    weights, mask = drawn(model).double().float(), masked(model)
    found = scored(name, model, weights, mask, (x, y))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparselth.scores.gradients.CHUNK", 10**6)
        whole = scored(name, model, weights, mask, (x, y))
    assert off(found, whole.double()) < 1e-5
    assert off(scored(name, model, weights, mask, (x[:CHUNK], y[:CHUNK])), whole.double()) > 1e-2


# ---- SynFlow


def test_synflow_is_the_product_of_absolute_matrices() -> None:
    model = Model("fc", (1, 1, 5), (Linear(4), ReLU(), Linear(6), ReLU(), Linear(3)), {}, "")
    weights, mask = drawn(model), masked(model)
    a, b, c = ((weights[s.span] * mask[s.span]).double().abs().view(s.shape) for s in model.params.weights)
    ones = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    expected = [
        a * torch.outer(ones[0] @ c @ b, ones[1]),
        b * torch.outer(ones[0] @ c, a @ ones[1]),
        c * torch.outer(ones[0], b @ a @ ones[1]),
    ]
    found = scored("synflow", model, weights, mask)
    assert found.dtype == torch.float64
    for spec, layer in zip(model.params.weights, expected, strict=True):
        assert off(found[spec.span], layer.flatten()) < 1e-14


def test_synflow_is_conserved_by_layer_and_by_unit() -> None:
    """What flows into a unit flows out of it, and every layer has the whole flow (Tanaka et al. 2020)."""
    model = CHAIN
    found = scored("synflow", model, drawn(model), masked(model))
    layers = [found[s.span].view(s.shape) for s in model.params.weights]
    totals = torch.stack([layer.sum() for layer in layers])
    assert totals.max() / totals.min() - 1 < 1e-12
    conv1, conv2, fc1, fc2 = layers
    torch.testing.assert_close(conv1.sum((1, 2, 3)), conv2.sum((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(conv2.sum((1, 2, 3)), fc1.view(6, 5, -1).sum((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(fc1.sum(1), fc2.sum(0), rtol=1e-12, atol=0)


def test_synflow_of_a_residual_network_splits_between_its_ways() -> None:
    model = RESIDUAL
    weights = drawn(model)
    found = scored("synflow", model, weights, model.params.full_mask())
    first, second, last = (found[s.span].sum() for s in model.params.weights)
    assert first == pytest.approx(float(last), rel=1e-12)
    assert 0 < second < last
    # neither images nor shifts, biases and statistics are looked at, scales count by their size
    other = weights.clone()
    for spec in model.params.all:
        last_name = spec.name.rpartition(".")[2]
        if last_name in ("bias", "shift", "mean", "var"):
            other[spec.span] += 1.0
        if last_name == "scale":
            other[spec.span] *= -1
    torch.testing.assert_close(
        scored("synflow", model, other, model.params.full_mask(), (batch(model)[0] * 9, batch(model)[1])),
        found, rtol=1e-13, atol=0,
    )  # fmt: skip


def test_synflow_passes_norms_by_the_size_of_their_scale() -> None:
    model = RESIDUAL
    weights, mask = drawn(model), RESIDUAL.params.full_mask()
    (scale,) = (spec for spec in model.params.trained if spec.name == "norm1.scale")
    found = scored("synflow", model, weights, mask)
    weights[scale.span] *= -2
    torch.testing.assert_close(scored("synflow", model, weights, mask), 2 * found, rtol=1e-13, atol=0)


def test_synflow_of_a_deep_network_stays_finite() -> None:
    model = get_model("vgg19")
    weights = init_weights(model, stream(0, "ticket", 0, "init"))
    found = scored("synflow", model, weights, model.params.full_mask(), (torch.empty(0), torch.empty(0)))
    assert found.isfinite().all()
    totals = torch.stack([found[s.span].sum() for s in model.params.weights])
    assert totals.max() / totals.min() - 1 < 1e-10
    assert totals.min() > 1e6


# ---- ERK


def test_erk_keeps_what_its_law_says_exactly() -> None:
    model = get_model("resnet20")
    params, mask = model.params, model.params.full_mask()
    for keep in (40, 2_000, 27_000, 200_000):
        scores = scored("erk", model, torch.zeros(params.size), mask)
        kept = params.kept(pruning.prune(params, ranked("erk", scores, mask), mask, {"all": keep}))
        assert sum(kept.values()) == keep
        free = [s for s in params.weights if 0 < kept[s.name] < s.numel]
        full = [s for s in params.weights if kept[s.name] == s.numel]
        unit = sum(kept[s.name] for s in free) / sum(sum(s.shape) for s in free)
        for spec in free:
            assert kept[spec.name] == pytest.approx(unit * sum(spec.shape), abs=1.0)
        for spec in full:
            assert unit * sum(spec.shape) > spec.numel - 1


def test_erk_is_drawn_and_prunes_what_is_left() -> None:
    model = CHAIN
    params, mask = model.params, masked(CHAIN)
    one, two = (
        SCORES["erk"].score(
            model, torch.zeros(params.size), mask, batch(model), torch.Generator().manual_seed(seed)
        )
        for seed in (0, 1)
    )
    masks = [pruning.prune(params, ranked("erk", s, mask), mask, {"all": 60}) for s in (one, two)]
    assert not torch.equal(*masks)
    assert params.kept(masks[0]) == params.kept(masks[1])
    assert all(not (found & ~mask).any() for found in masks)


# ---- modules of users


@pytest.fixture
def module(tmp_path: Path) -> Model:
    (tmp_path / "mine.py").write_text(MODULE)
    made = module_model(f"{tmp_path / 'mine.py'}:make")
    return replace(made, input=(2, 6, 6), classes=3, samples="here")


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "erk", "random", "magnitude"])
def test_a_module_of_a_user_is_scored(name: str, module: Model) -> None:
    weights = init_weights(module, stream(0, "ticket", 0, "init"))
    mask = module.params.full_mask()
    found = scored(name, module, weights, mask)
    assert found.shape == mask.shape
    assert found[mask].isfinite().all()
    assert name in ("erk", "random") or found[mask].count_nonzero() > 0.5 * int(mask.sum())


def test_synflow_of_a_module_is_that_of_its_layers(module: Model) -> None:
    """Dropout does nothing, norms pass on, biases are 0."""
    weights = init_weights(module, stream(0, "ticket", 0, "init"))
    found = scored("synflow", module, weights, module.params.full_mask())
    conv, first, last = (weights[s.span].double().abs().view(s.shape) for s in module.params.weights)
    inside = F.conv2d(torch.ones(1, 2, 6, 6, dtype=torch.float64), conv, padding=1).flatten()
    total = (last @ (first @ inside)).sum()
    for spec in module.params.weights:
        assert float(found[spec.span].sum()) == pytest.approx(float(total), rel=1e-12)


def test_synflow_refuses_what_has_no_flow_in_a_line(tmp_path: Path, module: Model) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    made = module_model(f"{tmp_path / 'mine.py'}:words")
    words = replace(made, input=(3,), classes=3, samples="here", tokens=True)
    mask = words.params.full_mask()
    with pytest.raises(SparselthError, match="reads tokens, and no input of ones is there"):
        scored("synflow", words, torch.zeros(words.params.size), mask)
    with pytest.raises(SparselthError, match="nothing flows through `model` chain"):
        scored("synflow", CHAIN, torch.zeros(CHAIN.params.size), CHAIN.params.full_mask())
    huge = torch.full((CHAIN.params.size,), 1e38)
    assert scored("synflow", CHAIN, huge, CHAIN.params.full_mask()).isfinite().all()


def test_magnitude_at_init_is_that_of_the_weights_at_the_rewind_step() -> None:
    weights, mask = drawn(CHAIN), CHAIN.params.full_mask()
    found = scored("magnitude-at-init", CHAIN, weights, mask)
    assert torch.equal(found, 2 * weights[: len(mask)].abs())
