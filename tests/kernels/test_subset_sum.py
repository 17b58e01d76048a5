"""`subset_sum` against all subsets, one after the other; at every level, with any number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels.subset_sum import MOST, floor, subset_sum, sums

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
HOW = ["native", "reference"] if _native.LIB else ["reference"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def nearest(values: Tensor, targets: Tensor, size: int | None) -> Tensor:
    """The least |sum - target| of every row, over all subsets."""
    picks = torch.tensor([*product((0, 1), repeat=values.shape[1])]).view(-1, values.shape[1])
    if size is not None:
        picks = picks[picks.sum(1) == size]
    return ((values[:, None] * picks).sum(2) - targets[:, None]).abs().amin(1)


def check(values: Tensor, targets: Tensor, size: int | None, how: str) -> Tensor:
    chosen = subset_sum(values, targets, size, how)
    assert chosen.dtype == torch.bool
    assert torch.equal(((values * chosen).sum(1) - targets).abs(), nearest(values, targets, size))
    if size is not None:
        assert bool((chosen.sum(1) == size).all())
    return chosen


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=CASES)
@given(st.data())
def test_no_subset_is_nearer(how: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9), "n")
    size = data.draw(st.none() | st.integers(0, n), "size")
    top = data.draw(st.sampled_from([1, 3, 50, 2**40, 2**56]), "top")  # few values: many equal sums
    numbers = st.integers(-top, top)
    rows = data.draw(st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=4), "values")
    targets = data.draw(st.lists(numbers, min_size=len(rows), max_size=len(rows)), "targets")
    check(torch.tensor(rows), torch.tensor(targets), size, how)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize(("n", "size"), [(17, None), (17, 3), (40, 2), (300, 1), (13, 12)])
def test_like_the_reference_whatever_the_threads(n: int, size: int | None) -> None:
    g = torch.Generator().manual_seed(n)
    values = torch.randint(-(2**50), 2**50, (101, n), generator=g)
    targets = torch.randint(-(2**51), 2**51, (101,), generator=g)
    right = subset_sum(values, targets, size, "reference")
    for level in _native.levels():
        _native.choose(level)
        for threads in (1, 2, 3, 200):
            torch.set_num_threads(threads)
            found = subset_sum(values, targets, size, "native")
            assert torch.equal((values * found).sum(1), (values * right).sum(1))
    part = subset_sum(values[7:20:3], targets[7:20:3], size)  # rows that lie apart, and other neighbours
    assert torch.equal(part, found[7:20:3])


@pytest.mark.parametrize("how", HOW)
def test_what_there_is_little_of(how: str) -> None:
    assert subset_sum(torch.zeros(0, 5).long(), torch.zeros(0).long(), None, how).shape == (0, 5)
    check(torch.tensor([[7]]), torch.tensor([3]), None, how)
    check(torch.tensor([[7]]), torch.tensor([4]), None, how)
    check(torch.zeros(3, 6).long(), torch.tensor([0, 1, -5]), 2, how)


def test_bad_arguments() -> None:
    values, targets = torch.zeros(2, 3).long(), torch.zeros(2).long()
    for wrong, says in (
        ((values.double(), targets), "values: expected int64"),
        ((values[0], targets), "values: expected int64"),
        ((values, targets[:1]), r"targets: expected int64 \[2\]"),
        ((values, targets, 4), "size 4: expected 0 to 3"),
        ((values, targets, -1), "size -1: expected 0 to 3"),
        ((values + MOST // 2, targets), "expected sums up to"),
        ((values, targets, None, "triton"), "expected auto, native"),
    ):
        with pytest.raises(ValueError, match=says):
            subset_sum(*wrong)


def test_counts() -> None:
    assert sums(20, None) == 2 * 2**10
    assert sums(5, 1) == (1 + 2) + (1 + 3)
    assert floor(10, 20, None)["flops"] == 2 * 10 * 2048
