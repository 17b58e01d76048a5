"""The small kernels of a step of R replicas, against float64, in company and alone, with poison around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import DEVICE, INF, NAN, compare, generator, must_repeat, pick, poisoned, same_bits, surrounded
from sparselth.kernels import replica_parts as op
from sparselth.kernels._triton import INTERPRET

on_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="Triton's interpreter is off")
pytestmark = on_triton
SHAPES = [(1, 1, 1), (3, 2, 7), (2, 5, 27), (2, 3, 784), (1, 2, 1040)]  # R, B, K or N
SHAPES += pick([], [(100, 60, 784), (30, 60, 3072), (100, 60, 300), (7, 61, 101)])
CLASSES = [(1, 1, 1), (2, 3, 10), (3, 65, 10), (2, 5, 17), (1, 4, 100)]  # R, B, classes
CLASSES += pick([], [(100, 60, 10), (1, 5000, 10), (3, 60, 1000)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), device=DEVICE)


def apart(t: Tensor) -> Tensor:
    """The same numbers with NaN between the replicas, as biases lie in flat buffers."""
    wide = t.new_full((len(t), t[0].numel() + 5), NAN)
    wide[:, 2:-3] = t.flatten(1)
    return wide[:, 2:-3]


@given(st.integers(1, 9) | st.sampled_from([127, 128, 129, 300]), st.integers(0, 40), st.integers(1, 20))
@settings(max_examples=pick(10, 40))
def test_begin_step(replicas: int, clock: int, steps: int) -> None:
    rates = torch.rand(50, dtype=torch.float64, generator=generator(clock), device=DEVICE)
    starts = torch.randint(0, 9, (replicas,), generator=generator(1), device=DEVICE).float()
    at = torch.tensor([clock], device=DEVICE)
    with poisoned():
        lr = torch.empty(replicas, dtype=torch.float64, device=DEVICE)
        count = torch.empty(replicas, device=DEVICE)
        place = torch.empty(1, dtype=torch.int64, device=DEVICE)
        for now in range(clock, clock + 3):
            op.begin_step(at, rates, starts, lr, count, place, steps, kernels="triton")
            assert (int(at), int(place)) == (now + 1, now % steps)
            assert torch.equal(lr, rates[now].expand(replicas))
            assert torch.equal(count, now + 1 - starts)
    right = [torch.tensor([clock], device=DEVICE), *(torch.zeros_like(t) for t in (lr, count, place))]
    at = right[0].clone()
    op.begin_step(at, rates, starts, lr, count, place, steps, kernels="triton")
    op.begin_step(right[0], rates, starts, *right[1:], steps, kernels="reference")
    for found, expected in zip((at, lr, count, place), right, strict=True):
        assert torch.equal(found, expected)


def test_behind_the_last_rate_there_is_none() -> None:
    vectors = [torch.zeros(2, dtype=torch.float64, device=DEVICE), torch.zeros(2, device=DEVICE)]
    clock, place = (torch.tensor([n], device=DEVICE) for n in (3, 0))
    rates = surrounded(torch.ones(3, dtype=torch.float64, device=DEVICE))
    op.begin_step(clock, rates, torch.zeros(2, device=DEVICE), *vectors, place, 2, kernels="triton")
    assert vectors[0].isnan().all()


@pytest.mark.parametrize(("replicas", "batch", "pixels"), SHAPES)
def test_gather(replicas: int, batch: int, pixels: int) -> None:
    """Float64 of scaled bytes; every replica has its own images, and alone the same bits."""
    count, steps = 11, 3
    draw: dict[str, Any] = {"generator": generator(pixels), "device": DEVICE}
    images = torch.randint(0, 256, (count, pixels), dtype=torch.uint8, **draw)
    labels = torch.randint(0, 10, (count,), **draw)
    order = torch.randint(0, count, (replicas, steps, batch), **draw)
    scale, shift = torch.rand(pixels, **draw) / 100, torch.randn(pixels, **draw)
    fixed = [surrounded(t) for t in (scale, shift)]

    def run(order: Tensor, at: int) -> dict[str, Tensor]:
        with poisoned():
            x = torch.empty(len(order), batch, pixels, device=DEVICE)
            y = torch.empty(len(order), batch, dtype=torch.int64, device=DEVICE)
            place = torch.tensor([at], device=DEVICE)
            op.gather(images, labels, *fixed, order, place, x, y, kernels="triton")
        return {"x": x, "y": y}

    for at in range(steps):
        found, place = run(order, at), torch.tensor([at], device=DEVICE)
        right, y = op.reference_gather(images, labels, scale.double(), shift.double(), order, place)
        torchs, _ = op.reference_gather(images, labels, scale, shift, order, place)
        compare({"x": found["x"]}, {"x": right}, {"x": torchs}, "ieee", {"x": 2})
        assert torch.equal(found["y"], y)
        must_repeat(found, run(order, at))
        for r in range(0, replicas, max(1, replicas // 3)):
            alone = run(order[r : r + 1].contiguous(), at)
            must_repeat({name: t[r : r + 1] for name, t in found.items()}, alone, "to be alone")


@pytest.mark.parametrize(("replicas", "batch", "columns"), SHAPES)
@pytest.mark.parametrize("size", [(), (3, 2)], ids=["vectors", "images"])
@pytest.mark.parametrize("biases", ["in a row", "apart"])
def test_bias_relu(replicas: int, batch: int, columns: int, size: tuple[int, ...], biases: str) -> None:
    y = normal(replicas, batch, *size, columns).movedim(-1, 1).movedim(2, -1)  # [R, N, ..., B]
    bias = normal(replicas, columns, seed=1)
    y[(0,) * y.dim()], y[(-1,) * y.dim()], bias[0, -1] = NAN, -0.0, INF

    def run(y: Tensor, bias: Tensor) -> Tensor:
        in_memory = y.movedim(-1, 1).movedim(2, -1)
        found = surrounded(in_memory.contiguous()).movedim(-1, 1).movedim(2, -1)
        op.bias_relu(found, apart(bias) if biases == "apart" else bias, kernels="triton")
        base = found._base
        assert base is not None
        assert base[:256].isnan().all()
        assert base[-256:].isnan().all()
        return found

    found = run(y, bias)
    right = torch.relu(y + bias.view(replicas, columns, *[1] * (y.dim() - 2)))
    assert torch.equal(found.nan_to_num(-1), right.nan_to_num(-1))
    for r in range(0, replicas, max(1, replicas // 3)):
        assert same_bits(run(y[r : r + 1], bias[r : r + 1]), found[r : r + 1])


POOLS = [(1, 1, 1, 2, 2, 2), (2, 3, 5, 7, 6, 2), (3, 2, 4, 9, 11, 4)]  # R, B, C, H, W, size
POOLS += pick([], [(30, 60, 64, 32, 32, 2), (15, 60, 6, 28, 28, 2), (2, 7, 33, 31, 17, 3)])


def images(t: Tensor) -> Tensor:
    """[R, B, H, W, C] as [R, C, H, W, B]."""
    return t.movedim(-1, 1).movedim(2, -1)


@pytest.mark.parametrize(("replicas", "batch", "channels", "h", "w", "size"), POOLS)
@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("layout", ["channels", "pixels"])
def test_max_pool(
    replicas: int, batch: int, channels: int, h: int, w: int, size: int, cuts: bool, layout: str
) -> None:
    """Equal pixels, too, of which the first counts; all bits are torch's, in company and alone."""
    draw: dict[str, Any] = {"generator": generator(h), "device": DEVICE}
    x = images(torch.randint(-2, 3, (replicas, batch, h, w, channels), **draw).float())
    p, q = h // size, w // size
    dy = normal(replicas, batch, p, q, channels).movedim(-1, 1).movedim(2, -1)
    if layout == "pixels":  # as what enters a fully connected layer
        dy = dy.movedim(-1, 1).contiguous().movedim(1, -1)

    def run(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        with poisoned():
            y = images(torch.empty(len(x), batch, p, q, channels, device=DEVICE))
            dx = images(torch.empty(len(x), batch, h, w, channels, device=DEVICE))
            op.max_pool(x, y, size, kernels="triton")
            op.max_pool_backward(dy, x, y, dx, size, cuts, kernels="triton")
        return {"y": y, "dx": dx}

    found, right = run(x, dy), op.reference_max_pool_backward(dy, x, size, cuts)
    assert torch.equal(found["y"], op.reference_max_pool(x, size))
    assert torch.equal(found["dx"][:, :, : p * size, : q * size], right[:, :, : p * size, : q * size])
    assert found["dx"][:, :, p * size :].isnan().all()
    assert found["dx"][:, :, :, q * size :].isnan().all()
    sums = right.double().sum((2, 3)), torch.where(found["y"] <= 0, 0, dy) if cuts else dy
    torch.testing.assert_close(sums[0], sums[1].double().sum((2, 3)))
    for r in range(0, replicas, max(1, replicas // 3)):
        alone = run(x[r : r + 1], dy[r : r + 1])
        must_repeat({name: t[r : r + 1] for name, t in found.items()}, alone, "to be alone")


def test_a_pool_is_that_of_autograd() -> None:
    x = images(normal(2, 3, 6, 8, 5)).relu()
    dy = images(normal(2, 3, 3, 4, 5))
    y, dx = torch.empty_like(dy), torch.zeros_like(x)
    op.max_pool(x, y, 2, kernels="triton")
    op.max_pool_backward(dy, x, y, dx, 2, True, kernels="triton")
    leaf = x.double().movedim(-1, 1).flatten(0, 1).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(leaf.relu(), 2)
    (right,) = torch.autograd.grad(pooled, leaf, dy.double().movedim(-1, 1).flatten(0, 1))
    assert torch.equal(y.double().movedim(-1, 1).flatten(0, 1), pooled)
    assert torch.equal(dx.double().movedim(-1, 1).flatten(0, 1), right)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_window_with_nan_is_nan() -> None:
    x = images(normal(1, 1, 2, 4, 3))
    x[0, 1, 1, 0, 0] = NAN
    y = images(torch.empty(1, 1, 1, 2, 3, device=DEVICE))
    op.max_pool(x, y, 2, kernels="triton")
    assert torch.equal(y.isnan(), op.reference_max_pool(x, 2).isnan())
    assert int(y.isnan().sum()) == 1


@pytest.mark.parametrize(("replicas", "batch", "classes"), CLASSES)
@pytest.mark.parametrize("layout", ["classes in a row", "images in a row"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_cross_entropy_grad(replicas: int, batch: int, classes: int, layout: str, with_bias: bool) -> None:
    shape = (replicas, batch, classes) if layout == "classes in a row" else (replicas, classes, batch)
    logits = normal(*shape) * 5
    logits = logits.mT if layout == "classes in a row" else logits
    logits[0, :, 0] *= 1e4  # far apart: all of it goes to one class
    logits[-1, :, -1] = 3e38  # as large as may be, and alike
    bias = normal(replicas, classes, seed=1) if with_bias else None
    draw: dict[str, Any] = {"generator": generator(2), "device": DEVICE}
    labels = torch.randint(0, classes, (replicas, batch), **draw)

    def run(logits: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        with poisoned():
            found = op.cross_entropy_grad(
                logits, labels, None if bias is None else apart(bias), kernels="triton"
            )
        assert found.stride() == logits.stride() or len(logits) == 1 or batch == 1 or classes == 1
        return found

    found = run(logits, labels, bias)
    shifted = (logits if bias is None else logits + bias[:, :, None]).double()  # rounded, as ours and torch's
    right = op.reference_cross_entropy_grad(shifted, labels, None)
    torchs = op.reference_cross_entropy_grad(logits, labels, bias)
    compare({"grad": found}, {"grad": right}, {"grad": torchs}, "ieee", {"grad": classes})
    assert (found - right).abs().max() <= 4 * 2**-23 / batch
    assert same_bits(found, run(logits, labels, bias))
    for r in range(0, replicas, max(1, replicas // 3)):
        alone = run(logits[r : r + 1], labels[r : r + 1], None if bias is None else bias[r : r + 1])
        assert same_bits(alone, found[r : r + 1])


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity - infinity
def test_what_is_not_finite_stays_in_its_column() -> None:
    logits = normal(2, 3, 4)
    labels = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    logits[0, 1, 0], logits[0, 2, 1], logits[1, :, 3] = NAN, INF, -INF
    found, right = (op.cross_entropy_grad(logits, labels, None, kernels=k) for k in ("triton", "reference"))
    assert torch.equal(found.isnan(), right.isnan())
    assert int(found.isnan().any(1).sum()) == 3
    torch.testing.assert_close(found, right, equal_nan=True, rtol=1e-6, atol=1e-7)


def test_a_label_that_no_class_has_takes_nothing_off() -> None:
    logits, labels = normal(1, 3, 2), torch.tensor([[7, -1]], device=DEVICE)
    found = op.cross_entropy_grad(logits, labels, None, kernels="triton")
    torch.testing.assert_close(found, torch.softmax(logits, 1) / 2)


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "begin_step": lambda: {
        "clock": torch.zeros(1, dtype=torch.int64),
        "rates": torch.zeros(3, dtype=torch.float64),
        "starts": torch.zeros(2),
        "lr": torch.zeros(2, dtype=torch.float64),
        "count": torch.zeros(2),
        "place": torch.zeros(1, dtype=torch.int64),
        "steps": 2,
    },
    "gather": lambda: {
        "images": torch.zeros(4, 6, dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "scale": torch.zeros(6),
        "shift": torch.zeros(6),
        "order": torch.zeros(2, 3, 5, dtype=torch.int64),
        "place": torch.zeros(1, dtype=torch.int64),
        "x": torch.zeros(2, 5, 6),
        "y": torch.zeros(2, 5, dtype=torch.int64),
    },
    "bias_relu": lambda: {"y": torch.zeros(2, 4, 3).mT, "bias": torch.zeros(2, 3)},
    "max_pool": lambda: {
        "x": images(torch.zeros(2, 3, 4, 4, 5)),
        "y": images(torch.zeros(2, 3, 2, 2, 5)),
        "size": 2,
    },
    "max_pool_backward": lambda: {
        "dy": torch.zeros(2, 5, 2, 2, 3),
        "x": images(torch.zeros(2, 3, 4, 4, 5)),
        "y": images(torch.zeros(2, 3, 2, 2, 5)),
        "dx": images(torch.zeros(2, 3, 4, 4, 5)),
        "size": 2,
    },
    "cross_entropy_grad": lambda: {
        "logits": torch.zeros(2, 3, 4),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
        "bias": torch.zeros(2, 3),
    },
}


@pytest.mark.parametrize("name", GOOD)
def test_misuse_is_named(name: str) -> None:
    call = getattr(op, name)
    call(
        **{k: t.to(DEVICE) if isinstance(t, Tensor) else t for k, t in GOOD[name]().items()}, kernels="triton"
    )
    for wrong, t in GOOD[name]().items():
        if not isinstance(t, Tensor):
            continue
        for bad in (t.half(), torch.cat([t, t[:1]]), t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2]):
            if wrong == "dy" and bad.dtype == t.dtype and bad.shape == t.shape:
                continue  # dy may lie in any order
            if bad.dtype == t.dtype and (wrong == "rates" or (wrong == "logits" and len(bad) == len(t))):
                continue  # there may be any number of rates, and logits may lie in any order
            arguments = GOOD[name]() | {wrong: bad}
            if bad.shape == t.shape and bad.dtype == t.dtype and bad.is_contiguous():
                continue  # one number
            with pytest.raises(ValueError, match="expected"):
                call(**arguments, kernels="triton")
