"""Attention of one new token behind a cache, beside torch's two copies and one attention; 1 and 2 threads.

Both are given the same tensors; ours is bound to its queries, as in a converted decoder. Before anything is
timed both must agree with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels import token_attention as ta
from sparselth.measure.memory import keep_freed

CASES = ((12, 64, 64, 1), (12, 64, 64, 2), (12, 1024, 64, 1), (12, 1024, 64, 2), (32, 512, 128, 2))


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize(("heads", "past", "width", "threads"), CASES)
def test_token_attention(
    heads: int,
    past: int,
    width: int,
    threads: int,
    interleaved: Callable[..., Any],
    show: Callable[[str], None],
) -> None:
    keep_freed()
    torch.set_num_threads(threads)
    q, k, v = torch.randn(1, 1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    cache = [torch.randn(1, heads, past, width) for _ in "kv"]
    bound = ta.TokenAttention(q, k, v, torch.empty(1, 1, heads, width).transpose(1, 2))

    def ours() -> tuple[Tensor, ...]:
        found = bound.follow(*cache)
        bound.run()
        return bound.new[3], *found

    def torchs() -> tuple[Tensor, ...]:
        keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return F.scaled_dot_product_attention(q, keys, values), keys, values

    exact = ta.reference(*(t.double() for t in (q, k, v, *cache)))
    for call in (ours, torchs):
        for found, right in zip(call(), exact, strict=True):
            assert not check(found, right, "fp32", terms=past + width).fault
    t = interleaved({"ours": (ours, 20), "torch": (torchs, 20)}, rounds=25)
    moved = ta.floor(1, heads, past, width)["bytes"] / 1e3
    show(
        f"attention of one token, {heads} heads of {width}, {past} before it, threads {threads}; us\n"
        f"  ours {1e6 * t['ours'].median:.1f}, torch {1e6 * t['torch'].median:.1f}; floor {moved:.0f} KB"
    )
