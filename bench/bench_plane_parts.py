"""Activations, means and factors of planes, beside torch's on the same memory; one thread.

Both work on planes without zeros around an image, and each call is bound. Before anything is timed both must
agree with float64.
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
from sparselth.kernels import plane_parts as pp
from sparselth.kernels.sparse_conv2d_rows import Planes

SHAPES = (1, 14, 112, 112), (1, 96, 28, 28), (1, 240, 14, 14), (1, 576, 7, 7), (8, 240, 14, 14)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("shape", SHAPES)
def test_plane_parts(
    shape: tuple[int, int, int, int], interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    b, c, h, w = shape
    x, s, y = Planes.of(b, c, (h, w)), Planes.of(b, c, (1, 1)), Planes.of(b, c, (1, 1))
    images, single, mean = x.images, s.images, torch.empty(b, c, 1, 1)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "mean": (partial(torch.mean, images, (2, 3), keepdim=True, out=mean), pp.bind_plane_means(x, y)),
        "factor": (partial(images.mul_, single), pp.bind_scale_planes(x, s)),
        "hardswish": (partial(F.hardswish, images, inplace=True), pp.bind_activate(x, "hardswish")),
        "silu": (partial(F.silu, images, inplace=True), pp.bind_activate(x, "silu")),
    }
    given, factor = torch.randn(b, c, h, w), torch.rand(b, c, 1, 1)
    double = given.double()
    exact = {
        "mean": double.mean((2, 3), keepdim=True),
        "factor": double * factor.double(),
        "hardswish": F.hardswish(double),
        "silu": F.silu(double),
    }
    for name, both in calls.items():
        for call, means in zip(both, (mean, y.images), strict=True):
            images.copy_(given)
            single.copy_(factor)
            call()
            found, terms = (means, h * w) if name == "mean" else (images, 1)
            assert not check(found, exact[name], "fp32", terms=terms).fault
    single.fill_(1.0)
    images.fill_(20.0)  # stays what it is, whatever is timed
    rivals = {
        f"{name}, {who}": (call, 10)
        for name, both in calls.items()
        for who, call in zip(("torch", "ours"), both, strict=True)
    }
    t = interleaved(rivals, rounds=15)
    floors = {"mean": "plane_means", "factor": "scale_planes", "hardswish": "activate", "silu": "activate"}
    rows = [f"planes {list(shape)}, {_native.WHY}; first quartiles, us"]
    for name, op in floors.items():
        own, torchs = (t[f"{name}, {who}"].low for who in ("ours", "torch"))
        moved = pp.floor(op, images.numel())["bytes"] / 1e3
        rows.append(f"  {name:<12}{1e6 * own:9.1f}  torch {1e6 * torchs:.1f}; floor {moved:.0f} KB")
    show("\n".join(rows))
