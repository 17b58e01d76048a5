"""Convolutions of each channel by itself, one image: layers of MobileNet-v3 and v2, one thread.

The rivals are torch's convolution in its two layouts, which allocate their results, and `sparse_conv2d_rows`,
which takes such filters as sparse ones; it and ours are bound to planes. Behind the convolution stands a
hardswish, torch's in place. Before anything is timed, all must agree with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels import depthwise_rows as dw
from sparselth.kernels.sparse_conv2d_rows import ConvRows, Planes, bind_sparse_conv2d_rows

LAYERS = (  # channels, side of the kernel, side of the image, stride
    (14, 3, 112, 2),
    (60, 3, 56, 2),
    (79, 3, 28, 1),
    (96, 5, 28, 2),
    (240, 5, 14, 1),
    (288, 5, 14, 2),
    (576, 5, 7, 1),
    (32, 3, 112, 1),
    (144, 3, 56, 1),
    (960, 3, 7, 1),
)
SPARSITIES = 0.0, 0.8, 0.9, 0.95
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("layer", LAYERS)
def test_depthwise_rows(
    layer: tuple[int, int, int, int], interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    c, k, side, stride = layer
    torch.manual_seed(0)
    dense, bias = torch.randn(c, 1, k, k) / k, torch.randn(c)
    x = Planes.of(1, c, (side, side))
    x.images.normal_()
    rivals: dict[str, tuple[Callable[[], object], int]] = {}
    floors = {}
    for sparsity in SPARSITIES:
        w = dense * (torch.rand(dense.shape) >= sparsity)
        packed = dw.DepthwiseRows.from_dense(w, (side, side), stride)
        floors[sparsity] = dw.floor(packed, 1)
        exact = dw.reference(packed, x.images.double(), bias.double(), "hardswish")
        wide = torch.zeros(c, c, k, k)
        wide[range(c), range(c)] = w[:, 0]
        filters = ConvRows.from_dense(wide, (side, side), stride, k // 2)
        room = filters.room(1) or Planes.of(1, c, (side, side))
        room.images.copy_(x.images)
        y, z = (Planes.of(1, c, packed.out) for _ in "yz")
        rivals[f"rows {sparsity}"] = bind_sparse_conv2d_rows(filters, room, bias, y, "hardswish"), 10
        rivals[f"ours {sparsity}"] = dw.bind_depthwise_rows(packed, x, bias, z, "hardswish"), 10
        for name, out in (("rows", y), ("ours", z)):
            rivals[f"{name} {sparsity}"][0]()
            assert not check(out.images, exact, "fp32", terms=k * k).fault
    for layout, memory in LAYOUTS.items():
        u, v = (t.contiguous(memory_format=memory) for t in (x.images, dense))

        def torchs(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.hardswish(F.conv2d(u, v, bias, stride, k // 2, groups=c), inplace=True)

        exact = F.hardswish(F.conv2d(u.double(), v.double(), bias.double(), stride, k // 2, groups=c))
        assert not check(torchs(u, v), exact, "fp32", terms=k * k).fault
        rivals[f"dense {layout}"] = partial(torchs, u, v), 10
    t = interleaved(rivals, rounds=15)
    bar = min(t[f"dense {layout}"].low for layout in LAYOUTS)
    rows = [f"{c} channels of {side} x {side}, {k} x {k}/{stride}, {_native.WHY}; first quartiles, us"]
    rows += [f"  {f'dense, {layout}':<22}{1e6 * t[f'dense {layout}'].low:9.1f}" for layout in LAYOUTS]
    for sparsity in SPARSITIES:
        own, sparse = (t[f"{kind} {sparsity}"].low for kind in ("ours", "rows"))
        least = floors[sparsity]
        rows.append(
            f"  {sparsity:<22.0%}{1e6 * own:9.1f}  {bar / own:5.1f}x  sparse_conv2d_rows {1e6 * sparse:.1f}; "
            f"floor {least['bytes'] / 1e3:.0f} KB, {least['flops'] / 1e6:.2f} MFLOP"
        )
    show("\n".join(rows))
