"""Bits of masks, a million weights: pack, unpack, count and Hamming distance beside numpy and beside bool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparselth.kernels.bitmask import count, floor, hamming, pack, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K = 1000, 1000


def test_bitmask(interleaved: Callable[..., Any], show: Callable[[str], None]) -> None:
    a, b = (torch.rand(2, N, K, generator=torch.Generator().manual_seed(0)) < 0.2).to(DEVICE)
    p, q = pack(a), pack(b)
    x, y = a.cpu().numpy(), p.cpu().numpy()
    assert np.array_equal(np.packbits(x, axis=1, bitorder="little"), y)
    assert torch.equal(unpack(p, K), a)
    assert int(count(p)) == int(a.sum())
    assert int(hamming(p, q)) == int((a ^ b).sum())
    rivals: dict[str, tuple[Callable[[], object], Callable[[], object], str]] = {
        "pack": (lambda: pack(a), lambda: np.packbits(x, axis=1, bitorder="little"), "numpy.packbits"),
        "unpack": (
            lambda: unpack(p, K),
            lambda: np.unpackbits(y, axis=1, count=K, bitorder="little"),
            "numpy.unpackbits",
        ),
        "count": (lambda: count(p), lambda: a.count_nonzero(), "torch.count_nonzero of bool"),
        "hamming": (lambda: hamming(p, q), lambda: (a ^ b).count_nonzero(), "torch's xor and count of bool"),
    }

    def synchronized(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {name: (synchronized(ours), 10) for name, (ours, _, _) in rivals.items()}
    calls |= {f"{name} rival": (synchronized(rival), 10) for name, (_, rival, _) in rivals.items()}
    t = interleaved(calls, rounds=20)
    rows = [f"{f'{N * K} bits, {DEVICE}':<16}ms      floor, MB   rival"]
    for name, (_, _, what) in rivals.items():
        ours, theirs = t[name].median, t[f"{name} rival"].median
        rows.append(
            f"  {name:<12}{1e3 * ours:8.3f}   {floor(name, N * K)['bytes'] / 1e6:8.3f}   "
            f"{1e3 * theirs:8.3f}  {what}, {theirs / ours:.2f}x"
        )
    show("\n".join(rows))
