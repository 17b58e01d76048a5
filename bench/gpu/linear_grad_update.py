"""linear_grad_update in a step of LeNet-300-100, beside products and an update one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
    precision,
)
from sparselth.kernels.bitmask import reference_pack, reference_unpack
from sparselth.kernels.linear_grad_update import floor, linear_grad_update
from sparselth.kernels.masked_update import masked_adam_many

LENET = [(300, 784), (100, 300), (10, 100)]
BATCH = 60


# Offsets beyond 2^31


def vast(here: Here, replicas: int, side: int) -> None:
    """Plain SGD in place on R x side x side weights: the corners of every replica are those of a product."""
    need_memory(5 * replicas * side * side / 2**30)
    g, n = here.generator(0), here.pick(77, side)
    b, end = 16, min(n, 64)
    w = torch.empty(replicas, n, n, device=here.device).normal_(generator=g)
    dy, x = (torch.randn(replicas, b, n, generator=g, device=here.device).mT for _ in range(2))
    size = (replicas, n, -(-n // 8))
    bits = torch.randint(0, 256, size, generator=g, device=here.device, dtype=torch.uint8)
    bits[:, :, -1] &= 255 >> (-n % 8)
    places = [slice(0, end), slice(n // 16 * 8, n // 16 * 8 + end), slice(n - end, n)]
    right = {}
    for i, down in enumerate(places):
        for j, right_of in enumerate(places):
            live = reference_unpack(bits[:, down], n)[:, :, right_of]
            step = dy[:, down].double() @ x[:, right_of].mT.double()
            right[i, j] = live, w[:, down, right_of].double() - 0.1 * step
    linear_grad_update(
        dy,
        x,
        w,
        [],
        bits,
        step=torch.ones(replicas, device=here.device),
        lr=torch.full((replicas,), 0.1, dtype=torch.float64, device=here.device),
        momentum=0.0,
        optimizer="sgd",
        kernels="triton",
    )
    for (i, j), (live, value) in right.items():
        error = (w[:, places[i], places[j]] - value)[live].abs().max()
        if not error <= 1e-5 or not live.any():
            raise Wrong(f"rows {places[i]}, columns {places[j]}: off by {float(error):.1e}")


def large(here: Here) -> Iterator[Case]:
    yield Case("beyond 2^31 weights in a replica", "sgd", partial(vast, here, 1, 46_404), 10)
    yield Case("replicas beyond 2^31 weights", "sgd", partial(vast, here, 3, 32_772), 10)


# At the sizes of the targets


class Network:
    """LeNet-300-100 or smaller, R replicas in flat buffers; a step from fixed activations and gradients."""

    def __init__(self, here: Here, shapes: list[tuple[int, int]], batch: int, keep: float, r: int) -> None:
        g = here.generator(0)
        self.places, width = [], 0
        for n, k in shapes:
            for shape in ((n, k), (n, 1)):
                size = shape[0] * shape[1]
                self.places.append((width, size, shape))
                width += -(-size // 16) * 16
        live = torch.ones(r, width, dtype=torch.bool, device=here.device)
        for first, size, _ in self.places[::2]:
            live[:, first : first + size] = torch.rand(r, size, generator=g, device=here.device) < keep
        self.live, self.flat_bits = live, reference_pack(live)
        self.w = torch.randn(r, width, generator=g, device=here.device) * 0.1 * live
        self.g, self.a, self.b = (torch.zeros_like(self.w) for _ in range(3))
        self.bits = [reference_pack(t) for t in self.views(live)[::2]]
        self.data = [
            [torch.randn(r, batch, size, generator=g, device=here.device).mT for size in shape]
            for shape in shapes
        ]
        self.step = torch.full((r,), 7.0, device=here.device)
        self.lr = torch.full((r,), 1e-3, dtype=torch.float64, device=here.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Weights and biases in turn."""
        return [flat[:, i : i + size].view(-1, *shape) for i, size, shape in self.places]

    def layers(self) -> list[Any]:
        views = [self.views(t) for t in (self.w, self.a, self.b)]
        return [
            (dy, x, w, (a, b), bits, bias, (bias_a, bias_b))
            for (dy, x), bits, w, a, b, bias, bias_a, bias_b in zip(
                self.data, self.bits, *(v[::2] for v in views), *(v[1::2] for v in views), strict=True
            )
        ]

    def ours(self) -> Any:
        layers = self.layers()

        def run() -> None:
            for layer in layers:
                linear_grad_update(*layer, step=self.step, lr=self.lr, kernels="triton")

        return run

    def products(self) -> Any:
        """dW and db of every layer into the flat gradient."""
        views = self.views(self.g)
        calls = list(zip(self.data, views[::2], views[1::2], strict=True))

        def run() -> None:
            for (dy, x), dw, db in calls:
                torch.bmm(dy, x.mT, out=dw)
                torch.sum(dy, 2, keepdim=True, out=db)

        return run

    def many(self) -> Any:
        """The products, then masked_adam_many, on weights and moments of its own."""
        products = self.products()
        w, a, b = (t.clone() for t in (self.w, self.a, self.b))

        def run() -> None:
            products()
            masked_adam_many(
                [w], [self.g], [self.flat_bits], ([a], [b]), [self.step], self.lr, kernels="triton"
            )

        return run

    def torchs(self) -> tuple[Tensor, Any]:
        """The products, then torch's fused Adam under a float mask."""
        products, mask = self.products(), self.live.float()
        parameter = torch.nn.Parameter(self.w.clone())
        parameter.grad = self.g
        cuda = self.w.is_cuda
        optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True, capturable=cuda)

        def run() -> None:
            products()
            self.g.mul_(mask)
            optimizer.step()

        return parameter.detach(), run

    def floor(self) -> dict[str, int]:
        least: Counter[str] = Counter()
        for dy, _, w, _, bits, bias, _ in self.layers():
            least.update(floor(w, dy.shape[2], bits, bias))
        return dict(least)

    def check(self, part: str) -> None:
        """Three steps beside torch's."""
        ours, (theirs, usual) = self.ours(), self.torchs()
        for step in range(1, 4):
            self.step.fill_(step)
            ours()
            usual()
        must_be_zero(self.w, ~self.live, "pruned weights")
        error = float((self.w - theirs).norm() / theirs.norm())
        if not error <= (1e-3 if part == "tf32" else 1e-5):
            raise Wrong(f"after 3 steps the weights are not torch's: {error:.1e}")

    def replay(self, part: str) -> None:
        """A CUDA graph gives the bits of a plain step."""
        ours, state = self.ours(), {"w": self.w, "a": self.a, "b": self.b}
        start = {name: t.clone() for name, t in state.items()}
        graph = graphed(ours, 1)

        def again(call: Any) -> dict[str, Tensor]:
            for name, t in state.items():
                t.copy_(start[name])
            call()
            return {name: t.clone() for name, t in state.items()}

        must_repeat(again(graph.replay), again(ours), "a CUDA graph")


FIRST = 100, 1.0  # replicas and the share kept that the target is about


def network(here: Here, replicas: int, keep: float) -> Network:
    shapes = here.pick([(9, 20), (5, 9)], LENET)
    return Network(here, shapes, here.pick(7, BATCH), keep, here.pick(2, replicas))


def titled(replicas: int, keep: float) -> str:
    return f"LeNet-300-100, R{replicas}, {keep:.0%} kept, a step of Adam"


def smoke(here: Here) -> Iterator[Case]:
    def run(part: str, check: Any) -> None:
        with precision(part):
            check(network(here, *FIRST), part)

    for part in ("ieee", "tf32"):
        yield Case(titled(*FIRST), part, partial(run, part, Network.check), 3)
        if here.device == "cuda":
            yield Case(f"{titled(*FIRST)}, in a CUDA graph", part, partial(run, part, Network.replay), 2)


def timed(here: Here, part: str, replicas: int, keep: float, rivals: bool) -> dict[str, Any]:
    """A step of all layers; beside products and an update one after the other."""
    with precision(part):
        load = network(here, replicas, keep)
        wrong = judged(load.check, part)
        raced = {"triton": load.ours()}
        if rivals:
            raced |= {
                "bmm, then masked_adam_many": load.many(),
                "bmm, masked, torch's fused Adam": load.torchs()[1],
                "bmm alone": load.products(),
            }
        return {"times": rows(here, titled(replicas, keep), load.floor(), part, "triton", raced)} | wrong


def targets(here: Here) -> Iterator[Case]:
    def figure() -> dict[str, Any]:
        found = timed(here, "ieee", *FIRST, rivals=False)
        copied = here.copying(found["times"][0]["bytes"])
        share = ratio(copied, median(found["times"], "triton", "cold"))
        return found | {"figures": {"share of copy bandwidth": share}}

    yield Case(titled(*FIRST), "ieee", figure, 4)


# Other times


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in {"ieee": [FIRST, (100, 0.2), (15, 1.0), (1, 1.0)], "tf32": [FIRST]}.items():
        for workload in workloads:
            yield Case(titled(*workload), part, partial(timed, here, part, *workload, rivals=True), 4)
