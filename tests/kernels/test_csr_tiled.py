"""`csr_tiled` against dense products in float64, at every level and with any number of threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels import csr_tiled as cp
from sparselth.kernels.csr_tiled import TiledCsr, bind_csr_tiled, csr_tiled, floor

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
native = pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def sparse(n: int, k: int, density: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < density)


def inside(rows: int, batch: int, ld: int, offset: int, fill: float) -> tuple[Tensor, Tensor]:
    """[rows, batch] within memory that is full of `fill`."""
    memory = torch.full((rows * ld + offset + 64,), fill)
    return memory, memory.as_strided((rows, batch), (ld, 1), offset)


def check(y: Tensor, w: Tensor, x: Tensor, bias: Tensor | None, relu: bool) -> None:
    """Each element within the rounding of a sum of as many terms of their size."""
    exact, size = w.double() @ x.double(), w.abs().double() @ x.abs().double()
    if bias is not None:
        exact, size = exact + bias.double()[:, None], size + bias.abs().double()[:, None]
    exact = exact.relu() if relu else exact
    terms = (w != 0).sum(1, keepdim=True) + 2
    assert bool(((y.double() - exact).abs() <= size * terms * 2.0**-24 + 1e-30).all())


@pytest.mark.parametrize("level", _native.levels() or ("none",))
@settings(max_examples=CASES, deadline=None)
@given(st.data())
def test_like_dense(level: str, data: st.DataObject) -> None:
    if level != "none":
        _native.choose(level)
    n, k = (data.draw(st.sampled_from([1, 2, 3, 17, 64, 131, 300]), name) for name in ("n", "k"))
    batch, meant = (data.draw(st.integers(1, 130), name) for name in ("batch", "meant"))
    density = data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), "density")
    w = sparse(n, k, density, data.draw(st.integers(0, 1 << 16), "seed"))
    for row in data.draw(st.sets(st.integers(0, n - 1), max_size=3), "empty rows"):
        w[row] = 0
    if data.draw(st.booleans(), "one full row"):
        w[data.draw(st.integers(0, n - 1), "which")] = 1.5
    torch.set_num_threads(data.draw(st.integers(1, 4), "threads"))
    with pytest.MonkeyPatch.context() as patch:  # many blocks and tiles even here
        patch.setattr(cp, "ENOUGH", data.draw(st.sampled_from([8, 4096]), "enough"))
        patch.setattr(cp, "NEAR", data.draw(st.sampled_from([1 << 10, cp.NEAR]), "near"))
        patch.setattr(cp, "WORK", 1)
        packed = TiledCsr.from_dense(w, meant)
        assert torch.equal(packed.to_dense(), w)
        ld, offset = batch + data.draw(st.integers(0, 40), "room"), data.draw(st.integers(0, 17), "offset")
        _, x = inside(k, batch, ld, offset, math.nan)
        memory, y = inside(n, batch, ld, offset, 7.0)
        x.copy_(torch.randn(k, batch))
        bias = torch.randn(n) if data.draw(st.booleans(), "bias") else None
        relu = data.draw(st.booleans(), "relu")
        bind_csr_tiled(packed, x, bias, y, relu)()
        check(y, w, x, bias, relu)
        first = y.clone()
        torch.set_num_threads(3)
        bind_csr_tiled(packed, x, bias, y, relu)()
        assert torch.equal(y, first)  # to the bit, whatever the threads
    y.fill_(7.0)
    assert bool((memory == 7.0).all())  # nothing beside y was written


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("n", [1, 131])
def test_one_column(n: int, tile: int | None, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features are neighbours or lie apart, in x, in y and in both; in one tile or in several."""
    monkeypatch.setattr(cp, "WORK", 1)
    monkeypatch.setattr(cp, "ENOUGH", 64)
    if tile:
        monkeypatch.setattr(cp, "NEAR", 4 * tile)
        monkeypatch.setattr(cp, "WORTH", 1)
    w = sparse(n, 300, 0.3)
    w[:, 70:130] = 0
    w[n // 2, :140] = 0
    w[-1] = torch.linspace(-1, 2, 300)
    packed = TiledCsr.from_dense(w, 1)
    assert packed.tile == (60 if tile else 300)
    for ldx, ldy, relu, offset in product((1, 3), (1, 2), (False, True), (0, 1)):
        for bias in (None, torch.randn(n)):
            _, x = inside(300, 1, ldx, offset, math.nan)
            x.normal_()
            found = list[Tensor]()
            for threads in (1, 3):
                torch.set_num_threads(threads)
                memory, y = inside(n, 1, ldy, offset, 7.0)
                bind_csr_tiled(packed, x, bias, y, relu, kernels)()
                check(y, w, x, bias, relu)
                found.append(y.clone())
                y.fill_(7.0)
                assert bool((memory == 7.0).all())
            assert torch.equal(*found)


@native
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 16, 40, 64, 100])
def test_kept_weights_alone_are_multiplied(batch: int) -> None:
    w = sparse(70, 300, 0.1)
    x = torch.randn(300, batch)
    x[13, 0], x[200, -1] = math.nan, math.inf
    y = csr_tiled(TiledCsr.from_dense(w, batch), x, relu=False)
    touched = (w[:, [13, 200]] != 0).any(1) if batch == 1 else w[:, 13] != 0
    assert torch.equal(y[:, 0].isnan() | y[:, 0].isinf(), touched)
    assert bool((y[w[:, 200] != 0, -1].isfinite() == 0).all())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (4096, 3), (3, 70_000)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    w = sparse(*shape, 0.01)
    packed = TiledCsr.from_dense(w, 8)
    assert torch.equal(packed.to_dense(), w)
    x, bias = torch.randn(shape[1], 9), torch.randn(shape[0])
    check(csr_tiled(packed, x, bias, relu=True), w, x, bias, True)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_weights_that_are_one_run_and_bytes(batch: int) -> None:
    w = sparse(512, 1024, 0.1)
    packed = TiledCsr.from_dense(w, batch)
    assert packed.kept == int((w != 0).sum())
    assert packed.bytes() < 7 * packed.kept  # 4 of the value, 2 of the column, less than one of the rest
    assert floor(packed, batch)["flops"] == 2 * packed.kept * batch
    x = torch.randn(1024, batch)
    right = csr_tiled(packed, x, kernels="reference")
    assert (csr_tiled(packed, x) - right).norm() <= 1e-6 * right.norm()


def test_misuse() -> None:
    packed = TiledCsr.from_dense(sparse(3, 4, 0.5), 2)
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\] in fp32"):
        TiledCsr.from_dense(torch.zeros(3, 4, 5), 2)
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\] in fp32"):
        TiledCsr.from_dense(torch.zeros(3, 4).double(), 2)
    with pytest.raises(ValueError, match=r"x: expected fp32 \[4, 2\]"):
        csr_tiled(packed, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"bias: expected contiguous fp32 \[3\]"):
        csr_tiled(packed, torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="kernels='fast'"):
        csr_tiled(packed, torch.zeros(4, 2), kernels="fast")
