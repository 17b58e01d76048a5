"""Pools of random numbers, against all their subsets."""

from __future__ import annotations

from itertools import combinations, product
from math import nan

import numpy as np
import pytest
import torch

from sparselth.errors import SparselthError
from sparselth.streams import stream
from sparselth.theory import cases, laws
from sparselth.theory.pools import Curve, Pools, closest, covering, errors, grid_numbers, holds_grid


def test_closest_of_floats() -> None:
    g = torch.Generator().manual_seed(0)
    values, targets = torch.randn(20, 8, generator=g).double(), torch.randn(20, generator=g).double()
    for size in (None, 3):
        chosen, error = closest(values, targets, size)
        for row, target, mask, off in zip(values, targets, chosen, error, strict=True):
            picks = [p for p in product((0, 1), repeat=8) if size in (None, sum(p))]
            best = min(abs(float((row * torch.tensor(p)).sum() - target)) for p in picks)
            assert abs(float(off) - best) < 1e-14
            assert abs(float((row * mask).sum() - target)) == pytest.approx(float(off), abs=1e-15)


def test_closest_is_exact_on_a_grid_and_for_any_size_of_numbers() -> None:
    g = torch.Generator().manual_seed(1)
    numbers = torch.randint(-16, 17, (50, 20), generator=g).double() / 16
    targets = torch.randint(-8, 9, (50,), generator=g).double() / 16
    assert torch.equal(closest(numbers, targets)[1], torch.zeros(50).double())
    for scale in (1e-30, 1e30):
        _, error = closest(numbers[:, :6] * scale, targets * 1.01 * scale)
        right = closest(numbers[:, :6], targets * 1.01)[1]
        assert torch.allclose(error / scale, right, rtol=1e-9, atol=1e-9), scale


def test_what_is_no_number() -> None:
    values = torch.ones(2, 3)
    for wrong in (nan, float("inf")):
        with pytest.raises(SparselthError, match="expected finite numbers, found NaN or infinity"):
            closest(values.clone().fill_(wrong), torch.zeros(2))
        with pytest.raises(SparselthError, match="expected finite numbers"):
            closest(values, torch.tensor([0.0, wrong]))


def test_pools_grow_and_curves_find_the_least() -> None:
    pools = Pools(7, stream(0, "test", 0, "pools"))
    first = pools.first(3).clone()
    assert torch.equal(pools.first(9)[:, :3], first)
    assert torch.equal(Pools(7, stream(0, "test", 0, "pools")).first(9), pools.first(9))
    for guess in (1, 37, 38, 500):
        curve = Curve(lambda n: float(n >= 37))
        assert curve.least(2, guess, 0.5) == 37
        assert len(curve.shares) < 25
    assert Curve(lambda n: 1.0).least(4, 9, 0.5) == 4


def test_errors_of_k() -> None:
    pools = Pools(5, stream(0, "test", 0, "pools"))
    values = pools.first(6)
    for k in (1, 2, 3):
        right = [min(abs(sum(c) - 0.4) for c in combinations(row.tolist(), k)) for row in values]
        assert torch.allclose(errors(pools, 6, k, 0.4), torch.tensor(right).double(), atol=1e-14)


def test_covering_against_a_fine_grid_of_targets() -> None:
    g = np.random.default_rng(0)
    z = np.linspace(-0.5, 0.5, 20_001)
    for n in (1, 2, 5, 8):
        numbers = g.uniform(-1, 1, n)
        sums = np.array([sum(c) for p in product((0, 1), repeat=n) for c in [numbers[np.array(p) == 1]]])
        right = np.abs(z[:, None] - sums).min(1).max()
        assert covering(numbers) == pytest.approx(right, abs=3e-5)
    assert covering(np.array([])) == 0.5
    assert covering(np.array([5.0])) == 0.5


def test_grids_are_held_as_their_subset_sums_say() -> None:
    numbers = grid_numbers(30, 12, 2, torch.Generator().manual_seed(0))
    assert numbers.min() == -4
    assert numbers.max() == 4
    for row in numbers.tolist():
        for n in range(13):
            sums = {sum(c) for k in range(n + 1) for c in combinations(row[:n], k)}
            if {*range(-2, 3)} <= sums:
                break
        else:
            n = 13
        assert holds_grid(row, 2) == n
    # what a grid holds has no error
    n = holds_grid(numbers[0].tolist(), 2)
    targets = torch.arange(-2, 3).double() / 4
    assert closest((numbers[0, :n] / 4).expand(5, -1), targets)[1].max() == 0


def test_as_many_hit_as_the_first_moment_allows() -> None:
    """P(hit) is at most what is expected, and near it where that is small; k = 1 in closed form."""
    g = stream(0, "test", 0, "hits")
    for k, z, n in ((1, 0.0, 4), (2, 0.5, 4), (3, 0.0, 4)):
        pools = Pools(20_000, g)
        share = float((errors(pools, n, k, z) < 0.01).double().mean())
        expected = laws.expected_hits(n, k, z, 0.01)
        assert 0.8 * expected < share < 1.1 * expected
    line, _ = cases.fixed_size(1, 0.0, 0.1, 500, g)
    assert abs(line["n"] - 7) <= 1  # the least n with 1 - 0.9^n >= 1/2
    assert (line["first_moment"], line["weights_used"], line["theorem"]) == (10, 1, "malach")


def test_redraws_and_coverings() -> None:
    g = stream(0, "test", 0, "redraws")
    once, often = (cases.redrawn(1, rounds, 0.05, 400, g)[0] for rounds in (1, 4))
    assert abs(often["n"] - once["n"] / 4) <= 2
    lines = [cases.covered(n, 0.05, 200, stream(0, "test", n, "covering"))[0] for n in (4, 8, 11)]
    assert [line["median_error"] for line in lines] == sorted([line["median_error"] for line in lines])[::-1]
    assert all(line["median_error"] > line["pigeonhole"] / 2 for line in lines)
    assert lines[-1]["covered"] > lines[0]["covered"]
    line, _ = cases.quantised(3, 200, g)
    assert line["max_error"] == 0
    assert 5 <= line["n"] <= 9
