"""Products with weights that are not stored beside the dense product at its best, one thread.

Squares, half of the weights kept. Dense is torch's mv or mm of the weights written out. "Made" is what large
batches and gradients take: W a few rows at a time in the cache, for torch's products. Before anything is
timed, both must agree with float64. SPARSELTH_NATIVE=avx2 shows the lower level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels import seed_linear as module
from sparselth.kernels.seed_linear import SeedWeight, bind_seed_linear, floor, seed_linear

SIZES = 1024, 2048, 4096, 8192
BATCHES = 1, 4, 16, 64


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
@pytest.mark.parametrize("n", SIZES)
def test_seed_linear(
    n: int,
    interleaved: Callable[..., Any],
    show: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    w = SeedWeight.of(torch.rand(n, n, generator=draw) < 0.5, 0, 0)
    dense = w.to_dense()
    rivals: dict[str, tuple[Callable[[], object], int]] = {}
    floors = {}

    def made(x: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(module, "LUT_BATCH", 0)
            return seed_linear(x, w, kernels="native")

    for batch in BATCHES:
        x, y, out = torch.randn(batch, n, generator=draw), torch.empty(batch, n), torch.empty(batch, n)
        ours = bind_seed_linear(w, x, None, y)
        ours()
        exact = x.double() @ dense.double().mT
        assert not check(y, exact, "fp32", terms=n).fault
        assert not check(made(x), exact, "fp32", terms=n).fault
        calls = max(1, 2**24 // (n * n * batch))
        rivals[f"mm {batch}"] = (lambda x=x, out=out: torch.mm(x, dense.t(), out=out)), calls  # type: ignore[misc]
        rivals[f"mv {batch}"] = (lambda x=x: dense @ x[0]), calls  # type: ignore[misc]
        rivals[f"ours {batch}"] = ours, calls
        rivals[f"made {batch}"] = (lambda x=x: made(x)), calls  # type: ignore[misc]
        floors[batch] = floor(n, n, batch, 4)["bytes"]
    rivals = {name: call for name, call in rivals.items() if not name.startswith("mv") or name == "mv 1"}
    t = interleaved(rivals, rounds=15)
    lines = [
        f"{n} square, half kept ({_native.WHY}): first quartiles, ms; dense at its best over ours",
        f"{'batch':>7}{'dense':>9}{'ours':>9}{'made':>9}{'times':>8}{'bytes, of dense':>17}",
    ]
    for batch in BATCHES:
        best = min(t[name].low for name in (f"mm {batch}", f"mv {batch}") if name in t)
        ours, made_too = t[f"ours {batch}"].low, t[f"made {batch}"].low
        share = floors[batch] / (4 * n * n + 8 * n * batch)
        times = "".join(f"{1e3 * seconds:>9.3f}" for seconds in (best, ours, made_too))
        lines.append(f"{batch:>7}{times}{best / ours:>7.2f}x{share:>16.1%}")
    show("\n".join(lines))
