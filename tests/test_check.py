"""The one tolerance: what is right passes, every planted fault is found, nothing is looser than before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparselth.check import DTYPES, LARGEST, MARGIN, ROUNDING, Checked, allowed, check

NAN, INF = math.nan, math.inf


def product(dtype: str, k: int = 300) -> tuple[Tensor, Tensor]:
    """What torch computes of [40, k] x [k, 50] in a dtype, and float64 on the same numbers."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=g).to(DTYPES[dtype]) for shape in ((40, k), (k, 50)))
    if dtype == "tf32":  # cut off behind ten bits
        cut = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (a, b)]
        return cut[0] @ cut[1], a.double() @ b.double()
    return a @ b, a.double() @ b.double()


@pytest.mark.parametrize("k", [1, 10, 300, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_own_product_is_right(dtype: str, k: int) -> None:
    y, exact = product(dtype, k)
    found = check(y, exact, dtype, terms=k)
    assert not found.fault
    assert found.error > 0
    assert found.allowed < 100 * found.error  # and no more than what sums in another order need


def spoilt(y: Tensor, what: str, dtype: str) -> Tensor:
    wrong, off = y.clone(), float(y.abs().max())
    if what == "everywhere":
        return (wrong.double() * (1 + 8 * MARGIN * ROUNDING[dtype])).to(y.dtype)
    if what == "in one place":
        wrong[3, 7] += 2 * LARGEST[dtype] * off
    elif what == "shape":
        wrong = wrong.reshape(-1)
    elif what == "dtype":
        wrong = wrong.double()
    else:
        wrong[0, 0] = {"NaN": NAN, "infinity": INF}[what]
    return wrong


@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("what", ["everywhere", "in one place", "shape", "dtype", "NaN", "infinity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_planted_fault_is_found(dtype: str, what: str, with_own: bool) -> None:
    y, exact = product(dtype, 8)
    found = check(spoilt(y, what, dtype), exact, dtype, terms=8, own=y if with_own else None)
    assert found.fault
    word = {"shape": "shape [2000] instead of [40, 50]", "dtype": "torch.float64 instead of torch."}
    assert word.get(what, "against float64") in found.fault
    assert "\n" not in found.fault


def test_one_wrong_number_among_many_is_found() -> None:
    """In RMS it would be nothing."""
    y = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = y.double()
    y[17, 4] += 0.2
    found = check(y, exact, "bf16")
    assert found.error <= found.allowed
    assert found.fault == f"largest error {found.largest:.1e} against float64, 2.0e-02 allowed"


def test_torchs_own_counts_where_it_is_worse_and_luck_does_not() -> None:
    exact = torch.ones(10, dtype=torch.float64)
    off, own = torch.full((10,), 1 + 2e-6), torch.full((10,), 1 + 1e-6)
    assert check(off, exact, "fp32").fault
    assert not check(off, exact, "fp32", own=own).fault
    lucky = torch.ones(10)
    assert check(lucky, exact, "fp32", own=lucky).allowed == allowed("fp32") > 0
    for nothing in (NAN, INF):  # is no measure
        useless = torch.full((10,), nothing)
        assert check(off, exact, "fp32", own=useless).fault
        assert check(useless, exact, "fp32", own=useless).fault
    assert not check(off, exact, "fp32", own=own, largest=1e-5).fault
    assert check(off, exact, "fp32", own=own, largest=1e-6).fault


def test_what_cancels_is_relative_to_its_terms() -> None:
    exact, scale = torch.full((4,), 1e-6, dtype=torch.float64), torch.ones(4)
    off = torch.full((4,), 1.05e-6)
    assert check(off, exact, "fp32").fault
    assert not check(off, exact, "fp32", scale=scale).fault
    zeros = torch.zeros(4)
    assert not check(zeros, zeros.double(), "fp32").fault
    assert check(zeros + 1e-3, zeros.double(), "fp32").fault
    assert not check(torch.zeros(0, 3), torch.zeros(0, 3).double(), "fp32").fault


@pytest.mark.parametrize("terms", [1, 9, 784, 4608, 65536])
@pytest.mark.parametrize("own", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_allowed_is_some_roundings(dtype: str, own: float, terms: int) -> None:
    """No more than `convert` and the kernels' tests allowed in RMS when each had its own bound."""
    half, lost = ROUNDING[dtype] / 2, 0.2 * ROUNDING["fp32"] * terms**0.5
    most = allowed(dtype, terms, own)
    assert 3 * max(own, half) * 0.999 <= most <= max(1e-5, 3 * max(own, half) * 1.0001)
    assert most <= 3 * max(own, half + lost)


def test_a_failed_comparison_says_which() -> None:
    assert Checked(NAN, 1.0, 0.0, 1.0).fault == "error nan against float64, 1.0e+00 allowed"
    assert Checked(0.0, 1.0, NAN, 1.0).fault == "largest error nan against float64, 1.0e+00 allowed"
    assert Checked(0.0, 1.0, 0.0, 1.0).fault is None
