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
one weight in a hundred is sorted; the index is the place of the weight's bit in the new masks. One weight
in `step` is sampled; two order statistics of the sample, a few standard deviations around the rank sought,
bracket it. One pass over the weights writes a provisional mask (1 from the lower pivot on) and marks what
lies inside the bracket; a second, over the bits, counts both and collects the ranks inside. The counts
prove the bracket, else it is widened and swept again. The exact rank is then found inside it, and the bits
of those of its members that go are cleared. For 1e8 weights in fp32 that moves about 4.8 bytes a weight
beside a floor of 4.125. Rows that end within a byte (K % 8 != 0) cost a division a weight more.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, log2, sqrt
from math import floor as round_down

import numpy as np
import torch
from torch import Tensor, library

from sparselth.kernels._triton import Aot, tl, triton
from sparselth.kernels.bitmask import (
    is_ragged,
    launch_count,
    places,
    popcount,
    reference_pack,
    reference_unpack,
    use_triton,
)

BLOCK = 1024  # bytes of mask, and so 8,192 weights, a program
CHUNK = 2**18  # weights that plain torch takes at a time, to stay in the cache
SIGMAS = 4.0  # half the bracket; a miss, one in 10,000, costs a second pass
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
def _sweep_kernel(
    w_ptr, mask_ptr, pivots_ptr, bits_ptr, members_ptr,
    n_bytes, K, first, stride_wr, stride_mr, stride_br,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Bits of the survivors from the lower pivot on, and of those of them below the upper one."""
    r = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # A pivot's place counts by the chunk, so that one comparison of keys is enough: equal magnitudes of
    # the chunk that holds a pivot all belong to the bracket.
    place = 8 * (first + start)
    low, high = tl.load(pivots_ptr + 2 * r), tl.load(pivots_ptr + (2 * r + 1))
    low = (low >> 32) + (place + 8 * BLOCK <= (low & 0xFFFFFFFF)).to(tl.int64)
    high = tl.minimum((high >> 32) + (place < (high & 0xFFFFFFFF)).to(tl.int64), 0x7FFFFFFF)

    offs_w, inside = places(start, n_bytes, K, BLOCK, RAGGED)
    key = _key(tl.load(w_ptr + r * stride_wr + offs_w, mask=inside, other=0.0))
    above = inside & (key >= low.to(tl.int32))
    both = tl.where(above, tl.where(key < high.to(tl.int32), 0x10001, 1), 0)
    both = tl.sum(tl.reshape(both, (BLOCK, 8)) << tl.arange(0, 8)[None, :], axis=1)  # [BLOCK]
    offs = start + tl.arange(0, BLOCK)
    if MASKED:
        byte = tl.load(mask_ptr + r * stride_mr + offs, mask=offs < n_bytes, other=0).to(tl.int32)
        both &= byte * 0x10001
    tl.store(bits_ptr + r * stride_br + offs, both.to(tl.uint8), mask=offs < n_bytes)
    tl.store(members_ptr + r * stride_br + offs, (both >> 16).to(tl.uint8), mask=offs < n_bytes)


@triton.jit
def _collect_kernel(
    w_ptr, bits_ptr, members_ptr, bracket_ptr, counts_ptr,
    n_bytes, K, first, capacity, stride_wr, stride_br,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Count both kinds of bits, 32 at a time, and write the ranks of the members, in any order."""
    r = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    words = tl.arange(0, BLOCK // 4)
    offs = r * stride_br + start // 4 + words
    there = start + 4 * words < n_bytes
    kept = popcount(tl.load(bits_ptr + offs, mask=there, other=0).to(tl.uint32)).to(tl.int32)
    word = tl.load(members_ptr + offs, mask=there, other=0).to(tl.uint32)
    ones = popcount(word).to(tl.int32)
    inside = tl.sum(ones)
    counts = (tl.sum(kept).to(tl.int64) << 32) + inside
    taken = tl.atomic_add(counts_ptr + r, counts, sem="relaxed") & 0xFFFFFFFF
    if taken + inside <= capacity:  # else the pass is repeated with room for all
        slot = r * capacity + taken + tl.cumsum(ones, 0) - ones
        rounds = tl.max(ones)
        while rounds > 0:  # each takes the lowest member of every word
            lowest = (word & (0 - word)).to(tl.float32)  # a power of 2: its exponent says which
            local = 32 * words + (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            offs_w = 8 * start + local
            if RAGGED:
                row_bits = (K + 7) // 8 * 8
                offs_w -= offs_w // row_bits * (row_bits - K)
            key = _key(tl.load(w_ptr + r * stride_wr + offs_w, mask=word != 0, other=0.0)).to(tl.int64)
            place = 8 * (first + start) + local
            tl.store(bracket_ptr + slot, (key << 32) | place, mask=word != 0)
            slot += 1
            word &= word - 1
            rounds -= 1


def _by_bracket(
    weights: list[Tensor], masks: list[Tensor], k: list[int], alive: list[int]
) -> tuple[Tensor, Tensor]:
    """What `_by_partition` does, in Triton."""
    new = torch.zeros(len(k), _starts(weights)[1], dtype=torch.uint8, device=weights[0].device)
    total = sum(w[0].numel() for w in weights)
    step = 1 << min(max(round(log2(total) / 3 - 1), 0), 8)  # balances the sample and the bracket
    while step > 1 and any(w.shape[2] % step == 0 for w in weights):
        step += 1  # else a matrix would be sampled in one of its columns
    sample = _sample(weights, masks, step)
    sigmas = SIGMAS
    while True:
        ends = [
            _ends(n - going, total, step, sample.shape[1] - 1, sigmas) if going else (0, 0)
            for going, n in zip(k, alive, strict=True)
        ]
        span = max(high - low for low, high in ends)
        capacity = min(total, step * ceil(span + 6 * sqrt(span) + 8))
        pivots = sample.gather(1, torch.tensor(ends, device=new.device))
        bracket, counts = _sweep(weights, masks, pivots, capacity, new)
        both = counts.tolist()
        inside = [c & LOW for c in both]
        left = [going - n + (c >> 32 & LOW) for going, n, c in zip(k, alive, both, strict=True)]
        room = bracket.shape[1]
        if all(not going or 1 <= here <= n <= room for going, here, n in zip(k, left, inside, strict=True)):
            break
        sigmas *= 4
    ranks = bracket[:, : max(inside)]
    nothing = ranks.new_full((len(k), 1), -1)
    last = [[here if going else 0] for going, here in zip(k, left, strict=True)]
    cuts = torch.cat([nothing, ranks], 1).sort(1).values.gather(1, torch.tensor(last, device=new.device))
    ones = torch.where(ranks <= cuts, -(1 << (ranks & 7)), 0).to(torch.uint8)
    new.scatter_add_(1, ((ranks & LOW) >> 3).clamp_(max=new.shape[1] - 1), ones)  # each is set: no borrow
    return new, _thresholds(cuts[:, 0])


def _sample(weights: list[Tensor], masks: list[Tensor], step: int) -> Tensor:
    """Ranks of one weight in `step` [R, S + 2], sorted: those of pruned weights are 0, the last is LAST."""
    found = [torch.tensor([[0, LAST]], device=weights[0].device).expand(len(weights[0]), 2)]
    for i, (w, start) in enumerate(zip(weights, _starts(weights)[0], strict=True)):
        keys = _magnitude(w.flatten(1)[:, ::step]).long()
        place = torch.arange(0, w[0].numel(), step, device=w.device)
        if gap := -w.shape[2] % 8:
            place += place // w.shape[2] * gap
        ranks = keys << 32 | place + 8 * start
        if masks:
            alive = masks[i].flatten(1)[:, place >> 3] >> (place & 7) & 1
            ranks *= alive
        found.append(ranks)
    return torch.cat(found, 1).sort(1).values


def _ends(keep: int, weights: int, step: int, last: int, sigmas: float) -> tuple[int, int]:
    """Indices into the sample that bracket the cut; 0 and `last` stand for the very ends."""
    centre = keep / step  # counted from the largest, for the pruned are in the sample, at its front
    half = sigmas * sqrt(centre * max(1 - keep / weights, 0)) + 2
    return max(last - ceil(centre + half), 0), min(last - round_down(centre - half), last)


def _sweep(
    weights: list[Tensor], masks: list[Tensor], pivots: Tensor, capacity: int, new: Tensor
) -> tuple[Tensor, Tensor]:
    """Provisional masks into `new`; ranks inside [R, capacity], filled up with LAST; kept << 32 | inside."""
    members = torch.zeros_like(new)
    bracket = pivots.new_full((len(new), capacity), LAST)
    counts = pivots.new_zeros(len(new))
    for i, (w, start) in enumerate(zip(weights, _starts(weights)[0], strict=True)):
        bits, marks, mask = new[:, start:], members[:, start:], masks[i] if masks else new
        n_bytes, k = w.shape[1] * -(-w.shape[2] // 8), w.shape[2]
        grid = (triton.cdiv(n_bytes, BLOCK), len(w))
        with torch.cuda.device_of(w):
            _sweep_kernel[grid](
                w, mask, pivots, bits, marks, n_bytes, k, start, w.stride(0), mask.stride(0), new.stride(0),
                BLOCK=BLOCK, MASKED=bool(masks), RAGGED=is_ragged(k), num_warps=8,
            )  # fmt: skip
            _collect_kernel[grid](
                w, bits.view(torch.int32), marks.view(torch.int32), bracket, counts,
                n_bytes, k, start, capacity, w.stride(0), new.stride(0) // 4,
                BLOCK=BLOCK, RAGGED=is_ragged(k), num_warps=4,
            )  # fmt: skip
    return bracket, counts


def launch(
    weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor], *, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The new masks of all tensors in one buffer [R, bytes], see `split`; and the thresholds."""
    _check(weights, k, masks)
    select = _by_bracket if use_triton(kernels, weights[0]) else _by_partition
    weights, masks = ([x if x[0].is_contiguous() else x.contiguous() for x in xs] for xs in (weights, masks))
    groups = [[i] for i in range(len(weights))] if k.ndim == 2 else [list(range(len(weights)))]
    alive = [[w[0].numel()] * len(w) for w in weights]
    if masks:
        counts = [launch_count(m.flatten(1), None, True, kernels=kernels) for m in masks]
        alive = torch.stack(counts).tolist()
    found = []
    for group, going in zip(groups, k.reshape(len(k), -1).T.tolist(), strict=True):
        survivors = [sum(alive[i][r] for i in group) for r in range(len(k))]
        for r, (gone, n) in enumerate(zip(going, survivors, strict=True)):
            if not 0 <= gone <= n:
                layer = f", tensor {group[0]}" if k.ndim == 2 else ""
                raise ValueError(f"replica {r}{layer}: cannot prune {gone} of {n} weights")
        theirs = [masks[i] for i in group] if masks else []
        found.append(select([weights[i] for i in group], theirs, going, survivors))
    bits, thresholds = zip(*found, strict=True)
    return torch.cat(bits, 1), torch.stack(thresholds, 1).view(k.shape)


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


@library.custom_op("sparselth::magnitude_threshold", mutates_args=())
def _op(weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return launch(weights, k, masks)


@_op.register_fake
def _(weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    bits = weights[0].new_empty((len(k), _starts(weights)[1]), dtype=torch.uint8)
    return bits, weights[0].new_empty(k.shape, dtype=torch.float32)


def magnitude_threshold(
    weights: Sequence[Tensor], k: Tensor, masks: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """New masks without the k smallest magnitudes, and the largest of those magnitudes (-inf where k is 0).

    Weights may be views of a flat buffer [R, P]: `flat[:, s.offset : s.offset + s.numel].unflatten(1,
    s.matrix)`. The masks are views of one buffer: contiguous within a replica, and altogether where R is 1.
    A k that exceeds the survivors raises ValueError.
    """
    bits, thresholds = _op([w.detach() for w in weights], k, list(masks))
    return split(bits, weights), thresholds


def floor(weights: int, itemsize: int = 4, masked: bool = False) -> dict[str, int]:
    """Least traffic: every weight read, every bit written, and read first where there is a mask."""
    bits = -(-weights // 8)
    return {"bytes": weights * itemsize + bits + bits * masked, "flops": 0}


def _aot(pointer: str, masked: bool, ragged: bool, registers: int, narrow: int) -> list[Aot]:
    sizes = {"n_bytes": "i32", "K": "i32", "first": "i32"}
    aligned: tuple[str, ...] = (
        "w_ptr",
        "mask_ptr",
        "bits_ptr",
        "members_ptr",
        "first",
        "stride_wr",
        "stride_br",
    )
    if not ragged:
        aligned += ("n_bytes", "K", "stride_mr")
    return [
        Aot(
            kernel=_sweep_kernel,
            signature={"w_ptr": pointer, "mask_ptr": "*u8", "pivots_ptr": "*i64", "bits_ptr": "*u8"}
            | {"members_ptr": "*u8", **sizes}
            | {"stride_wr": "i64", "stride_mr": "i64", "stride_br": "i64"},
            constants={"BLOCK": BLOCK, "MASKED": masked, "RAGGED": ragged},
            aligned=aligned,
            num_warps=8,
            num_stages=1,
            max_registers=registers,
            narrow=narrow,
        ),
        Aot(
            kernel=_collect_kernel,
            signature={"w_ptr": pointer, "bits_ptr": "*i32", "members_ptr": "*i32", "bracket_ptr": "*i64"}
            | {"counts_ptr": "*i64", **sizes, "capacity": "i32", "stride_wr": "i64", "stride_br": "i64"},
            constants={"BLOCK": BLOCK, "RAGGED": ragged},
            aligned=tuple(name for name in aligned if name not in ("mask_ptr", "stride_mr")),
            num_warps=4,
            num_stages=1,
            max_registers=64,
            narrow=9,  # words of bits, and single members
        ),
    ]


AOT = [
    # narrow: the pivots, the bytes of bits, the mask's; where rows are ragged the weights, too
    *_aot("*fp32", masked=False, ragged=False, registers=64, narrow=4),
    *_aot("*fp32", masked=True, ragged=False, registers=64, narrow=5),
    *_aot("*fp32", masked=True, ragged=True, registers=128, narrow=46),
    *_aot("*bf16", masked=True, ragged=False, registers=64, narrow=5),
]
