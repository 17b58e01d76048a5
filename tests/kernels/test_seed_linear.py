"""Products with weights that are not stored, against float64: y, dx, db and the gradient of the scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import (
    DEVICE,
    DTYPES,
    FLOATS,
    INF,
    NAN,
    compare,
    layed,
    must_repeat,
    must_replay,
    near,
    pick,
    poisoned,
    precision,
    surrounded,
)
from sparselth.kernels import _native
from sparselth.kernels import seed_linear as module
from sparselth.kernels.seed_linear import SeedWeight, bind_seed_linear, floor, seed_linear

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
SHAPES = [(1, 1, 1), (5, 20, 47), (7, 33, 130), (2, 70, 520), (65, 17, 32)]  # B, N, K
LARGE = [
    (17, 130, 550),
    (2, 3, 1030),
    (60, 300, 784),
    (16, 1000, 4096),
    (1, 8192, 8192),
    (300, 257, 513),
    (3, 5000, 40),
    (100, 2048, 2048),
]
LAYOUTS = ("contiguous", "transposed", "sliced", "off the grid")
NAMES = ("y", "dx", "db", "ds")
PATHS = ["reference", *_native.levels()]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def weight(n: int, k: int, density: float = 0.5, seed: int = 0, device: str = DEVICE) -> SeedWeight:
    """With an empty row and a full one, and what no mask is around its bits."""
    keep = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < density
    if n > 2 and 0 < density < 1:
        keep[0], keep[-1] = False, True
    packed = SeedWeight.of(keep, seed, 3).bits.to(device)
    return SeedWeight((n, k), surrounded(packed), seed, 3)


def products(
    x: Tensor, w: SeedWeight, bias: Tensor, dy: Tensor, kernels: str, scores: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """y and all gradients, through autograd; the scores' values must not matter."""
    holes = torch.full(w.shape, NAN, dtype=scores, device=x.device)
    leaves = [t.detach().requires_grad_() for t in (x, bias, holes)]
    y = seed_linear(leaves[0], w, leaves[1], leaves[2], kernels)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def expected(
    x: Tensor,
    w: SeedWeight,
    bias: Tensor,
    dy: Tensor,
    dtype: torch.dtype = torch.double,
    absolute: bool = False,
) -> dict[str, Tensor]:
    kept, frozen = w.to_dense(), w.frozen()
    tensors = (x, bias, dy, kept, frozen)
    x, bias, dy, kept, frozen = (t.abs().to(dtype) if absolute else t.to(dtype) for t in tensors)
    ds = (dy.mT @ x) * frozen
    return {
        "y": torch.addmm(bias, x, kept.mT),
        "dx": dy @ kept,
        "db": dy.sum(0),
        "ds": ds if dtype == torch.double else ds.float(),
    }


def check(
    kernels: str, part: str, shape: tuple[int, ...], layout: str = "contiguous", **more: object
) -> None:
    """As close to float64 as torch's own with the weights written out; twice, over NaN."""
    device = DEVICE if kernels == "triton" else "cpu"
    (b, n, k), dtype = shape, DTYPES[part]
    w = weight(n, k, device=device, **more)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(1)
    x, bias, dy = (torch.randn(s, generator=g).to(device, dtype) for s in ((b, k), (n,), (b, n)))
    with precision(part):
        right, own = expected(x, w, bias, dy), expected(x, w, bias, dy, dtype)
        absolute = expected(x, w, bias, dy, absolute=True)
        with poisoned():
            found = products(layed(x, layout), w, surrounded(bias), layed(dy, layout), kernels)
            again = products(layed(x, layout), w, surrounded(bias), layed(dy, layout), kernels)
    exact = "ieee" if part == "tf32" and device == "cpu" else part  # the interpreter cuts no operand off
    terms = {"y": k, "dx": n, "db": b, "ds": b}
    scores = {
        name: {"ds": t.pop("ds")} for name, t in (("f", found), ("r", right), ("o", own), ("a", absolute))
    }
    compare(found, right, own, exact, terms, absolute)
    compare(scores["f"], scores["r"], scores["o"], exact if exact == "tf32" else "ieee", terms, scores["a"])
    must_repeat(again, found | scores["f"])


@pytest.mark.parametrize("part", DTYPES)
@pytest.mark.parametrize("shape", pick(SHAPES, SHAPES + LARGE), ids=str)
def test_triton_is_the_formula(shape: tuple[int, ...], part: str) -> None:
    check("triton", part, shape)


@pytest.mark.parametrize("part", pick(["bf16", "ieee"], list(DTYPES)))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_do_not_matter(layout: str, part: str) -> None:
    check("triton", part, (5, 20, 77), layout)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=CASES // 2 + 1)
@given(
    b=st.one_of(st.integers(1, 9), st.sampled_from([16, 47, 48, 49, 60])),
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 140), st.sampled_from([512, 1024, 1030, 2050])),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_any_product_on_a_cpu(
    path: str, b: int, n: int, k: int, density: float, layout: str, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    if path != "reference":
        _native.choose(path)
    with pytest.MonkeyPatch.context() as patch:  # several threads and tiles even here
        patch.setattr(module, "WORK", 1)
        patch.setattr(module, "MADE", 1 << 9)
        kernels = "reference" if path == "reference" else "native"
        check(kernels, "ieee", (b, n, k), layout, density=density, seed=seed)


@pytest.mark.parametrize("path", ["reference", *(["triton"] if DEVICE == "cpu" else []), *_native.levels()])
def test_the_product_with_ones_and_zeros_is_the_weights(path: str) -> None:
    """Exactly; all 256 bytes of a mask at every place of a word."""
    if path in _native.levels():
        _native.choose(path)
    kernels = "native" if path in _native.levels() else path
    places = torch.arange(64)[:, None] + 37 * torch.arange(16)
    w = SeedWeight((64, 128), places.to(torch.uint8), 5, 1)
    right = w.to_dense()
    for dtype in (torch.float32, *([torch.bfloat16, torch.float16] if kernels != "native" else [])):
        one = torch.eye(128, dtype=dtype)
        y = torch.cat([seed_linear(some, w, kernels=kernels) for some in one.split(16)])
        assert torch.equal(y.mT, right.to(dtype))
        x = one[:64].clone().requires_grad_()
        seed_linear(x, w, kernels=kernels).backward(torch.eye(64, dtype=dtype))
        assert x.grad is not None
        assert torch.equal(x.grad, right.to(dtype))


@pytest.mark.parametrize("path", _native.levels())
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 16])
def test_what_is_pruned_is_not_read_on_a_cpu(path: str, batch: int) -> None:
    """NaN and infinity reach no row that has pruned their column."""
    _native.choose(path)
    w = weight(50, 99, device="cpu")
    kept = w.to_dense() != 0
    for column, value in ((0, NAN), (33, INF), (98, NAN)):
        x = torch.randn(batch, 99)
        clean = seed_linear(x.index_fill(1, torch.tensor([column]), 0.0), w, kernels="native")
        y = seed_linear(x.index_fill(1, torch.tensor([column]), value), w, kernels="native")
        assert y[:, kept[:, column]].isfinite().sum() == 0
        assert torch.equal(y[:, ~kept[:, column]], clean[:, ~kept[:, column]])


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
def test_bound_to_fixed_tensors() -> None:
    w = weight(70, 40, device="cpu")
    memory, x, bias = torch.full((3, 90), NAN), torch.randn(3, 40), torch.randn(70)
    y = memory[:, 11:81]
    run = bind_seed_linear(w, x, bias, y)
    for _ in range(2):
        run()
        near(y, x.double() @ w.to_dense().double().mT + bias, 40)
        assert memory[:, :11].isnan().all()
        assert memory[:, 81:].isnan().all()
        x.normal_()
    with pytest.raises(ValueError, match="bits: expected contiguous uint8"):
        bind_seed_linear(
            SeedWeight((70, 40), torch.zeros(70, 10, dtype=torch.uint8)[:, ::2], 0, 0), x, bias, y
        )
    with pytest.raises(ValueError, match="x: expected the numbers of a row side by side"):
        bind_seed_linear(w, torch.zeros(40, 3).t(), bias, y)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("batch", [1, 5, 60])
def test_threads_change_no_bit(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORK", 1)
    w, x = weight(131, 200, device="cpu"), torch.randn(batch, 200)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(seed_linear(x, w, kernels="native"))
    if batch <= module.LUT_BATCH:
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", pick([torch.bfloat16], list(FLOATS)), ids=lambda d: str(d)[6:])
def test_parts_of_k(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for filled in (1, 4, 264):
        monkeypatch.setattr(module, "FILLED", filled)
        w = weight(*pick((140, 1100), (1000, 5000)))
        x, bias = torch.randn(3, w.shape[1]).to(DEVICE, dtype), torch.randn(w.shape[0]).to(DEVICE, dtype)
        y = seed_linear(x, w, bias, kernels="triton")
        near(y, x.double() @ w.to_dense().double().mT + bias.double(), w.shape[1])


def test_parts_cover_k_and_fill_a_device() -> None:
    for n, k, batch in ((8192, 8192, 1), (8192, 8192, 16), (300, 784, 60), (1, 1, 1), (128, 10**6, 500)):
        columns, parts, turns = module.cut(n, k, batch)
        assert columns in module.COLUMNS
        assert 1 <= parts <= module.PARTS
        assert (parts - 1) * turns < -(-k // module.DEPTH) <= parts * turns
    assert module.cut(8192, 8192, 16) == (16, 4, 4)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
@pytest.mark.parametrize("part", DTYPES)
def test_in_a_cuda_graph(part: str) -> None:
    w, dtype = weight(300, 784), DTYPES[part]
    x, bias, dy = (torch.randn(s).to(DEVICE, dtype) for s in ((16, 784), (300,), (16, 300)))
    with precision(part):
        must_replay(lambda: products(x, w, bias, dy, "triton"))


def test_scores_in_any_dtype_and_autocast() -> None:
    w, x = weight(20, 30), torch.randn(4, 30, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.zeros(20, 30, device=DEVICE, dtype=dtype, requires_grad=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = seed_linear(x, w, None, scores)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert scores.grad is not None
        assert scores.grad.dtype == dtype


def test_weights_are_those_of_the_generator() -> None:
    mask = torch.rand(6, 5, 3, 3) < 0.4
    w = SeedWeight.of(mask, 9, 4, gain=1.5)
    assert w.bytes() == 6 * 6
    assert torch.equal(w.to_dense() != 0, mask)
    assert torch.equal(w.to_dense()[mask], w.frozen()[mask])
    assert w.frozen().abs().unique().tolist() == [w.scale]
    assert w.scale == pytest.approx(1.5 * (2 / 45) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6)}, r"expected x\[B, 5\]"),
        ({"x": torch.zeros(0, 5)}, r"B at least 1"),
        ({"x": torch.zeros(2, 5).int()}, "one floating-point dtype"),
        ({"bias": torch.zeros(4)}, r"bias\[3\]"),
        ({"bias": torch.zeros(3).half()}, "one floating-point dtype"),
        ({"scores": torch.zeros(3, 4)}, r"scores\[3, 5\]"),
        ({"bias": torch.zeros(3, device="meta")}, "all on one device"),
        ({"kernels": "fast"}, "kernels='fast'"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"x": torch.zeros(2, 5), "w": weight(3, 5, device="cpu")}
    with pytest.raises(ValueError, match=message):
        seed_linear(**(usual | change))  # type: ignore[arg-type]


def test_what_is_no_layer_is_said() -> None:
    for bits in (torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"bits: expected uint8 \[3, 1\] for weights \[3, 5\]"):
            SeedWeight((3, 5), bits, 0, 0)
    with pytest.raises(ValueError, match="seed: expected"):
        SeedWeight((3, 5), torch.zeros(3, 1, dtype=torch.uint8), -1, 0)


def test_floor() -> None:
    assert floor(8192, 8192, 1, 2) == {"bytes": 2**23 + 2**15, "flops": 2**27}
    assert floor(3, 9, 2, 4)["bytes"] == 6 + 8 * 12


OPCHECK = """
import torch
from torch import library
from sparselth.kernels.seed_linear import SeedWeight, _dx, _ds, _forward, seed_linear
w = SeedWeight.of(torch.rand(7, 12) < 0.5, 1, 2)
keys = list(w.keys)
x, bias, scores = (torch.randn(shape, requires_grad=True) for shape in ((5, 12), (7,), (7, 12)))
dy = torch.randn(5, 7)
some = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
library.opcheck(_forward, (x, w.bits, bias, scores, keys, w.scale, "auto"))
library.opcheck(_forward, (x, w.bits, None, None, keys, w.scale, "reference"), **some)
library.opcheck(_dx, (dy, w.bits, 12, keys, w.scale, "auto"), **some)
library.opcheck(_ds, (dy, x.detach(), keys, w.scale, torch.float32, "auto"), **some)
try:
    seed_linear(x, w, kernels="triton")
except ValueError as e:
    assert "TRITON_INTERPRET=1" in str(e)
else:
    raise AssertionError("Triton on a CPU without the interpreter")
"""


def test_opcheck(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
