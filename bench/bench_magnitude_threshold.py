"""The k-th smallest magnitude and the mask behind it, in a fresh and in a half pruned matrix, beside rivals.

(a) one read of the weights; (b) torch.kthvalue and (c) numpy's partition of the survivors' magnitudes, which
leave the mask and the ties to the caller; (d) torch.topk of those that stay; (e) a stable sort and the mask
from it, as `pruning.prune` makes it; (f) ours, with the packed mask. Before anything is timed, (e) and (f)
must have the same mask. One read is about the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselth.kernels.bitmask import pack, unpack
from sparselth.kernels.magnitude_threshold import floor, magnitude_threshold

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"266,200": (1331, 200), "4e6": (2000, 2000)} | ({"1e8": (10**4, 10**4)} if DEVICE == "cuda" else {})


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "half-pruned"])
@pytest.mark.parametrize("size", SHAPES)
def test_magnitude_threshold(
    size: str, masked: bool, interleaved: Callable[..., Any], show: Callable[[str], None]
) -> None:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(1, *SHAPES[size], generator=draw).to(DEVICE)
    kept = torch.ones_like(w, dtype=torch.bool)
    if masked:
        kept = (torch.rand(w.shape, generator=draw) < 0.5).to(DEVICE)
        w *= kept
    alive = int(kept.sum())
    going = alive // 5
    k, masks = torch.tensor([going]), [pack(kept)] if masked else []

    def magnitudes() -> Tensor:
        return (w[kept] if masked else w.flatten()).abs()

    def by_sort() -> Tensor:
        alive = kept.flatten().nonzero().squeeze(1)
        order = torch.sort(w.flatten()[alive].abs(), stable=True).indices
        new = kept.flatten().clone()
        new[alive[order[:going]]] = False
        return new

    assert torch.equal(unpack(magnitude_threshold([w], k, masks)[0][0], w.shape[2]).flatten(), by_sort())
    rivals = {
        "a": lambda: w.sum(),
        "b": lambda: magnitudes().kthvalue(going),
        "c": lambda: np.partition(magnitudes().numpy(), going - 1),
        "d": lambda: magnitudes().topk(alive - going, sorted=False),
        "e": by_sort,
        "f": lambda: magnitude_threshold([w], k, masks),
    }
    if DEVICE == "cuda":
        del rivals["c"]

    def synchronized(rival: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            rival()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return call

    t = interleaved({name: (synchronized(rival), 1) for name, rival in rivals.items()}, rounds=15)
    names = {
        "a": "(a) one read of the weights",
        "b": "(b) torch.kthvalue, no mask",
        "c": "(c) numpy.partition, no mask",
        "d": "(d) torch.topk, no mask",
        "e": "(e) stable sort and mask",
        "f": "(f) magnitude_threshold and packed mask",
    }
    which = "half pruned" if masked else "dense"
    rows = [f"{f'{size} weights, {which}, a fifth goes, {DEVICE}':<50}ms   quartiles   over (f)"]
    rows += [
        f"  {names[key]:<42}{1e3 * v.median:9.3f}   {1e3 * v.low:.3f} to {1e3 * v.high:.3f}   "
        f"{v.median / t['f'].median:.2f}"
        for key, v in t.items()
    ]
    least = floor(w.numel(), masked=masked)["bytes"]
    rows.append(
        f"  floor {least / 1e6:.2f} MB, (f) moves {least / t['f'].median / 1e9:.2f} GB of it a second"
    )
    show("\n".join(rows))
