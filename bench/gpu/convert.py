"""sparse.convert: networks as the clock chooses their forms, beside dense."""

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

from gpu.common import Case, Here, judged
from gpu.timing import rows
from oracle import DTYPES, compare, need_memory, precision
from sparselth import sparse
from sparselth.engine.dense import init_weights
from sparselth.models import get_model
from sparselth.models.torch import network
from sparselth.sparse import times

Workload = tuple[str, float, int]  # network, sparsity, batch
WORKLOADS: dict[str, list[Workload]] = {
    "bf16": [
        ("8192 square", 0.9, 1),
        ("8192 square", 0.9, 64),
        ("lenet-300-100", 0.95, 64),
        ("conv4", 0.95, 64),
    ],
    "ieee": [("lenet-300-100", 0.95, 64), ("conv4", 0.95, 64)],
}


def made(here: Here, part: str, name: str, density: float) -> nn.Sequential:
    """A network with so many of its weights, chosen at random."""
    torch.manual_seed(0)
    if name == "two layers":
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    elif name == "8192 square":
        net = nn.Sequential(nn.Linear(8192, 8192))
    else:
        model = get_model(name)
        net = network(model, init_weights(model, torch.Generator().manual_seed(0)))
    net = net.to(here.device).eval().requires_grad_(False)
    g = here.generator(0)
    for weight in (p for p in net.parameters() if p.dim() > 1):
        weight.mul_(torch.rand(weight.shape, generator=g, device=here.device) < density)
    return net.to(DTYPES[part])


def images(here: Here, part: str, net: nn.Sequential, name: str, batch: int) -> Tensor:
    first = next(p for p in net.parameters() if p.dim() > 1)
    shape = (first.shape[1],) if name in ("two layers", "8192 square") else get_model(name).input
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


def csr_lanes_is_fast(calls: Mapping[str, Callable[[], object]], sample: object) -> times.Times:
    """A clock for the interpreter."""
    for call in calls.values():
        call()
    fast = "csr_lanes", "mixed", "to", "from"
    return times.Times({name: 1e-6 if name.split()[0] in fast else 1e-2 for name in calls})


def accuracy(net: nn.Sequential, x: Tensor, y: Tensor, part: str) -> dict[str, float]:
    """Against float64, by the error of torch's own in the same dtype."""
    right, torchs = copy.deepcopy(net).double()(x.double()), net(x)
    terms = max(p[0].numel() for p in net.parameters() if p.dim() > 1)
    return compare({"y": y}, {"y": right}, {"y": torchs}, part, {"y": terms})


def chosen(converted: sparse.Converted) -> str:
    """The forms of the layers, in order; "original" is dense without compaction."""
    forms = dict.fromkeys(layer.chosen for layer in converted.report.layers)
    return converted.report.chosen if converted.report.chosen == "original" else ", ".join(forms)


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
        with own_cache():
            if here.size == "tiny":
                with mock.patch.object(times, "seconds", csr_lanes_is_fast):
                    converted = sparse.convert(net, None, x, kernels="triton")
            else:
                converted = sparse.convert(net, None, x)
        wrong = judged(accuracy, net, x, converted(x), part)
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
    return {"times": timed} | wrong


def said(workload: Workload) -> str:
    name, sparsity, batch = workload
    return f"{name}, {sparsity:.0%} pruned, batch {batch}"


def benchmarks(here: Here) -> Iterator[Case]:
    for part, workloads in here.pick({"bf16": [("two layers", 0.8, 3)]}, WORKLOADS).items():
        for workload in workloads:
            yield Case(said(workload), part, partial(benchmark, here, part, workload), 20)
