"""linear_grad_update: steps beside float64 and torch.optim, replicas alone, what is pruned or not active."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.common import Case, Here, judged
from gpu.timing import median, ratio, rows
from oracle import (
    INF,
    NAN,
    UNIT,
    Wrong,
    compare,
    graphed,
    must_be_zero,
    must_repeat,
    need_memory,
    precision,
    same_bits,
)
from sparselth.kernels.bitmask import reference_pack, reference_unpack
from sparselth.kernels.linear_grad_update import floor, linear_grad_update
from sparselth.kernels.masked_update import adam_reference, masked_adam_many, sgd_reference

DECAY, GAP = 0.01, 64
LENET = [(300, 784), (100, 300), (10, 100)]
BATCH = 60


class State:
    """R replicas of a layer in flat buffers [R, P], NaN around them; pruned weights and moments are 0.

    Weights start `shift` floats behind a 16-byte boundary. Half of the replicas' live moments are 0.
    """

    def __init__(
        self,
        here: Here,
        part: str,
        shape: tuple[int, int, int, int],
        keep: float | None,
        seed: int = 0,
        shift: int = 0,
        batch_major: bool = True,
        warm: bool = True,
    ) -> None:
        r, n, k, _ = self.shape = shape
        self.here, self.part, self.batch_major = here, part, batch_major
        self.optimizer = "sgd" if part == "sgd" else "adam"
        g = here.generator(seed)
        self.live = torch.rand(r, n, k, generator=g, device=here.device) < (1 if keep is None else keep)
        self.bits = None if keep is None else reference_pack(self.live)
        self.at = GAP + shift, GAP + shift + n * k + GAP
        width = -(-(self.at[1] + n + GAP) // 16) * 16
        self.flat = [torch.full((r, width), NAN, device=here.device) for _ in range(2 + (part != "sgd"))]
        for i, flat in enumerate(self.flat):
            for t, live in zip(self.views(flat), (self.live, True), strict=True):
                values = torch.randn(t.shape, generator=g, device=here.device)
                values = values * 0.1 if i == 0 else (values * values + 0.01) * warm
                t.copy_(values * live)
        self.lr = 10 ** (-3 * torch.rand(r, generator=g, dtype=torch.float64, device=here.device))
        self.step = torch.randint(1, 20, (r,), generator=g, device=here.device).float()
        self.active: Tensor | None = None
        self.new_batch(seed)

    def new_batch(self, seed: int) -> None:
        r, n, k, b = self.shape
        g = self.here.generator(seed + 10**7)
        both = (torch.randn(r, b, size, generator=g, device=self.here.device).mT for size in (n, k))
        self.dy, self.x = (t if self.batch_major else t.contiguous() for t in both)

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        (r, n, k, _), (first, second) = self.shape, self.at
        r = len(flat)
        return flat[:, first : first + n * k].view(r, n, k), flat[:, second : second + n].view(r, n, 1)

    def take(self, kernels: str = "triton") -> None:
        pairs = [self.views(flat) for flat in self.flat]
        (w, bias), states = pairs[0], pairs[1:]
        with precision("tf32" if self.part == "tf32" else "ieee"):
            linear_grad_update(
                self.dy,
                self.x,
                w,
                [s[0] for s in states],
                self.bits,
                bias,
                [s[1] for s in states],
                step=self.step,
                lr=self.lr,
                active=self.active,
                weight_decay=DECAY,
                optimizer=self.optimizer,
                kernels=kernels,
            )

    def expected(self) -> list[Tensor]:
        """The flat buffers after a step, in float64."""
        wanted = [flat.double() for flat in self.flat]
        grads = [(self.dy.double() @ self.x.mT.double()).where(self.live, 0)]
        grads.append(self.dy.double().sum(2, keepdim=True))
        for place, g in enumerate(grads):
            state = [self.views(flat)[place] for flat in wanted]
            for i in range(len(self.lr)):
                w, *moments = (t[i].reshape(1, -1) for t in state)
                known: list[Any] = [w, g[i].view(1, -1), torch.ones_like(w), *moments]
                rate = float(self.lr[i])
                if self.optimizer == "adam":
                    new: Any = adam_reference(*known, int(self.step[i]), rate, DECAY)
                else:
                    new = sgd_reference(*known, rate, 0.9, DECAY)
                for t, value in zip(state, new, strict=True):
                    t[i] = value.view(t[i].shape)
        return wanted

    def named(self, flat: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Weights, biases and their moments."""
        found = {}
        for name, t in zip("wab", flat or self.flat, strict=False):
            found[name], found[f"bias {name}"] = self.views(t)
        return found

    def copies(self) -> list[Tensor]:
        return [flat.clone() for flat in self.flat]

    def alone(self, i: int, flat: list[Tensor]) -> State:
        """Replica i as it was in `flat`, without the others."""
        one = State.__new__(State)
        one.__dict__ |= self.__dict__
        one.shape = (1, *self.shape[1:])
        one.flat = [t[i : i + 1].clone() for t in flat]
        one.bits = None if self.bits is None else self.bits[i : i + 1].clone()
        one.dy, one.x = (t[i : i + 1].mT.clone().mT for t in (self.dy, self.x))
        one.live, one.lr, one.step = self.live[i : i + 1], self.lr[i : i + 1].clone(), self.step[i : i + 1]
        one.active = None
        return one


def single(here: Here, part: str, *args: Any, gone: tuple[int, ...] = (), **kwargs: Any) -> dict[str, float]:
    """One step beside float64 and torch's; a second run, and replicas that are not active, to the bit."""
    state = State(here, part, *args, **kwargs)
    before, wanted = state.copies(), state.expected()
    theirs = State(here, part, *args, **kwargs)
    if gone:
        state.active = torch.ones(len(state.lr), dtype=torch.bool, device=here.device)
        state.active[list(gone)] = False
        theirs.active = state.active
    state.take()
    theirs.take("reference")
    for found, right, old in zip(state.flat, wanted, before, strict=True):
        right[list(gone)] = old[list(gone)].double()
        if not same_bits(found[list(gone)], old[list(gone)]):
            raise Wrong("a replica that is not active was touched")
        if not torch.equal(found.isnan(), right.isnan()):
            raise Wrong("wrote outside a tensor, or left some of it out")
    for name in ("w", "a", "b")[: len(state.flat)]:
        must_be_zero(state.named()[name], ~state.live, f"pruned {name}")
    again = State(here, part, *args, **kwargs)
    again.active = state.active
    again.take()
    must_repeat(again.named(), state.named())
    terms = dict.fromkeys(state.named(), state.shape[3])
    unit = "tf32" if part == "tf32" else "ieee"
    errors = compare(state.named(), state.named(wanted), theirs.named(), unit, terms)
    return {"error": max(errors.values())}


def trajectory(here: Here, part: str, keep: float) -> dict[str, float]:
    """20 steps beside torch.optim in fp32 and in float64, whose gradients are products masked by hand."""
    n, k = here.pick((5, 36), (300, 784), (300, 784))
    state = State(here, part, (2, n, k, here.pick(9, BATCH, BATCH)), keep, warm=False)
    state.lr.copy_(torch.tensor([1e-2, 1e-3]))
    options: dict[str, Any] = {"weight_decay": DECAY} | ({"momentum": 0.9} if part == "sgd" else {})
    kind: Any = torch.optim.SGD if part == "sgd" else torch.optim.Adam
    start = state.views(state.flat[0])[0].clone()
    copies = {d: [torch.nn.Parameter(w.to(d)) for w in start] for d in (torch.float32, torch.double)}
    optimizers = [
        (d, i, kind([p], lr=float(state.lr[i]), **options))
        for d, ps in copies.items()
        for i, p in enumerate(ps)
    ]
    for step in range(1, 21):
        state.new_batch(step)
        state.step.fill_(step)
        state.take()
        for dtype, i, optimizer in optimizers:
            dw = state.dy[i].to(dtype) @ state.x[i].mT.to(dtype)
            copies[dtype][i].grad = dw.where(state.live[i], 0)
            optimizer.step()
    found, own, right = (
        torch.stack([p.detach().double() for p in ps])
        for ps in (state.views(state.flat[0])[0], copies[torch.float32], copies[torch.double])
    )
    errors = [float((t - right).norm() / right.norm()) for t in (found, own)]
    allowed = 3 * max(errors[1], UNIT["tf32" if part == "tf32" else "ieee"])
    if not errors[0] <= allowed:
        raise Wrong(f"after 20 steps the error is {errors[0]:.1e}, torch.optim's own {errors[1]:.1e}")
    return {"error": errors[0], "torchs": errors[1]}


def zeros(here: Here, part: str, steps: int) -> None:
    """Many steps with NaN, infinity and huge numbers in all gradients: pruned weights stay 0."""
    state = State(here, part, (2, 20, 70, 9), 0.3)
    for step in range(1, steps + 1):
        state.new_batch(step)
        state.x[:, step % 70] = [NAN, INF, -1e30][step % 3]
        state.step.fill_(step)
        state.take()
    for name, t in list(state.named().items())[::2]:
        must_be_zero(t, ~state.live, f"pruned {name} after {steps} steps")


def untouched(here: Here, part: str, k: int, shift: int) -> None:
    """Eight pruned weights in a row are neither read nor written."""
    state = State(here, part, (1, 2, k, 5), 1.0, shift=shift)
    byte = torch.tensor([0, 1, 0, 6], dtype=torch.uint8, device=here.device)
    state.live = reference_unpack(byte, k).expand(1, 2, k).clone()
    state.bits = reference_pack(state.live)
    eights = (byte != 0).repeat_interleave(8)[:k]
    weights = [state.views(flat)[0] for flat in state.flat]
    for t in weights:
        t[:, :, ~eights] = NAN
    state.take()
    for t in weights:
        if not t[:, :, ~eights].isnan().all() or not t[state.live].isfinite().all():
            raise Wrong("eight pruned weights in a row were touched, or live ones lost")


def alone(here: Here, part: str, replicas: int, shape: tuple[int, int, int]) -> None:
    together = State(here, part, (replicas, *shape), 0.3)
    start = together.copies()
    together.take()
    for i in sorted({0, replicas // 2, replicas - 1}):
        one = together.alone(i, start)
        one.take()
        right = together.named([t[i : i + 1] for t in together.flat])
        must_repeat(one.named(), right, f"company of {replicas}")


def replayed(here: Here, part: str) -> None:
    """A CUDA graph, which reads steps, rates and flags anew at each replay."""
    state = State(here, part, (3, 100, 300, BATCH), 0.3)
    state.active = torch.tensor([True, True, False], device=here.device)
    start = state.copies()
    graph = graphed(state.take, 1)

    def reset() -> None:
        for t, old in zip(state.flat, start, strict=True):
            t.copy_(old)

    for step in (3, 7):
        state.x.mul_(-1.5)
        state.step.fill_(step)
        state.lr.mul_(0.5)
        state.active.logical_not_()
        reset()
        state.take()
        eager = {name: t.clone() for name, t in state.named().items()}
        reset()
        graph.replay()
        must_repeat(state.named(), eager, "a CUDA graph")


def checks(part: str, here: Here) -> Iterator[Case]:
    def case(name: str, run: Any, *args: Any, **kwargs: Any) -> Case:
        return Case(name, part, partial(run, here, part, *args, **kwargs))

    shapes = here.pick([(10, 36)], [*LENET, (1, 1), (37, 131)], [*LENET, (1, 1), (37, 131), (1000, 1024)])
    batch = here.pick(9, BATCH, BATCH)
    for n, k in shapes:
        for keep in (None, 0.2, 1.0):
            yield case(f"one step, {n} x {k}, kept {keep}", single, (2, n, k, batch), keep)
    n, k = shapes[0]
    yield case("one step, not all active", single, (3, n, k, batch), 0.3, gone=(0, 2))
    yield case("one step, none active", single, (2, n, k, batch), 0.3, gone=(0, 1))
    yield case("one step, batch in a row", single, (2, n, k, batch), 0.3, batch_major=False)
    yield case("one step, 4 bytes off", single, (2, n, k, batch), 0.3, shift=1)
    for keep in (0.2, 1.0):
        yield case(f"20 steps beside torch.optim, {keep:.0%} kept", trajectory, keep)
    yield case("many steps leave what is pruned at 0", zeros, here.pick(6, 200, 200))
    for k in (32, 28, 31):
        yield case(f"eight pruned in a row, rows of {k}", untouched, k, k % 3)
    yield case("replicas alone and together", alone, here.pick(3, 100, 100), (*shapes[0], batch))
    draw = random.Random(0)
    for i in range(here.pick(3, 30, 100)):
        most = here.pick(50, 500, 900)
        n, k = draw.randint(1, most), draw.choice([1, 4, 8]) * draw.randint(1, most // 4)
        shape = (draw.randint(1, 4), n, k, draw.randint(1, here.pick(20, 130, 130)))
        keep, shift, major = draw.choice([None, 0.0, 0.1, 0.5]), draw.choice([0, 1, 4]), draw.random() < 0.7
        options = {"seed": i, "shift": shift, "batch_major": major}
        yield case(f"random {i}: {shape}, kept {keep}, {options}", single, shape, keep, **options)
    if here.size != "tiny":
        yield case("in a CUDA graph", replayed)


# Offsets beyond 2^31


def vast(here: Here, replicas: int, side: int) -> None:
    """Plain SGD in place on R x side x side weights: the corners of every replica are those of a product."""
    need_memory(5 * replicas * side * side / 2**30)
    g, n = here.generator(0), here.pick(77, 0, side)
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
