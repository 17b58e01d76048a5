"""masked_update: trajectories beside torch.optim and float64, single steps to 2 ulp, pruned state at 0."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
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
    graphed,
    must_be_zero,
    must_repeat,
    need_memory,
)
from sparselth.kernels.bitmask import reference_pack, reference_unpack
from sparselth.kernels.masked_update import floor, masked_adam_many, masked_sgd_many

RULES: dict[str, dict[str, dict[str, Any]]] = {
    "sgd": {"sgd": {}, "momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True}},
    "adam": {"adam": {}, "adamw": {"betas": (0.8, 0.99), "eps": 1e-6, "decoupled": True}},
}
DECAY = 0.01
GUARD = 64  # floats before and behind every tensor
TINY = ([(1,), (37,), (48, 33), (0,)], [None, 0.3, 0.05, 0.5])
SMALL = (
    [(1,), (37,), (48, 33), (64,), (7, 16), (11,), (0,), (300, 784), (1000, 1001)],
    [None, 0.3, 0.05, None, 0.0, 1.0, 0.5, 0.2, 0.1],
)
LENET = [(300, 784), (300,), (100, 300), (100,), (10, 100), (10,)]


class State:
    """Lists of tensors with everything a step needs; unmasked where a place in `keeps` is None.

    Pruned weights and moments are 0, their gradients NaN; half of the live moments are 0, too. Floats begin
    `shift` bytes behind a 16-byte boundary, with NaN around them.
    """

    def __init__(
        self,
        here: Here,
        rule: str,
        shapes: list[tuple[int, ...]],
        keeps: list[float | None],
        replicas: int = 1,
        seed: int = 0,
        step: int = 7,
        shift: int = 0,
    ) -> None:
        g, r, self.rule = here.generator(seed), replicas, rule
        self.edges: list[Tensor] = []

        def placed(t: Tensor, shape: tuple[int, ...]) -> Tensor:
            start, n = GUARD + shift // 4, t.numel()
            wide = torch.full((n + 2 * GUARD,), NAN, device=here.device)
            self.edges += [wide[:start], wide[start + n :]]
            return wide[start : start + n].view(t.shape).copy_(t).view((r, *shape)[r == 1 :])

        self.lists: dict[str, list[Any]] = {name: [] for name in ("w", "g", "a", "b", "mask", "step")}
        for shape, keep in zip(shapes, keeps, strict=True):
            p = int(torch.tensor(shape).prod())
            live, warm = (torch.rand(r, p, generator=g, device=here.device) < s for s in (keep or 0, 0.5))
            live |= keep is None
            w, grad, a, b = torch.randn(4, r, p, generator=g, device=here.device)
            values = {"w": w.where(live, 0), "g": grad.where(live, NAN)}
            values |= {"a": a.where(live & warm, 0), "b": (b * b).where(live & warm, 0)}
            for name, t in values.items():
                self.lists[name].append(placed(t, shape))
            bits = reference_pack(live) if p else torch.empty(r, 0, dtype=torch.uint8, device=here.device)
            self.lists["mask"].append(None if keep is None else bits)
            self.lists["step"].append(torch.full((r,), float(step), device=here.device))
        self.lr = 10 ** (-3 * torch.rand(r, generator=g, dtype=torch.float64, device=here.device))

    def step(self, kernels: str = "triton") -> None:
        x = self.lists
        if self.rule in RULES["adam"]:
            options = RULES["adam"][self.rule] | {"weight_decay": DECAY, "kernels": kernels}
            masked_adam_many(x["w"], x["g"], x["mask"], (x["a"], x["b"]), x["step"], self.lr, **options)
        else:
            options = RULES["sgd"][self.rule] | {"weight_decay": DECAY, "kernels": kernels}
            buffers = x["a"] if "momentum" in options else None
            masked_sgd_many(x["w"], x["g"], x["mask"], buffers, self.lr, **options)

    def live(self, i: int) -> Tensor:
        """Which weights of tensor i are kept [R, P]."""
        w, mask = self.lists["w"][i], self.lists["mask"][i]
        p = w.numel() // len(self.lr)
        if mask is None or not p:
            return torch.ones(len(self.lr), p, dtype=torch.bool, device=w.device)
        return reference_unpack(mask, p)

    def flat(self, name: str, i: int) -> Tensor:
        return self.lists[name][i].reshape(len(self.lr), -1)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}[{i}]": t.clone() for name in "wab" for i, t in enumerate(self.lists[name])}

    def load(self, values: dict[str, Tensor]) -> None:
        for name in "wab":
            for i, t in enumerate(self.lists[name]):
                t.copy_(values[f"{name}[{i}]"])

    def check_edges(self) -> None:
        if not torch.cat(self.edges).isnan().all():
            raise Wrong("wrote outside a tensor")


def single(here: Here, rule: str, *args: Any, **kwargs: Any) -> dict[str, float]:
    """One step to 2 ulp of the largest term beside torch's CPU kernels; the share of equal bits as a fact."""
    state = State(here, rule, *args, **kwargs)
    theirs = State(here, rule, *args, **kwargs)
    theirs.lists = {name: [None if t is None else t.cpu() for t in ts] for name, ts in theirs.lists.items()}
    theirs.lr = theirs.lr.cpu()
    before = state.tensors()
    state.step()
    state.check_edges()
    theirs.step("reference")
    equal = total = 0
    for i in range(len(state.lists["w"])):
        live, g = state.live(i), state.flat("g", i)
        for name in "wab":
            found, right = state.flat(name, i), theirs.flat(name, i).to(here.device)
            if not (found[~live] == 0).all() or found[~live].signbit().any():
                raise Wrong(f"{name}[{i}]: a pruned weight or its state is not 0")
            old = before[f"{name}[{i}]"].reshape(found.shape)
            rate = float(state.lr.max()) if name == "w" else 1.0
            size = old.abs() + right.abs() + rate * g.abs().clamp_min(1)
            bad = ~((found - right).abs() <= 2**-22 * size) & live
            if bad.any():
                raise Wrong(f"{name}[{i}]: {int(bad.sum())} of {bad.numel()} beyond 2 ulp of torch's")
            equal += int((found == right)[live].sum())
            total += int(live.sum())
    again = State(here, rule, *args, **kwargs)
    again.step()
    must_repeat(again.tensors(), state.tensors())
    return {"equal_bits": equal / max(total, 1)}


def trajectory(here: Here, rule: str, keep: float) -> dict[str, float]:
    """20 steps beside torch.optim in fp32 (fused) and in float64, whose gradients are masked by hand."""
    state = State(here, rule, [here.pick((5, 30), (300, 784), (300, 784))], [keep])
    live = state.live(0).view(state.lists["w"][0].shape)
    kind, options = torch.optim.SGD, {"lr": 1e-2, "weight_decay": DECAY} | RULES["sgd"].get(rule, {})
    if rule in RULES["adam"]:
        options |= {k: v for k, v in RULES["adam"][rule].items() if k != "decoupled"}
        kind = torch.optim.AdamW if rule == "adamw" else torch.optim.Adam  # type: ignore[assignment]
    copies = [torch.nn.Parameter(state.lists["w"][0].to(dtype)) for dtype in (torch.float32, torch.double)]
    optimizers = [
        kind([c], fused=fused, **options)  # type: ignore[arg-type]
        for c, fused in zip(copies, (True, None), strict=True)
    ]
    state.lr.fill_(1e-2)
    for name in "ab":
        state.lists[name][0].zero_()
    for step in range(1, 21):
        g = torch.randn(live.shape, generator=here.generator(step), device=here.device)
        state.lists["g"][0].copy_(g.where(live, NAN))
        state.lists["step"][0].fill_(step)
        state.step()
        for c, optimizer in zip(copies, optimizers, strict=True):
            c.grad = g.where(live, 0).to(c.dtype)
            optimizer.step()
    right = copies[1].detach()
    errors = [
        float((t.detach().double() - right).norm() / right.norm()) for t in (state.lists["w"][0], copies[0])
    ]
    if not errors[0] <= 3 * max(errors[1], UNIT["ieee"]):
        raise Wrong(f"after 20 steps the error is {errors[0]:.1e}, torch.optim's own {errors[1]:.1e}")
    return {"error": errors[0], "torchs": errors[1]}


def zeros(here: Here, rule: str, steps: int) -> None:
    """Many steps with NaN, infinity and huge numbers as gradients of pruned weights, which stay 0."""
    state = State(here, rule, [(41,), (16,), (50, 70)], [0.3, 0.5, 0.1], 2)
    for step in range(1, steps + 1):
        for i, g in enumerate(state.lists["g"]):
            noise = torch.randn(g.numel(), generator=here.generator(step), device=here.device).view(g.shape)
            g.copy_(noise.where(state.live(i).view(g.shape), [NAN, INF, -1e30][step % 3]))
            state.lists["step"][i].fill_(step)
        state.step()
    state.check_edges()
    for name in "wab":
        for i, t in enumerate(state.lists[name]):
            if not t.isfinite().all():
                raise Wrong(f"{name}[{i}] is not finite")
            must_be_zero(state.flat(name, i), ~state.live(i), f"pruned {name}[{i}] after {steps} steps")


def untouched(here: Here, rule: str, shift: int) -> None:
    """Eight pruned weights in a row are neither read nor written."""
    state = State(here, rule, [(32,)], [1.0], shift=shift)
    state.lists["mask"] = [torch.tensor([[0, 1, 0, 254]], dtype=torch.uint8, device=here.device)]
    live = state.live(0)
    eights = live.view(4, 8).any(1).repeat_interleave(8)
    for name in "wgab":
        state.lists[name][0][~eights] = NAN
    state.step()
    for name in "wab":
        t = state.lists[name][0]
        if not t[~eights].isnan().all() or not t[live[0]].isfinite().all():
            raise Wrong(f"{name}: eight pruned weights in a row were touched, or live ones lost")


def alone(here: Here, rule: str) -> None:
    together, single = (State(here, rule, [(40,), (9,), (3000,)], [0.5, None, 0.2], 3) for _ in range(2))
    single.lists = {n: [t if t is None else t[1:2].clone() for t in ts] for n, ts in single.lists.items()}
    single.lr = single.lr[1:2].clone()
    together.step()
    single.step()
    right = {f"{n}[{i}]": t[1:2].clone() for n in "wab" for i, t in enumerate(together.lists[n])}
    must_repeat(single.tensors(), right, "company")


def turned(here: Here, rule: str) -> None:
    """Any order of axes: the bits are in the order of memory."""
    plain, state = (State(here, rule, [(8, 3, 4), (16, 8)], [0.4, None]) for _ in range(2))
    for name in "wgab":
        state.lists[name] = [t.transpose(0, 1) for t in state.lists[name]]
    plain.step()
    state.step()
    back = {f"{n}[{i}]": t.transpose(0, 1).clone() for n in "wab" for i, t in enumerate(state.lists[n])}
    must_repeat({k: t.contiguous() for k, t in back.items()}, plain.tensors(), "another order of axes")


def replayed(here: Here, rule: str) -> None:
    state = State(here, rule, *SMALL)
    start = state.tensors()
    state.step()
    eager = state.tensors()
    graph = graphed(state.step, 1)
    state.load(start)
    graph.replay()
    must_repeat(state.tensors(), eager, "a CUDA graph")


def checks(part: str, here: Here) -> Iterator[Case]:
    draw = random.Random(0)
    shapes, keeps = here.pick(TINY, SMALL, SMALL)
    for rule in RULES[part]:

        def case(name: str, run: Any, *args: Any, rule: str = rule, **kwargs: Any) -> Case:
            return Case(f"{rule}: {name}", part, partial(run, here, rule, *args, **kwargs))

        for replicas in (1, 3):
            yield case(f"one step, R{replicas}", single, shapes, keeps, replicas)
        for keep in (0.2, 1.0):
            yield case(f"20 steps beside torch.optim, {keep:.0%} kept", trajectory, keep)
        yield case("many steps leave what is pruned at 0", zeros, here.pick(6, 200, 200))
        for shift in (0, 4):
            yield case(f"eight pruned in a row, {shift} bytes off", untouched, shift)
        yield case("replicas alone and together", alone)
        yield case("other orders of axes", turned)
        for i in range(here.pick(1, 10, 40)):
            some = [(draw.randint(0, here.pick(70, 9000, 9000)),) for _ in range(draw.randint(1, 3))]
            kept = [draw.choice([None, 0.0, 0.1, 0.5, 1.0]) for _ in some]
            step, shift = draw.choice([1, 2, 10, 1000, 100_000]), draw.choice([0, 4, 8, 12])
            replicas = draw.randint(1, 3)
            name = f"random {i}: R{replicas} {some}, kept {kept}, step {step}, {shift} bytes off"
            yield case(name, single, some, kept, replicas, i, step, shift)
        if here.size != "tiny":
            yield case("in a CUDA graph", replayed)


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
