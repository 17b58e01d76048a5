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
    x, s = Planes.of(b, c, (h, w)), Planes.of(b, c, (1, 1))
    x.images.normal_()
    images, single = x.images, s.images
    given = images.double()
    pp.bind_plane_means(x, s)()
    exact = given.mean((2, 3), keepdim=True)
    assert not check(single, exact, "fp32", terms=h * w).fault
    pp.bind_activate(x, "silu")()
    assert not check(images, F.silu(given), "fp32").fault
    single.fill_(1.0)
    images.fill_(20.0)  # stays what it is, whatever is timed
    rivals: dict[str, tuple[Callable[[], object], int]] = {
        "mean, torch": (partial(torch.mean, images, (2, 3), keepdim=True, out=torch.empty(b, c, 1, 1)), 10),
        "mean, ours": (pp.bind_plane_means(x, Planes.of(b, c, (1, 1))), 10),
        "factor, torch": (partial(images.mul_, single), 10),
        "factor, ours": (pp.bind_scale_planes(x, s), 10),
    }
    for name, act in (("hardswish", F.hardswish), ("silu", F.silu)):
        rivals[f"{name}, torch"] = partial(act, images, inplace=True), 10
        rivals[f"{name}, ours"] = pp.bind_activate(x, name), 10
    t = interleaved(rivals, rounds=15)
    floors = {"mean": "plane_means", "factor": "scale_planes", "hardswish": "activate", "silu": "activate"}
    rows = [f"planes {list(shape)}, {_native.WHY}; first quartiles, us"]
    for name, op in floors.items():
        own, torchs = (t[f"{name}, {who}"].low for who in ("ours", "torch"))
        moved = pp.floor(op, images.numel())["bytes"] / 1e3
        rows.append(f"  {name:<12}{1e6 * own:9.1f}  torch {1e6 * torchs:.1f}; floor {moved:.0f} KB")
    show("\n".join(rows))
