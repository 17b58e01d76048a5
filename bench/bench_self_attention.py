"""Attention among the tokens of sequences, features-major, beside torch's; 1 and 2 threads.

torch's stands twice: on heads as one product of rows leaves them, and with the turns of layout that it takes
between products that work features-major. Before anything is timed all must agree with float64.
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
from sparselth.kernels import self_attention as sa
from sparselth.measure.memory import keep_freed

CASES = (  # heads, features of each, sequences, tokens, threads
    *((12, 64, 1, 197, 1), (12, 64, 1, 197, 2), (12, 64, 8, 197, 2)),
    *((12, 64, 1, 1024, 2), (6, 32, 4, 49, 1)),
)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize(("heads", "width", "batch", "tokens", "threads"), CASES)
def test_self_attention(
    heads: int,
    width: int,
    batch: int,
    tokens: int,
    threads: int,
    interleaved: Callable[..., Any],
    show: Callable[[str], None],
) -> None:
    keep_freed()
    torch.set_num_threads(threads)
    n, features = batch * tokens, heads * width
    room = torch.randn(3 * features, -(-n // 16) * 16)[:, :n]
    q, k, v = (part.unflatten(0, (heads, width)) for part in room.chunk(3))
    y = torch.empty(heads, width, n)
    run = sa.bind_self_attention(q, k, v, y, tokens)
    rows = room.t().contiguous()

    def ours() -> Tensor:
        run()
        return y

    def torchs(x: Tensor = rows) -> Tensor:
        parts = x.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(*parts)

    def turned() -> Tensor:
        return torchs(room.t().contiguous()).permute(1, 3, 0, 2).flatten(2).contiguous()

    exact = sa.reference(*(t.double() for t in (q, k, v)), tokens)
    for found in (ours(), torchs().permute(1, 3, 0, 2).flatten(2), turned()):
        assert not check(found, exact, "fp32", terms=tokens + width).fault
    t = interleaved({"ours": (ours, 5), "torch": (torchs, 5), "turned": (turned, 5)}, rounds=25)
    flops = sa.floor(heads, width, batch, tokens)["flops"]
    show(
        f"self attention, {heads} heads of {width}, {batch} x {tokens} tokens, threads {threads}; us\n"
        f"  ours {1e6 * t['ours'].median:.0f}, torch {1e6 * t['torch'].median:.0f}, with its turns "
        f"{1e6 * t['turned'].median:.0f}; ours {flops / t['ours'].median / 1e9:.0f} GFLOP/s"
    )
