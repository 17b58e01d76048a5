"""sparse.convert: every form of a layer in turn, then networks as the clock chooses them, beside dense."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gpu.common import Case, Here
from gpu.timing import rows
from oracle import (
    DTYPES,
    NAN,
    Skip,
    Wrong,
    compare,
    graphed,
    need_memory,
    poisoned,
    precision,
)
from sparselth import sparse
from sparselth.measure.usual import network
from sparselth.models import get_model
from sparselth.nn import init_weights
from sparselth.sparse import times
from sparselth.sparse.formats import OURS_GPU

HALF = "slot_linear", "two_four_linear"  # for 16 bits alone
MOVES = "mixed", "to turned", "from turned", "to channels-last", "from channels-last"

# network, sparsity, batch; --quick times the first
Workload = tuple[str, float, int]
WORKLOADS: dict[str, list[Workload]] = {
    "bf16": [
        ("8192 square", 0.9, 1),
        ("8192 square", 0.9, 64),
        ("lenet-300-100", 0.95, 64),
        ("conv4", 0.95, 64),
    ],
    "ieee": [("lenet-300-100", 0.95, 64), ("conv4", 0.95, 64)],
}


def made(here: Here, part: str, name: str, density: float, block: int | None = None) -> nn.Sequential:
    """A network with so many of its weights, chosen at random one by one or in blocks."""
    torch.manual_seed(0)
    if name == "two layers":
        k, n = here.pick((64, 32), (832, 512), (832, 512))
        net = nn.Sequential(nn.Linear(k, n), nn.ReLU(), nn.Linear(n, 10))
    elif name == "convolutions":
        c = here.pick(16, 64, 64)
        net = nn.Sequential(
            *(nn.Conv2d(1, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(c, c + 1, 2)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(9 * (c + 1), 10)),
        )
    elif name == "8192 square":
        net = nn.Sequential(nn.Linear(8192, 8192))
    else:
        model = get_model(name)
        net = network(model, init_weights(model, torch.Generator().manual_seed(0)))
    net = net.to(here.device).eval().requires_grad_(False)
    g = here.generator(0)
    for weight in (p for p in net.parameters() if p.dim() > 1):
        drawn = weight[::block, ::block] if block else weight
        mask = torch.rand(drawn.shape, generator=g, device=here.device) < density
        mask[0] |= ~mask.any()
        if block:
            mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        weight.mul_(mask[: len(weight), : weight.shape[1]])
    return net.to(DTYPES[part])


def images(here: Here, part: str, net: nn.Sequential, name: str, batch: int) -> Tensor:
    first = next(p for p in net.parameters() if p.dim() > 1)
    shape: tuple[int, ...] = (first.shape[1],)
    if name == "convolutions":
        shape = 1, 8, 8
    elif name not in ("two layers", "8192 square"):
        shape = get_model(name).input
    x = torch.randn(batch, *shape, generator=here.generator(1), device=here.device)
    return x.to(DTYPES[part])


@contextmanager
def own_cache() -> Iterator[None]:
    """What was measured before does not count."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=folder),
    ):
        yield


@contextmanager
def prefer(*names: str) -> Iterator[None]:
    """A clock by which forms and networks of these names are fast, and all others slow."""

    def seconds(calls: Mapping[str, Callable[[], object]], sample: object) -> times.Times:
        for call in calls.values():
            call()
        fast = {name for name in calls if name in names or name.split()[0] in names}
        return times.Times({name: 1e-6 if name in fast else 1e-2 for name in calls})

    with own_cache(), mock.patch.object(times, "seconds", seconds):
        yield


def must_have_ours(converted: sparse.Converted) -> None:
    failed = {name: why for name, why in converted.report.left_out.items() if name.split()[-1] in OURS_GPU}
    if failed:
        raise Wrong("; ".join(f"{name}: {why}" for name, why in failed.items()))


def accuracy(net: nn.Sequential, x: Tensor, y: Tensor, part: str) -> dict[str, float]:
    """Against float64, by the error of torch's own in the same dtype."""
    right, torchs = copy.deepcopy(net).double()(x.double()), net(x)
    terms = max(p[0].numel() for p in net.parameters() if p.dim() > 1)
    return compare({"y": y}, {"y": right}, {"y": torchs}, part, {"y": terms})


def replayed(converted: sparse.Converted, x: Tensor) -> Tensor:
    """y from a CUDA graph."""
    kept: list[Tensor] = []
    graph = graphed(lambda: kept.append(converted(x)), 1)
    kept[-1].fill_(NAN)
    graph.replay()
    return kept[-1]


@torch.no_grad()
def forced(here: Here, part: str, name: str, form: str, batch: int) -> dict[str, float]:
    """A network in this form wherever there is one, on several batches and in a CUDA graph."""
    net = made(here, part, name, 0.2, 16 if form.startswith("block_") else None)
    x = images(here, part, net, name, batch)
    with precision(part), prefer(form, *MOVES):
        converted = sparse.convert(net, None, x, compact=False, kernels="triton")
        must_have_ours(converted)
        left_out = [why for key, why in converted.report.left_out.items() if key.split()[-1] == form]
        if left_out:
            raise Skip(left_out[0])
        layers = converted.report.layers
        if form not in {layer.chosen for layer in layers}:
            raise Wrong(f"{form} was not chosen, errors {[layer.errors for layer in layers]}")
        with poisoned():
            found = accuracy(net, x, converted(x), part)
        for other in here.pick((1,), (1, 7, 300), (1, 7, 300)):
            xs = images(here, part, net, name, other)
            accuracy(net, xs, converted(xs), part)
        if here.device == "cuda":
            accuracy(net, x, replayed(converted, x), part)
    return found


@torch.no_grad()
def by_the_clock(here: Here, part: str, name: str, sparsity: float, batch: int) -> dict[str, Any]:
    """As a user converts it."""
    net = made(here, part, name, 1 - sparsity)
    x = images(here, part, net, name, batch)
    with precision(part), own_cache():
        converted = sparse.convert(net, None, x)
        must_have_ours(converted)
        accuracy(net, x, converted(x), part)
        accuracy(net, x, replayed(converted, x), part)
    return {"said": f"{name}, batch {batch}: {chosen(converted)}"}


def chosen(converted: sparse.Converted) -> str:
    """The forms of the layers, in order; "original" is dense without compaction."""
    forms = dict.fromkeys(layer.chosen for layer in converted.report.layers)
    return converted.report.chosen if converted.report.chosen == "original" else ", ".join(forms)


def checks(part: str, here: Here) -> Iterator[Case]:
    batches = here.pick((3,), (3, 16), (3, 16))
    for form in ("csr_infer", "block_linear", *(HALF if part in ("bf16", "fp16") else ())):
        for batch in batches:
            run = partial(forced, here, part, "two layers", form, batch)
            yield Case(f"{form}, batch {batch}", part, run)
    for form in ("channels-last", "block_conv2d"):
        run = partial(forced, here, part, "convolutions", form, 3)
        yield Case(f"convolutions, {form}", part, run)
    if here.size != "tiny":
        for batch in (1, 64):
            run_timed = partial(by_the_clock, here, part, "lenet-300-100", 0.95, batch)
            yield Case(f"lenet-300-100, batch {batch}, by the clock", part, run_timed)


def large(part: str, here: Here) -> Iterator[Case]:
    yield from ()


# Benchmarks


def floor(net: nn.Sequential, x: Tensor, converted: sparse.Converted) -> dict[str, int]:
    """Weights as they were converted, x and y; the multiplications of kept weights."""
    flops, y = 0, x
    for module in net:
        y = module(y)
        if isinstance(module, nn.Linear | nn.Conv2d):
            flops += 2 * int((module.weight != 0).sum()) * y[:, 0].numel()
    moved = sum(t.numel() * t.itemsize for t in (x, y))
    return {"bytes": sparse.weight_bytes(converted) + moved, "flops": flops}


@torch.no_grad()
def benchmark(here: Here, part: str, workload: Workload) -> dict[str, Any]:
    """Converted beside the network as it was, eager, channels-last and compiled."""
    name, sparsity, batch = workload
    need_memory(8)
    net = made(here, part, name, 1 - sparsity)
    x = images(here, part, net, name, batch)
    with precision(part):
        if here.size == "tiny":
            with prefer("csr_infer", *MOVES):
                converted = sparse.convert(net, None, x, kernels="triton")
        else:
            with own_cache():
                converted = sparse.convert(net, None, x)
        must_have_ours(converted)
        accuracy(net, x, converted(x), part)
        rivals: dict[str, Callable[[], object]] = {"converted": partial(converted, x)}
        rivals["dense eager"] = partial(net, x)
        if any(isinstance(module, nn.Conv2d) for module in net):
            turned = copy.deepcopy(net).to(memory_format=torch.channels_last)
            rivals["dense channels-last"] = partial(turned, x.contiguous(memory_format=torch.channels_last))
        if here.device == "cuda":
            torch.compiler.reset()
            rivals["dense compiled"] = partial(torch.compile(copy.deepcopy(net), dynamic=False), x)
        text = f"{said(workload)}: {chosen(converted)}"
        timed = rows(here, text, floor(net, x, converted), part, "converted", rivals)
    return {"times": timed}


def said(workload: Workload) -> str:
    name, sparsity, batch = workload
    return f"{name}, {sparsity:.0%} pruned, batch {batch}"


def benchmarks(part: str, here: Here) -> Iterator[Case]:
    full = WORKLOADS.get(part, [])
    quick = full[:1] if part == "bf16" else []
    for workload in here.pick([("two layers", 0.8, 3)], quick, full):
        yield Case(said(workload), part, partial(benchmark, here, part, workload))
