"""Norms, GELU, sums and products against float64, at every level this machine has, in memory with gaps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import token_parts as parts

SHAPES = [
    (1, 1),
    (768, 1),
    (13, 1),
    (7, 2),
    (5, 3),
    (19, 5),
    (64, 8),
    (33, 17),
    (131, 31),
    (3, 64),
    (71, 197),
]
WAYS = {
    "layer_norm": lambda x, kernels: parts.layer_norm(x, None, None, kernels=kernels),
    "rms_norm": lambda x, kernels: parts.rms_norm(x, None, 1e-6, kernels),
    "gelu": lambda x, kernels: parts.gelu(x, kernels=kernels),
    "tanh": lambda x, kernels: parts.gelu(x, True, kernels),
    "add": lambda x, kernels: parts.add(x, 3 * x, kernels),
    "multiply": lambda x, kernels: parts.multiply(x, 3 * x, kernels),
}


def apart(shape: tuple[int, int], more: int) -> tuple[Tensor, Tensor]:
    """[K, B] whose rows lie apart, 7 before, between and behind them; all that memory."""
    k, b = shape
    memory = torch.full((k * (b + more) + 2 * more + 1,), 7.0)
    return memory.as_strided(shape, (b + more, 1), more), memory


def exact_gelu(x: Tensor, tanh: bool) -> Tensor:
    """In float64, without what cancels."""
    x = x.double()
    if tanh:
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [0, 3])
def test_layer_norm(shape: tuple[int, int], more: int, kernels: str) -> None:
    for affine in (True, False):
        (x, _), (y, memory) = apart(shape, more), apart(shape, more)
        x.copy_(3 * torch.randn(shape) + 5)
        weight, bias = (torch.randn(shape[0]) if affine else None for _ in range(2))
        parts.bind_layer_norm(x, weight, bias, y, 1e-3, kernels)()
        double = [None if t is None else t.double() for t in (weight, bias)]
        exact = F.layer_norm(x.double().t(), shape[:1], *double, 1e-3).t()
        scale = x.double().abs().amax(0) * (x.double().var(0, correction=0) + 1e-3).rsqrt()
        size = exact.abs() + scale * (1 if weight is None else weight.abs()[:, None])
        assert bool(((y - exact).abs() <= 8 * 2.0**-24 * size).all())
        y.fill_(7.0)
        assert bool((memory == 7.0).all())  # nothing beside y was written


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [0, 3])
def test_rms_norm(shape: tuple[int, int], more: int, kernels: str) -> None:
    for weight in (torch.randn(shape[0]), None):
        (x, _), (y, memory) = apart(shape, more), apart(shape, more)
        x.copy_(3 * torch.randn(shape) + 5)  # a mean that stays
        parts.bind_rms_norm(x, weight, y, 1e-3, kernels)()
        exact = x.double() * (x.double().square().mean(0) + 1e-3).rsqrt()
        exact = exact if weight is None else exact * weight.double()[:, None]
        assert bool(((y - exact).abs() <= 8 * 2.0**-24 * exact.abs()).all())
        y.fill_(7.0)
        assert bool((memory == 7.0).all())  # nothing beside y was written


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu(shape: tuple[int, int], tanh: bool, kernels: str) -> None:
    for more in (0, 3):
        x, memory = apart(shape, more)
        x.copy_(4 * torch.randn(shape))
        before = x.clone()
        found = parts.gelu(before, tanh, kernels)
        parts.bind_gelu(x, x, tanh, kernels)()
        assert torch.equal(x, found)  # in place or not
        exact = exact_gelu(before, tanh)
        assert bool(((x - exact).abs() <= 4e-7 * before.abs()).all())
        x.fill_(7.0)
        assert bool((memory == 7.0).all())


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_loses_nothing_left_of_0(tanh: bool, kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("torch's loses everything there")
    x = torch.linspace(-14, 14, 2801)[None]
    exact = exact_gelu(x, tanh)
    error = (parts.gelu(x, tanh, kernels) - exact).abs()
    assert bool((error <= (4 + x * x) * 2.0**-23 * exact.abs() + 1e-30).all())
    theirs = (F.gelu(x, approximate="tanh" if tanh else "none") - exact).abs()
    assert error.max() <= theirs.max()


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_of_what_is_no_number(tanh: bool, kernels: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, -3e38])
    for shape in ((8, 1), (1, 8), (4, 2)):
        y = parts.gelu(x.view(shape), tanh, kernels).view(-1)
        assert y[0].isnan()
        assert y[1] == math.inf
        assert abs(float(y[2])) < 1e-30 or (kernels == "torch" and y[2].isnan())  # -inf times 0
        assert y[[3, 4]].tolist() == [0, 0]
        assert y[6] == x[6]
        assert abs(float(y[7])) < 1e-30


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["add", "multiply"])
def test_sums_and_products(shape: tuple[int, int], op: str, kernels: str) -> None:
    does, binds = getattr(parts, op), getattr(parts, f"bind_{op}")
    for more in (0, 3):
        (a, memory), (b, _) = apart(shape, more), apart(shape, 2 * more)
        a.copy_(torch.randn(shape))
        b.copy_(torch.randn(shape))
        right = a + b if op == "add" else a * b
        assert torch.equal(does(a, b, kernels), right)
        binds(b, a, a, kernels)()
        assert torch.equal(a, right)
        a.fill_(7.0)
        assert bool((memory == 7.0).all())


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gelu"])
@pytest.mark.parametrize("batch", [1, 6, 40])
def test_nan_stays_in_its_column(op: str, batch: int, kernels: str) -> None:
    x = torch.randn(20, batch)
    x[3, -1] = math.nan
    wrong = WAYS[op](x, kernels).isnan()
    right = torch.zeros_like(wrong)
    right[slice(None) if op.endswith("norm") else 3, -1] = True
    assert torch.equal(wrong, right)


@pytest.mark.parametrize("op", WAYS)
def test_threads_do_not_matter(op: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MANY", dict.fromkeys(parts.MANY, 1))
    for shape in ((50, 1), (50, 21), (9, 200)):
        x, found = torch.randn(shape), list[Tensor]()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(WAYS[op](x, kernels))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert bool(found[0].isfinite().all())  # all of it was written


def test_of_nothing(kernels: str) -> None:
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: parts.gelu(x, kernels=kernels),
        lambda x: parts.add(x, x, kernels),
        lambda x: parts.layer_norm(x, None, None, kernels=kernels),
        lambda x: parts.rms_norm(x, None, 1e-6, kernels),
        lambda x: parts.multiply(x, x, kernels),
    ]
    for way in ways:
        assert way(torch.zeros(4, 0)).shape == (4, 0)
    assert ways[0](torch.zeros(0, 4)).shape == (0, 4)


def test_what_cannot_be_bound() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="y: expected other memory than that of x"):
        parts.bind_layer_norm(x, None, None, x)
    with pytest.raises(ValueError, match="y: expected other memory than that of x"):
        parts.bind_rms_norm(x, None, x, 1e-6)
    with pytest.raises(ValueError, match=r"weight: expected contiguous fp32 \[4\]"):
        parts.layer_norm(x, torch.zeros(3), None)
    with pytest.raises(ValueError, match=r"y: expected fp32 \[4, 3\] on a CPU"):
        parts.bind_gelu(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"x: expected \[K, B\], got \[2, 2, 3\]"):
        parts.gelu(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="b: expected its columns side by side"):
        parts.add(x, torch.zeros(3, 4).t())
