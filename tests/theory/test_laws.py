"""The closed forms, against known densities, Monte Carlo, and each other."""

from __future__ import annotations

from math import comb, isclose, log2, sqrt

import pytest
import torch

from sparselth.theory import laws


def test_density_of_few_draws() -> None:
    for z, right in ((0.0, 0.5), (0.7, 0.5), (1.0, 0.5), (-1.0, 0.5), (1.01, 0.0)):
        assert laws.density(1, z) == right
    for z in (-1.5, -0.2, 0.0, 0.4, 1.9, 2.5):
        assert isclose(laws.density(2, z), max(0.0, (2 - abs(z)) / 4), abs_tol=1e-15)
    for z in (0.0, 0.5, 1.0):  # the middle and the outer piece of the quadratic spline
        assert isclose(laws.density(3, z), (3 - z * z) / 8, rel_tol=1e-12)
    assert isclose(laws.density(3, 2.0), (3 - 2) ** 2 / 16, rel_tol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 20, 60])
def test_density_is_that_of_below(k: int) -> None:
    h = 1e-4
    for z in (0.0, 0.3, 0.9, sqrt(k) - 0.01):
        slope = (laws.below(k, z + h) - laws.below(k, z - h)) / (2 * h)
        assert isclose(slope, laws.density(k, z), rel_tol=1e-4), z
        assert isclose(laws.below(k, z) + laws.below(k, -z), 1, rel_tol=1e-12)
    assert (laws.below(k, -k - 0.1), laws.below(k, k + 0.1)) == (0, 1)
    normal = 1 / sqrt(2 * 3.14159265 * k / 3)
    assert k < 20 or isclose(laws.density(k, 0), normal, rel_tol=0.02)


def test_window_by_monte_carlo() -> None:
    g = torch.Generator().manual_seed(0)
    for k, z in ((1, 1.0), (2, 0.3), (5, 1.1)):
        total = (torch.rand(200_000, k, generator=g, dtype=torch.float64) * 2 - 1).sum(1)
        share = float(((total - z).abs() < 0.1).double().mean())
        right = laws.window(k, z, 0.1)
        assert abs(share - right) < 4 * sqrt(right / 200_000)


def test_the_first_moment_is_the_least_n() -> None:
    for k in range(1, 11):
        for z in (0.0, sqrt(k)):
            for epsilon in (0.1, 0.01, 0.001):
                n = laws.first_moment(k, z, epsilon)
                assert laws.expected_hits(n, k, z, epsilon) >= 1 - 1e-12
                assert n == k or laws.expected_hits(n - 1, k, z, epsilon) < 1
    # the table of research/anchors.md, epsilon 0.01
    found = [laws.first_moment(k, 0, 0.01) for k in (1, 2, 3, 4, 6, 8, 10)]
    assert found == [100, 15, 11, 10, 10, 12, 13]
    assert [laws.first_moment(k, sqrt(k), 0.01) for k in (1, 2, 3, 4)] == [100, 27, 16, 13]


def test_entropy() -> None:
    assert laws.entropy(0.5) == 1
    assert laws.entropy(0) == laws.entropy(1) == 0
    for k, epsilon in ((1, 0.01), (3, 0.001), (8, 1e-6)):
        n = laws.entropy_n(k, epsilon)
        assert n >= 2 * k
        assert n == 2 * k or isclose(n * laws.entropy(k / n), log2(k / epsilon), rel_tol=1e-9)
    assert comb(40, 10) < 2 ** (40 * laws.entropy(0.25))  # what makes it a bound
    assert laws.pigeonhole(2**-9) == 8
    assert laws.half_sums(20) == 8 * 2 * 1024
    assert laws.half_sums(5, 1) == 8 * 7
