r"""The k smallest magnitudes go: an exact threshold over many tensors, and the packed mask behind it.

    t[r] = k[r]-th smallest |w| over the survivors of replica r,  new mask = survivors without those k

| name       | shape                 | dtype              |   Floor, s = itemsize, P = weights:
| weights    | L x [R, N, K]         | fp32, fp16 or bf16 |   bytes = P s + P / 8, and P / 8 more
| masks      | L x [R, N, ceil(K/8)] | uint8, or none     |   where there is a current mask;
| k          | [R] or [R, L]         | integer            |   no FLOPs, two comparisons a weight
| new masks  | as masks              | uint8              |
| thresholds | as k                  | fp32               |

k of shape [R] ranks over all tensors, [R, L] within each. Equal magnitudes go by lowest index: first
tensor first, then row-major. Only survivors are ranked, the pruned stay pruned. 0.0 and -0.0 are equal.
NaN counts as larger than infinity, all NaN as equal: it goes last, never silently before a number.

Every weight has a rank of its own, the 64-bit number

    magnitude bits << 32 | index

so there are no ties to count. On a CPU, numpy's partition, which is SIMD, selects among a replica's ranks:
8 bytes a weight of scratch, and as much for the selection. On CUDA nothing is concatenated and only about
one weight in a hundred is sorted; the index is the place of the weight's bit in the new masks. One weight in
`step` is sampled, by a hash; two order statistics of the sample, a few standard deviations around the rank
sought, bracket it. One pass over the weights writes provisional bits (1 from the lower pivot on), collects
the ranks inside the bracket and counts both. The ranks are sorted, and the bits of those that go are cleared.
The counts prove the bracket; the host reads them when all is done, and where they do not it starts again
with a wider one, in the end with everything. Rows that end within a byte (K % 8 != 0) cost a division more.

1e8 weights, fp32, a fifth of them to go, expected (H200 | H100, copies at 4.3 | 3.0 TB/s); goal 5 reads:
    the pass     4.125 B a weight, 412 MB; 22 instructions a weight; 48 registers, 5 programs a SM with 32 KB
                 of loads in flight each; at 0.9 of a copy                                   107 | 153 us
    the sample   390,625 granules of 64 bytes, 25 MB                                           6 |   8 us
    two sorts    390,625 int32 in 4, 584,000 int64 in 8 radix passes of 7 us, 18 us beside         102 us
    the rest     4 kernels, an upload and a wait 15 us, Python before the first of them 30 us       45 us
    together     2.8 | 2.3 reads of the weights (93 | 133 us)                                260 | 308 us
A radix select in place of the sorts (16 launches of histograms) comes to 240 | 290 us by the same count.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, log2, sqrt
from math import floor as round_down

import numpy as np
import torch
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels._operator import fake, operator
from sparselth.kernels._triton import tl, triton
from sparselth.kernels.bitmask import (
    is_ragged,
    launch_count,
    places,
    popcount,
    reference_pack,
    reference_unpack,
)

BLOCK = 1024  # bytes of mask, and so 8,192 weights, a program
LIST = 1024  # samples or members a program
CHUNK = 2**18  # weights that plain torch takes at a time, to stay in the cache
SIGMAS = 4.0  # half the bracket; a miss, one in 10,000, costs a second pass
ROWS = 65_535  # replicas of a launch: the second axis of a CUDA grid
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ABS, NAN = 0x7FFFFFFF, 0x7F800001  # the sign cleared; the magnitude bits of every NaN
LOW, LAST = 0xFFFFFFFF, (1 << 63) - 1  # the place within a rank; behind every rank


def _by_partition(
    weights: list[Tensor], masks: list[Tensor], k: list[int], alive: list[int]
) -> tuple[Tensor, Tensor]:
    """New masks [R, bytes] and thresholds [R] of one ranking; plain torch, but for the selection itself."""
    sizes, (starts, size) = [w[0].numel() for w in weights], _starts(weights)
    new = torch.zeros(len(k), size, dtype=torch.uint8, device=weights[0].device)
    ranks = np.arange(sum(sizes))
    keys = torch.from_numpy(ranks.view(np.int32)[1::2])  # the upper halves
    ordered, cuts = np.empty_like(ranks), []
    for r, (going, n) in enumerate(zip(k, alive, strict=True)):
        for i, part in enumerate(keys.split(sizes)):
            _write_keys(part, weights[i][r], masks[i][r] if masks else None)
        ordered[:] = ranks
        last = len(ranks) - n + going - 1
        if going:
            ordered.partition(last)
        cuts.append(int(ordered[last]) if going else -1)
        stay = torch.from_numpy(ranks > cuts[r])
        for start, part, w in zip(starts, stay.split(sizes), weights, strict=True):
            bits = reference_pack(part.view(w.shape[1:])).flatten()
            new[r, start : start + len(bits)] = bits
    return new, _thresholds(torch.tensor(cuts, device=new.device))


def _write_keys(keys: Tensor, w: Tensor, mask: Tensor | None) -> None:
    """Magnitudes of w [N, K], -1 where pruned, a cacheful at a time."""
    alive = None if mask is None else reference_unpack(mask, w.shape[1]).flatten().split(CHUNK)
    for i, (part, piece) in enumerate(zip(keys.split(CHUNK), w.flatten().split(CHUNK), strict=True)):
        found = _magnitude(piece)
        if alive is not None:
            found |= alive[i].int() - 1  # torch's masked_fill_ goes one by one
        part.copy_(found)


def _magnitude(w: Tensor) -> Tensor:
    """int32 that order as |w| does."""
    return (w.float().view(torch.int32) & ABS).clamp_(max=NAN)


def _thresholds(cuts: Tensor) -> Tensor:
    """Ranks to the magnitudes in them; -inf for -1, where nothing went."""
    return torch.where(cuts < 0, -inf, (cuts >> 32).int().view(torch.float32))


@triton.jit
def _key(w):
    """As `_magnitude`."""
    return tl.minimum(w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def _sample_kernel(
    w_ptr, mask_ptr, keys_ptr, places_ptr,
    n, numel, masked_bytes, K, first, step, at, samples, stride_wr, stride_mr,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Keys of one weight in every `step`, -1 where pruned, and their places, which rise."""
    r = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    # which of them, a hash says: to a fixed one, weights with that period would hide the others
    h = i.to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA77
    h = (h ^ (h >> 13)) & (step - 1)
    offs_w = tl.minimum(i * step + h.to(tl.int64), numel - 1)
    place = offs_w
    if RAGGED:
        place += offs_w // K * ((K + 7) // 8 * 8 - K)
    key = _key(tl.load(w_ptr + r * stride_wr + offs_w, mask=there, other=0.0))
    read = there & (place >> 3 < masked_bytes)  # without a mask no byte is
    byte = tl.load(mask_ptr + r * stride_mr + (place >> 3), mask=read, other=255).to(tl.int32)
    key = tl.where((byte >> (place & 7).to(tl.int32)) & 1 != 0, key, -1)
    tl.store(keys_ptr + (r * samples + at + i), key, mask=there)
    tl.store(places_ptr + (at + i), place + 8 * first.to(tl.int64), mask=i < tl.where(r == 0, n, 0))


@triton.jit
def _open_kernel(
    keys_ptr, order_ptr, places_ptr, plan_ptr, bracket_ptr, samples, capacity, BLOCK: tl.constexpr
):  # fmt: skip
    """Fill the bracket with ranks behind all others; put the pivots, ranks too, where their indices were."""
    r = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    last = tl.full((BLOCK,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    tl.store(bracket_ptr + r * capacity + offs, last, mask=offs < capacity)
    if tl.program_id(0) == 0:
        ends = tl.arange(0, 2)
        at = tl.load(plan_ptr + (6 * r + ends))
        there = (at >= 0) & (at < samples)
        key = tl.load(keys_ptr + r * samples + at, mask=there, other=-1).to(tl.int64)
        place = tl.load(places_ptr + tl.load(order_ptr + r * samples + at, mask=there, other=0))
        rank = tl.where(key < 0, 0, (key << 32) | place)
        tl.store(plan_ptr + (6 * r + ends), tl.where(at < samples, rank, 0x7FFFFFFFFFFFFFFF))


@triton.jit
def _sweep_kernel(
    w_ptr, mask_ptr, plan_ptr, bits_ptr, bracket_ptr,
    n_bytes, masked_bytes, K, first, capacity, stride_wr, stride_mr, stride_br,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Bits of the survivors from the lower pivot on; ranks of those of them below the upper one, the
    bracket's members, in any order; and how many there are of both."""
    r = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # A pivot's place counts by the chunk, so that one comparison of keys is enough: equal magnitudes of
    # the chunk that holds a pivot all belong to the bracket.
    place = 8 * (first + start)
    low, high = tl.load(plan_ptr + 6 * r), tl.load(plan_ptr + (6 * r + 1))
    low = (low >> 32) + (place + 8 * BLOCK <= (low & 0xFFFFFFFF)).to(tl.int64)
    high = tl.minimum((high >> 32) + (place < (high & 0xFFFFFFFF)).to(tl.int64), 0x7FFFFFFF)

    offs_w, inside = places(start, n_bytes, K, BLOCK, RAGGED)
    key = _key(tl.load(w_ptr + r * stride_wr + offs_w, mask=inside, other=0.0))
    offs = start + tl.arange(0, BLOCK)
    byte = tl.load(mask_ptr + r * stride_mr + offs, mask=offs < masked_bytes, other=255).to(tl.int32)
    above = key >= low.to(tl.int32)
    if RAGGED:
        above &= inside
    both = tl.where(above, tl.where(key < high.to(tl.int32), 0x10001, 1), 0)
    both = tl.sum(tl.reshape(both, (BLOCK, 8)) << tl.arange(0, 8)[None, :], axis=1)  # [BLOCK]
    both &= tl.where(offs < n_bytes, byte * 0x10001, 0)
    # up to the next tensor's bits, so that those between are 0
    tl.store(bits_ptr + r * stride_br + offs, both.to(tl.uint8), mask=offs < (n_bytes + 15) // 16 * 16)

    fours = tl.arange(0, 4)[None, :] * 8
    word = tl.sum(tl.reshape(both >> 16, (BLOCK // 4, 4)).to(tl.uint32) << fours, axis=1).to(tl.uint32)
    ones = popcount(word).to(tl.int32)
    members = tl.sum(ones)
    kept = tl.sum(popcount((both & 255).to(tl.uint32)).to(tl.int32))
    counts = (kept.to(tl.int64) << 32) + members
    taken = tl.atomic_add(plan_ptr + (6 * r + 4), counts, sem="relaxed") & 0xFFFFFFFF
    if taken + members <= capacity:  # else the pass is repeated with room for all
        slot = r * capacity + taken + tl.cumsum(ones, 0) - ones
        words = tl.arange(0, BLOCK // 4)
        rounds = tl.max(ones)
        while rounds > 0:  # each takes the lowest member of every word
            lowest = (word & (0 - word)).to(tl.float32)  # a power of 2: its exponent says which
            local = 32 * words + (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            offs_m = 8 * start + local
            if RAGGED:
                row_bits = (K + 7) // 8 * 8
                offs_m -= offs_m // row_bits * (row_bits - K)
            rank = _key(tl.load(w_ptr + r * stride_wr + offs_m, mask=word != 0, other=0.0)).to(tl.int64) << 32
            tl.store(bracket_ptr + slot, rank | (place + local), mask=word != 0)
            slot += 1
            word &= word - 1
            rounds -= 1


@triton.jit
def _finish_kernel(
    bracket_ptr, plan_ptr, bits_ptr, thresholds_ptr, capacity, stride_br, stride_tr, BLOCK: tl.constexpr
):
    """Clear the bits of those members, in order, that go; the last of them is the threshold."""
    r = tl.program_id(1).to(tl.int64)
    going, n = tl.load(plan_ptr + (6 * r + 2)), tl.load(plan_ptr + (6 * r + 3))
    counts = tl.load(plan_ptr + (6 * r + 4))
    left = tl.minimum(going - n + (counts >> 32), capacity)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(bracket_ptr + r * capacity + offs, mask=offs < left, other=0x7FFFFFFFFFFFFFFF)
    place = rank & 0xFFFFFFFF
    goes = rank != 0x7FFFFFFFFFFFFFFF  # where the bracket missed, there may be fewer
    bit = tl.full((BLOCK,), 1, tl.int32) << (place & 31).to(tl.int32)
    tl.atomic_xor(bits_ptr + r * stride_br + (place >> 5), bit, mask=goes, sem="relaxed")
    if tl.program_id(0) == 0:
        some = (going > 0) & (left > 0)
        cut = tl.load(bracket_ptr + (r * capacity + left - 1), mask=some, other=0) >> 32
        threshold = tl.where(some, cut.to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
        tl.store(thresholds_ptr + r * stride_tr, threshold)


def _by_bracket(
    weights: list[Tensor],
    masks: list[Tensor],
    groups: list[list[int]],
    k: list[list[int]],
    alive: list[list[int]],
) -> tuple[Tensor, Tensor]:
    """What `_by_partition` does for every group of tensors, in Triton; k and alive are [groups][R].

    All of it is queued before the host waits, once, for the counts that prove the brackets.
    """
    device, replicas = weights[0].device, len(weights[0])
    new = torch.empty(replicas, _starts(weights)[1], dtype=torch.uint8, device=device)
    thresholds = torch.empty(replicas, len(groups), device=device, dtype=torch.float32)
    todo = [(g, slice(r, r + ROWS)) for g in range(len(groups)) for r in range(0, replicas, ROWS)]
    sigmas = SIGMAS
    while todo:
        jobs = [_Job(weights, groups[g], k[g][rows], alive[g][rows], sigmas) for g, rows in todo]
        lines = [line for job in jobs for line in job.plan]
        pinned = torch.tensor(lines, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
        plan = pinned.to(device, non_blocking=True)  # torch keeps the pinned block until it was read
        first = 0
        for (g, rows), job in zip(todo, jobs, strict=True):
            theirs = plan[first : first + len(job.plan)]
            some, old = ([x[rows] for x in xs] for xs in (weights, masks))
            job.queue(some, old, theirs, new[rows], thresholds[rows, g])
            first += len(job.plan)
        counts, missed = [line[4] for line in plan.tolist()], []
        for which, job in zip(todo, jobs, strict=True):
            if not job.proven([counts.pop(0) for _ in job.plan]):
                if job.all:
                    raise RuntimeError(f"no threshold among all of {job.samples} x {job.step} weights")
                missed.append(which)
        todo, sigmas = missed, 4 * sigmas
    return new, thresholds


class _Job:
    """One ranking over a group of tensors for at most ROWS replicas.

    `plan` [R, 6] holds the pivots as indices into the sorted sample (-1 and `samples` stand for the very
    ends), how many weights go, of how many, and a place for what the sweep counts: kept << 32 | inside. The
    sixth number fills 16 bytes up.
    """

    def __init__(
        self, weights: list[Tensor], group: list[int], k: list[int], alive: list[int], sigmas: float
    ) -> None:
        sizes = [weights[i][0].numel() for i in group]
        total = sum(sizes)
        self.group = group
        self.step = 1 << min(max(round(log2(total) / 3 - 1), 0), 10)  # balances the sample and the bracket
        self.counts = [-(-size // self.step) for size in sizes]
        self.samples = sum(self.counts)
        self.plan = []
        for going, n in zip(k, alive, strict=True):
            keep = n - going
            centre = keep / self.step  # from the largest, for the pruned are in the sample, at its front
            half = sigmas * sqrt(centre * max(1 - keep / total, 0)) + 2
            low = max(self.samples - ceil(centre + half), -1)
            high = min(self.samples - round_down(centre - half), self.samples)
            self.plan.append([low, high, going, n, 0, 0] if going else [-1, -1, 0, n, 0, 0])
        span = max(high - low for low, high, *_ in self.plan)
        self.all = all(high - low > self.samples for low, high, going, *_ in self.plan if going)
        self.capacity = min(total, self.step * ceil(span + 6 * sqrt(span) + 8))

    def queue(
        self, weights: list[Tensor], masks: list[Tensor], plan: Tensor, new: Tensor, thresholds: Tensor
    ) -> None:
        """The launches; `new` [R, bytes] and `thresholds` [R] are written."""
        starts, rows = _starts(weights)[0], len(plan)
        n_bytes = [w.shape[1] * -(-w.shape[2] // 8) for w in weights]
        keys = torch.empty(rows, self.samples, dtype=torch.int32, device=new.device)
        places = torch.empty(self.samples, dtype=torch.int64, device=new.device)
        bracket = torch.empty(rows, self.capacity, dtype=torch.int64, device=new.device)
        with torch.cuda.device_of(new):
            at = 0
            for i, n in zip(self.group, self.counts, strict=True):
                w, mask, masked = weights[i], masks[i] if masks else new, n_bytes[i] if masks else 0
                _sample_kernel[(triton.cdiv(n, LIST), rows)](
                    w, mask, keys, places,
                    n, w[0].numel(), masked, w.shape[2], starts[i], self.step, at, self.samples,
                    w.stride(0), mask.stride(0), BLOCK=LIST, RAGGED=is_ragged(w.shape[2]), num_warps=4,
                )  # fmt: skip
                at += n
            ordered, order = keys.sort(dim=1, stable=True)  # of equal keys the first place first
            _open_kernel[(triton.cdiv(self.capacity, LIST), rows)](
                ordered, order, places, plan, bracket, self.samples, self.capacity,
                BLOCK=LIST, num_warps=4,
            )  # fmt: skip
            for i in self.group:
                w, mask, masked = weights[i], masks[i] if masks else new, n_bytes[i] if masks else 0
                ragged = is_ragged(w.shape[2])
                block = BLOCK // 2 if ragged else BLOCK  # a full one would spill
                _sweep_kernel[(triton.cdiv(n_bytes[i], block), rows)](
                    w, mask, plan, new[:, starts[i] :], bracket,
                    n_bytes[i], masked, w.shape[2], starts[i], self.capacity,
                    w.stride(0), mask.stride(0), new.stride(0),
                    BLOCK=block, RAGGED=ragged, num_warps=8,
                )  # fmt: skip
            _finish_kernel[(triton.cdiv(self.capacity, LIST), rows)](
                bracket.sort(1).values, plan, new.view(torch.int32), thresholds,
                self.capacity, new.stride(0) // 4, thresholds.stride(0), BLOCK=LIST, num_warps=4,
            )  # fmt: skip

    def proven(self, counts: list[int]) -> bool:
        """Whether every rank sought lies in its bracket, and the bracket had room for all its members."""
        for (_, _, going, n, *_), both in zip(self.plan, counts, strict=True):
            inside, left = both & LOW, going - n + (both >> 32)
            if going and not 1 <= left <= inside <= self.capacity:
                return False
        return True


def launch(
    weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor], *, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The new masks of all tensors in one buffer [R, bytes], see `split`; and the thresholds."""
    _check(weights, k, masks)
    triton_takes = use_triton(kernels, weights[0])
    weights, masks = ([x if x[0].is_contiguous() else x.contiguous() for x in xs] for xs in (weights, masks))
    groups = [[i] for i in range(len(weights))] if k.ndim == 2 else [list(range(len(weights)))]
    alive = [[w[0].numel()] * len(w) for w in weights]
    if masks:
        counts = [launch_count(m.flatten(1), None, True, kernels=kernels) for m in masks]
        alive = torch.stack(counts).tolist()
    going = k.reshape(len(k), -1).T.tolist()
    survivors = [[sum(alive[i][r] for i in group) for r in range(len(k))] for group in groups]
    for group, gone, left in zip(groups, going, survivors, strict=True):
        for r, (some, n) in enumerate(zip(gone, left, strict=True)):
            if not 0 <= some <= n:
                layer = f", tensor {group[0]}" if k.ndim == 2 else ""
                raise ValueError(f"replica {r}{layer}: cannot prune {some} of {n} weights")
    if triton_takes:
        bits, thresholds = _by_bracket(weights, masks, groups, going, survivors)
        return bits, thresholds.view(k.shape)
    found = [
        _by_partition([weights[i] for i in group], [masks[i] for i in group] if masks else [], gone, left)
        for group, gone, left in zip(groups, going, survivors, strict=True)
    ]
    parts, cuts = zip(*found, strict=True)
    return torch.cat(parts, 1), torch.stack(cuts, 1).view(k.shape)


def split(bits: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The masks [R, N, ceil(K / 8)] in the buffer that `launch` returns, as views."""
    found = []
    for w, start in zip(weights, _starts(weights)[0], strict=True):
        n, width = w.shape[1], -(-w.shape[2] // 8)
        found.append(bits[:, start : start + n * width].unflatten(1, (n, width)))
    return found


def _starts(weights: Sequence[Tensor]) -> tuple[list[int], int]:
    """First byte of every tensor in a replica's new masks, multiples of 16, and their size."""
    starts, size = [], 0
    for w in weights:
        starts.append(size)
        size += -(-w.shape[1] * -(-w.shape[2] // 8) // 16) * 16
    return starts, size


def _check(weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor]) -> None:
    if not weights:
        raise ValueError("expected at least one tensor of weights, got none")
    first = weights[0]
    for i, w in enumerate(weights):
        if w.ndim != 3 or not w.numel() or len(w) != len(first):
            raise ValueError(f"expected weights [R={len(first)}, N, K], got {tuple(w.shape)} (tensor {i})")
        if w.dtype not in DTYPES or w.dtype != first.dtype or w.device != first.device:
            raise ValueError(
                f"expected fp32, fp16 or bf16 weights, all alike and on one device, "
                f"got {w.dtype} on {w.device} beside {first.dtype} on {first.device} (tensor {i})"
            )
    if k.shape not in ((len(first),), (len(first), len(weights))) or k.is_floating_point():
        raise ValueError(
            f"expected integers k [R={len(first)}] or [R={len(first)}, L={len(weights)}], "
            f"got {k.dtype} {tuple(k.shape)}"
        )
    if masks and len(masks) != len(weights):
        raise ValueError(f"expected {len(weights)} masks, one a tensor, or none; got {len(masks)}")
    for i, (w, mask) in enumerate(zip(weights, masks, strict=False)):
        shape = (*w.shape[:2], -(-w.shape[2] // 8))
        if mask.shape != shape or mask.dtype != torch.uint8 or mask.device != w.device:
            raise ValueError(
                f"expected a packed mask uint8 {shape} on {w.device}, "
                f"got {mask.dtype} {tuple(mask.shape)} on {mask.device} (tensor {i})"
            )
    if 8 * _starts(weights)[1] > LOW:
        raise ValueError(f"expected fewer than 2**32 weights a replica, got {8 * _starts(weights)[1]}")


@operator("magnitude_threshold")
def _op(weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return launch(weights, k, masks)


@fake(_op)
def _(weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    bits = weights[0].new_empty((len(k), _starts(weights)[1]), dtype=torch.uint8)
    return bits, weights[0].new_empty(k.shape, dtype=torch.float32)


def magnitude_threshold(
    weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """New masks without the k smallest magnitudes, and the largest of those magnitudes (-inf where k is 0).

    Weights may be views of a flat buffer [R, P]: `flat[:, s.span].unflatten(1,
    s.matrix)`. The masks are views of one buffer: contiguous within a replica, and altogether where R is 1.
    A k that exceeds the survivors raises ValueError.
    """
    bits, thresholds = _op([w.detach() for w in weights], k, list(masks))
    return split(bits, weights), thresholds


def floor(weights: int, itemsize: int = 4, masked: bool = False) -> dict[str, int]:
    """Least traffic: every weight read, every bit written, and read first where there is a mask."""
    bits = -(-weights // 8)
    return {"bytes": weights * itemsize + bits + bits * masked, "flops": 0}
