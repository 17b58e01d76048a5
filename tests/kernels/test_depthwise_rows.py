"""Convolution of each channel by itself against float64, at every level this machine has."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels import depthwise_rows as dw
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels._choose import use_native
from sparselth.kernels.depthwise_rows import DepthwiseRows
from sparselth.kernels.sparse_conv2d_rows import Planes

CASES = settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")), deadline=None)
LAYERS = {  # channels, side of the kernel, size, stride, batch, kept
    "MobileNet, first": (3, 3, (112, 112), 2, 1, 0.2),
    "56 x 56": (3, 3, (56, 56), 1, 1, 0.2),
    "14 x 14": (13, 5, (14, 14), 1, 3, 0.1),
    "14 x 14, stride 2": (13, 5, (14, 14), 2, 3, 0.1),
    "7 x 7": (17, 5, (7, 7), 1, 1, 0.1),
    "odd sides, stride 2": (5, 5, (13, 29), 2, 3, 0.5),
    "a kernel beyond the image": (2, 7, (2, 3), 1, 3, 1.0),
    "the same, stride 2": (2, 7, (2, 3), 2, 3, 1.0),
    "nothing kept": (3, 3, (5, 6), 1, 3, 0.0),
    "one of everything": (1, 1, (1, 1), 1, 1, 1.0),
}


def weight(channels: int, k: int, kept: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = channels, 1, k, k
    return torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) < kept)


def planes(shape: tuple[int, ...], padding: int) -> Planes:
    """NaN everywhere, rows further apart than they are long."""
    b, c, h, w = shape
    row = w + padding
    pitch = -(-((h + 2 * padding) * row + padding) // 16) * 16
    found = Planes.of(b, c, (h, w), row, padding, pitch)
    found.memory.fill_(torch.nan)
    return found


def error(found: Tensor, exact: Tensor) -> float:
    """Largest error, relative to the largest number where that is above 1."""
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1))


def compare(packed: DepthwiseRows, batch: int, activation: str, kernels: str) -> None:
    """From tensors and planes into tensors and planes; to the same bits on any number of threads."""
    c = packed.shape[0]
    x, bias = torch.randn(batch, c, *packed.size), torch.randn(c)
    exact = dw.reference(packed, x.double(), bias.double(), activation)
    first = dw.depthwise_rows(packed, x, bias, activation, kernels)
    assert error(first, exact) < 1e-6
    apart, bare = planes(tuple(x.shape), 1), Planes.of(batch, c, packed.size)
    for given_ in (apart, bare):
        given_.images.copy_(x)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for inner in (x, apart, bare):
            outer = planes(tuple(exact.shape), 2)
            whole, memory = torch.full_like(first, torch.nan), Planes.of(batch, c, packed.out)
            memory.memory.fill_(torch.nan)
            for y in (outer, whole, memory):
                dw.bind_depthwise_rows(packed, inner, bias, y, activation, kernels)()
            for found in (outer.images, whole, memory.images):
                assert error(found, exact) < 1e-6
                assert torch.equal(found, first) or not use_native(kernels)
            outer.images.fill_(torch.nan)
            assert bool(outer.memory.isnan().all())  # nothing beside the images was written


@pytest.mark.parametrize("name", LAYERS)
def test_against_float64(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dw, "WORK", 1)
    channels, k, size, stride, batch, kept = LAYERS[name]
    torch.manual_seed(0)
    w = weight(channels, k, kept)
    packed = DepthwiseRows.from_dense(w, size, stride)
    assert torch.equal(packed.to_dense(), w)
    assert packed.kept == int((w != 0).sum())
    for activation in ("none", "hardswish"):
        compare(packed, batch, activation, kernels)


@CASES
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    if _native.LIB is not None:
        _native.choose(data.draw(st.sampled_from(_native.levels()), "level"))
    k, stride = data.draw(st.sampled_from([1, 3, 5, 7]), "k"), data.draw(st.integers(1, 2), "stride")
    size = tuple(data.draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 67, 130]))) for _ in "hw")
    kept = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "kept")
    w = weight(data.draw(st.integers(1, 5), "channels"), k, kept, data.draw(st.integers(0, 1000), "seed"))
    packed = DepthwiseRows.from_dense(w, (size[0], size[1]), stride)
    assert torch.equal(packed.to_dense(), w)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dw, "WORK", 1)
        activation = data.draw(st.sampled_from([*ACTIVATIONS]), "activation")
        compare(packed, data.draw(st.sampled_from([1, 3]), "batch"), activation, "auto")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (9, 33)])
def test_nan_spreads_through_kept_weights_alone(
    size: tuple[int, int], stride: int, value: float, kernels: str
) -> None:
    mask = (weight(6, 5, 0.2) != 0).float()
    packed = DepthwiseRows.from_dense(mask, size, stride)
    x = torch.randn(2, 6, *size)
    x[1, 2, 3, size[1] - 1] = x[0, 4, 0, 0] = x[1, 0, size[0] - 1, 2] = value
    touched = F.conv2d((~x.isfinite()).float(), mask, None, stride, 2, groups=6) > 0
    assert bool(touched.any())
    y = dw.depthwise_rows(packed, x, kernels=kernels)
    if use_native(kernels):
        assert torch.equal(~y.isfinite(), touched)


def test_a_call_takes_any_batch_and_layout(kernels: str) -> None:
    packed, bias = DepthwiseRows.from_dense(weight(6, 3, 0.5), (7, 9)), torch.randn(6)
    call, first = dw.depthwise_rows_call(packed, bias, kernels=kernels), list[tuple[Tensor, Tensor]]()
    for batch in (3, 1, 0, 3):
        x = torch.randn(batch, 6, 7, 9)
        y = call(x.contiguous(memory_format=torch.channels_last))
        exact = dw.reference(packed, x.double(), bias.double())
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
        first.append((y, y.clone()))
    assert all(torch.equal(y, copy) for y, copy in first)  # outputs are in memory of their own


def test_calls_of_several_threads_do_not_meet() -> None:
    call = dw.depthwise_rows_call(DepthwiseRows.from_dense(weight(16, 3, 0.4), (16, 16)))
    images = [torch.randn(1, 16, 16, 16) for _ in range(8)]
    alone = [call(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, images * 5))
    assert all(torch.equal(a, b) for a, b in zip(alone * 5, found, strict=True))


def test_bound_forms_follow_their_memory(kernels: str) -> None:
    packed = DepthwiseRows.from_dense(weight(3, 3, 0.5), (6, 7), 2)
    x, bias, y = torch.randn(2, 3, 6, 7), torch.randn(3), torch.empty(2, 3, 3, 4)
    run = dw.bind_depthwise_rows(packed, x, bias, y, "relu", kernels)
    for _ in range(2):
        for t in (x, bias, packed.values):
            t.normal_()
        run()
        assert error(y, dw.reference(packed, x.double(), bias.double(), "relu")) < 1e-6


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "LIB", None)
    compare(DepthwiseRows.from_dense(weight(3, 3, 0.5), (6, 7), 2), 3, "silu", "auto")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: dw.depthwise_rows(p, x[:, 1:]), r"x: expected fp32 \[3, 2, 6, 7\] on a CPU"),
        (lambda p, x: dw.depthwise_rows(p, x, x), r"bias: expected contiguous fp32 \[2\]"),
        (
            lambda p, x: dw.depthwise_rows(p, x, None, "gelu"),
            "activation: expected none, relu, .* got 'gelu'",
        ),
        (lambda p, x: dw.bind_depthwise_rows(p, x, None, x[:, :, 1:]), r"y: expected fp32 \[3, 2, 6, 7\]"),
        (lambda p, x: dw.bind_depthwise_rows(p, x.mT.contiguous().mT, None, x), "x: expected rows of pixels"),
        (lambda p, x: dw.bind_depthwise_rows(p, x, None, Planes.of(3, 2, (6, 6))), r"y: expected fp32"),
        (lambda p, x: DepthwiseRows.from_dense(x, (6, 7)), r"expected a weight \[C, 1, k, k\] with an odd k"),
        (lambda p, x: DepthwiseRows.from_dense(x[0], (6, 7)), r"expected a weight \[C, 1, k, k\] in fp32"),
        (lambda p, x: DepthwiseRows.from_dense(p.to_dense(), (6, 7), 3), "stride 3"),
        (lambda p, x: DepthwiseRows.from_dense(p.to_dense(), (224, 224)), "224 x 224 are too large"),
    ],
)
def test_refused(call: Callable[[DepthwiseRows, Tensor], object], message: str) -> None:
    packed = DepthwiseRows.from_dense(torch.ones(2, 1, 3, 3), (6, 7))
    with pytest.raises(ValueError, match=message):
        call(packed, torch.zeros(3, 2, 6, 7))


def test_floor_and_bytes() -> None:
    packed = DepthwiseRows.from_dense(torch.ones(2, 1, 3, 3), (6, 7))
    assert dw.floor(packed, 10) == {"bytes": 5 * 18 + 8 + 4 * 10 * 2 * 84, "flops": 2 * 18 * 42 * 10}
    masks = 3 * (112 + dw.RUN) * 4
    assert packed.bytes() == 5 * 18 + 4 * 3 + 2 + 2 * 4 * 9 + masks
