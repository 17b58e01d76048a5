"""Batch norm of features-major images and its gradients against float64, at every native level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle import kernels_of
from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels.batch_norm import batch_norm, batch_norm_backward, floor

WAYS = [*_native.levels(), "reference"]
SHAPES = [(1, 2), (3, 7), (5, 64), (4, 2048), (2, 2049), (3, 5000), (7, 33)]


def right(x: Tensor, scale: Tensor, shift: Tensor, dy: Tensor, eps: float) -> dict[str, Tensor]:
    """Through torch's own autograd, in float64."""
    given = [t.double().requires_grad_() for t in (x, scale, shift)]
    y = F.batch_norm(given[0][None], None, None, given[1], given[2], True, 0.1, eps)[0]
    grads = torch.autograd.grad(y, given, dy.double())
    return dict(zip(("y", "dx", "dscale", "dshift"), (y.detach(), *grads), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("far", [0.0, 100.0])
@pytest.mark.parametrize("affine", [True, False])
def test_output_and_gradients_are_those_of_float64(
    shape: tuple[int, int], way: str, far: float, affine: bool
) -> None:
    draw = torch.Generator().manual_seed(shape[1])
    x, dy = (torch.randn(shape, generator=draw) for _ in range(2))
    x += far
    scale, shift = torch.randn(2, shape[0], generator=draw)
    if not affine:
        scale, shift = torch.ones(shape[0]), torch.zeros(shape[0])
    expected, kernels = right(x, scale, shift, dy, 1e-5), kernels_of(way)
    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    mean, var = batch_norm(x, y, *((scale, shift) if affine else ()), kernels=kernels)
    dscale, dshift = batch_norm_backward(dy, x, mean, var, dx, scale if affine else None, kernels=kernels)
    var64, mean64 = torch.var_mean(x.double(), 1, correction=0)
    # what rounding loses of x - mean grows with how far from 0 the numbers are
    torch.testing.assert_close(mean, mean64, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(var, var64, rtol=1e-5 * (1 + far / 10), atol=1e-9)
    terms = shape[1]
    for name, found in {"y": y, "dx": dx, "dscale": dscale, "dshift": dshift}.items():
        size = {"dx": dy * scale[:, None] / var64.sqrt()[:, None].float(), "dscale": dy.norm(dim=1)}.get(name)
        if name == "dshift":
            size = dy.norm(dim=1)
        seen = check(found, expected[name], "fp32", terms=terms, scale=size, largest=2e-5)
        assert not seen.fault, f"{name}: {seen.fault}"


@pytest.mark.parametrize("way", WAYS)
def test_one_value_everywhere_and_what_is_not_finite(way: str) -> None:
    kernels = kernels_of(way)
    x = torch.full((2, 100), 3.7)
    x[1, 5] = torch.nan
    y = torch.empty_like(x)
    mean, var = batch_norm(x, y, kernels=kernels)
    assert abs(float(var[0])) < 1e-12
    assert float(y[0].abs().max()) < 1e-3
    assert y[1].isnan().all()
    assert mean[1].isnan()


@pytest.mark.skipif(not _native.LIB, reason=_native.WHY)
def test_threads_and_a_gradient_that_is_not_wanted_change_no_bit() -> None:
    x, dy = torch.randn(2, 9, 4099)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, dx = torch.empty_like(x), torch.empty_like(x)
            mean, var = batch_norm(x, y)
            found.append((y, mean, var, dx, *batch_norm_backward(dy, x, mean, var, dx)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    assert all(map(torch.equal, batch_norm_backward(dy, x, mean, var), found[0][4:]))


def test_what_c_cannot_read_is_refused() -> None:
    x = torch.randn(3, 8)
    for wrong in (x.double(), x.t(), torch.randn(3, 16)[:, ::2]):
        with pytest.raises(ValueError, match="expected"):
            batch_norm(x, wrong)
    with pytest.raises(ValueError, match="scale"):
        batch_norm(x, torch.empty_like(x), torch.ones(4))
    with pytest.raises(ValueError, match=r"\[C, L\]"):
        batch_norm(torch.randn(3), torch.randn(3))
    assert floor(10) == {"bytes": 80, "flops": 60}
    assert floor(10, backward=True) == {"bytes": 120, "flops": 80}
