"""Against the dense product in float64, at every level this machine has; what lies beside operands stays."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import kernels_of
from sparselth.kernels import _native
from sparselth.kernels.csr_linear import (
    CsrIndex,
    bind_csr_input_grad,
    bind_csr_linear,
    bind_csr_weight_grad,
    csr_input_grad,
    csr_linear,
    csr_weight_grad,
    floor,
    reference,
)

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
CANARY = 12345.0
WAYS = [*_native.levels(), "torch", "reference"]  # levels of the native kernels, then the others
needs_native = pytest.mark.skipif(_native.LIB is None, reason=f"native kernels: {_native.WHY}")


def padded(t: Tensor, ld: int, offset: int, filling: float) -> Tensor:
    """`t` with row stride `ld` in memory of its own, `offset` floats behind its begin, `filling` around."""
    rows, batch = t.shape
    storage = torch.full((offset + rows * ld,), filling)
    view = storage[offset:].view(rows, ld)[:, :batch]
    view.copy_(t)
    return view


def untouched(view: Tensor, filling: float) -> bool:
    around = view._base
    assert around is not None
    copy = around.clone()
    torch.as_strided(copy, view.shape, view.stride(), view.storage_offset()).fill_(filling)
    return bool((copy == filling).all())


def error(found: Tensor, right: Tensor, squares: Tensor | None = None) -> float:
    """Relative RMS error; `squares`, the sums of the squared terms, where few sums may nearly cancel."""
    size = right.norm() if squares is None else torch.maximum(right.norm(), squares.sum().sqrt())
    return float((found - right).norm() / size.clamp_min(1e-20))


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    b: int
    keep: float
    relu: bool = False
    bias: bool = True
    ld: int = 0  # more than b
    offset: int = 0
    threads: int = 1
    seed: int = 0


def check(case: Case, way: str) -> None:
    draw = torch.Generator().manual_seed(case.seed)
    n, k, b = case.n, case.k, case.b
    mask = torch.rand(n, k, generator=draw) < case.keep
    index = CsrIndex.from_dense(mask)
    w, x, dy = (torch.randn(*s, generator=draw) for s in ((n, k), (k, b), (n, b)))
    bias = torch.randn(n, generator=draw) if case.bias else None
    values = index.gather(w)
    ld = b + case.ld
    x_in, dy_in = (padded(t, ld, case.offset, math.nan) for t in (x, dy))
    y, dx = (padded(torch.full_like(t, math.nan), ld, case.offset, CANARY) for t in (dy, x))
    dv = padded(torch.full((1, index.kept), math.nan), index.kept + 3, case.offset, CANARY)

    kernels = kernels_of(way)
    torch.set_num_threads(case.threads)
    csr_linear(index, values, x_in, bias, case.relu, out=y, kernels=kernels)
    csr_input_grad(index, values, dy_in, out=dx, kernels=kernels)
    csr_weight_grad(index, dy_in, x_in, out=dv[0], kernels=kernels)
    twice = padded(dv, index.kept + 3, case.offset, CANARY)
    bind_csr_weight_grad(index, dy_in, x_in, twice[0], kernels, add=True)()

    dense = (w * mask).double()
    pre = dense @ x.double() + (0 if bias is None else bias.double()[:, None])
    tolerance = 3e-6 * max(1.0, math.sqrt(max(case.keep * n, case.keep * k, b) / 1000))  # sums in one order
    if case.b and n:
        wide, deep = x.double(), dy.double()
        assert error(y, pre.relu() if case.relu else pre, dense.square() @ wide.square()) <= tolerance
        slope, squares = (deep @ wide.t())[mask], (deep.square() @ wide.t().square())[mask]
        assert error(dv[0], slope, squares) <= tolerance
        assert error(twice[0], 2 * slope, 4 * squares) <= tolerance
        assert error(dx, dense.t() @ deep, dense.t().square() @ deep.square()) <= tolerance
    assert untouched(y, CANARY)
    assert untouched(dx, CANARY)
    assert untouched(dv, CANARY)
    assert untouched(twice, CANARY)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case",
    [
        Case(300, 784, 60, 0.2, relu=True, ld=4),
        Case(300, 784, 64, 0.05, threads=2),
        Case(37, 1201, 61, 0.1, ld=3, offset=1),  # several tiles, an odd batch
        Case(9, 2500, 500, 0.5, ld=12, threads=3),  # blocks of columns, copied to scratch
        Case(40, 3000, 130, 0.3, relu=True, ld=6),
        Case(3, 70000, 17, 0.002),  # more columns than 16 bits count
        Case(70000, 3, 2, 0.3),
        Case(10, 84, 1, 0.5, relu=True),
        Case(7, 5, 3, 0.0),
        Case(7, 5, 3, 1.0, bias=False),
    ],
    ids=str,
)
def test_all_products_are_the_dense_ones(case: Case, way: str) -> None:
    check(case, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)], ids=str)
def test_empty_operands(shape: tuple[int, int, int], way: str) -> None:
    check(Case(*shape, keep=0.5, threads=2), way)


@pytest.mark.parametrize("way", _native.levels())
@settings(max_examples=CASES)
@given(
    st.builds(
        Case,
        n=st.integers(1, 40),
        k=st.one_of(st.integers(1, 60), st.integers(1000, 2100)),
        b=st.integers(1, 130),
        keep=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
        relu=st.booleans(),
        bias=st.booleans(),
        ld=st.integers(0, 20),
        offset=st.integers(0, 17),
        threads=st.integers(1, 4),
        seed=st.integers(0, 10**6),
    )
)
@example(Case(1, 1, 1, 1.0))
def test_any_shape_any_stride(way: str, case: Case) -> None:
    check(case, way)


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_columns_without_weights_and_full_ones(way: str) -> None:
    kernels = kernels_of(way)
    mask = torch.zeros(20, 300, dtype=torch.bool)
    mask[3], mask[:, 7], mask[19, 299] = True, True, True
    index = CsrIndex.from_dense(mask)
    w, x = torch.randn(20, 300), torch.randn(300, 33)
    y = csr_linear(index, index.gather(w), x, kernels=kernels)
    assert error(y, (w * mask).double() @ x.double()) <= 1e-6
    dx = csr_input_grad(index, index.gather(w), y, kernels=kernels)
    assert error(dx, (w * mask).double().t() @ y.double()) <= 1e-6


@needs_native
@pytest.mark.parametrize("level", _native.levels())
@pytest.mark.parametrize("batch", [1, 5, 60, 64, 75, 500])
def test_threads_do_not_change_a_bit(level: str, batch: int) -> None:
    kernels_of(level)
    index = CsrIndex.from_dense(torch.rand(45, 1300) < 0.3)
    values, x, dy = torch.randn(index.kept), torch.randn(1300, batch), torch.randn(45, batch)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = csr_linear(index, values, x)
        found.append((y, csr_input_grad(index, values, dy), csr_weight_grad(index, dy, x)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("level", _native.levels())
@pytest.mark.parametrize("batch", [1, 12, 60, 140])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_spread_through_kept_weights_alone(level: str, batch: int, bad: float) -> None:
    kernels_of(level)
    mask = torch.rand(30, 50) < 0.3
    mask[5], mask[11], mask[:, 4] = True, False, False
    index = CsrIndex.from_dense(mask)
    values, x, dy = torch.randn(index.kept), torch.randn(50, batch), torch.randn(30, batch)
    x[4, :] = bad  # nobody looks at it
    x[9, batch - 1] = bad
    y = csr_linear(index, values, x)
    relu = csr_linear(index, values, x, relu=True)
    assert y[:, :-1].isfinite().all()
    assert (y[:, -1].isfinite() == ~mask[:, 9]).all()
    if math.isnan(bad):
        assert (relu.isnan() == y.isnan()).all()
    else:
        assert torch.equal(relu, y.relu())
    dv = index.to_dense(csr_weight_grad(index, dy, x))
    columns = (~dv.isfinite()).any(0).nonzero().flatten().tolist()
    assert columns == [9]
    if math.isinf(bad):  # no 0 * infinity from columns that two vectors share
        assert not dv.isnan().any()
    dy[5, 0] = bad
    assert (csr_input_grad(index, values, dy)[:, 0].isfinite() == ~mask[5]).all()


@pytest.mark.parametrize("way", WAYS)
def test_bound_forms_see_what_their_tensors_hold_now(way: str) -> None:
    kernels = kernels_of(way)
    index = CsrIndex.from_dense(torch.rand(12, 30) < 0.4)
    values, x, dy, bias = torch.randn(index.kept), torch.randn(30, 9), torch.randn(12, 9), torch.randn(12)
    y, dx, dv = torch.empty(12, 9), torch.empty(30, 9), torch.empty(index.kept)
    calls = [
        bind_csr_linear(index, values, x, bias, y, relu=True, kernels=kernels),
        bind_csr_input_grad(index, values, dy, dx, kernels),
        bind_csr_weight_grad(index, dy, x, dv, kernels),
    ]
    for _ in range(2):
        for t in (values, x, dy, bias):
            t.normal_()
        for call in calls:
            assert call() is None
        torch.testing.assert_close(y, reference(index, values, x, bias, relu=True))
        torch.testing.assert_close(dx, index.to_dense(values).t() @ dy)
        torch.testing.assert_close(dv, index.gather(dy @ x.t()))


def test_index_goes_there_and_back() -> None:
    for shape, keep in (((300, 784), 0.1), ((5, 3000), 0.5), ((4, 70000), 1e-4), ((3, 70000), 0.6)):
        mask = torch.rand(shape) < keep
        index = CsrIndex.from_dense(mask)
        assert index.backward is not None
        assert index.backward.order is not None
        assert torch.equal(index.forward.positions(), mask.flatten().nonzero().flatten())
        assert torch.equal(index.forward.counts(), mask.sum(1))
        assert torch.equal(index.backward.counts(), mask.sum(0))
        w = torch.randn(shape) * mask
        assert torch.equal(index.to_dense(index.gather(w)), w)
        transposed = index.gather(w)[index.backward.order]
        assert torch.equal(transposed, w.t().flatten()[mask.t().flatten()])
        assert index.bytes() == CsrIndex.from_dense(mask, backward=False).bytes() + index.backward.bytes()


def test_index_is_small() -> None:
    index = CsrIndex.from_dense(torch.rand(300, 784) < 0.2)
    kept = index.kept
    assert index.forward.bytes() <= 2 * kept + 4 * 300 * 9
    assert index.bytes() <= 8 * kept + 4 * (300 * 9 + 784 * 5)
    assert floor(index, 64) == {
        "bytes": 4 * kept + index.forward.bytes() + 4 * 64 * 1084,
        "flops": 2 * kept * 64,
    }


def test_wrong_operands_are_named() -> None:
    index = CsrIndex.from_dense(torch.rand(4, 6) < 0.5, backward=False)
    values, x, y = torch.randn(index.kept), torch.randn(6, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"expected a bool mask \[N, K\], got torch.float32 \[4, 6\]"):
        CsrIndex.from_dense(torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"x: expected fp32 \[6, 8\] on a CPU, got torch.float64"):
        csr_linear(index, values, x.double())
    with pytest.raises(ValueError, match=r"y: expected fp32 \[4, 8\] on a CPU, got torch.float32 \[4, 9\]"):
        csr_linear(index, values, x, out=torch.empty(4, 9))
    with pytest.raises(ValueError, match="x: expected its columns side by side"):
        csr_linear(index, values, torch.randn(8, 6).t())
    with pytest.raises(ValueError, match="y: expected rows that do not overlap"):
        csr_linear(index, values, x, out=torch.empty(8).expand(4, 8))
    with pytest.raises(ValueError, match="values: expected contiguous fp32"):
        csr_linear(index, values[:-1], x)
    with pytest.raises(ValueError, match="bias: expected contiguous fp32"):
        csr_linear(index, values, x, torch.randn(5))
    with pytest.raises(ValueError, match="backward=False"):
        csr_input_grad(index, values, y)
    with pytest.raises(ValueError, match="kernels='fast'"):
        csr_linear(index, values, x, kernels="fast")
