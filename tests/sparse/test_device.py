"""Networks in every form of CUDA beside float64: tiny in Triton's interpreter, real widths on a device."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oracle import DEVICE, DTYPES, NAN, Skip, compare, graphed, pick, poisoned, precision
from sparselth import sparse
from sparselth.engine.dense import init_weights
from sparselth.models import get_model
from sparselth.models.torch import network
from sparselth.sparse.forms import FORMS

timing = importlib.import_module("sparselth.sparse.times")
PARTS = pick(("bf16",), ("bf16", "fp16", "tf32", "ieee"))
HALF = "slot_linear", "two_four_linear"  # for 16 bits alone
MOVES = "mixed", "to turned", "from turned", "to channels-last", "from channels-last"
CASES = [
    (form, part)
    for form in ("csr_lanes", "block_linear", *HALF)
    for part in PARTS
    if form not in HALF or part in ("bf16", "fp16")
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was measured before does not count; nobody asks for gradients."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.no_grad():
        yield


def prefer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A clock by which forms and networks of these names are fast, and all others slow."""

    def seconds(calls: Mapping[str, Callable[[], object]], sample: object) -> object:
        for call in calls.values():
            call()
        fast = {name for name in calls if name in names or name.split()[0] in names}
        return timing.Times({name: 1e-6 if name in fast else 1e-2 for name in calls})

    monkeypatch.setattr(timing, "seconds", seconds)


def pruned(net: nn.Sequential, part: str, density: float, block: int | None = None) -> nn.Sequential:
    """With so many of its weights, chosen at random one by one or in blocks."""
    net, g = net.to(DEVICE).eval(), torch.Generator(DEVICE).manual_seed(0)
    for weight in (p for p in net.parameters() if p.dim() > 1):
        drawn = weight[::block, ::block] if block else weight
        mask = torch.rand(drawn.shape, generator=g, device=DEVICE) < density
        mask[0] |= ~mask.any()
        if block:
            mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        weight.mul_(mask[: len(weight), : weight.shape[1]])
    return net.to(DTYPES[part])


def draw(part: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).to(
        DTYPES[part]
    )


def like_float64(net: nn.Sequential, x: Tensor, y: Tensor, part: str) -> None:
    """By the error of torch's own in the same dtype."""
    right, torchs = copy.deepcopy(net).double()(x.double()), net(x)
    terms = max(p[0].numel() for p in net.parameters() if p.dim() > 1)
    compare({"y": y}, {"y": right}, {"y": torchs}, part, {"y": terms})


def replayed(converted: sparse.Converted, x: Tensor) -> Tensor:
    """y from a CUDA graph."""
    kept: list[Tensor] = []
    graph = graphed(lambda: kept.append(converted(x)), 1)
    kept[-1].fill_(NAN)
    graph.replay()
    return kept[-1]


def must_have_ours(converted: sparse.Converted) -> None:
    left_out = converted.report.left_out
    assert not [name for name in left_out if FORMS[name.split()[-1]].kind == "ours"], left_out


def check(net: nn.Sequential, part: str, form: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network in this form wherever there is one, on several batches and in a CUDA graph."""
    prefer(monkeypatch, form, *MOVES)
    with precision(part):
        converted = sparse.convert(net, None, x, compact=False, kernels="triton")
        must_have_ours(converted)
        for name, why in converted.report.left_out.items():
            if name.split()[-1] == form:
                raise Skip(why)
        assert form in {layer.chosen for layer in converted.report.layers}
        with poisoned():
            like_float64(net, x, converted(x), part)
        for batch in pick((1,), (1, 7, 300)):
            other = draw(part, batch, *x.shape[1:])
            like_float64(net, other, converted(other), part)
        if DEVICE == "cuda":
            like_float64(net, x, replayed(converted, x), part)


@pytest.mark.parametrize("batch", pick((3,), (3, 16)))
@pytest.mark.parametrize(("form", "part"), CASES)
def test_linear_layers(form: str, part: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    k, n = pick((64, 32), (832, 512))
    net = nn.Sequential(nn.Linear(k, n), nn.ReLU(), nn.Linear(n, 10))
    net = pruned(net, part, 0.2, 16 if form == "block_linear" else None)
    check(net, part, form, draw(part, batch, k), monkeypatch)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("form", ["channels-last", "block_conv2d"])
def test_convolutions(form: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    c = pick(16, 64)
    net = nn.Sequential(
        *(nn.Conv2d(1, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(c, c + 1, 2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(9 * (c + 1), 10)),
    )
    net = pruned(net, part, 0.2, 16 if form == "block_conv2d" else None)
    check(net, part, form, draw(part, 3, 1, 8, 8), monkeypatch)


@pytest.mark.skipif(DEVICE == "cpu", reason="forms of CUDA by the clock of a device")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("batch", [1, 64])
def test_as_a_user_converts_it(batch: int, part: str) -> None:
    model = get_model("lenet-300-100")
    net = network(model, init_weights(model, torch.Generator().manual_seed(0)))
    net = pruned(net.requires_grad_(False), part, 0.05)
    x = draw(part, batch, *model.input)
    with precision(part):
        converted = sparse.convert(net, None, x)
        must_have_ours(converted)
        like_float64(net, x, converted(x), part)
        like_float64(net, x, replayed(converted, x), part)
