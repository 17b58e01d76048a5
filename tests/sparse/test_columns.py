"""Batch norm, ReLU and pools on features-major images: torch's numbers, and images that stay as they lie."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sparselth.check import check
from sparselth.errors import UsageError
from sparselth.sparse import columns

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.BatchNorm2d(6),
    "norm without affine": lambda: nn.BatchNorm2d(6, affine=False),
    "norm without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "norm with an average": lambda: nn.BatchNorm2d(6, momentum=None),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "max": lambda: nn.MaxPool2d(3, 2, 1),
    "max with places": lambda: nn.MaxPool2d(2, return_indices=True),
    "average": lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2),
    "adaptive to 1": lambda: nn.AdaptiveAvgPool2d(1),
}


def turned(x: Tensor) -> Tensor:
    room = columns.like_columns(x)
    return room.copy_(x)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("batch", [1, 5, 32])
def test_results_gradients_and_statistics(name: str, training: bool, batch: int) -> None:
    torch.manual_seed(batch)
    right = nn.Sequential(MAKERS[name]()).train(training)
    for buffer in right.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    for p in right.parameters():
        nn.init.uniform_(p, 0.5, 2)
    fast = deepcopy(right)
    columns.enter(fast)
    assert type(fast[0]) is not type(right[0])
    assert isinstance(fast[0], type(right[0]))
    right.double()
    x = torch.randn(batch, 6, 8, 6)
    for _ in range(2):  # statistics add up
        own, other = turned(x).requires_grad_(), x.double().requires_grad_()
        y, expected = fast(own * 1), right(other * 1)
        if isinstance(y, tuple):
            assert torch.equal(y[1], expected[1])
            y, expected = y[0], expected[0]
        elif batch > 1:
            assert columns.is_columns(y)
        dy = torch.randn_like(expected).float()
        y.backward(turned(dy) if batch == 5 else dy)
        expected.backward(dy.double())
        terms = batch * 48
        for found, exact in (
            (y.detach(), expected.detach()),
            (own.grad, other.grad),
            *zip((p.grad for p in fast.parameters()), (p.grad for p in right.parameters()), strict=True),
            *((b, c) for b, c in zip(fast.buffers(), right.buffers(), strict=True) if b.is_floating_point()),
        ):
            assert found is not None
            assert exact is not None
            seen = check(found, exact, "fp32", terms=terms)
            assert not seen.fault, seen.fault
    columns.leave(fast)
    assert type(fast[0]) is type(right[0])
    assert all(torch.equal(b.float(), b.float()) for b in fast.buffers())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_images_take_torchs_own_way(name: str, dtype: torch.dtype) -> None:
    right = MAKERS[name]().to(dtype)
    fast = nn.Sequential(deepcopy(right))
    columns.enter(fast)
    for x in (torch.randn(4, 6, 8, 8, dtype=dtype), torch.randn(0, 6, 8, 8, dtype=dtype)):
        expected, found = right(x.clone()), fast(x.clone())
        for a, b in zip(*(([t] if isinstance(t, Tensor) else t) for t in (expected, found)), strict=True):
            assert torch.equal(a, b)


def test_one_value_a_channel_is_refused_as_torch_does() -> None:
    fast = nn.Sequential(nn.BatchNorm2d(3))
    columns.enter(fast)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fast(torch.randn(1, 3, 1, 1))


def test_no_second_derivative() -> None:
    for layer in (nn.BatchNorm2d(3), nn.ReLU()):
        fast = nn.Sequential(layer)
        columns.enter(fast)
        x = turned(torch.randn(4, 3, 2, 2)).requires_grad_()
        with pytest.raises(UsageError, match="no second derivative"):
            torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
