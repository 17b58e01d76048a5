"""seed_linear at 8192 square, batch 1 to 16, beside dense products; the bits of hash_weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import Copies, Run, median, ratio, rows
from oracle import DTYPES, Wrong, compare, must_replay, need_memory, precision, same_bits
from sparselth.kernels.hash_weights import LAWS, hash_weights
from sparselth.kernels.seed_linear import SeedWeight, floor, seed_linear

SIZE = 8192
BATCHES = (1, 4, 16)
WORKLOADS: dict[str, list[tuple[int, int]]] = {  # size, batch
    "bf16": [*((SIZE, batch) for batch in (64, 256)), *((4096, batch) for batch in (1, 16, 64))],
    "fp16": [(SIZE, 1), (SIZE, 16)],
    "ieee": [(4096, 1), (4096, 16)],
    "tf32": [(4096, 16)],
}


class Workload:
    """A random mask of half of a square matrix."""

    def __init__(self, here: Here, part: str, size: int, batch: int) -> None:
        self.part, self.name = part, f"{size} square, batch {batch}"
        g, dtype = here.generator(0), DTYPES[part]
        bits = torch.randint(0, 256, (size, size // 8), generator=g, device=here.device, dtype=torch.uint8)
        self.w = SeedWeight((size, size), bits, 1, 2)
        self.x, self.bias = (
            torch.randn(s, generator=g, device=here.device).to(dtype) for s in ((batch, size), (size,))
        )

    def found(self) -> dict[str, Tensor]:
        return {"y": seed_linear(self.x, self.w, self.bias, kernels="triton")}

    def formula(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"y": F.linear(self.x.to(dtype), self.w.to_dense().to(dtype), self.bias.to(dtype))}

    def check(self) -> None:
        right, torchs = self.formula(torch.double), self.formula(DTYPES[self.part])
        compare(self.found(), right, torchs, self.part, {"y": self.x.shape[1]})

    def replay(self) -> None:
        """A CUDA graph gives the bits of a plain call."""
        must_replay(self.found)

    def ours(self) -> Run:
        w = SeedWeight(self.w.shape, self.w.bits.clone(), 1, 2)
        return lambda: seed_linear(self.x, w, kernels="triton")

    def dense(self) -> dict[str, Copies]:
        """The product of the weights written out, each way that torch has."""
        full = self.w.to_dense().to(self.x.dtype)
        features = self.x.t().contiguous()

        def product(call: Callable[[Tensor], object]) -> Copies:
            def make() -> Run:
                w = full.clone()
                return lambda: call(w)

            return Copies(make, full.nbytes)

        found = {
            "dense F.linear": product(lambda w: F.linear(self.x, w)),
            "dense w @ x": product(lambda w: w @ features),
        }
        if len(self.x) == 1:
            found["dense mv"] = product(lambda w: torch.mv(w, self.x[0]))
        return found


def timed(here: Here, part: str, size: int, batch: int) -> dict[str, Any]:
    load = Workload(here, part, size, batch)
    dense = load.dense()
    rivals: dict[str, Run | Copies] = {"triton": Copies(load.ours, load.w.bytes()), **dense}
    with precision(part):
        wrong = judged(load.check)
        least = floor(size, size, batch, DTYPES[part].itemsize)
        found = rows(here, load.name, least, part, "triton", rivals)
    best = min((t for name in dense if (t := median(found, name, "cold"))), default=None)
    return {"times": found, "best dense": ratio(best, median(found, "triton", "cold"))} | wrong


def generated(here: Here) -> None:
    """Every law's weights, on the device and by torch on the CPU."""
    shape = here.pick((5, 70), (1000, 3001))
    redrawn = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0))
    for law in LAWS:
        for generation in (0, redrawn):
            right = hash_weights(7, 1, shape, law, generation, kernels="reference")
            there = generation.to(here.device) if isinstance(generation, Tensor) else generation
            found = hash_weights(7, 1, shape, law, there, device=here.device, kernels="triton")
            if not same_bits(found.cpu(), right):
                raise Wrong(f"{law}: other bits than torch's")


def smoke(here: Here) -> Iterator[Case]:
    def run(part: str, batch: int, check: Callable[[Workload], None]) -> None:
        with precision(part):
            check(Workload(here, part, here.pick(64, SIZE), batch))

    yield Case("frozen weights", "fp32", partial(generated, here))
    for batch in BATCHES[::2]:
        check, replay = (partial(run, "bf16", batch, what) for what in (Workload.check, Workload.replay))
        yield Case(f"target shape, batch {batch}", "bf16", check, 3)
        if here.device == "cuda":
            yield Case(f"in a CUDA graph, batch {batch}", "bf16", replay)


def targets(here: Here) -> Iterator[Case]:
    size = here.pick(64, SIZE)

    def figures(batch: int) -> dict[str, Any]:
        found = timed(here, "bf16", size, batch)
        return found | {"figures": {f"times the best dense, cold, batch {batch}": found.pop("best dense")}}

    def space() -> dict[str, Any]:
        load = Workload(here, "bf16", size, 1)
        return {"figures": {"bytes of weights, of dense": load.w.bytes() / (2 * size * size)}}

    for batch in BATCHES:
        yield Case(f"{size} square, batch {batch}", "bf16", partial(figures, batch), 4)
    yield Case("bytes", "bf16", space)


def many_weights(here: Here, part: str) -> None:
    """More than 2^31 weights; the first, a middle and the last rows against float64."""
    need_memory(8)
    n, k = here.pick((130, 1024), (2**17 + 8, 2**15))
    g = here.generator(0)
    bits = torch.randint(0, 256, (n, k // 8), generator=g, device=here.device, dtype=torch.uint8)
    x = torch.randn(8, k, generator=g, device=here.device).to(DTYPES[part])
    y = seed_linear(x, SeedWeight((n, k), bits, 3, 0), kernels="triton")
    for row in (0, n // 2, n - 1):
        v = hash_weights(3, 0, (n, k), rows=(row, row + 1), device=here.device)
        kept = (bits[row, :, None] >> torch.arange(8, device=here.device) & 1).flatten() * v[0]
        compare(
            {"y": y[:, row]},
            {"y": x.double() @ kept.double()},
            {"y": x @ kept.to(x.dtype)},
            part,
            {"y": k},
            {"y": x.double().abs() @ kept.double().abs()},
        )


def large(here: Here) -> Iterator[Case]:
    yield Case("beyond 2^31 weights", "bf16", partial(many_weights, here, "bf16"), 10)


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in WORKLOADS.items():
        for size, batch in here.pick([(64, 1), (64, 8)], workloads):
            yield Case(f"{size} square, batch {batch}", part, partial(timed, here, part, size, batch), 4)
