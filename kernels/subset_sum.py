r"""Of each list of whole numbers, the subset whose sum is nearest to its target; for CPUs.

    chosen[c] = argmin_S |sum_S values[c] - targets[c]|, S a subset of {0 .. n-1}, of `size` where it is given

| name    | shape      | dtype |                                      Floor: the sums of both halves, written
| values  | [count, n] | int64 |                                      and read once, 2^(n/2) each, or
| targets | [count]    | int64 |                                      C(n/2, 0 .. size)
| chosen  | [count, n] | bool  |

By halves (Horowitz & Sahni 1974): the sums of each half come in order out of merges, then two pointers meet.
Sums of whole numbers are exact, so the answer is: no subset is nearer. Of equally near ones any is right, the
same one for the same numbers. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

MOST = 1 << 61  # what values and target of a problem add up to, in magnitude
CHUNK = 1 << 22  # sums that the reference holds at once


def lists(n: int, size: int | None) -> list[int]:
    """How many sums the lists of a half of `n` values hold: one list, or one for each number of values."""
    return [2**n] if size is None else [comb(n, j) for j in range(size + 1)]


def sums(n: int, size: int | None) -> int:
    """Sums of both halves: 8 bytes each for every thread."""
    return sum(lists(n // 2, size)) + sum(lists(n - n // 2, size))


def floor(count: int, n: int, size: int | None) -> dict[str, int]:
    """Bytes and additions of `subset_sum`."""
    return {"bytes": count * (8 * n + 8 + n), "flops": 2 * count * sums(n, size)}


def reference(values: Tensor, targets: Tensor, size: int | None = None) -> Tensor:
    """By halves, too, for many problems at a time: sums, sorted, and searched."""
    count, n = values.shape
    half = n // 2
    picks = [_subsets(m, size) for m in (half, n - half)]
    step = max(1, CHUNK // max(len(picks[0]), len(picks[1])))
    chosen = torch.zeros(count, n, dtype=torch.bool, device="cpu")
    for start in range(0, count, step):
        part, target = values[start : start + step], targets[start : start + step, None]
        totals = [_sums(v, pick) for v, pick in zip((part[:, :half], part[:, half:]), picks, strict=True)]
        best = torch.full((len(part),), MOST * 2, dtype=torch.int64, device="cpu")
        found = torch.zeros(len(part), n, dtype=torch.bool, device="cpu")
        for left, right in _pairs(picks, size):
            a = totals[0][:, left]
            b, order = totals[1][:, right].sort(1)
            above = torch.searchsorted(b, target - a)
            for at in (above.clamp(max=b.shape[1] - 1), (above - 1).clamp(min=0)):
                error, i = (a + b.gather(1, at) - target).abs().min(1)
                nearer = error < best
                best = torch.where(nearer, error, best)
                j = order.gather(1, at.gather(1, i[:, None]))[:, 0]
                both = torch.cat([picks[0][left][i], picks[1][right][j]], 1)
                found = torch.where(nearer[:, None], both, found)
        chosen[start : start + step] = found
    return chosen


def _subsets(m: int, size: int | None) -> Tensor:
    """Subsets of m things, of at most `size` of them, bool [.., m]."""
    if size is None:
        numbers = torch.arange(2**m, device="cpu")
        return (numbers[:, None] >> torch.arange(m, device="cpu") & 1).bool()
    picks = [torch.zeros(1, m, dtype=torch.bool, device="cpu")]
    for j in range(1, min(size, m) + 1):
        places = torch.tensor([*combinations(range(m), j)], device="cpu")
        picks.append(torch.zeros(len(places), m, dtype=torch.bool, device="cpu").scatter_(1, places, True))
    return torch.cat(picks)


def _sums(values: Tensor, picks: Tensor) -> Tensor:
    """[count, subsets] from values [count, m]."""
    total = values.new_zeros(len(values), len(picks))
    for i in range(values.shape[1]):
        total += values[:, i, None] * picks[:, i]
    return total


def _pairs(picks: list[Tensor], size: int | None) -> list[tuple[Any, Any]]:
    """Which subsets of the left half go with which of the right one."""
    if size is None:
        return [(slice(None), slice(None))]
    numbers = [pick.sum(1) for pick in picks]
    pairs = [(numbers[0] == j, numbers[1] == size - j) for j in range(size + 1)]
    return [(left, right) for left, right in pairs if left.any() and right.any()]


def subset_sum(values: Tensor, targets: Tensor, size: int | None = None, kernels: str = "auto") -> Tensor:
    """The nearest subset of each row of `values`, as bool [count, n]; of `size` values where that is given.

    Raises ValueError for other shapes and types, for a size that n values do not have, and where a sum
    could leave int64.
    """
    if values.dim() != 2 or values.dtype != torch.int64 or not values.is_cpu:
        raise ValueError(
            f"values: expected int64 [count, n] on a CPU, got {values.dtype} {list(values.shape)} "
            f"on {values.device}"
        )
    count, n = values.shape
    _native.check("targets", targets, (count,), torch.int64)
    if size is not None and not 0 <= size <= n:
        raise ValueError(f"size {size}: expected 0 to {n}, the values there are")
    if count and float((values.double().abs().sum(1) + targets.double().abs()).max()) > MOST:
        raise ValueError(f"values: expected sums up to {MOST} in magnitude; use a coarser grid")
    if not use_native(kernels):
        return reference(values, targets, size)
    values, targets = values.contiguous(), targets.contiguous()
    chosen = torch.empty(count, n, dtype=torch.uint8, device="cpu")
    most = -1 if size is None else size
    starts = []
    at = 0
    for m in (n // 2, n - n // 2):
        bounds = [at]
        for length in lists(m, size):
            bounds.append(bounds[-1] + length)
        starts.append(torch.tensor(bounds, dtype=torch.int64, device="cpu"))
        at = bounds[-1]
    threads = max(1, min(_native.threads(), count))
    slot = at + 2 * (most + 2)
    work = torch.empty(threads * slot, dtype=torch.int64, device="cpu")
    arguments = _SubsetSum(
        values=values.data_ptr(),
        targets=targets.data_ptr(),
        chosen=chosen.data_ptr(),
        work=work.data_ptr(),
        lefts=starts[0].data_ptr(),
        rights=starts[1].data_ptr(),
        count=count,
        n=n,
        size=most,
        slot=slot,
        threads=threads,
    )
    _native.bind("subset_sum", arguments)()
    return chosen.bool()


class _SubsetSum(ctypes.Structure):  # struct subset_sum
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("values", "targets", "chosen", "work", "lefts", "rights")],
        *[(name, ctypes.c_int64) for name in ("count", "n", "size", "slot")],
        ("threads", ctypes.c_int32),
    ]
