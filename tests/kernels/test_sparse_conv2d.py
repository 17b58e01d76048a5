"""Sparse convolution against float64, at every level this machine has."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels import sparse_conv2d as sc

CASES = settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")))
LAYERS = {  # [N, C, kh, kw], size, stride, padding, batch, kept
    "LeNet-5, first": ((6, 1, 5, 5), (28, 28), 1, 2, 60, 0.3),
    "LeNet-5, second": ((16, 6, 5, 5), (14, 14), 1, 0, 60, 0.3),
    "blocks of channels": ((8, 64, 3, 3), (8, 8), 1, 1, 20, 0.3),
    "strips": ((2, 320, 3, 3), (3, 17), 1, 1, 18, 0.1),
    "stride 2": ((5, 7, 3, 3), (9, 12), 2, 1, 17, 0.5),
    "stride 2, 1 x 1": ((5, 7, 1, 1), (9, 12), 2, 0, 17, 0.5),
    "stride beyond the kernel": ((3, 2, 2, 2), (9, 8), 3, 0, 16, 0.7),
    "padding beyond the kernel": ((3, 2, 2, 3), (5, 8), 2, 4, 3, 0.5),
    "nothing kept": ((3, 2, 3, 3), (5, 6), 1, 1, 5, 0.0),
    "all kept": ((3, 2, 3, 3), (5, 6), 1, 1, 33, 1.0),
    "one of everything": ((1, 1, 1, 1), (1, 1), 1, 0, 1, 1.0),
}


def error(found: Tensor, wanted: Tensor, terms: int = 1) -> float:
    """RMS error, relative where that is smaller. Sums of so many terms of size 1 may cancel."""
    scale = wanted.square().mean().sqrt().item() if found.numel() else 0.0
    return (
        (found.double() - wanted).square().sum().item() ** 0.5
        / max(scale, terms**0.5)
        / max(1, found.numel()) ** 0.5
    )


def image(shape: tuple[int, ...], ld: int, offset: int, fill: float) -> Tensor:
    """A random [C, H, W, B] whose pixels are `ld` floats apart, with `fill` all around them."""
    c, h, w, b = shape
    memory = torch.full((offset + c * h * w * ld + 16,), fill)
    found = memory[offset : offset + c * h * w * ld].view(c, h, w, ld)[..., :b]
    return found.copy_(torch.randn(shape))


def around(t: Tensor) -> Tensor:
    """All memory that `t` is part of, without `t`."""
    memory = torch.tensor(t.untyped_storage(), dtype=torch.float32)
    mine = torch.zeros(memory.shape, dtype=torch.bool)
    mine.as_strided(t.shape, t.stride(), t.storage_offset())[...] = True
    return memory[~mine]


def compare(
    index: sc.Conv2dIndex, batch: int, kernels: str, ld: int, offset: int, bias: bool, relu: bool
) -> None:
    n, c, _, _ = index.shape
    values = torch.randn(index.kept)
    b = torch.randn(n) if bias else None
    x = image((c, *index.size, batch), ld, offset, torch.nan)
    dy = image((n, *index.out, batch), ld, offset, torch.nan)
    y = image(tuple(dy.shape), ld, offset, 7.0)
    dx = image(tuple(x.shape), ld, offset, 7.0)
    sc.sparse_conv2d(index, values, x, b, relu, y, kernels)
    sc.sparse_conv2d_input_grad(index, values, dy, dx, kernels)
    dv, db = sc.sparse_conv2d_weight_grad(index, dy, x, kernels)
    exact = sc.reference(index, values.double(), x.double(), None if b is None else b.double(), relu)
    exact_dx, exact_dv, exact_db = sc.reference_grads(index, values.double(), x.double(), dy.double())
    assert error(y, exact) < 1e-6
    assert error(dx, exact_dx) < 1e-6
    terms = index.out[0] * index.out[1] * batch
    assert error(dv, exact_dv, terms) < 3e-6
    assert error(db, exact_db, terms) < 1e-5  # of which torch itself makes 3e-6
    sums = image(tuple(dy.shape), ld, offset, 7.0)
    exact = sc.reference(index, values.double(), x.double(), None if b is None else b.double()) + sums
    exact = exact.relu() if relu else exact
    sc.bind_sparse_conv2d_add(index, values, x, b, sums, relu, kernels)()
    assert error(sums, exact) < 1e-6
    outs = [y, dx, sums]
    if min(index.halves) > 0:
        outs.append(image((n, *index.halves, batch), ld, offset, 7.0))
        sc.sparse_conv2d(index, values, x, b, relu, outs[-1], kernels, pool=True)
        assert torch.equal(outs[-1].permute(3, 0, 1, 2), F.max_pool2d(y.permute(3, 0, 1, 2), 2))
    for out in outs:
        assert (around(out) == 7).all()


@pytest.mark.parametrize("name", LAYERS)
def test_against_float64(name: str, kernels: str) -> None:
    shape, size, stride, padding, batch, kept = LAYERS[name]
    torch.manual_seed(0)
    index = sc.Conv2dIndex.from_dense(torch.rand(shape) < kept, size, stride, padding)
    compare(index, batch, kernels, -(-batch // 16) * 16, 0, bias=True, relu=True)


def test_layers_are_what_their_names_say() -> None:
    def index(name: str) -> sc.Conv2dIndex:
        shape, size, stride, padding, _, kept = LAYERS[name]
        torch.manual_seed(0)
        return sc.Conv2dIndex.from_dense(torch.rand(shape) < kept, size, stride, padding)

    blocks, strips = index("blocks of channels").forward, index("strips").forward
    assert 1 < blocks.joined < blocks.blocks
    assert strips.strip < strips.places[1]


def case(draw: st.DrawFn) -> tuple[sc.Conv2dIndex, int]:
    kernel = [draw(st.integers(1, 5)) for _ in "ij"]
    padding, stride = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    size = [draw(st.integers(max(1, k - 2 * padding), 13)) for k in kernel]
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 6)), *kernel)
    torch.manual_seed(draw(st.integers(0, 1000)))
    mask = torch.rand(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    if draw(st.booleans()):
        mask[draw(st.integers(0, shape[0] - 1))] = draw(st.booleans())
    batch = draw(st.one_of(st.integers(1, 34), st.integers(60, 65)))
    return sc.Conv2dIndex.from_dense(mask, (size[0], size[1]), stride, padding), batch


@CASES
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    index, batch = data.draw(st.composite(case)())
    ld, offset = batch + data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3))
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    try:
        compare(index, batch, "auto", ld, offset, data.draw(st.booleans()), data.draw(st.booleans()))
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@CASES
@given(st.data())
def test_images_between_convolutions_are_read_in_place(data: st.DataObject) -> None:
    first, batch = data.draw(st.composite(case)())
    pool = min(first.halves) > 0 and data.draw(st.booleans())
    h, w = first.halves if pool else first.out
    padding = data.draw(st.integers(0, 2))
    kernel = [data.draw(st.integers(1, min(3, size + 2 * padding))) for size in (h, w)]
    mask = torch.rand(data.draw(st.integers(1, 9)), first.shape[0], *kernel) < 0.5
    second = sc.Conv2dIndex.from_dense(mask, (h, w), 1, padding)
    third = sc.Conv2dIndex.from_dense(torch.rand(4, len(mask), 1, 1) < 0.7, second.out, 1, 1)
    layers = [(index, torch.randn(index.kept)) for index in (first, second, third)]
    x = torch.randn(first.shape[1], *first.size, batch)
    rooms = second.slices(batch), third.slices(batch)
    assert rooms[0] is not None
    assert rooms[1] is not None
    y = torch.full((4, *third.out, batch), 7.0)
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    try:
        for (index, v), here, there in zip(layers, (x, *rooms), (*rooms, y), strict=True):
            sc.bind_sparse_conv2d(index, v, here, None, there, True, pool=pool and index is first)()
    finally:
        torch.set_num_threads(1)
    for index, v in layers:
        x = sc.sparse_conv2d(index, v, x, None, True, pool=pool and index is first)
    assert torch.equal(x, y)
    for room in rooms:
        room.images.zero_()
        assert not room.memory.any()  # nothing around the images


@pytest.mark.parametrize(("cache", "blocks"), [(32 << 10, 5), (48 << 10, 4)])
def test_blocks_of_channels_are_read_in_place(
    kernels: str, cache: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "first_level", lambda: cache)
    torch.manual_seed(0)
    index = sc.Conv2dIndex.from_dense(torch.rand(8, 64, 3, 3) < 0.15, (8, 9), 1, 1)
    assert index.forward.blocks == blocks
    room, x, values = index.slices(20), torch.randn(64, 8, 9, 20), torch.randn(index.kept)
    assert room is not None
    room.images[0], room.images[1, ..., :4] = x[..., :16], x[..., 16:]
    y = torch.empty(8, 4, 4, 20)
    if kernels == "torch":
        with pytest.raises(ValueError, match="slices: expected native kernels"):
            sc.bind_sparse_conv2d(index, values, room, None, y, pool=True)
        return
    sc.bind_sparse_conv2d(index, values, room, None, y, pool=True)()
    assert torch.equal(y, sc.sparse_conv2d(index, values, x, kernels=kernels, pool=True))


def test_what_cannot_be_read_in_place_says_so() -> None:
    mask = torch.ones(2, 320, 3, 3, dtype=torch.bool)
    assert sc.Conv2dIndex.from_dense(mask, (3, 17), 1, 1).slices(5) is None  # strips
    assert sc.Conv2dIndex.from_dense(mask[:, :2], (6, 7), 2, 1).slices(5) is None
    index = sc.Conv2dIndex.from_dense(mask[:, :2], (6, 7), 1, 1)
    room, values, y = index.slices(5), torch.ones(index.kept), torch.zeros(2, 6, 7, 5)
    assert room is not None
    with pytest.raises(ValueError, match=r"expected what index\.slices makes"):
        sc.bind_sparse_conv2d(index, values, sc.Slices(room.memory, 0), None, y)
    narrow = sc.Slices(room.memory[:, 1:], 1)
    with pytest.raises(ValueError, match=r"y or dy: expected fp32 \[1, 2, 6, 7, 16\] on a CPU"):
        sc.bind_sparse_conv2d(index, values, torch.zeros(2, 6, 7, 5), None, narrow)
    if _native.LIB is not None:
        with pytest.raises(ValueError, match="slices: expected native kernels"):
            sc.bind_sparse_conv2d(index, values, room, None, y, kernels="torch")


@CASES
@given(st.data())
def test_index_knows_the_mask(data: st.DataObject) -> None:
    index, _ = data.draw(st.composite(case)())
    dense = index.to_dense(torch.arange(1.0, index.kept + 1))
    assert torch.equal(dense[dense > 0], torch.arange(1.0, index.kept + 1))
    again = sc.Conv2dIndex.from_dense(dense > 0, index.size, index.stride, index.padding)
    assert torch.equal(again.positions(), index.positions())
    assert torch.equal(index.gather(dense), torch.arange(1.0, index.kept + 1))


def test_threads_do_not_change_a_bit(kernels: str) -> None:
    torch.manual_seed(0)
    index = sc.Conv2dIndex.from_dense(torch.rand(8, 32, 3, 3) < 0.3, (9, 9), 1, 1)
    x, dy = torch.randn(32, 9, 9, 70), torch.randn(8, 9, 9, 70)
    values, found = torch.randn(index.kept), []
    try:
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            y = sc.sparse_conv2d(index, values, x, kernels=kernels)
            pooled = sc.sparse_conv2d(index, values, x, kernels=kernels, pool=True)
            dx = sc.sparse_conv2d_input_grad(index, values, dy, kernels=kernels)
            found.append((y, pooled, dx, *sc.sparse_conv2d_weight_grad(index, dy, x, kernels=kernels)))
    finally:
        torch.set_num_threads(1)
    if kernels == "native":
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_spreads_through_kept_weights_alone(kernels: str, value: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(6, 5, 3, 3) < 0.1
    index = sc.Conv2dIndex.from_dense(mask, (8, 9), 1, 1)
    x, dy = torch.randn(5, 8, 9, 20), torch.randn(6, 8, 9, 20)
    x[2, 3, 4, 5] = dy[1, 6, 7, 19] = value
    touched = F.conv2d((~x.isfinite()).float().permute(3, 0, 1, 2), mask.float(), padding=1).permute(
        1, 2, 3, 0
    )
    y = sc.sparse_conv2d(index, torch.ones(index.kept), x, relu=True, kernels=kernels)
    assert torch.equal(~y.isfinite(), touched > 0)
    pooled = sc.sparse_conv2d(index, torch.ones(index.kept), x, relu=True, kernels=kernels, pool=True)
    assert torch.equal(
        pooled.permute(3, 0, 1, 2).nan_to_num(7e7), F.max_pool2d(y.permute(3, 0, 1, 2), 2).nan_to_num(7e7)
    )
    dx = sc.sparse_conv2d_input_grad(index, torch.ones(index.kept), dy, kernels=kernels)
    back = F.conv_transpose2d((~dy.isfinite()).float().permute(3, 0, 1, 2), mask.float(), padding=1)
    assert torch.equal(~dx.isfinite(), back.permute(1, 2, 3, 0) > 0)
    dv, db = sc.sparse_conv2d_weight_grad(index, dy, x, kernels=kernels)
    c, n = mask.nonzero()[:, 1], mask.nonzero()[:, 0]
    assert torch.equal(~dv.isfinite(), (c == 2) | (n == 1))
    assert torch.equal(~db.isfinite(), torch.arange(6) == 1)


def test_bound_forms_follow_their_memory(kernels: str) -> None:
    torch.manual_seed(0)
    index = sc.Conv2dIndex.from_dense(torch.rand(3, 2, 3, 3) < 0.5, (6, 7), 1, 1)
    values, bias = torch.randn(index.kept), torch.randn(3)
    x, y = torch.randn(2, 6, 7, 10), torch.empty(3, 6, 7, 10)
    dx, dv, db = torch.empty_like(x), torch.empty(index.kept), torch.empty(3)
    forward = sc.bind_sparse_conv2d(index, values, x, bias, y, kernels=kernels)
    input_grad = sc.bind_sparse_conv2d_input_grad(index, values, y, dx, kernels)
    weight_grad = sc.bind_sparse_conv2d_weight_grad(index, y, x, dv, db, kernels)
    for _ in range(2):
        for t in (x, values, bias):
            t.normal_()
        for run in (forward, input_grad, weight_grad):
            run()
        assert error(y, sc.reference(index, values.double(), x.double(), bias.double())) < 1e-6
        exact = sc.reference_grads(index, values.double(), x.double(), y.double())
        assert all(error(t, e, 420) < 3e-6 for t, e in zip((dx, dv, db), exact, strict=True))


def test_empty_batch(kernels: str) -> None:
    index = sc.Conv2dIndex.from_dense(torch.ones(3, 2, 3, 3, dtype=torch.bool), (6, 7))
    x, dy = torch.empty(2, 6, 7, 0), torch.empty(3, 4, 5, 0)
    assert sc.sparse_conv2d(index, torch.ones(index.kept), x, kernels=kernels).shape == dy.shape
    if kernels == "native":
        dv, db = sc.sparse_conv2d_weight_grad(index, dy, x, kernels=kernels)
        assert not dv.any()
        assert not db.any()


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "LIB", None)
    torch.manual_seed(0)
    index = sc.Conv2dIndex.from_dense(torch.rand(3, 2, 3, 3) < 0.5, (6, 7), 2, 1)
    compare(index, 9, "auto", 9, 0, bias=True, relu=True)
    with pytest.raises(ValueError, match="native kernels are missing"):
        sc.sparse_conv2d(index, torch.ones(index.kept), torch.zeros(2, 6, 7, 9), kernels="native")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, v, x: sc.sparse_conv2d(i, v[1:], x), r"values: expected contiguous fp32 \[54\]"),
        (lambda i, v, x: sc.sparse_conv2d(i, v, x[1:]), r"expected fp32 \[2, 6, 7, 9\] on a CPU"),
        (lambda i, v, x: sc.sparse_conv2d(i, v, x.double()), "got torch.float64"),
        (lambda i, v, x: sc.sparse_conv2d(i, v, x.repeat(1, 1, 1, 2)[..., ::2]), "contiguous batch"),
        (lambda i, v, x: sc.sparse_conv2d(i, v, x, v), r"bias: expected contiguous fp32 \[3\]"),
        (lambda i, v, x: sc.sparse_conv2d(i, v, x, kernels="fast"), "kernels='fast'"),
        (lambda i, v, x: sc.sparse_conv2d_input_grad(i, v, torch.zeros(3, 4, 5, 9)), "knows no dx"),
        (lambda i, v, x: sc.Conv2dIndex.from_dense(torch.ones(3, 2, 3, 3), (6, 7)), "expected a bool mask"),
        (
            lambda i, v, x: sc.Conv2dIndex.from_dense(torch.ones(3, 2, 3, 3) > 0, (2, 7)),
            "images of 3 x 3 or more",
        ),
        (lambda i, v, x: sc.Conv2dIndex.from_dense(torch.zeros(1, 9000, 3, 3) > 0, (9, 9)), "too many"),
    ],
)
def test_refused(call: Callable[[sc.Conv2dIndex, Tensor, Tensor], object], message: str) -> None:
    index = sc.Conv2dIndex.from_dense(torch.ones(3, 2, 3, 3, dtype=torch.bool), (6, 7), backward=False)
    with pytest.raises(ValueError, match=message):
        call(index, torch.ones(54), torch.zeros(2, 6, 7, 9))


def test_floor() -> None:
    index = sc.Conv2dIndex.from_dense(torch.ones(3, 2, 3, 3, dtype=torch.bool), (6, 7), 1, 1)
    least = sc.floor(index, 10)
    assert least["flops"] == 2 * 54 * 42 * 10
    assert least["bytes"] == 4 * 54 + index.forward.bytes() + 4 * 10 * 42 * 5
    assert index.bytes() > index.forward.bytes() >= 2 * 3 * 54
