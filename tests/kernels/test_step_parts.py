"""Against torch to the bit where that is promised, else against float64; at every level this machine has."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import kernels_of
from sparselth.engine import dense, layers
from sparselth.kernels import _native
from sparselth.kernels.step_parts import (
    bias_relu,
    bind_bias_relu,
    bind_columns,
    bind_cross_entropy,
    bind_cross_entropy_grad,
    bind_gather,
    bind_max_pool,
    bind_max_pool_backward,
    bind_relu_backward,
    bind_rows,
    cross_entropy,
    cross_entropy_grad,
    floor,
    gather,
    max_pool,
    max_pool_backward,
    relu_backward,
    sequence,
    transpose,
)

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
CANARY = 12345.0
WAYS = [*_native.levels(), "torch"]
WILD = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 3e38, -3e38]
needs_native = pytest.mark.skipif(_native.LIB is None, reason=f"native kernels: {_native.WHY}")
sizes = st.sampled_from([*range(1, 20), 31, 32, 33, 59, 60, 64, 65, 100, 127, 128, 130])
seeds = st.integers(0, 10**6)


class Laid:
    """Tensors in memory with room behind their lines and rows, filled with what nobody may touch."""

    def __init__(self, draw: torch.Generator, gap: int, offset: int, filling: float = CANARY) -> None:
        self.draw, self.gap, self.offset, self.filling = draw, gap, offset, filling
        self.all: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor) -> Tensor:
        *outer, batch = t.shape
        room = [*outer[:-1], outer[-1] + (self.gap > 0) * (len(outer) > 1), batch + self.gap]
        storage = torch.full((torch.Size(room).numel() + self.offset,), self.filling)
        view = storage[self.offset :].view(room)[..., : outer[-1], :batch]
        view.copy_(t)
        self.all.append((storage, view))
        return view

    def check(self) -> None:
        for storage, view in self.all:
            view.fill_(self.filling)
            assert storage.equal(torch.full_like(storage, self.filling)), "what lies beside was written"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wild(t: Tensor, draw: torch.Generator) -> Tensor:
    """`t` with some numbers of WILD in it."""
    chosen = torch.tensor(WILD)[torch.randint(len(WILD), t.shape, generator=draw)]
    return torch.where(torch.rand(t.shape, generator=draw) < 0.1, chosen, t)


def same(found: Tensor, right: Tensor) -> bool:
    """Bits, but all NaN are alike."""
    found, right = (torch.where(t.isnan(), torch.nan, t).contiguous() for t in (found, right))
    return found.shape == right.shape and bool((found.view(torch.int32) == right.view(torch.int32)).all())


def torch_has_this_level(way: str) -> bool:
    """Whether torch itself uses fused multiply-adds as this way does."""
    return (way != "plain") == (torch.backends.cpu.get_cpu_capability() != "DEFAULT") or way == "torch"


# ---- gather ----


def data(draw: torch.Generator, n: int, pixels: int) -> dict[str, Tensor]:
    return {
        "images": torch.randint(0, 256, (n, pixels), dtype=torch.uint8, generator=draw),
        "labels": torch.randint(0, 10, (n,), generator=draw),
        "scale": torch.rand(pixels, generator=draw) / 255,
        "shift": -torch.rand(pixels, generator=draw),
    }


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(1, 40), sizes, sizes, st.floats(0, 1), st.booleans(), seeds)
@settings(max_examples=CASES)
def test_gather_has_the_bits_of_batches(
    way: str, n: int, pixels: int, batch: int, keep: float, some: bool, seed: int
) -> None:
    draw, kernels = generator(seed), kernels_of(way)
    d = data(draw, n, pixels)
    index = torch.randint(n, (batch,), generator=draw)
    live = torch.arange(pixels, dtype=torch.int32)
    if some:
        live = live[torch.rand(pixels, generator=draw) < keep]
    x, y = gather(**d, index=index, rows=live if some else None, kernels=kernels)
    # as sparselth/data/batches.py has it
    right = torch.addcmul(d["shift"][:, None], d["images"][index].T.float(), d["scale"][:, None])[live]
    assert y.equal(d["labels"][index])
    if torch_has_this_level(way):
        assert x.equal(right)
    torch.testing.assert_close(x, right, rtol=0, atol=2**-23)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("batch", "ld", "offset"), [(60, 64, 0), (60, 61, 3), (7, 16, 1), (16, 16, 0)])
def test_gather_zeroes_what_lies_behind_the_batch(way: str, batch: int, ld: int, offset: int) -> None:
    draw, kernels = generator(0), kernels_of(way)
    d = data(draw, 30, 50)
    storage = torch.full((offset + 50 * ld + 8,), torch.nan)
    x = storage[offset : offset + 50 * ld].view(50, ld)[:, :batch]
    y = torch.empty(batch, dtype=torch.int64)
    run = bind_gather(d["images"], d["labels"], d["scale"], d["shift"], x, y, kernels=kernels)
    for _ in range(2):
        index = torch.randint(30, (batch,), generator=draw)
        run(index)
        assert x.equal(gather(**d, index=index, kernels=kernels)[0])
        assert y.equal(d["labels"][index])
    whole = storage[offset : offset + 50 * ld].view(50, ld)
    assert not whole[:, batch:].any()
    assert storage[:offset].isnan().all()


def test_the_last_row_may_end_with_the_batch() -> None:
    d, storage = data(generator(0), 4, 3), torch.ones(2 * 16 + 5)
    x, y = storage.as_strided((3, 5), (16, 1)), torch.empty(5, dtype=torch.int64)
    bind_gather(d["images"], d["labels"], d["scale"], d["shift"], x, y)(torch.zeros(5, dtype=torch.int64))
    assert x.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_gather_refuses_an_index_outside_of_the_images(way: str, bad: int) -> None:
    d, kernels = data(generator(0), 30, 20), kernels_of(way)
    index = torch.zeros(5, dtype=torch.int64)
    index[3] = bad
    with pytest.raises(IndexError, match="from 0 to 29"):
        gather(**d, index=index, kernels=kernels)


@pytest.mark.parametrize("way", WAYS)
def test_gather_refuses_what_does_not_fit(way: str) -> None:
    d, kernels = data(generator(0), 30, 20), kernels_of(way)
    index = torch.zeros(5, dtype=torch.int64)
    for name, other in (
        ("images", d["images"].float()),
        ("images", d["images"].T),
        ("labels", d["labels"][1:]),
        ("scale", d["scale"][:, None]),
        ("shift", d["shift"].double()),
        ("rows", torch.tensor([3, 3], dtype=torch.int32)),
        ("rows", torch.tensor([3, 20], dtype=torch.int32)),
        ("rows", torch.tensor([-1, 2], dtype=torch.int32)),
        ("rows", torch.tensor([1, 2])),
    ):
        with pytest.raises(ValueError, match="expected"):
            gather(**(d | {"index": index, "kernels": kernels, name: other}))
    run = bind_gather(d["images"], d["labels"], d["scale"], d["shift"], torch.empty(20, 5), index.clone())
    for other in (index[:4], index.int(), torch.zeros(10, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match="index: expected"):
            run(other)


# ---- bias and ReLU ----

images = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), sizes)
matrices = st.tuples(st.integers(1, 9), sizes)
layouts = st.tuples(st.sampled_from([0, 0, 1, 4]), st.integers(0, 3))  # gap behind the batch, offset


@pytest.mark.parametrize("way", WAYS)
@given(st.one_of(images, matrices), layouts, st.booleans(), st.integers(1, 3), seeds)
@settings(max_examples=CASES)
def test_bias_relu_has_torchs_bits(
    way: str, shape: tuple[int, ...], layout: tuple[int, int], biased: bool, threads: int, seed: int
) -> None:
    draw, kernels = generator(seed), kernels_of(way)
    torch.set_num_threads(threads)
    x = wild(torch.randn(shape, generator=draw), draw)
    bias = wild(torch.randn(shape[0], generator=draw), draw) if biased else None
    right = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 1))
    laid = Laid(draw, *layout)
    y = laid(x)
    assert bias_relu(y, bias, kernels) is y
    assert same(y, right.relu())
    laid.check()


@pytest.mark.parametrize("way", WAYS)
@given(st.one_of(images, matrices), layouts, st.booleans(), st.booleans(), seeds)
@settings(max_examples=CASES)
def test_relu_backward_has_torchs_bits_and_sums(
    way: str, shape: tuple[int, ...], layout: tuple[int, int], cut: bool, unlike: bool, seed: int
) -> None:
    draw, kernels = generator(seed), kernels_of(way)
    laid, other = Laid(draw, *layout), Laid(draw, 3 if unlike else layout[0], layout[1], torch.nan)
    x = torch.randn(shape, generator=draw)
    y = other(x) if cut else None
    before = torch.randn(shape, generator=draw)
    right = torch.ops.aten.threshold_backward(before, x, 0) if cut else before
    dy = laid(before)
    found, dbias = relu_backward(dy, y, kernels)
    assert same(found, right)
    sums = right.double().flatten(1).sum(1)
    assert ((dbias - sums).abs() <= 1e-6 * right.double().flatten(1).norm(dim=1) + 1e-9).all()
    added = torch.randn(len(dbias), generator=draw)
    expected = dbias + added  # of the new dy, which is cut already
    bind_relu_backward(dy, y, added, kernels, add=True)()
    assert same(added, expected)
    assert same(found, right)
    laid.check()
    x, before = wild(x, draw), wild(before, draw)
    if cut:
        dy, y = laid(before), other(x)
        found, dbias = relu_backward(dy, y, kernels)
        assert same(found, torch.ops.aten.threshold_backward(before, x, 0))
        assert dbias[found.isnan().flatten(1).any(1)].isnan().all()
        laid.check()


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_many_numbers_are_exact_enough(way: str) -> None:
    dy = torch.rand(3, 24, 24, 61, generator=generator(0))
    right = dy.double().flatten(1).sum(1)
    dbias = relu_backward(dy, None, kernels_of(way))[1]
    assert ((dbias - right) / right).abs().max() < 1e-6


# ---- cross-entropy ----


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(1, 12), sizes, layouts, st.sampled_from([0.1, 1.0, 10.0, 100.0]), seeds)
@settings(max_examples=CASES)
def test_cross_entropy_and_its_gradient(
    way: str, classes: int, batch: int, layout: tuple[int, int], scale: float, seed: int
) -> None:
    draw, kernels = generator(seed), kernels_of(way)
    laid, beside = Laid(draw, *layout, torch.nan), Laid(draw, *layout)
    z = scale * torch.randn(classes, batch, generator=draw)
    labels = torch.randint(classes, (batch,), generator=draw)
    logits, dlogits = laid(z), beside(torch.zeros(classes, batch))
    dbias = torch.empty(classes)
    bind_cross_entropy_grad(logits, labels, dlogits, dbias, kernels)()
    onehot = torch.nn.functional.one_hot(labels, classes).T
    p = torch.softmax(z.double(), 0)
    right = (p - onehot) / batch
    # some ulp of the probability, and one of each difference
    errors = (8 + z.max(0).values - z) * p + 2 * onehot
    assert ((dlogits - right).abs() <= errors * 2**-24 / batch + 1e-44).all()
    assert (dbias - dlogits.double().sum(1)).abs().max() <= 1e-6 / batch**0.5
    loss, answers = cross_entropy(logits, labels, kernels)
    terms = -torch.log_softmax(z.double(), 0).gather(0, labels[None])
    assert abs(loss - terms.sum().item()) <= 1e-6 * (z.abs().max().item() + terms.sum().item()) + 1e-7 * batch
    assert answers == (z.argmax(0) == labels).sum()
    beside.check()


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(1, 5), sizes, seeds)
@settings(max_examples=CASES)
def test_cross_entropy_of_nan_and_infinity_is_torchs(way: str, classes: int, batch: int, seed: int) -> None:
    draw, kernels = generator(seed), kernels_of(way)
    logits = wild(torch.randint(-1, 2, (classes, batch), generator=draw).float(), draw)  # equal ones too
    labels = torch.randint(classes, (batch,), generator=draw)
    found = cross_entropy_grad(logits, labels, kernels)
    right = cross_entropy_grad(logits, labels, "torch")
    assert found.isnan().equal(right.isnan())
    torch.testing.assert_close(found, right, equal_nan=True, rtol=1e-5, atol=1e-7)
    for b in range(batch):  # each column alone: one NaN makes a NaN of the loss
        column, label = logits[:, b : b + 1], labels[b : b + 1]
        loss, answers = cross_entropy(column, label, kernels)
        right_loss, right_answers = cross_entropy(column, label, "torch")
        assert answers == right_answers
        assert loss == pytest.approx(right_loss, rel=1e-6, abs=1e-6, nan_ok=True)
    assert cross_entropy(logits, labels, kernels)[1] == cross_entropy(logits, labels, "torch")[1]


@needs_native
@pytest.mark.parametrize("way", _native.levels())
def test_softmax_is_within_three_ulp(way: str) -> None:
    kernels_of(way)
    # exponents far apart, down to subnormal results; one class holds nearly all
    low = torch.linspace(-103.9, 0, 200_000)
    logits = torch.stack([low, torch.zeros_like(low)])
    labels = torch.ones(len(low), dtype=torch.int64)
    found = len(low) * cross_entropy_grad(logits, labels)[0].double()
    right = torch.softmax(logits.double(), 0)[0]
    ulp = torch.ldexp(torch.tensor(1.0), right.log2().floor().clamp_min(-126) - 23).double()
    # times B and its rounding is undone above
    assert ((found - right).abs()[right > 1e-30] / ulp[right > 1e-30]).max() < 4
    assert ((found - right).abs() <= 4 * ulp + len(low) * 2.0**-149).all()


@needs_native
@pytest.mark.parametrize("way", _native.levels())
@pytest.mark.parametrize("label", [-1, 3, 2**32])
def test_a_label_of_no_class_makes_nan(way: str, label: int) -> None:
    kernels_of(way)
    labels = torch.tensor([0, 1, label, 2, 0])
    d = cross_entropy_grad(torch.zeros(3, 5), labels)
    assert d[:, 2].isnan().all()
    assert d[:, [0, 1, 3, 4]].isfinite().all()
    loss, answers = cross_entropy(torch.zeros(3, 5), labels)
    assert loss != loss
    assert answers == 2


def test_the_network_and_these_agree() -> None:
    draw = generator(0)
    logits, labels = torch.randn(10, 60, generator=draw), torch.randint(10, (60,), generator=draw)
    theirs = dense.cross_entropy_grad(logits[None], labels[None, None])[0]
    torch.testing.assert_close(cross_entropy_grad(logits, labels), theirs, rtol=1e-5, atol=1e-8)
    loss, right = dense.cross_entropy(logits[None], labels[None, None])
    found = cross_entropy(logits, labels)
    assert found == (pytest.approx(loss.item(), rel=1e-6), right.item())


# ---- pooling ----


def network_pool(x: Tensor, dy: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """(y, dx) as sparselth/engine/layers.py has them."""
    c, h, w, b = x.shape
    out = torch.zeros(1, c, h // 2, w // 2, b)
    pool, cut = layers.DensePool(2, out, out.new_zeros(1, c, h, w, b)), layers.DenseReLU()
    y = pool.forward(x[None])
    if relu:
        cut.forward(y)
    dx = pool.backward(cut.backward(dy[None].clone()) if relu else dy[None])
    return y[0], dx[0]


@pytest.mark.parametrize("way", WAYS)
@given(
    st.tuples(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), sizes),
    layouts,
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    seeds,
)
@settings(max_examples=CASES)
def test_pooling_has_the_bits_of_the_network(
    way: str, shape: Any, layout: tuple[int, int], relu: bool, odd: bool, threads: int, seed: int
) -> None:
    draw, kernels = generator(seed), kernels_of(way)
    torch.set_num_threads(threads)
    c, h, w, b = shape
    x = torch.randint(-2, 3, shape, generator=draw).float()  # many ties
    dy = torch.randn(c, h // 2, w // 2, b, generator=draw)
    if odd:
        x, dy = wild(x, draw), wild(dy, draw)
    laid = Laid(draw, *layout)
    right_y, right_dx = network_pool(x, dy, relu)
    xs, ys, dys, dxs = (laid(t) for t in (x, torch.zeros_like(dy), dy, torch.full(shape, torch.nan)))
    dbias = torch.empty(c)
    bind_max_pool(xs, ys, relu, kernels)()
    bind_max_pool_backward(dys, xs, ys, dxs, relu, dbias, kernels)()
    assert (ys == right_y).logical_or(ys.isnan() & right_y.isnan()).all()  # 0 and -0 are one
    assert same(dxs + 0.0, right_dx + 0.0)
    cut = torch.ops.aten.threshold_backward(dy, right_y, 0) if relu else dy
    sums = cut.double().flatten(1).sum(1)
    fine = cut.isfinite().flatten(1).all(1) & (cut.abs() < 1e30).flatten(1).all(1)
    assert ((dbias - sums).abs() <= 1e-6 * cut.double().flatten(1).norm(dim=1) + 1e-9)[fine].all()
    laid.check()


@pytest.mark.parametrize("way", WAYS)
def test_pooling_without_buffers(way: str) -> None:
    kernels = kernels_of(way)
    x = torch.randn(2, 4, 6, 5, generator=generator(0))
    y = max_pool(x, True, kernels)
    dx = max_pool_backward(torch.ones_like(y), x, y, True, kernels)
    assert y.equal(torch.nn.functional.max_pool2d(x.permute(3, 0, 1, 2), 2).relu().permute(1, 2, 3, 0))
    assert dx.sum() == (y > 0).sum()


# ---- calls ----


@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_is_its_calls_in_turn(way: str) -> None:
    kernels = kernels_of(way)
    y, bias = torch.randn(3, 5, generator=generator(0)), torch.tensor([-0.5, 0.0, 0.5])
    right = ((y + bias[:, None]).relu() + bias[:, None]).relu()
    call = bind_bias_relu(y, bias, kernels)
    order: list[int] = []
    assert sequence([call, call])() is None
    assert y.equal(right)
    sequence([lambda: order.append(1), call, call, lambda: order.append(2), call])()
    assert order == [1, 2]
    for _ in range(3):
        right = (right + bias[:, None]).relu()
    assert y.equal(right)
    sequence([])()


def test_refuses_what_does_not_fit() -> None:
    t, labels = torch.zeros(3, 5), torch.zeros(5, dtype=torch.int64)
    for call in (
        lambda: bind_bias_relu(t.double()),
        lambda: bind_bias_relu(t.T),
        lambda: bind_bias_relu(torch.zeros(3)),
        lambda: bind_bias_relu(torch.zeros(1, 5).expand(3, 5)),
        lambda: bind_bias_relu(t, torch.zeros(5)),
        lambda: bind_relu_backward(t, torch.zeros(3, 4)),
        lambda: bind_relu_backward(t, t.clone(), torch.zeros(5)),
        lambda: bind_cross_entropy_grad(t, labels, t),
        lambda: bind_cross_entropy_grad(t, labels[1:], t.clone()),
        lambda: bind_cross_entropy_grad(t, labels, t.clone(), torch.zeros(5)),
        lambda: bind_cross_entropy(t, labels.int()),
        lambda: bind_max_pool(torch.zeros(1, 4, 4, 2), torch.zeros(1, 2, 1, 2)),
        lambda: bind_max_pool_backward(*[torch.zeros(1, 4, 4, 2)] * 4),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    with pytest.raises(ValueError, match="kernels"):
        bind_bias_relu(t, kernels="triton")


def test_floors() -> None:
    assert floor("gather", 784 * 60) == {"bytes": 784 * 60 * 5, "flops": 2 * 784 * 60}
    assert floor("max_pool", 16) == {"bytes": 16 * 5, "flops": 16}
    assert floor("max_pool_backward", 16)["bytes"] == 16 * 10


@settings(max_examples=CASES, deadline=None)
@given(
    rows=sizes, columns=sizes, gap=st.integers(0, 20), way=st.sampled_from(WAYS), threads=st.integers(1, 3)
)
def test_transpose(rows: int, columns: int, gap: int, way: str, threads: int) -> None:
    kernels = kernels_of(way)
    torch.set_num_threads(threads)
    x = torch.randn(rows, columns)
    memory = torch.full((columns, rows + gap), CANARY)
    inside = memory[:, :rows]
    bind_columns(inside, kernels)(x)
    assert torch.equal(inside, x.t())
    assert bool((memory[:, rows:] == CANARY).all())
    back = torch.full((rows + 1, columns), CANARY)
    bind_rows(inside, kernels)(back[:rows])
    assert torch.equal(back[:rows], x)
    assert bool((back[rows:] == CANARY).all())
    assert torch.equal(transpose(x.t(), kernels), x)


@pytest.mark.parametrize("way", WAYS)
def test_transpose_with_many_threads_and_misuse(way: str) -> None:
    kernels = kernels_of(way)
    torch.set_num_threads(4)
    x = torch.randn(130, 1030)  # more than one thread takes
    assert torch.equal(transpose(x, kernels), x.t())
    fill = bind_columns(torch.zeros(6, 4), kernels)
    fill(torch.ones(4, 2, 3))
    for wrong in (torch.ones(3, 6), torch.ones(4, 5), torch.ones(6, 4).t(), torch.ones(4, 6).double()):
        with pytest.raises(ValueError, match=r"expected (contiguous fp32 of 4 rows|6 numbers a row)"):
            fill(wrong)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(3, 700_001), (61, 36_001), (1500, 1500), (1, 1 << 21), (256, 8192)])
def test_transpose_beyond_the_caches(shape: tuple[int, int], way: str) -> None:
    kernels = kernels_of(way)
    rows, columns = shape
    x, memory = torch.randn(shape), torch.full((columns + 1, rows + 3), CANARY)
    inside = memory[:columns, :rows]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        inside.zero_()
        bind_columns(inside, kernels)(x)
        assert torch.equal(inside, x.t())
        back = torch.full((rows + 1, columns), CANARY)
        bind_rows(inside, kernels)(back[:rows])
        assert torch.equal(back[:rows], x)
        assert bool((back[rows:] == CANARY).all())
    assert bool((memory[:, rows:] == CANARY).all() and (memory[columns:] == CANARY).all())
