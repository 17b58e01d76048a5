"""What a step of LeNet-300-100 or LeNet-5 is besides its products, batch 60: the best of torch, and ours.

Both sides are bound to the same memory, so that torch saves its allocations too. The floor is what must be
read and written; it lies in the caches here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels.bitmask import pack
from sparselth.kernels.masked_update import bind_masked_adam, bind_masked_sgd
from sparselth.kernels.step_parts import (
    bind_bias_relu,
    bind_columns,
    bind_cross_entropy,
    bind_cross_entropy_grad,
    bind_gather,
    bind_max_pool,
    bind_max_pool_backward,
    bind_relu_backward,
    bind_rows,
    floor,
    sequence,
)

Make = Callable[[str], Callable[[], object]]  # of "native" or "torch"
B, LD = 60, 64
pytestmark = pytest.mark.skipif(_native.LIB is None, reason=f"native kernels: {_native.WHY}")


def matrix(n: int) -> Tensor:
    return torch.randn(n, LD)[:, :B]


def gathering(rows: Tensor | None) -> Make:
    """Batch after batch of 5,000 images; torch as sparselth/data/batches.py does it."""
    images = torch.randint(0, 256, (5000, 784), dtype=torch.uint8)
    labels, scale, shift = torch.randint(0, 10, (5000,)), torch.rand(784), -torch.rand(784)
    orders = torch.randperm(5000)[: 83 * B].view(83, B)
    y = torch.empty(B, dtype=torch.int64)
    raw, floats = torch.empty(B, 784, dtype=torch.uint8), torch.empty(B, 784)

    def make(kernels: str) -> Callable[[], object]:
        order = cycle(orders)
        if kernels == "native":
            x = matrix(784 if rows is None else len(rows))
            run = bind_gather(images, labels, scale, shift, x, y, rows)
            return lambda: run(next(order))

        def run_torch() -> None:
            index = next(order)
            torch.index_select(images, 0, index, out=raw)
            torch.index_select(labels, 0, index, out=y)
            floats.copy_(raw)
            torch.addcmul(shift, floats, scale, out=floats)

        return run_torch

    return make


def updating(p: int, keep: float, adam: bool) -> Make:
    live = torch.rand(1, p) < keep
    w, a, b = (torch.rand(1, p).where(live, 0) for _ in range(3))
    g, bits = torch.randn(1, p), None if keep == 1 else pack(live)

    def make(kernels: str) -> Callable[[], object]:
        if adam:
            step = bind_masked_adam(w, g, (a, b), bits, kernels=kernels)
        else:
            step = bind_masked_sgd(w, g, a, bits, momentum=0.9, kernels=kernels)
        return lambda: step(1000, 1e-6)

    return make


def parts() -> dict[str, tuple[Make, int]]:
    """Each op with its floor in bytes, 0 where the call is all."""
    torch.manual_seed(0)
    rows = torch.arange(784, dtype=torch.int32)[torch.rand(784) < 0.5]
    hidden, cotangent, bias, dbias = matrix(300), matrix(300), torch.randn(300), torch.empty(300)
    logits, dlogits, labels, dlast = matrix(10), matrix(10), torch.randint(0, 10, (B,)), torch.empty(10)
    image, small = torch.randn(6, 24, 24, B), torch.empty(6, 12, 12, B)
    dsmall, dimage, dfilter = torch.randn_like(small), torch.empty_like(image), torch.empty(6)
    many, who = torch.randn(10, 500), torch.randint(0, 10, (500,))
    small.copy_(torch.nn.functional.max_pool2d(image.permute(3, 0, 1, 2), 2).relu().permute(1, 2, 3, 0))

    def chain(kernels: str) -> Callable[[], object]:
        return sequence([bind_bias_relu(dlogits, None, kernels)] * 12)

    return {
        "gather 784 x 60": (gathering(None), floor("gather", 784 * B)["bytes"]),
        "gather, half of the pixels live": (gathering(rows), floor("gather", len(rows) * B)["bytes"]),
        "bias and ReLU, 300 x 60": (
            lambda k: bind_bias_relu(hidden, bias, k),
            floor("bias_relu", 300 * B)["bytes"],
        ),
        "ReLU backward and dbias, 300 x 60": (
            lambda k: bind_relu_backward(cotangent, hidden, dbias, k),
            floor("relu_backward", 300 * B)["bytes"],
        ),
        "cross-entropy gradient and dbias, 10 x 60": (
            lambda k: bind_cross_entropy_grad(logits, labels, dlogits, dlast, k),
            floor("cross_entropy_grad", 10 * B)["bytes"],
        ),
        "cross-entropy, 10 x 500": (
            lambda k: bind_cross_entropy(many, who, k),
            floor("cross_entropy", 10 * 500)["bytes"],
        ),
        "max pool and ReLU, 6 x 24 x 24 x 60": (
            lambda k: bind_max_pool(image, small, True, k),
            floor("max_pool", image.numel())["bytes"],
        ),
        "max pool backward and dbias": (
            lambda k: bind_max_pool_backward(dsmall, image, small, dimage, True, dfilter, k),
            floor("max_pool_backward", image.numel())["bytes"],
        ),
        "Adam, 2,700 weights": (updating(2700, 1.0, True), 28 * 2700),
        "Adam, 266,610 weights": (updating(266_610, 1.0, True), 28 * 266_610),
        "Adam, 266,610 weights, 20 % kept": (updating(266_610, 0.2, True), 28 * 266_610),
        "Adam, 266,610 weights, 1 % kept": (updating(266_610, 0.01, True), 28 * 21_000),
        "SGD with momentum, 266,610 weights": (updating(266_610, 1.0, False), 20 * 266_610),
        "12 smallest calls as a sequence": (chain, 0),
    }


@pytest.mark.parametrize("large", [False, True], ids=["second-level cache", "beyond it"])
def test_step_parts(large: bool, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    # apart, for in a step of a small network nothing drives the images' pages out of reach
    found = {name: (make, size) for name, (make, size) in parts().items() if (size > 400_000) == large}
    rivals = {
        f"{name}, {kernels}": (make(kernels), 10 if large else 100)
        for name, (make, size) in found.items()
        for kernels in ("native", "torch")
    }
    t = interleaved(rivals, rounds=20)
    rows = [f"{f'small parts of a step, {_native.WHY}':<58}us ours     torch   ratio   floor"]
    for name, (_, size) in found.items():
        ours, theirs = (t[f"{name}, {kernels}"].low for kernels in ("native", "torch"))
        rows.append(
            f"  {name:<54}{1e6 * ours:9.2f} {1e6 * theirs:9.2f} {theirs / ours:6.1f}x   "
            f"{size / 1e3:8.1f} kB, {size / ours / 1e9:4.1f} GB/s"
        )
    show("\n".join([*rows, "  first quartiles"]))


@pytest.mark.parametrize("back", [False, True], ids=["to columns", "back"])
def test_changes_of_layout(back: bool, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    """Beside torch's own and a copy of as many bytes, into memory that is there already."""
    rivals: dict[str, tuple[Callable[[], object], int]] = {}
    sizes = [(60, 784), (8, 4096), (64, 4096), (256, 4096), (64, 65_536)]
    for b, k in sizes:
        lines, columns = torch.randn(b, k), torch.randn(k, b)
        turn, other = bind_rows(columns) if back else bind_columns(columns), torch.empty(b, k)
        calls = max(1, (1 << 20) // (b * k))
        rivals[f"{b} {k} ours"] = partial(turn, lines), calls
        to, source = (lines, columns) if back else (columns, lines)
        rivals[f"{b} {k} torch"] = partial(to.copy_, source.t()), calls
        rivals[f"{b} {k} copy"] = partial(other.copy_, lines), calls
    t = interleaved(rivals, rounds=20)
    title = f"[B, K] {'from' if back else 'to'} [K, B], {_native.WHY}"
    rows = [f"{title:<58}us ours     torch      copy   floor"]
    for b, k in sizes:
        ours, theirs, copied = (t[f"{b} {k} {name}"].low for name in ("ours", "torch", "copy"))
        size = floor("transpose", b * k)["bytes"]
        rows.append(
            f"  {f'{b} x {k}':<54}{1e6 * ours:9.2f} {1e6 * theirs:9.2f} {1e6 * copied:9.2f}   "
            f"{size / 1e3:8.1f} kB, {size / ours / 1e9:4.1f} GB/s"
        )
    show("\n".join([*rows, "  first quartiles"]))
