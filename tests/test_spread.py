"""Counts of small layers beside large ones: exact together, none above what there is."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselth.models import get_model
from sparselth.spread import rooted


def test_counts_go_with_the_roots_of_sizes() -> None:
    assert rooted([100, 400, 900], 60) == [10, 20, 30]
    assert rooted([100, 400, 900], 12) == [2, 4, 6]
    assert rooted([4, 10_000], 512) == [4, 508]  # the first would have 10 of 4
    assert rooted([9, 16], 25) == [9, 16]
    assert rooted([5], 3) == [3]


def test_a_twentieth_of_conv2() -> None:
    sizes = [spec.numel for spec in get_model("conv2").weights]
    assert sizes == [1728, 36_864, 4_194_304, 65_536, 2560]
    found = rooted(sizes, 215_050)
    assert found[0] == 1728
    assert found[4] == 2560
    shares = [round(count / size, 3) for count, size in zip(found, sizes, strict=True)]
    assert shares == [1, 0.44, 0.041, 0.33, 1]  # 210,762 weights by 192, 2048 and 256


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.floats(0, 1))
def test_counts_are_exact_together_and_within_sizes(sizes: list[int], keep: float) -> None:
    total = max(len(sizes), round(keep * sum(sizes)))
    found = rooted(sizes, total)
    assert all(1 <= count <= size for count, size in zip(found, sizes, strict=True))
    assert abs(sum(found) - total) <= len(sizes)  # where a single weight is all that a layer has
    if min(found) > 1:
        assert sum(found) == total
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for small, large in pairwise(order):
        assert found[small] <= found[large] + len(sizes)
        assert found[small] / sizes[small] >= found[large] / sizes[large] - len(sizes) / sizes[small]


@pytest.mark.parametrize("total", [3, 40, 700])
def test_none_but_full_ones_is_off_its_root_by_more_than_rounding(total: int) -> None:
    sizes = [50, 300, 900]
    found = rooted(sizes, total)
    units = [count / sqrt(size) for count, size in zip(found, sizes, strict=True) if 1 < count < size]
    assert max(units, default=0) - min(units, default=0) <= 3 / sqrt(50)
