"""Sparse convolution of a few images, NCHW, beside torch's dense one: layers of ResNet-18, one thread.

The rivals are torch's convolution in its two layouts, each with tensors of its own; the bar is the better of
the two. All allocate their results. `sparse_conv2d` is there too, bound and in a layout of its own, and once
more with the way there and back. Before anything is timed, ours must agree with torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels import sparse_conv2d_rows as sr
from sparselth.kernels.sparse_conv2d import Conv2dIndex, bind_sparse_conv2d
from sparselth.measure.layers import parse
from sparselth.sparse.forms.stage import columns, image

LAYERS = (
    "64x64x3x3@32x32",
    "128x128x3x3@16x16",
    "256x256x3x3@8x8",
    "512x512x3x3@4x4",
    "128x64x3x3@32x32/2",
    "128x64x1x1@32x32/2",
)
BATCHES = 1, 8, 64
SPARSITIES = 0.8, 0.9, 0.95, 0.98
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", LAYERS)
def test_sparse_conv2d_rows(
    name: str, batch: int, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    layer = parse(name)
    assert layer.size
    torch.manual_seed(0)
    dense, x = torch.randn(layer.shape), torch.randn(batch, *layer.inputs)
    calls = max(1, 20_000_000 // (layer.flops() * batch))
    rivals: dict[str, tuple[Callable[[], object], int]] = {}
    floors = {}
    for sparsity in SPARSITIES:
        w = dense * (torch.rand(dense.shape) >= sparsity)
        packed = sr.ConvRows.from_dense(w, layer.size, layer.stride, layer.padding, batch)
        run, floors[sparsity] = sr.sparse_conv2d_rows_call(packed), sr.floor(packed, batch)
        exact, terms = sr.reference(packed, x.double()), int((w != 0).flatten(1).sum(1).max())
        assert not check(run(x), exact, "fp32", terms=terms).fault
        rivals[f"rows {sparsity}"] = partial(run, x), 4 * calls
        index = Conv2dIndex.from_dense(w != 0, layer.size, layer.stride, layer.padding, backward=False)
        turned, y = (
            image(columns(torch.Size(shape).numel(), batch), shape, batch)
            for shape in (layer.inputs, layer.outputs)
        )
        bound = bind_sparse_conv2d(index, index.gather(w), turned, None, y)
        turned.copy_(x.permute(1, 2, 3, 0))

        def there_and_back(turned: torch.Tensor, bound: Callable[[], None], y: torch.Tensor) -> None:
            turned.copy_(x.permute(1, 2, 3, 0))
            bound()
            y.permute(3, 0, 1, 2).contiguous()

        rivals[f"columns {sparsity}"] = bound, calls
        rivals[f"turned {sparsity}"] = partial(there_and_back, turned, bound, y), calls
    for layout, memory in LAYOUTS.items():
        u, v = x.contiguous(memory_format=memory), dense.contiguous(memory_format=memory)
        conv = partial(torch.conv2d, u, v, None, layer.stride, layer.padding)
        rivals[f"dense {layout}"] = conv, calls
    t = interleaved(rivals, rounds=15)
    bar = min(t[f"dense {layout}"].low for layout in LAYOUTS)
    rows = [f"{name}, batch {batch}, {_native.WHY}; first quartiles, ms"]
    rows += [f"  {f'dense, {layout}':<22}{1e3 * t[f'dense {layout}'].low:9.3f}" for layout in LAYOUTS]
    for sparsity in SPARSITIES:
        own, columns_, turned_ = (t[f"{kind} {sparsity}"].low for kind in ("rows", "columns", "turned"))
        least = floors[sparsity]
        rows.append(
            f"  {sparsity:<22.0%}{1e3 * own:9.3f}  {bar / own:5.1f}x   sparse_conv2d {1e3 * columns_:.3f}, "
            f"with both changes of layout {1e3 * turned_:.3f}; "
            f"floor {least['bytes'] / 1e6:.1f} MB, {least['flops'] / 1e6:.1f} MFLOP"
        )
    show("\n".join(rows))
