"""Sparse convolution of images as torch has them against float64, at every level this machine has."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels import sparse_conv2d_rows as sr
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels._choose import use_native
from sparselth.kernels.sparse_conv2d_rows import ConvRows, Planes

CASES = settings(max_examples=int(os.environ.get("SPARSELTH_CASES", "25")), deadline=None)
native = pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
LAYERS = {  # [N, C, kh, kw], size, stride, padding, batch, kept
    "strips": ((9, 64, 3, 3), (32, 32), 1, 1, 1, 0.1),
    "strips, stride 2": ((9, 64, 3, 3), (32, 32), 2, 1, 2, 0.1),
    "blocks": ((6, 130, 3, 3), (8, 8), 1, 1, 1, 0.2),
    "groups of 4 x 4": ((5, 40, 3, 3), (4, 4), 1, 1, 9, 0.2),
    "groups of 2 x 2": ((5, 7, 3, 3), (2, 2), 1, 1, 33, 0.5),
    "1 x 1": ((5, 7, 1, 1), (9, 12), 1, 0, 3, 0.5),
    "stride 2, 1 x 1": ((5, 7, 1, 1), (9, 12), 2, 0, 3, 0.5),
    "LeNet-5, first": ((6, 1, 5, 5), (28, 28), 1, 2, 5, 0.3),
    "LeNet-5, second": ((16, 6, 5, 5), (14, 14), 1, 0, 5, 0.3),
    "stride beyond the kernel": ((3, 2, 2, 2), (9, 8), 3, 0, 16, 0.7),
    "padding beyond the kernel": ((3, 2, 2, 3), (5, 8), 2, 4, 3, 0.5),
    "strips that end within a vector": ((3, 40, 3, 1), (40, 43), 1, 1, 1, 0.5),
    "nothing kept": ((3, 2, 3, 3), (5, 6), 1, 1, 5, 0.0),
    "all kept": ((3, 2, 3, 3), (5, 70), 1, 1, 2, 1.0),
    "one of everything": ((1, 1, 1, 1), (1, 1), 1, 0, 1, 1.0),
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def weight(shape: tuple[int, ...], kept: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) < kept)


def inside(shape: tuple[int, ...], offset: int, fill: float) -> tuple[Tensor, Tensor]:
    """A contiguous tensor with `fill` before and behind it, and all that memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((offset + size + 64,), fill)
    return memory, memory[offset : offset + size].view(shape)


def error(found: Tensor, exact: Tensor) -> float:
    """RMS error, relative to numbers of size 1 where the exact ones are smaller."""
    if not exact.numel():
        return 0.0
    scale = max(1.0, float(exact.square().mean().sqrt()))
    return float((found.double() - exact).square().mean().sqrt()) / scale


def compare(packed: ConvRows, batch: int, kernels: str, offset: int, bias: bool, activation: str) -> None:
    n, c, _, _ = packed.shape
    _, x = inside((batch, c, *packed.size), offset, torch.nan)
    x.normal_()
    b = torch.randn(n) if bias else None
    exact = sr.reference(packed, x.double(), None if b is None else b.double(), activation)
    memory, y = inside((batch, n, *packed.out), offset, 7.0)
    y.fill_(torch.nan)
    sr.bind_sparse_conv2d_rows(packed, x, b, y, activation, kernels=kernels)()
    assert error(y, exact) < 1e-6
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = sr.sparse_conv2d_rows(packed, x, b, activation, kernels=kernels)
        if use_native(kernels):
            assert torch.equal(again, y)  # to the bit, whatever the threads
    if min(packed.halves) > 0:
        pooled_memory, pooled = inside((batch, n, *packed.halves), offset, 7.0)
        sr.bind_sparse_conv2d_rows(packed, x, b, pooled, activation, True, kernels)()
        if use_native(kernels):
            assert torch.equal(pooled, F.max_pool2d(y, 2))
        assert error(pooled, F.max_pool2d(exact, 2)) < 1e-6
        pooled.fill_(7.0)
        assert bool((pooled_memory == 7.0).all())
    y.fill_(7.0)
    assert bool((memory == 7.0).all())  # nothing beside y was written


@pytest.mark.parametrize("name", LAYERS)
def test_against_float64(name: str, kernels: str) -> None:
    shape, size, stride, padding, batch, kept = LAYERS[name]
    torch.manual_seed(0)
    w = weight(shape, kept)
    packed = ConvRows.from_dense(w, size, stride, padding, batch)
    assert torch.equal(packed.to_dense(), w)
    torch.set_num_threads(2)
    compare(packed, batch, kernels, 1, bias=True, activation="relu")


def planes(shape: tuple[int, int, int, int], apart: int, padding: int) -> Planes:
    """NaN everywhere, rows `apart` further from each other than they are long."""
    b, c, h, w = shape
    row = w + apart
    pitch = -(-((h + 2 * padding) * row + padding) // 16) * 16
    found = Planes.of(b, c, (h, w), row, padding, pitch)
    found.memory.fill_(torch.nan)
    return found


def compare_planes(packed: ConvRows, batch: int, kernels: str, apart: int, activation: str) -> None:
    """In place where that can be and not, into planes and tensors, and added to what lies there."""
    n, c, _, _ = packed.shape
    x, b, old = torch.randn(batch, c, *packed.size), torch.randn(n), torch.randn(batch, n, *packed.out)
    for held in (packed.room(batch), planes((batch, c, *packed.size), apart, 0)):
        if held is None:
            continue
        if packed.unit > 1:
            held.memory.fill_(torch.nan)  # around 1 x 1 filters there are no zeros
        held.images.copy_(x)
        for adds in (False, True):
            exact = sr.reference(packed, x.double(), b.double())
            exact = exact + old if adds else exact
            exact = ACTIVATIONS[activation](exact)
            first = []
            for threads in (2, 1, 3):
                torch.set_num_threads(threads)
                y, plain = planes((batch, n, *packed.out), apart + 1, apart), old.clone()
                bare = Planes.of(batch, n, packed.out)
                for to in (y.images, bare.images):
                    to.copy_(old)
                for out in (y, bare, plain):
                    sr.bind_sparse_conv2d_rows(packed, held, b, out, activation, kernels=kernels, adds=adds)()
                assert error(plain, exact) < 1e-6
                assert torch.equal(y.images, plain)
                assert torch.equal(bare.images, plain)
                first.append(plain)
                y.images.fill_(torch.nan)
                assert bool(y.memory.isnan().all())  # nothing beside the images was written
            if use_native(kernels):
                assert all(torch.equal(one, first[0]) for one in first)


@pytest.mark.parametrize("name", LAYERS)
def test_planes(name: str, kernels: str) -> None:
    shape, size, stride, padding, batch, kept = LAYERS[name]
    torch.manual_seed(0)
    packed = ConvRows.from_dense(weight(shape, kept), size, stride, padding, batch)
    assert packed.direct == (stride == 1)
    for apart, activation in ((0, "none"), (1, "hardswish")):
        compare_planes(packed, batch, kernels, apart, activation)


PARTED = {  # [N, C, kh, kw], size, stride, padding, kept: rows of x and y that 2 and 4 divide
    "1 x 1": ((9, 20, 1, 1), (8, 13), 1, 0, 0.4),
    "blocks": ((6, 130, 1, 1), (16, 16), 1, 0, 0.3),
    "runs": ((5, 7, 1, 1), (28, 28), 1, 0, 0.4),
    "3 x 3": ((9, 20, 3, 3), (8, 13), 1, 1, 0.2),
    "strips": ((9, 64, 3, 3), (32, 32), 1, 1, 0.1),
    "stride 2": ((9, 20, 3, 3), (16, 14), 2, 1, 0.2),
    "stride 2, 1 x 1": ((9, 20, 1, 1), (16, 14), 2, 0, 0.4),
    "stride 2, strips": ((9, 64, 3, 3), (64, 40), 2, 1, 0.1),
    "no padding": ((4, 5, 3, 3), (10, 11), 1, 0, 0.4),
}


def laid(images: Tensor, parts: int, packed: ConvRows | None = None) -> Planes:
    """Planes without zeros around them, NaN where nothing lies; or those that `packed` reads."""
    b, c, h, w = images.shape
    if packed and (room := packed.room(b)):
        room.put(images)
        return room
    found = Planes.of(b, c, (h, w), parts=parts)
    found.memory.fill_(torch.nan)
    found.put(images)
    assert torch.equal(found.get(), images)
    return found


@pytest.mark.parametrize("name", PARTED)
def test_planes_in_parts(name: str, kernels: str) -> None:
    """Of x, of y and of both, as many and not."""
    shape, size, stride, padding, kept = PARTED[name]
    torch.manual_seed(0)
    packed = ConvRows.from_dense(weight(shape, kept), size, stride, padding)
    counts = [[parts for parts in (1, 2, 4) if rows % parts == 0] for rows in (size[0], packed.out[0])]
    for batch, adds in ((1, False), (1, True), (2, False), (2, True)):
        x, b = torch.randn(batch, shape[1], *size), torch.randn(shape[0])
        old = torch.randn(batch, shape[0], *packed.out)
        exact = sr.reference(packed, x.double(), b.double())
        activation = "hardswish" if adds else "none"
        exact = ACTIVATIONS[activation](exact + old if adds else exact)
        rooms = [(f"x {i}", laid(x, i)) for i in counts[0]] + [("x", laid(x, 1, packed))]
        own = dict[str, Tensor]()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for (which, held), parts in product([*rooms, ("tensor", x)], (*counts[1], 0)):
                y = laid(old, parts) if parts else planes(tuple(old.shape), 2, 1)  # type: ignore[arg-type]
                y.put(old)
                sr.bind_sparse_conv2d_rows(packed, held, b, y, activation, kernels=kernels, adds=adds)()
                found = y.get()
                assert error(found, exact) < 1e-6
                assert torch.equal(found, own.setdefault(f"{which}, y {parts}", found))
                if not parts:
                    y.images.fill_(torch.nan)
                    assert bool(y.memory.isnan().all())  # nothing beside the images was written


@native
@pytest.mark.parametrize(("channels", "threads"), [(16, 1), (128, 4)])
def test_parts_are_no_more_work_than_the_whole(channels: int, threads: int) -> None:
    torch.set_num_threads(4)
    packed = ConvRows.from_dense(weight((channels, channels, 1, 1), 0.5), (28, 28))
    x, y = (Planes.of(1, channels, (28, 28), parts=4) for _ in "xy")
    arguments = _native.arguments(sr.bind_sparse_conv2d_rows(packed, x, None, y))
    assert (arguments.threads, arguments.batch, arguments.down) == (threads, 4, 7)


def test_planes_that_lie_close_are_not_written_beyond(kernels: str) -> None:
    """Single pixels side by side."""
    packed = ConvRows.from_dense(weight((5, 3, 1, 1), 0.5), (1, 1))
    x, b, y = torch.randn(2, 3, 1, 1), torch.randn(5), Planes.of(2, 5, (1, 1), pitch=1)
    around = y.memory.as_strided((2 * 5 + 3 * 16,), (1,))  # with what lies behind
    around.fill_(7.0)
    sr.bind_sparse_conv2d_rows(packed, x, b, y, kernels=kernels)()
    assert error(y.images, sr.reference(packed, x.double(), b.double())) < 1e-6
    assert bool((around[10:] == 7.0).all())


def test_planes_of_others_are_not_read_in_place() -> None:
    packed = ConvRows.from_dense(weight((3, 2, 3, 3), 0.5), (6, 7), 1, 1)
    room = packed.room(2)
    assert room is not None
    assert packed.reads(room)
    assert not room.bare
    for other in (Planes.of(2, 2, (6, 7)), planes((2, 2, 6, 7), 2, 1), planes((2, 2, 6, 7), 1, 0)):
        assert not packed.reads(other)
    assert ConvRows.from_dense(weight((3, 2, 3, 3), 0.5), (6, 7), 2, 1).room(2) is None
    bare = ConvRows.from_dense(weight((3, 2, 3, 3), 0.5), (6, 7))
    assert bare.reads(Planes.of(2, 2, (6, 7), pitch=bare.pitch))
    assert not bare.reads(Planes.of(2, 2, (6, 7), pitch=bare.pitch, parts=2))
    single = ConvRows.from_dense(weight((3, 2, 1, 1), 0.5), (6, 7))
    assert single.reads(Planes.of(2, 2, (6, 7)))
    assert not single.reads(planes((2, 2, 6, 7), 1, 0))


def test_layers_are_what_their_names_say() -> None:
    def packed(name: str) -> ConvRows:
        shape, size, stride, padding, batch, kept = LAYERS[name]
        return ConvRows.from_dense(weight(shape, kept), size, stride, padding, batch)

    for name, rows in (("strips", 16), ("strips, stride 2", 8)):
        assert packed(name).strip == rows
        assert packed(name).strip < packed(name).out[0]
    assert packed("blocks").blocks > 1
    assert [packed(f"groups of {name}").group for name in ("4 x 4", "2 x 2")] == [3, 11]
    assert packed("LeNet-5, first").group == 1


@CASES
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    if _native.LIB is not None:
        _native.choose(data.draw(st.sampled_from(_native.levels()), "level"))
    kernel = [data.draw(st.integers(1, 5)) for _ in "ij"]
    padding, stride = data.draw(st.integers(0, 3), "padding"), data.draw(st.integers(1, 3), "stride")
    size = [data.draw(st.one_of(st.integers(max(1, k - 2 * padding), 13), st.just(40))) for k in kernel]
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), *kernel)
    kept = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "kept")
    w = weight(shape, kept, data.draw(st.integers(0, 1000), "seed"))
    if data.draw(st.booleans()):
        w[data.draw(st.integers(0, shape[0] - 1))] = float(data.draw(st.booleans()))
    batch = data.draw(st.one_of(st.integers(1, 20), st.just(65)), "batch")
    meant = data.draw(st.one_of(st.just(batch), st.integers(1, 70)), "meant")
    torch.set_num_threads(data.draw(st.integers(1, 4), "threads"))
    with pytest.MonkeyPatch.context() as patch:  # strips, blocks and threads even here
        patch.setattr(sr, "NEAR", data.draw(st.sampled_from([256, sr.NEAR]), "near"))
        patch.setattr(sr, "FAR", data.draw(st.sampled_from([1024, sr.FAR]), "far"))
        patch.setattr(sr, "WORTH", data.draw(st.sampled_from([1, sr.WORTH]), "worth"))
        patch.setattr(sr, "WORK", 1)
        packed = ConvRows.from_dense(w, (size[0], size[1]), stride, padding, meant)
        assert torch.equal(packed.to_dense(), w)
        offset = data.draw(st.integers(0, 17), "offset")
        activation = data.draw(st.sampled_from([*ACTIVATIONS]), "activation")
        compare(packed, batch, "auto", offset, data.draw(st.booleans()), activation)
        apart = data.draw(st.integers(0, 2), "apart")
        compare_planes(packed, min(batch, 3), "auto", apart, activation)


@native
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 0), (3, 1)])
def test_every_width_is_halved(kernel: int, padding: int, kernels: str) -> None:
    """Images at the end of what may be read, at stride 2."""
    w = weight((2, 1, kernel, kernel), 1.0)
    for width in range(kernel, 71):
        x = before_a_wall(torch.randn(1, 1, 3, width))
        packed = ConvRows.from_dense(w, (3, width), 2, padding)
        found = sr.sparse_conv2d_rows(packed, x, kernels=kernels)
        assert error(found, F.conv2d(x.double(), w.double(), None, 2, padding)) < 1e-6, width


def before_a_wall(t: Tensor) -> Tensor:
    """A copy behind which the next byte must not be read."""
    size = -(-4 * t.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
    held = mmap.mmap(-1, size + mmap.PAGESIZE)
    bytes_ = torch.frombuffer(held, dtype=torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(bytes_.data_ptr() + size, mmap.PAGESIZE, 0) == 0
    return bytes_[:size].view(torch.float32)[-t.numel() :].view(t.shape).copy_(t)


@native
@pytest.mark.parametrize("size", [7, 14, 28, 56])
def test_threads_have_as_many_pieces(size: int) -> None:
    torch.set_num_threads(2)
    packed = ConvRows.from_dense(weight((256, 64, 1, 1), 0.5), (size, size))
    x, y = packed.room(1), Planes.of(1, 256, (size, size))
    assert x is not None
    a = _native.arguments(sr.bind_sparse_conv2d_rows(packed, x, None, y))
    runs = -(-size * size // (sr.VECTORS * _native.lanes()))
    assert a.threads == 2
    assert runs * a.parts % 2 == 0


@pytest.mark.parametrize(
    ("channels", "size", "strip"), [(512, 14, 7), (256, 28, 8), (128, 56, 8), (64, 112, 4)]
)
def test_runs_of_many_channels_are_not_short(channels: int, size: int, strip: int) -> None:
    """Of stride 2, whose planes are four times as many: up to what registers hold, not all of an image."""
    packed = ConvRows.from_dense(weight((4, channels, 3, 3), 0.1), (size, size), 2, 1)
    assert packed.strip == strip


def test_no_channels_are_one_block(kernels: str) -> None:
    """y is the bias, and is written."""
    packed, bias = ConvRows.from_dense(torch.zeros(3, 0, 3, 3), (4, 5), 1, 1), torch.randn(3)
    y = torch.full((1, 3, 4, 5), torch.nan)
    sr.bind_sparse_conv2d_rows(packed, torch.zeros(1, 0, 4, 5), bias, y, kernels=kernels)()
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand(1, 3, 4, 5))


@native
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [(8, 33), (4, 4)])
def test_nan_spreads_through_kept_weights_alone(size: tuple[int, int], value: float, kernels: str) -> None:
    mask = (weight((6, 5, 3, 3), 0.1) != 0).float()
    packed = ConvRows.from_dense(mask, size, 1, 1, 4)
    x = torch.randn(4, 5, *size)
    x[1, 2, 3, size[1] - 1] = x[2, 4, 0, 0] = value
    touched = F.conv2d((~x.isfinite()).float(), mask, padding=1) > 0
    assert bool(touched.any())
    y = sr.sparse_conv2d_rows(packed, x, activation="relu", kernels=kernels)
    assert torch.equal(~y.isfinite(), touched)
    pooled = sr.sparse_conv2d_rows(packed, x, activation="relu", pool=True, kernels=kernels)
    assert torch.equal(pooled.nan_to_num(7e7), F.max_pool2d(y, 2).nan_to_num(7e7))


def test_a_call_takes_any_batch_and_layout(kernels: str) -> None:
    w, bias = weight((5, 6, 3, 3), 0.4), torch.randn(5)
    packed = ConvRows.from_dense(w, (4, 4), 1, 1, 8)
    call = sr.sparse_conv2d_rows_call(packed, bias, kernels=kernels)
    first: list[tuple[Tensor, Tensor]] = []
    for batch in (8, 1, 0, 13, 8):
        x = torch.randn(batch, 6, 4, 4)
        y = call(x.contiguous(memory_format=torch.channels_last))
        assert y.shape == (batch, 5, 4, 4)
        assert error(y, sr.reference(packed, x.double(), bias.double())) < 1e-6
        first.append((y, y.clone()))
    assert all(torch.equal(y, copy) for y, copy in first)  # outputs are in memory of their own


def test_calls_of_several_threads_do_not_meet() -> None:
    packed = ConvRows.from_dense(weight((32, 16, 3, 3), 0.4), (16, 16), 1, 1)
    call = sr.sparse_conv2d_rows_call(packed)
    images = [torch.randn(1, 16, 16, 16) for _ in range(8)]
    alone = [call(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = list(pool.map(call, images))
            assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_bound_forms_follow_their_memory(kernels: str) -> None:
    packed = ConvRows.from_dense(weight((3, 2, 3, 3), 0.5), (6, 7), 1, 1, 2)
    x, bias, y = torch.randn(2, 2, 6, 7), torch.randn(3), torch.empty(2, 3, 6, 7)
    run = sr.bind_sparse_conv2d_rows(packed, x, bias, y, kernels=kernels)
    for _ in range(2):
        for t in (x, bias, packed.values):
            t.normal_()
        run()
        assert error(y, sr.reference(packed, x.double(), bias.double())) < 1e-6


def test_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "LIB", None)
    packed = ConvRows.from_dense(weight((3, 2, 3, 3), 0.5), (6, 7), 2, 1)
    compare(packed, 9, "auto", 3, bias=True, activation="relu")
    with pytest.raises(ValueError, match="native kernels are missing"):
        sr.sparse_conv2d_rows(packed, torch.zeros(9, 2, 6, 7), kernels="native")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: sr.sparse_conv2d_rows(p, x[:, 1:]), r"x: expected fp32 \[9, 2, 6, 7\] on a CPU"),
        (lambda p, x: sr.sparse_conv2d_rows(p, x.double()), "got torch.float64"),
        (lambda p, x: sr.sparse_conv2d_rows(p, x, x), r"bias: expected contiguous fp32 \[3\]"),
        (lambda p, x: sr.sparse_conv2d_rows(p, x, kernels="fast"), "kernels='fast'"),
        (
            lambda p, x: sr.sparse_conv2d_rows(p, x, None, "gelu"),
            "activation: expected none, relu, .* got .gelu",
        ),
        (lambda p, x: sr.bind_sparse_conv2d_rows(p, x, None, x), r"y: expected fp32 \[9, 3, 4, 5\]"),
        (lambda p, x: sr.bind_sparse_conv2d_rows(p, x, None, Planes.of(9, 3, (4, 4))), r"y: expected fp32"),
        (
            lambda p, x: sr.bind_sparse_conv2d_rows(p, x, None, Planes.of(9, 3, (2, 2)), pool=True),
            "pool: expected a y of its own",
        ),
        (lambda p, x: sr.bind_sparse_conv2d_rows(p, x.mT.contiguous().mT, None, x), "expected a contiguous"),
        (lambda p, x: ConvRows.from_dense(x[0], (6, 7)), r"expected a weight \[N, C, kh, kw\] in fp32"),
        (lambda p, x: ConvRows.from_dense(x > 0, (6, 7)), "got torch.bool"),
        (lambda p, x: ConvRows.from_dense(x, (5, 7)), "expected images of 6 x 7 or more, got 5 x 7"),
        (lambda p, x: ConvRows.from_dense(x, (9, 9), 0), "padding 0, stride 0"),
        (lambda p, x: ConvRows.from_dense(x[..., :3, :3], (3, 65536)), "images of 3 x 65536 are too wide"),
    ],
)
def test_refused(call: Callable[[ConvRows, Tensor], object], message: str) -> None:
    packed = ConvRows.from_dense(torch.ones(3, 2, 3, 3), (6, 7))
    with pytest.raises(ValueError, match=message):
        call(packed, torch.zeros(9, 2, 6, 7))


def test_floor_and_bytes() -> None:
    packed = ConvRows.from_dense(torch.ones(3, 2, 3, 3), (6, 7), 1, 1)
    least = sr.floor(packed, 10)
    assert least["flops"] == 2 * 54 * 42 * 10
    assert packed.bytes() == 6 * 54 + 4 * (3 * packed.blocks + 1)
    assert least["bytes"] == packed.bytes() + 4 * 10 * 42 * 5
