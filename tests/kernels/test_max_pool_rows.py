"""Max pooling of images as torch has them: torch's to the bit, at every level this machine has."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels import max_pool_rows as mp

CASES = settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")), deadline=None)


def apart(shape: tuple[int, ...], more: int) -> tuple[Tensor, Tensor]:
    """Images whose rows and planes lie apart, 7 before, between and behind them; all that memory."""
    b, c, h, w = shape
    row, plane = w + more, h * (w + more) + more
    memory = torch.full((b * c * plane + 2 * more + 1,), 7.0)
    return memory.as_strided(shape, (c * plane, plane, row, 1), more), memory


def compare(x: Tensor, sizes: list[tuple[int, int]], relu: bool, more: int, kernels: str) -> None:
    exact = mp.reference(x, *sizes, relu)
    assert torch.equal(mp.max_pool_rows(x, *sizes, relu, kernels).nan_to_num(7e7), exact.nan_to_num(7e7))
    given, _ = apart(tuple(x.shape), more)
    given.copy_(x)
    y, memory = apart(tuple(exact.shape), more)
    mp.bind_max_pool_rows(given, y, *sizes, relu, kernels)()
    assert torch.equal(y.nan_to_num(7e7), exact.nan_to_num(7e7))
    y.fill_(7.0)
    assert bool((memory == 7.0).all())  # nothing beside y was written


@CASES
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    if _native.LIB is not None:
        _native.choose(data.draw(st.sampled_from(_native.levels()), "level"))
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    kernel = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    stride = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    size = (data.draw(st.integers(kernel[0], 9)), data.draw(st.integers(kernel[1], 70)))
    x = torch.randn(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), *size)
    x[torch.rand(x.shape) < 0.05] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, -0.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mp, "MANY", 1)
        sizes = [kernel, stride, (padding[0], padding[1])]
        compare(x, sizes, data.draw(st.booleans()), data.draw(st.integers(0, 3)), "auto")


def test_of_resnet(kernels: str) -> None:
    compare(torch.randn(2, 3, 38, 37), [(3, 3), (2, 2), (1, 1)], True, 1, kernels)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(3, 3), (2, 2), (2, 1)], r"kernel \(3, 3\), stride \(2, 2\), padding \(2, 1\)"),
        ([(7, 3), (2, 2), (0, 0)], "images of 6 x 7 hold"),
        ([(3, 3), (0, 2), (0, 0)], r"stride \(0, 2\)"),
        ([(1, 400_000), (1, 1), (0, 200_000)], "rows of at most 32768 with padding"),  # a thread's memory
    ],
)
def test_refused(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mp.max_pool_rows(torch.zeros(1, 2, 6, 7), *sizes)


def test_of_no_images(kernels: str) -> None:
    none = torch.zeros(0, 2, 6, 8).to(memory_format=torch.channels_last)
    assert mp.max_pool_rows(none, (2, 2), (2, 2), (0, 0), kernels=kernels).shape == (0, 2, 3, 4)


def test_what_cannot_be_bound() -> None:
    x, sizes = torch.zeros(1, 2, 6, 8), [(2, 2), (2, 2), (0, 0)]
    with pytest.raises(ValueError, match=r"y: expected fp32 \[1, 2, 3, 4\]"):
        mp.bind_max_pool_rows(x, torch.zeros(1, 2, 3, 3), *sizes)
    with pytest.raises(ValueError, match="x: expected rows of pixels side by side"):
        mp.bind_max_pool_rows(x.mT.contiguous().mT, torch.zeros(1, 2, 3, 4), *sizes)
    with pytest.raises(ValueError, match="x: this op has no gradient"):
        mp.max_pool_rows(x.requires_grad_(), *sizes)
