"""magnitude_threshold at 1e8 weights and at LeNet's: exact by counting; kthvalue, sort and topk as rivals."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import median, ratio, rows
from oracle import Wrong, need_memory
from sparselth.kernels.bitmask import reference_pack, reference_unpack
from sparselth.kernels.magnitude_threshold import floor, launch, split

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LENET = [(300, 784), (100, 300), (10, 100)]


def run(weights: list[Tensor], k: Tensor, masks: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    bits, thresholds = launch(weights, k, masks, kernels="triton")
    return split(bits, weights), thresholds


def prove(w: Tensor, k: int, bits: Tensor, t: float, kept: Tensor | None = None) -> None:
    """w [1, N, K], too many to sort: exactly the k smallest of those kept go, equal ones by lowest index."""
    ties, pruned = [], 0
    before = [None] * len(w[0].split(4096)) if kept is None else kept[0].split(4096)
    for rows_, mask, old in zip(w[0].split(4096), bits[0].split(4096), before, strict=True):
        magnitude, stay = rows_.abs().float(), reference_unpack(mask, w.shape[2])
        if old is not None:
            if stay[~old].any():
                raise Wrong("a pruned weight came back")
            magnitude, stay = magnitude[old], stay[old]
        if not torch.equal(stay[magnitude != t], (magnitude > t)[magnitude != t]):
            raise Wrong(f"what is kept is not what is larger than {t}")
        ties.append(stay[magnitude == t])
        pruned += stay.numel() - int(stay.sum())
    equal = torch.cat(ties)
    gone = int((~equal).sum())
    if pruned != k or not gone:
        raise Wrong(f"{pruned} pruned instead of {k}, {gone} of them as large as the threshold")
    if equal[:gone].any():
        raise Wrong(f"of {len(equal)} ties not the first {gone} went")


class Lone:
    """One tensor of 1e8 weights, 20 % of them to go; with a mask a tenth of them went before."""

    def __init__(self, here: Here, part: str, masked: bool = False) -> None:
        self.n = here.pick(10**4, 10**8)
        shape, g = (1, self.n // 1000, 1000), here.generator(0)
        self.w = torch.randn(shape, generator=g, device=here.device).to(DTYPES[part])
        self.kept = torch.rand(shape, generator=g, device=here.device) < 0.9 if masked else None
        self.masks = [] if self.kept is None else [reference_pack(self.kept)]
        self.k = (self.n if self.kept is None else int(self.kept.sum())) // 5

    def ours(self) -> tuple[list[Tensor], Tensor]:
        return run([self.w], torch.tensor([self.k]), self.masks)

    def check(self) -> None:
        found, threshold = self.ours()
        prove(self.w, self.k, found[0], float(threshold), self.kept)


def smoke(here: Here) -> Iterator[Case]:
    """No graph: the host waits for the proof."""
    for masked in (False, True):
        name = f"1e8 weights{', masked' if masked else ''}"
        yield Case(name, "fp32", lambda masked=masked: Lone(here, "fp32", masked).check(), 3)


def timed(here: Here, part: str, masked: bool, more: bool) -> dict[str, Any]:
    """Beside kthvalue, and with `more` beside one read, sort and topk."""
    load = Lone(here, part, masked)
    wrong = judged(load.check)
    rivals: dict[str, Any] = {"triton": load.ours}
    flat, n, k = load.w.flatten(), load.n, load.k
    if more:
        rivals["one read (amax)"] = load.w.amax
    if part == "fp32" and not masked:
        if more:
            rivals["sort of |w|"] = lambda: flat.abs().sort()
            rivals["topk of |w|"] = lambda: flat.abs().topk(n - k, sorted=False)
        else:
            rivals["kthvalue of |w|"] = lambda: flat.abs().kthvalue(k)
    name = f"{n:.0e} weights{', masked' if masked else ''}"
    least = floor(n, load.w.element_size(), masked)
    found = rows(here, name, least, "ieee", "triton", rivals, tuple(rivals))
    if more:
        return {"times": found, "figures": {}} | wrong
    ours = median(found, "triton", "cold")
    figures = {
        "reads of the data": ratio(ours, here.copying(n * load.w.element_size())),
        "times kthvalue": ratio(median(found, "kthvalue of |w|", "cold"), ours),
    }
    return {"times": found, "figures": figures} | wrong


def targets(here: Here) -> Iterator[Case]:
    yield Case("1e8 weights", "fp32", partial(timed, here, "fp32", False, more=False), 8)


def lenet(here: Here) -> dict[str, Any]:
    """LeNet-300-100, 20 replicas, global, half of the weights pruned before, a fifth of the rest to go."""
    g, r = here.generator(0), here.pick(2, 20)
    shapes = [(r, *shape) for shape in here.pick([(5, 8)], LENET)]
    weights = [torch.randn(shape, generator=g, device=here.device) for shape in shapes]
    kept = [torch.rand(shape, generator=g, device=here.device) < 0.5 for shape in shapes]
    masks = [reference_pack(m) for m in kept]
    together = torch.cat([w.flatten(1) for w in weights], 1)
    alive = torch.cat([m.flatten(1) for m in kept], 1)
    k = (alive.sum(1) // 5).cpu()
    found, thresholds = run(weights, k, masks)
    magnitudes = together.abs().where(alive, torch.inf)
    right = magnitudes.sort(1).values.gather(1, k[:, None].to(here.device) - 1)
    if not torch.equal(thresholds, right[:, 0]):
        raise Wrong("the thresholds are not those of a sort")
    stays = torch.cat(
        [reference_unpack(m, w.shape[2]).flatten(1) for m, w in zip(found, weights, strict=True)], 1
    )
    if not torch.equal(stays, alive & (magnitudes > right)):  # random numbers: no ties
        raise Wrong("the masks are not those of a sort")
    rivals = {
        "triton": lambda: run(weights, k, masks),
        "cat, sort of |w|": lambda: together.abs().sort(1),
    }
    n = sum(w.numel() for w in weights)
    name = f"LeNet-300-100, {r} replicas ({n:.1e})"
    return {
        "times": rows(here, name, floor(n, 4, True), "ieee", "triton", rivals, ("triton",)),
        "figures": {},
    }


def benchmarks(here: Here) -> Iterator[Case]:
    for part in here.pick(("fp32", "bf16"), DTYPES):
        yield Case("1e8 weights", part, partial(timed, here, part, False, more=True), 3)
    yield Case("1e8 weights, masked", "fp32", partial(timed, here, "fp32", True, more=True), 3)
    yield Case("LeNet-300-100, 20 replicas", "fp32", partial(lenet, here), 2)


# Beyond what 31 bits count, and beyond a grid's second axis


def vast(here: Here, part: str) -> None:
    """More than 2^31 weights in one tensor, with rows that end within a byte."""
    need_memory(16)
    size = here.pick((37, 44), (65537, 32780))
    w = torch.empty(1, *size, dtype=DTYPES[part], device=here.device).normal_(generator=here.generator(0))
    k = w.numel() - w.numel() // 5
    masks, threshold = run([w], torch.tensor([k]), [])
    prove(w, k, masks[0], float(threshold))


def many(here: Here, part: str) -> None:
    """More replicas than a grid has programs on its second axis."""
    r = here.pick(3, 70_000)
    w = torch.randn(r, 2, 8, generator=here.generator(0), device=here.device).to(DTYPES[part])
    w += torch.arange(16, device=here.device).view(2, 8).to(w.dtype) * 8  # no ties
    masks, thresholds = run([w], torch.full((r,), 5), [])
    magnitudes = w.float().abs().flatten(1)
    right = magnitudes.kthvalue(5, 1, keepdim=True).values
    if not torch.equal(thresholds, right[:, 0]):
        raise Wrong("the thresholds are not those of kthvalue")
    if not torch.equal(reference_unpack(masks[0], 8).flatten(1), magnitudes > right):
        raise Wrong("the masks are not those of kthvalue")


def large(here: Here) -> Iterator[Case]:
    for part in ("fp32", "fp16"):
        yield Case("beyond 2^31 weights in a tensor", part, partial(vast, here, part), 5)
    yield Case("70,000 replicas", "fp32", partial(many, here, "fp32"))
