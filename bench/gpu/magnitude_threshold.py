"""magnitude_threshold: exact, beside a stable sort of all survivors; kthvalue, sort and topk as rivals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from gpu.common import Case, Here
from gpu.timing import median, ratio, rows
from oracle import (
    INF,
    NAN,
    Wrong,
    need_memory,
    poisoned,
    same_bits,
    surrounded,
)
from sparselth.kernels import magnitude_threshold as module
from sparselth.kernels.bitmask import reference_pack, reference_unpack
from sparselth.kernels.magnitude_threshold import floor, launch, split

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LENET = [(300, 784), (100, 300), (10, 100)]


class Setup(NamedTuple):
    shapes: list[tuple[int, int]]
    replicas: int = 1
    values: int = 1000  # distinct magnitudes
    keep: float = 1.0  # below 1: with a current mask
    layers: bool = False  # rank within each tensor
    seed: int = 0


TINY = [
    Setup([(1, 1)]),
    Setup([(5, 16), (3, 7)], 2, 20, 0.5),
    Setup([(12, 64), (3, 7)], 2, 10**6, 0.7, layers=True),
]
SMALL = TINY + [
    Setup(LENET, 3, 10**6, 0.5),
    Setup(LENET, 2, 10**6, 0.8, layers=True),
    Setup([(1000, 1000), (257, 513)], 1, 10**6),
    Setup([(1000, 1000)], 2, 3, 0.9),  # almost only ties
    Setup([(999, 1003)], 1, 0),  # only zeros
    Setup([(512, 4608), (64, 27), (1, 5)], 2, 10**6, 0.1),
]


class Problem(NamedTuple):
    weights: list[Tensor]
    masks: list[Tensor]
    k: Tensor


def problem(here: Here, part: str, s: Setup) -> Problem:
    """Pruned weights are NaN."""
    g = here.generator(s.seed)
    weights, kept = [], []
    for shape in s.shapes:
        size = (s.replicas, *shape)
        w = torch.randint(-s.values, s.values + 1, size, generator=g, device=here.device) / 64
        alive = torch.rand(size, generator=g, device=here.device) < s.keep
        weights.append(torch.where(alive, w, NAN).to(DTYPES[part]))
        kept.append(alive)
    alive = torch.stack([m.flatten(1).sum(1) for m in kept], 1).cpu()  # [R, L]
    alive = alive if s.layers else alive.sum(1)
    k = (torch.rand(alive.shape, generator=torch.Generator().manual_seed(s.seed)) * (alive + 1)).long()
    return Problem(weights, [reference_pack(m) for m in kept] if s.keep < 1 else [], k)


def by_sort(p: Problem) -> tuple[list[Tensor], Tensor]:
    """The definition: new masks and thresholds by a stable sort."""
    weights, masks, k = p
    kept = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    if masks:
        kept = [reference_unpack(m, w.shape[2]) for m, w in zip(masks, weights, strict=True)]
    groups = [[i] for i in range(len(weights))] if k.ndim == 2 else [list(range(len(weights)))]
    thresholds = torch.full((len(k), len(groups)), -INF, device=weights[0].device)
    for r in range(len(k)):
        for c, (group, going) in enumerate(zip(groups, k[r].view(-1).tolist(), strict=True)):
            values = torch.cat([weights[i][r][kept[i][r]] for i in group]).float().abs()
            ordered, order = values.sort(stable=True)
            stays = torch.ones_like(values, dtype=torch.bool)
            stays[order[:going]] = False
            for i, part in zip(group, stays.split([int(kept[i][r].sum()) for i in group]), strict=True):
                kept[i][r, kept[i][r].clone()] = part
            if going:
                thresholds[r, c] = ordered[going - 1]
    return [reference_pack(m) for m in kept], thresholds.view(k.shape)


def run(p: Problem) -> tuple[list[Tensor], Tensor]:
    bits, thresholds = launch(p.weights, p.k, p.masks, kernels="triton")
    return split(bits, p.weights), thresholds


def agree(p: Problem, found: tuple[list[Tensor], Tensor], right: tuple[list[Tensor], Tensor]) -> None:
    if not torch.equal(found[1].nan_to_num(-1.0, INF), right[1].nan_to_num(-1.0, INF)):
        raise Wrong(f"thresholds {found[1].tolist()} instead of {right[1].tolist()}")
    for i, (a, b) in enumerate(zip(found[0], right[0], strict=True)):
        if not torch.equal(a, b):
            bad = int((a != b).sum())
            raise Wrong(f"mask {i}: {bad} of {a.numel()} bytes differ")


def check(here: Here, part: str, s: Setup) -> None:
    p = problem(here, part, s)
    around = Problem([surrounded(w) for w in p.weights], [surrounded(m) for m in p.masks], p.k)
    with poisoned():
        found = run(around)
        agree(p, found, by_sort(p))
        again = run(around)
    if not all(same_bits(a, b) for a, b in zip([*found[0], found[1]], [*again[0], again[1]], strict=True)):
        raise Wrong("a second run gave other bits")


def all_counts(here: Here, part: str) -> None:
    """Every k, on NaN of both signs, infinities, zeros of both signs and the smallest number."""
    least = torch.finfo(DTYPES[part]).smallest_normal
    values = [NAN, INF, -0.0, 1.0, 0.0, -INF, -NAN, least, -1.0]
    w = torch.tensor([[values]], device=here.device).to(DTYPES[part])
    for k in range(len(values) + 1):
        p = Problem([w], [], torch.tensor([k]))
        agree(p, run(p), by_sort(p))


def missed(here: Here, part: str) -> None:
    """A bracket too narrow for its rank: it must be noticed and widened."""
    p = problem(
        here, part, Setup([here.pick((12, 64), (60, 1000), (60, 1000)), (3, 7)], 2, 10**6, 0.9, seed=1)
    )
    with mock.patch.object(module, "SIGMAS", 0.001, create=True):
        agree(p, run(p), by_sort(p))


def layouts(here: Here, part: str) -> None:
    p = problem(here, part, Setup([(9, 24), (5, 16)], 2, 50, 0.7))
    right = by_sort(p)
    flat = torch.full((2, 403), NAN, device=here.device, dtype=DTYPES[part])
    views = [flat[:, 1:217].view(2, 9, 24), flat[:, 220:300].view(2, 5, 16)]  # off the 16-byte grid
    bits = torch.full((2, 60), 255, dtype=torch.uint8, device=here.device)
    masks = [bits[:, 3:30].view(2, 9, 3), bits[:, 41:51].view(2, 5, 2)]
    for to, of in ((views, p.weights), (masks, p.masks)):
        for a, b in zip(to, of, strict=True):
            a.copy_(b)
    turned = [p.weights[0].mT.contiguous().mT, p.weights[1]]
    for weights in (views, turned):
        agree(p, run(Problem(weights, masks, p.k)), right)


def checks(part: str, here: Here) -> Iterator[Case]:
    draw = random.Random(0)
    for s in here.pick(TINY, SMALL, SMALL):
        yield Case(said(s), part, partial(check, here, part, s))
    yield Case("every count, with NaN, infinities and zeros", part, partial(all_counts, here, part))
    yield Case("a missed bracket", part, partial(missed, here, part))
    yield Case("strides and addresses", part, partial(layouts, here, part))
    for i in range(here.pick(1, 12, 50)):
        most = here.pick(30, 400, 700)
        shapes = [(draw.randint(1, most), draw.randint(1, most)) for _ in range(draw.randint(1, 3))]
        s = Setup(
            shapes,
            draw.randint(1, 3),
            draw.choice([0, 1, 5, 1000, 10**6]),
            draw.choice([0.0, 0.1, 0.7, 1.0]),
            draw.random() < 0.5,
            seed=i,
        )
        yield Case(f"random {i}: {said(s)}", part, partial(check, here, part, s))
    if here.size != "tiny":
        yield Case("benchmark's 1e8 weights", part, partial(proven, here, part, here.pick(0, 2**24, 10**8)))


def said(s: Setup) -> str:
    names = ", ".join("x".join(map(str, shape)) for shape in s.shapes)
    where = "within each" if s.layers else "over all"
    return f"R{s.replicas} {names}, {s.keep:.0%} alive, {s.values} values, {where}"


# Too many weights to sort


def prove(w: Tensor, k: int, bits: Tensor, t: float) -> None:
    """w [1, N, K] without a current mask: exactly the k smallest go, equal ones by lowest index."""
    ties, pruned = [], 0
    for rows_, mask in zip(w[0].split(4096), bits[0].split(4096), strict=True):
        magnitude, kept = rows_.abs().float(), reference_unpack(mask, w.shape[2])
        if not torch.equal(kept[magnitude != t], (magnitude > t)[magnitude != t]):
            raise Wrong(f"what is kept is not what is larger than {t}")
        ties.append(kept[magnitude == t])
        pruned += kept.numel() - int(kept.sum())
    equal = torch.cat(ties)
    gone = int((~equal).sum())
    if pruned != k or not gone:
        raise Wrong(f"{pruned} pruned instead of {k}, {gone} of them as large as the threshold")
    if equal[:gone].any():
        raise Wrong(f"of {len(equal)} ties not the first {gone} went")


def proven(here: Here, part: str, n: int) -> None:
    w = torch.randn(1, n // 1000, 1000, generator=here.generator(0), device=here.device).to(DTYPES[part])
    k = w.numel() // 5
    masks, threshold = run(Problem([w], [], torch.tensor([k])))
    prove(w, k, masks[0], float(threshold))


def vast(here: Here, part: str) -> None:
    """More than 2^31 weights in one tensor, with rows that end within a byte."""
    need_memory(16)
    size = here.pick((37, 44), (0, 0), (65537, 32780))
    w = torch.empty(1, *size, dtype=DTYPES[part], device=here.device).normal_(generator=here.generator(0))
    k = w.numel() - w.numel() // 5
    masks, threshold = run(Problem([w], [], torch.tensor([k])))
    prove(w, k, masks[0], float(threshold))


def apart(here: Here, part: str) -> None:
    need_memory(10)
    gap = here.pick(2**12, 0, 2**31) + 16
    flat = torch.empty(gap + 48, dtype=DTYPES[part], device=here.device)
    w = flat.as_strided((2, 3, 16), (gap, 16, 1))
    w.copy_((torch.arange(96).view(2, 3, 16).flip(0) / 8).to(here.device))
    p = Problem([w], [], torch.tensor([5, 20]))
    agree(p, run(p), by_sort(p))


def large(part: str, here: Here) -> Iterator[Case]:
    yield Case("replicas 2^31 apart", part, partial(apart, here, part))
    yield Case("beyond 2^31 weights in a tensor", part, partial(vast, here, part))


# Benchmarks


def lone(here: Here, part: str, masked: bool) -> dict[str, Any]:
    """One tensor of 1e8 weights, 20 % of them to go."""
    n = here.pick(10**4, 10**8, 10**8)
    w = torch.randn(1, n // 1000, 1000, generator=here.generator(0), device=here.device).to(DTYPES[part])
    k, flat = n // 5, w.flatten()
    masks = [torch.full((1, n // 1000, 125), 255, dtype=torch.uint8, device=here.device)] if masked else []
    p = Problem([w], masks, torch.tensor([k]))
    found, threshold = run(p)
    prove(w, k, found[0], float(threshold))
    rivals: dict[str, Any] = {"triton": lambda: launch(p.weights, p.k, p.masks, kernels="triton")}
    if not masked:
        rivals["one read (amax)"] = w.amax
    if part == "fp32" and not masked:
        rivals["kthvalue of |w|"] = lambda: flat.abs().kthvalue(k)
        if here.size != "quick":
            rivals["sort of |w|"] = lambda: flat.abs().sort()
            rivals["topk of |w|"] = lambda: flat.abs().topk(n - k, sorted=False)
    least = floor(n, w.element_size(), masked)
    timed = rows(
        here,
        f"{n:.0e} weights{', masked' if masked else ''}",
        least,
        "ieee",
        "triton",
        rivals,
        tuple(rivals),
    )
    figures = {}
    if part == "fp32" and not masked and here.anchors:
        ours = median(timed, "triton", "cold")
        read = n * w.element_size() / here.anchors["copy_bytes_per_s"]
        figures["reads of the data"] = ratio(ours, read)
        figures["times kthvalue"] = ratio(median(timed, "kthvalue of |w|", "cold"), ours)
    return {"times": timed, "figures": figures}


def lenet(here: Here, part: str) -> dict[str, Any]:
    """LeNet-300-100, 20 replicas, global."""
    p = problem(here, part, Setup(here.pick([(5, 8)], LENET, LENET), 20, 10**6, 0.5))
    agree(p, run(p), by_sort(p))
    n = sum(w.numel() for w in p.weights)
    together = torch.cat([w.flatten(1) for w in p.weights], 1)
    rivals = {
        "triton": lambda: launch(p.weights, p.k, p.masks, kernels="triton"),
        "cat, sort of |w|": lambda: together.abs().sort(1),
    }
    name = f"LeNet-300-100, 20 replicas ({n:.1e})"
    timed = rows(here, name, floor(n, together.element_size(), True), "ieee", "triton", rivals, ("triton",))
    return {"times": timed, "figures": {}}


def benchmarks(part: str, here: Here) -> Iterator[Case]:
    yield Case("1e8 weights", part, partial(lone, here, part, False))
    if part == "fp32" and here.size != "quick":
        yield Case("1e8 weights, masked", part, partial(lone, here, part, True))
        yield Case("LeNet-300-100, 20 replicas", part, partial(lenet, here, part))
