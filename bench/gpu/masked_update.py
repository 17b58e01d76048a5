"""masked_update at 6.7e7 weights and beyond 2^31: beside torch's fused optimizers, masked by hand or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import median, ratio, rows
from oracle import (
    Wrong,
    graphed,
    must_be_zero,
    must_repeat,
    need_memory,
)
from sparselth.kernels.bitmask import reference_pack, reference_unpack
from sparselth.kernels.masked_update import floor, masked_adam_many, masked_sgd_many

LENET = [(300, 784), (300,), (100, 300), (100,), (10, 100), (10,)]


# Offsets beyond 2^31


def vast(here: Here, replicas: int, size: int) -> None:
    """Plain SGD in place on R x P weights: the ends of every replica are those of a small step."""
    need_memory(9 * replicas * size / 2**30)
    g, p = here.generator(0), here.pick(777, size)
    w, grad = (torch.empty(replicas, p, device=here.device).normal_(generator=g) for _ in range(2))
    bits = torch.randint(0, 256, (replicas, -(-p // 8)), generator=g, device=here.device, dtype=torch.uint8)
    bits[:, -1] &= 255 >> (-p % 8)
    lr = torch.full((replicas,), 0.1, dtype=torch.float64, device=here.device)
    ends = [slice(0, 64), slice(p // 16 * 8, p // 16 * 8 + 64), slice(p - 64 - p % 8, p)]
    right = []
    for end in ends:
        live = reference_unpack(bits[:, end.start // 8 : -(-end.stop // 8)], end.stop - end.start)
        right.append((w[:, end] - 0.1 * grad[:, end]).where(live, 0))
    masked_sgd_many([w], [grad], [bits], None, lr, kernels="triton")
    for r, end in zip(right, ends, strict=True):
        # eight pruned in a row are left as they are, 0 in training but not here
        touched = r != 0
        error = (w[:, end] - r)[touched].abs().max()
        if not error <= 1e-6 or not touched.any():
            raise Wrong(f"weights {end.start} to {end.stop}: off by {float(error):.1e}")


def large(here: Here) -> Iterator[Case]:
    yield Case("beyond 2^31 weights in a tensor", "sgd", partial(vast, here, 1, 2**31 + 1003), 8)
    yield Case("replicas beyond 2^31 weights", "sgd", partial(vast, here, 3, 2**30 + 2**14 + 1003), 8)


# At the sizes of the targets


class Network:
    """Weights with fixed gradients; a step by torch's fused optimizer, masked by hand or not, or by ours."""

    def __init__(
        self, here: Here, part: str, shapes: list[tuple[int, ...]], keep: float, replicas: int
    ) -> None:
        g, r, self.part = here.generator(0), replicas, part
        shapes = [(r, *shape) for shape in shapes]
        self.masks = [torch.rand(s, generator=g, device=here.device) < keep for s in shapes]
        self.w = [
            torch.randn(s, generator=g, device=here.device) * m
            for s, m in zip(shapes, self.masks, strict=True)
        ]
        self.g = [torch.randn(s, generator=g, device=here.device) for s in shapes]
        self.a, self.b = ([torch.zeros_like(w) for w in self.w] for _ in range(2))
        self.bits: list[Tensor | None] = [reference_pack(m.flatten(1)) for m in self.masks]
        self.steps = [torch.full((r,), 7.0, device=here.device) for _ in shapes]
        self.lr = torch.full((r,), 1e-3, dtype=torch.float64, device=here.device)

    def ours(self) -> None:
        if self.part == "adam":
            masked_adam_many(
                self.w, self.g, self.bits, (self.a, self.b), self.steps, self.lr, kernels="triton"
            )
        else:
            masked_sgd_many(self.w, self.g, self.bits, self.a, self.lr, momentum=0.9, kernels="triton")

    def torchs(self) -> tuple[list[torch.nn.Parameter], dict[str, Any]]:
        params = [torch.nn.Parameter(w.clone()) for w in self.w]
        for p, g in zip(params, self.g, strict=True):
            p.grad = g.clone()
        grads = [p.grad for p in params]
        floats = [m.float() for m in self.masks]
        if self.part == "adam":
            cuda = params[0].is_cuda
            optimizer: torch.optim.Optimizer = torch.optim.Adam(params, lr=1e-3, fused=True, capturable=cuda)
        else:
            optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True)

        @torch.no_grad()
        def masked(weights: bool) -> None:
            torch._foreach_mul_(grads, floats)
            optimizer.step()
            if weights:
                torch._foreach_mul_(params, floats)

        return params, {
            "torch fused, no masks": optimizer.step,
            "torch fused, gradients masked": partial(masked, False),
            "torch fused, both masked": partial(masked, True),
        }

    def check(self) -> list[torch.nn.Parameter]:
        """Three steps beside torch's."""
        params, theirs = self.torchs()
        for step in range(1, 4):
            for t in self.steps:
                t.fill_(step)
            self.ours()
            theirs["torch fused, both masked"]()
        for i, (w, right, m) in enumerate(zip(self.w, params, self.masks, strict=True)):
            must_be_zero(w, ~m, f"pruned weights of tensor {i}")
            if not (w - right).norm() <= 3e-7 * right.norm():
                raise Wrong(f"tensor {i} is not torch's after 3 steps: {float((w - right).norm()):.1e}")
        return params

    def replay(self) -> None:
        """A CUDA graph gives the bits of a plain call."""
        start = [t.clone() for t in (*self.w, *self.a, *self.b)]

        def again(call: Callable[[], object]) -> dict[str, Tensor]:
            for t, value in zip((*self.w, *self.a, *self.b), start, strict=True):
                t.copy_(value)
            call()
            return {str(i): t.clone() for i, t in enumerate((*self.w, *self.a, *self.b))}

        graph = graphed(self.ours, 1)
        must_repeat(again(graph.replay), again(self.ours), "a CUDA graph")


def big(here: Here) -> list[tuple[int, ...]]:
    return [here.pick((16, 16), (8192, 8192))]


def smoke(here: Here) -> Iterator[Case]:
    for part in ("adam", "sgd"):

        def run(check: Callable[[Network], object], part: str = part) -> None:
            check(Network(here, part, big(here), 0.2, 1))

        yield Case("one of 6.7e7 weights", part, partial(run, Network.check), 3)
        if here.device == "cuda":
            yield Case("one of 6.7e7 weights in a CUDA graph", part, partial(run, Network.replay), 2)


def timed(
    here: Here, part: str, name: str, shapes: list[tuple[int, ...]], keep: float, replicas: int, *rivals: str
) -> dict[str, Any]:
    """Beside torch's fused optimizer in the ways that are named, else in all."""
    network = Network(here, part, shapes, keep, replicas)
    wrong = judged(network.check)
    _, theirs = network.torchs()
    raced = {"triton": network.ours} | {r: theirs[r] for r in rivals or theirs}
    least = floor(network.w, network.bits, 2 if part == "adam" else 1)
    return {"times": rows(here, name, least, "ieee", "triton", raced)} | wrong


def targets(here: Here) -> Iterator[Case]:
    name, theirs = "one of 6.7e7 weights, 20% kept", "torch fused, both masked"

    def figures() -> dict[str, Any]:
        found = timed(here, "adam", name, big(here), 0.2, 1, theirs)
        ours = median(found["times"], "triton", "cold")
        found["figures"] = {
            "share of copy bandwidth": ratio(here.copying(found["times"][0]["bytes"]), ours),
            "times torch's fused Adam and masks": ratio(median(found["times"], theirs, "cold"), ours),
        }
        return found

    yield Case(name, "adam", figures, 6)


# Other times


def benchmarks(here: Here) -> Iterator[Case]:
    lenet = here.pick([(5, 9), (5,)], LENET)
    for part in ("adam", "sgd"):

        def case(name: str, *args: Any, part: str = part) -> Case:
            name = f"{name}, {args[1]:.0%} kept"
            return Case(name, part, partial(timed, here, part, name, *args), 5)

        for keep in (0.2, 1.0, 0.02):
            yield case("one of 6.7e7 weights", big(here), keep, 1)
        yield case("LeNet-300-100", lenet, 0.2, 1)
        yield case("LeNet-300-100, R20", lenet, 0.2, here.pick(2, 20))
