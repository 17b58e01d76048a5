"""Pruned random networks: masks over weights nobody trained, run as plain torch, beside their target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparselth.models import Linear, Model, ReLU, get_model
from sparselth.streams import stream
from sparselth.theory.construct import Layer, Pruned, Weights, one_more, twice, weights_of

SHAPES = ((3, 5), (2, 3))


def draw(purpose: str) -> torch.Generator:
    return stream(0, "test", 0, purpose)


def target(*shapes: tuple[int, int], bits: int | None = None) -> Weights:
    g = torch.Generator().manual_seed(0)
    found = [((torch.rand(n, k, generator=g) - 0.5) / 2, torch.rand(n, generator=g) / 4) for n, k in shapes]
    if bits is None:
        return found
    return [((w * 2**bits).round() / 2**bits, (b * 2**bits).round() / 2**bits) for w, b in found]


def run(weights: Weights, x: Tensor) -> Tensor:
    for i, (w, b) in enumerate(weights):
        x = (x.relu() if i else x) @ w.to(x.dtype).T + b.to(x.dtype)
    return x


def masked(layers: list[Layer], x: Tensor) -> Tensor:
    """The forward pass of masks over weights, in float64, one product after the other."""
    for i, layer in enumerate(layers):
        w, b = layer.weight.double() * layer.keep, layer.bias.double() * layer.keep_bias
        x = (x.relu() if i else x) @ w.T + b
    return x


def plain(pruned: Pruned) -> nn.Sequential:
    """A network of torch's own, and what is pruned is set to 0 in it."""
    net = nn.Sequential()
    for i, layer in enumerate(pruned.layers):
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        with torch.no_grad():
            linear.weight[~layer.keep] = 0
            linear.bias[~layer.keep_bias] = 0
        net.extend([nn.ReLU()] * bool(i) + [linear])
    return net


Make = Callable[..., Pruned | None]


@pytest.mark.parametrize(
    ("make", "depth", "words"),
    [(twice, 4, {}), (twice, 4, {"size": 4}), (one_more, 3, {})],
    ids=["twice", "sparse", "one-more"],
)
def test_the_pruned_network_computes_the_target(make: Make, depth: int, words: dict[str, int]) -> None:
    weights, n = target(*SHAPES), 22
    pruned = make(weights, n, draw, **words)
    assert pruned is not None
    assert len(pruned.layers) == depth
    error = max(float(e.max()) for e in pruned.errors)
    assert 0 < error < 0.02
    assert [e.shape for e in pruned.errors] == [(3, 6), (2, 4)]

    # the source is random: nothing in it knows the target, and it is drawn again from its stream
    again = make(target(*SHAPES), n, draw, **words)
    assert again is not None
    for layer, other in zip(pruned.layers, again.layers, strict=True):
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.keep, other.keep)
        assert layer.weight.abs().max() <= 1
        assert abs(float(layer.weight.mean())) < 0.2

    # inputs of both signs; errors of weights go through two layers
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    right, found = run(weights, x.double()), masked(pruned.layers, x.double())
    size = float(x.abs().sum(1).max()) + 1
    assert float((found - right).abs().max()) < 4 * error * size
    assert float((found - right).abs().max()) > 0
    assert torch.allclose(plain(pruned)(x).double(), found, atol=1e-4)
    assert torch.allclose(pruned.module()(x).double(), found, atol=1e-4)


def test_errors_are_those_of_the_masked_products() -> None:
    """Each input alone, of either sign, through features and sums: what is computed is the weight, but for
    the error that was said.
    """
    weights = target((4, 6))
    pruned = twice(weights, 10, draw)
    assert pruned is not None
    (error,) = pruned.errors
    assert float(error.max()) > 1e-6
    constant = masked(pruned.layers, torch.zeros(1, 6).double())[0]
    off = [(constant - weights[0][1].double()).abs()]
    worst = torch.zeros(4, 6).double()
    for sign in (1.0, -1.0):
        alone = (masked(pruned.layers, sign * torch.eye(6).double()) - constant) / sign  # [input, output]
        worst = torch.maximum(worst, (alone.T - weights[0][0].double()).abs())
    assert torch.allclose(torch.cat([worst, off[0][:, None]], 1), error, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, None])
def test_what_is_kept_is_what_the_structure_allows(size: int | None) -> None:
    n, (rows, columns) = 6, (4, 5)
    pruned = twice(target((rows, columns)), n, draw, size)
    assert pruned is not None
    first, second = pruned.layers
    assert first.weight.shape == (2 * n * (columns + 1), columns)
    assert bool((first.keep.sum(1) + first.keep_bias <= 1).all())  # a neuron has one weight, or none
    assert not second.keep_bias.any()
    sums = 2 * columns + 1
    assert size is None or int(second.keep.sum()) == size * rows * sums
    read = second.keep.any(0)
    assert torch.equal(first.keep.any(1) | first.keep_bias, read)  # nothing is kept that nobody reads
    # each weight's sums take neurons of its input: as many of either sign
    for j in range(columns):
        mine = first.keep[:, j]
        assert int((mine & (first.weight[:, j] > 0)).sum()) <= n
        assert int((mine & (first.weight[:, j] < 0)).sum()) <= n
    assert bool((first.bias[first.keep_bias] > 0).all())


def test_on_a_grid_there_is_no_error() -> None:
    weights = target(*SHAPES, bits=3)
    pruned = twice(weights, 18, draw, bits=3)
    assert pruned is not None
    assert max(float(e.max()) for e in pruned.errors) == 0
    for layer in pruned.layers:
        assert torch.equal(layer.weight * 8, (layer.weight * 8).round())
    x = torch.randint(-8, 9, (40, 5), generator=torch.Generator().manual_seed(1)).double() / 8
    assert torch.equal(masked(pruned.layers, x), run(weights, x))


def test_sums_that_miss_are_drawn_again() -> None:
    weights, n, epsilon = target(*SHAPES), 6, 0.01
    once = twice(weights, n, draw)
    often = twice(weights, n, draw, redraws=(100, epsilon))
    assert once is not None
    assert often is not None
    assert max(float(e.max()) for e in once.errors) > epsilon
    assert max(float(e.max()) for e in often.errors) <= epsilon
    # what had been met stays as it was, weights and mask
    for i, (first, second) in enumerate(zip(once.layers, often.layers, strict=True)):
        if i % 2 == 0:
            assert torch.equal(first.weight, second.weight)
            continue
        changed = (first.weight != second.weight).sum(1)
        redrawn = (often.rounds[i // 2] > 0).sum(1)
        assert torch.equal(changed, n * redrawn)
        assert 0 < int(redrawn.sum()) < often.rounds[i // 2].numel()
        same = first.weight == second.weight
        assert torch.equal(first.keep[same], second.keep[same])
    assert not any(one.any() for one in once.rounds)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(
        plain(often)(x), run(weights, x), atol=6 * epsilon * float(x.abs().sum(1).max() + 1)
    )


def test_depth_one_more_has_copies_with_errors_of_their_own() -> None:
    n = 12
    pruned = one_more(target((3, 4), (3, 3), (2, 3)), n, draw)
    assert pruned is not None
    assert [len(layer.weight) for layer in pruned.layers] == [n * 10, n * 4, n * 4, 2]
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).double()
    hidden = masked(pruned.layers[:2], x)[0]
    assert len(hidden.unique()) > 3 * n


def test_a_network_that_is_stopped() -> None:
    assert twice(target(*SHAPES), 8, draw, should_stop=lambda: True) is None
    assert one_more(target(*SHAPES), 8, draw, lambda: True) is None


def test_weights_of_a_model() -> None:
    model = Model("tiny", (1, 1, 3), (Linear(2), ReLU(), Linear(4)), {}, "here", classes=4)
    flat = torch.arange(float(model.params.size))
    (w, b), (v, c) = weights_of(model, flat)
    assert [t.shape for t in (w, b, v, c)] == [(2, 3), (2,), (4, 2), (4,)]
    assert torch.equal(w.flatten(), flat[:6])
    assert get_model("fc-500").params.prunable == 397_000
