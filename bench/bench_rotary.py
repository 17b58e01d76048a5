"""Rotary positions of queries and keys, features-major, beside what torch has on its own layout.

Each is given tensors as what stands before it gives them: features-major ours, [B, T, H, D] torch's. Before
anything is timed both must agree with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels.rotary import bind_rotary, floor, reference

CASES = ((16, 64, 1, 1), (16, 64, 1, 2), (16, 64, 128, 1), (16, 64, 128, 2), (40, 128, 512, 2))


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize(("heads", "width", "tokens", "threads"), CASES)
def test_rotary(
    heads: int,
    width: int,
    tokens: int,
    threads: int,
    interleaved: Callable[..., Any],
    show: Callable[[str], None],
) -> None:
    torch.set_num_threads(threads)
    x, angles = torch.randn(heads, width, tokens), torch.rand(width, tokens)
    order = torch.arange(width, dtype=torch.int32)
    other, sign = order.roll(width // 2), torch.ones(width, 1)
    sign[: width // 2] = -1
    cos, sin, y = angles.cos(), angles.sin(), torch.empty_like(x)
    ours = bind_rotary(x, order, other, cos, sin * sign, y)
    theirs = x.permute(2, 0, 1).contiguous()[None].transpose(1, 2)  # [1, H, T, D]
    cosines, sines = cos.t().contiguous(), sin.t().contiguous()

    def torchs() -> Tensor:
        a, b = theirs.chunk(2, -1)
        return theirs * cosines + torch.cat((-b, a), -1) * sines

    exact = reference(x.double(), order, other, cos.double(), (sin * sign).double())
    ours()
    for found in (y, torchs()[0].transpose(1, 2)):
        assert not check(found, exact, "fp32", terms=2).fault
    t = interleaved({"ours": (ours, 20), "torch": (torchs, 20)}, rounds=25)
    moved = floor(heads, width, tokens)["bytes"] / 1e3
    show(
        f"rotary positions, {heads} heads of {width}, {tokens} tokens, threads {threads}; us\n"
        f"  ours {1e6 * t['ours'].median:.1f}, torch {1e6 * t['torch'].median:.1f}; floor {moved:.0f} KB"
    )
