"""Sparse products on a CPU beside the dense product at its best and MKL's CSR product, one thread.

y = W x, dx = W^T dy and dv, the gradient at the kept weights: for the models' layers with 64 columns, for the
columns of an evaluation, and for large layers. "Of dense" is the rate on the kept weights over that of the
dense product: 100 % would make every pruned weight count. Before anything is timed, y, dx and dv are compared
with the dense products in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels.csr_linear import (
    CsrIndex,
    bind_csr_input_grad,
    bind_csr_linear,
    bind_csr_weight_grad,
    floor,
)

SHAPES = [
    *[(300, 784, 64), (100, 300, 64), (10, 100, 64)],  # LeNet-300-100
    *[(120, 400, 64), (84, 120, 64), (10, 84, 64)],  # LeNet-5
    *[(256, 8192, 64), (256, 256, 64), (10, 256, 64)],  # Conv-4
    *[(300, 784, 500), (1024, 1024, 64), (4096, 4096, 64), (4096, 4096, 256)],
]
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-{s[2]}")
def test_products(
    shape: tuple[int, int, int], interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    n, k, b = shape
    draw = torch.Generator().manual_seed(0)
    w, x, dy = (torch.randn(*s, generator=draw) for s in ((n, k), (k, b), (n, b)))
    y, dx, dw = torch.empty(n, b), torch.empty(k, b), torch.empty(n, k)
    flops = 2 * n * k * b
    calls = max(1, int(2e7 / flops))
    rivals: dict[str, tuple[Callable[[], object], int]] = {
        "dense y": (lambda: torch.mm(w, x, out=y), calls),
        "dense dx": (lambda: torch.mm(w.t(), dy, out=dx), calls),
        "dense dv": (lambda: torch.mm(dy, x.t(), out=dw), calls),
    }
    indices = {}
    for sparsity in SPARSITIES:
        mask = torch.rand(n, k, generator=draw) >= sparsity
        index = indices[sparsity] = CsrIndex.from_dense(mask)
        values, y_, dx_, dv_ = index.gather(w), torch.empty(n, b), torch.empty(k, b), torch.empty(index.kept)
        ours = {
            "y": bind_csr_linear(index, values, x, None, y_),
            "dx": bind_csr_input_grad(index, values, dy, dx_),
            "dv": bind_csr_weight_grad(index, dy, x, dv_),
            "csr": bind_csr_linear(index, values, x, None, torch.empty(n, b), kernels="torch"),
        }
        for name in ("y", "dx", "dv"):
            ours[name]()
        kept = index.to_dense(values).double()
        assert not check(y_, kept @ x.double(), "fp32", terms=k).fault
        assert not check(dx_, kept.t() @ dy.double(), "fp32", terms=n).fault
        assert not check(dv_, index.gather(dy.double() @ x.double().t()), "fp32", terms=b).fault
        for name, call in ours.items():
            rivals[f"{name} {sparsity}"] = (call, calls)
    found = interleaved(rivals, rounds=6 if flops > 1e9 else 20)
    dense = {name: found[f"dense {name}"] for name in ("y", "dx", "dv")}
    lines = [
        f"W {n} x {k}, {b} columns ({_native.WHY}): times faster than dense, first quartiles; dense takes "
        + ", ".join(f"{name} {t.low * 1e6:.1f} us" for name, t in dense.items()),
        f"{'sparsity':>9}{'y':>8}{'dx':>8}{'dv':>8}{'MKL CSR y':>11}{'y us':>10}{'IQR':>8}{'of dense':>10}",
    ]
    for sparsity in SPARSITIES:
        mine = {name: found[f"{name} {sparsity}"] for name in ("y", "dx", "dv", "csr")}
        gain = {name: dense[name.replace("csr", "y")].low / t.low for name, t in mine.items()}
        share = floor(indices[sparsity], b)["flops"] / flops * gain["y"]
        lines.append(
            f"{sparsity:>9.0%}{gain['y']:>7.2f}x{gain['dx']:>7.2f}x{gain['dv']:>7.2f}x{gain['csr']:>10.2f}x"
            f"{mine['y'].low * 1e6:>10.1f}{(mine['y'].high - mine['y'].low) * 1e6:>8.1f}{share:>10.0%}"
        )
    show("\n".join(lines))
