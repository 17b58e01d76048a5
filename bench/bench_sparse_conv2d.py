"""A sparse convolution beside torch's dense one, batch 60: forward, dX, dW with db, one thread.

The rivals are torch's convolution in its two layouts, each with tensors of its own; the bar for a pass is the
better of the two. Ours works on [C, H, W, B] with room for 64 columns, all copies included. Before anything
is timed, ours must agree with torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels import sparse_conv2d as sc

BATCH, ROOM, PASSES = 60, 64, ("forward", "dx", "dw")
LAYERS = {  # channels in and out, kernel, size, padding
    "Conv-4, first": (3, 64, 3, 32, 1),
    "Conv-4, second": (64, 64, 3, 32, 1),
    "Conv-4, third": (64, 128, 3, 16, 1),
    "Conv-4, fourth": (128, 128, 3, 16, 1),
    "LeNet-5, first": (1, 6, 5, 28, 2),
    "LeNet-5, second": (6, 16, 5, 14, 0),
}
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, ROOM)[..., :BATCH]


def backward(dy: Tensor, x: Tensor, w: Tensor, padding: int, wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(
        dy, x, w, [len(w)], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("name", LAYERS)
def test_sparse_conv2d(name: str, interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    c, n, k, size, padding = LAYERS[name]
    torch.manual_seed(0)
    dense, bias = torch.randn(n, c, k, k), torch.randn(n)
    x, dx = image(c, size, size), image(c, size, size)
    calls = 10 if c < 10 else 1
    rivals: dict[str, tuple[Callable[[], object], int]] = {}
    indices = {}
    for sparsity in SPARSITIES:
        index = indices[sparsity] = sc.Conv2dIndex.from_dense(
            torch.rand(dense.shape) >= sparsity, (size, size), 1, padding
        )
        values, dv, db = index.gather(dense), torch.empty(index.kept), torch.empty(n)
        y, dy = image(n, *index.out), image(n, *index.out)
        ours = (
            sc.bind_sparse_conv2d(index, values, x, bias, y),
            sc.bind_sparse_conv2d_input_grad(index, values, dy, dx),
            sc.bind_sparse_conv2d_weight_grad(index, dy, x, dv, db),
        )
        for run in ours:
            run()
        v, x_, dy_, b = (t.double() for t in (values, x, dy, bias))
        exact = [sc.reference(index, v, x_, b), *sc.reference_grads(index, v, x_, dy_)]
        pixels = BATCH * index.out[0] * index.out[1]
        sums = c * k * k, n * k * k, pixels, pixels
        for found, wanted, terms in zip((y, dx, dv, db), exact, sums, strict=True):
            assert not check(found, wanted, "fp32", terms=terms).fault
        rivals |= {f"{p} {sparsity}": (run, calls) for p, run in zip(PASSES, ours, strict=True)}
    for layout, memory in LAYOUTS.items():
        u = x.permute(3, 0, 1, 2).contiguous(memory_format=memory)
        v = torch.randn(BATCH, n, *index.out).contiguous(memory_format=memory)
        w = dense.contiguous(memory_format=memory)
        rivals[f"forward {layout}"] = (partial(torch.conv2d, u, w, bias, padding=padding), calls)
        rivals[f"dx {layout}"] = (partial(backward, v, u, w, padding, [True, False, False]), calls)
        rivals[f"dw {layout}"] = (partial(backward, v, u, w, padding, [False, True, True]), calls)
    t = interleaved(rivals, rounds=15)
    bar = {p: min(t[f"{p} {layout}"].low for layout in LAYOUTS) for p in PASSES}
    rows = [f"{name}: {c} to {n}, {k}x{k}, {size}x{size}, batch {BATCH}, {_native.WHY}; first quartiles, ms"]
    rows += [f"  {'dense, the better':<20}" + "".join(f"{p} {1e3 * bar[p]:8.3f}{'':12}" for p in PASSES)]
    for sparsity in SPARSITIES:
        took = {p: t[f"{p} {sparsity}"].low for p in PASSES}
        least = sc.floor(indices[sparsity], BATCH)
        rows.append(
            f"  {sparsity:<20.0%}"
            + "".join(f"{p} {1e3 * took[p]:8.3f}  {bar[p] / took[p]:5.1f}x    " for p in PASSES)
            + f"all {sum(bar.values()) / sum(took.values()):5.1f}x   "
            f"floor of a pass {least['bytes'] / 1e6:.1f} MB, {least['flops'] / 1e6:.0f} MFLOP"
        )
    show("\n".join(rows))
