"""Chains with what stands between them as one program: against float64, and as what they were made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as zoo

from conversions import close, random_masks, times, timing
from sparselth import sparse
from sparselth.check import check
from sparselth.kernels import _native
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels.sparse_conv2d_rows import Planes
from sparselth.kernels.step_parts import Call
from sparselth.sparse.forms.stage import LAYERS
from sparselth.sparse.joined import Joined
from sparselth.sparse.programs import InRows, scheduled

pytestmark = pytest.mark.skipif(_native.LIB is None, reason="forms in columns are the native kernels'")


def joins(calls: Mapping[str, Call], sample: Any) -> Any:
    """A clock by which forms in columns are fast, and what joins them too."""
    for call in calls.values():
        call()
    fast = {"sparse_conv2d": 1e-7, "columns": 1e-7, "csr_linear": 1e-7, "joined": 1e-5}
    return times({name: fast.get(name.split()[0], 1e-3) for name in calls})


def joins_rows(calls: Mapping[str, Call], sample: Any) -> Any:
    """The same of rows, and of columns where an image has one pixel."""
    for call in calls.values():
        call()
    fast = {"sparse_conv2d_rows": 1e-7, "max_pool_rows": 1e-7, "depthwise_rows": 1e-8}
    fast |= {"csr_tiled": 1e-8, "columns": 1e-7, "joined rows": 1e-5}
    return times({name: fast.get(name, 1e-3) for name in calls})


LAYOUTS = [(joins, "joined", "sparse_conv2d"), (joins_rows, "joined rows", "sparse_conv2d_rows")]


class Block(nn.Module):
    """Two convolutions and what goes past them: the input, or a convolution of it."""

    def __init__(self, c: int, n: int, stride: int, in_place: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(c, n, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(n, n, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in range(2))
        self.past = nn.Conv2d(c, n, 1, stride) if stride > 1 or c != n else None
        self.relu, self.in_place = nn.ReLU(in_place), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.two(self.relu(self.norms[0](self.one(x)))))
        z = x if self.past is None else self.past(x)
        if self.in_place:
            y += z
            return self.relu(y)
        return self.relu(z + y)


class Odd(nn.Module):
    """A sum with itself, a sum of what came in, a convolution added to its own input, a value read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + x
        y = y + self.b(y)
        y = y + y
        z = torch.relu(y)
        return self.c(z) + z + y.mul(2)


MEANS: list[Callable[[Tensor], Tensor]] = [  # all that are known as one
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((1, 1)),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.adaptive_avg_pool2d(x, output_size=[1, 1]),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: x.mean(dim=[-1, -2], keepdim=True),
    lambda x: torch.mean(x, (3, 2), True),
]
SCALES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda s, x: s * x,
    lambda s, x: x * s,
    lambda s, x: torch.mul(x, s),
    lambda s, x: s.mul(x),
]


class Squeezed(nn.Module):
    """Wide, depthwise, squeezed and narrow again; with what came in where it fits."""

    def __init__(self, c: int, n: int, stride: int, how: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(c, 2 * c, 1, bias=False), nn.Conv2d(2 * c, n, 1)
        self.deep = nn.Conv2d(2 * c, 2 * c, 5, stride, 2, groups=2 * c)
        self.down, self.up = nn.Conv2d(2 * c, 3, 1), nn.Conv2d(3, 2 * c, 1)
        self.norm, self.act, self.gate = nn.BatchNorm2d(2 * c), act, gate
        self.mean, self.scale = MEANS[how % len(MEANS)], SCALES[how % len(SCALES)]
        self.past = stride == 1 and c == n

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.deep(self.act(self.norm(self.wide(x)))))
        s = self.gate(self.up(F.relu(self.down(self.mean(y)))))
        z = self.narrow(self.scale(s, y))
        return z + x if self.past else z


class Shared(nn.Module):
    """Images that are read again behind their product, a gate of two, means as vectors, sums of these."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.up, self.line = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        s = F.hardsigmoid(self.up(F.adaptive_avg_pool2d(y, 1)) * y.mean((2, 3), keepdim=True))
        z = F.relu6(self.b(y * s) + y)
        v = F.hardswish(z + y * s).mean((2, 3))
        return self.line(F.silu(v + v)) + v


def resnet(in_place: bool) -> nn.Module:
    body = Block(3, 8, 1, in_place), Block(8, 8, 1, in_place), Block(8, 12, 2, in_place)
    return nn.Sequential(nn.Sequential(*body), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def squeezed(act: nn.Module, gate: nn.Module, how: int) -> nn.Module:
    body = Squeezed(6, 6, 1, how, act, gate), Squeezed(6, 8, 2, how + 1, act, gate)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10), act, nn.Dropout(), nn.Linear(10, 5)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), act, *body, *ends)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "in place": lambda: resnet(True),
    "new memory": lambda: resnet(False),
    "odd": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Odd()),
    "shared": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Shared()),
    "squeezed": lambda: squeezed(nn.Hardswish(True), nn.Hardsigmoid(), 0),
    "squeezed otherwise": lambda: squeezed(nn.SiLU(), nn.Sigmoid(), 2),
    "squeezed once more": lambda: squeezed(nn.ReLU6(), nn.Tanh(), 4),
    "stem": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 1, 1), resnet(True)),
}


def converted(name: str, x: Tensor) -> tuple[Any, nn.Module]:
    """And the dense masked network in float64."""
    torch.manual_seed(0)
    return of(NETWORKS[name]().eval(), x)


def of(model: nn.Module, x: Tensor) -> tuple[Any, nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    masks = {n: m for n, m in random_masks(model, 0.3).items() if m.dim() > 1}
    exact = copy.deepcopy(model).double().requires_grad_(False)
    for n, mask in masks.items():
        exact.get_parameter(n).mul_(mask)
    return sparse.convert(model, masks, x), exact


def program(network: nn.Module) -> Joined:
    (found,) = (m for m in network.modules() if isinstance(m, Joined))
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("clock", "whole", "form"), LAYOUTS)
def test_it_is_right_for_any_batch_and_size(
    clock: Any, whole: str, form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "seconds", clock)
    x = torch.randn(5, 3, 10, 9)
    fast, exact = converted(name, x)
    assert fast.report.chosen == whole, fast.report
    chosen = {layer.name: layer.chosen for layer in fast.report.layers if len(layer.shape) == 4}
    pixels = {"csr_tiled"} if form.endswith("rows") and name[:6] in ("squeez", "shared") else set()
    assert name == "odd" or {*chosen.values()} - {"depthwise_rows"} == {form} | pixels
    assert not [layer for layer in chosen if "segment" in layer]  # a form is converted once
    held = program(fast)
    for shape in ((5, 3, 10, 9), (1, 3, 10, 9), (17, 3, 10, 9), (2, 3, 13, 8)):
        for _ in range(2):  # the second on memory that was used
            x = torch.randn(shape)
            before = x.clone()
            close(fast(x), exact(x.double()))
            assert torch.equal(x, before)
    assert len(held.run.chains) == 3  # the other size went through the segments
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    assert torch.equal(again(x), fast(x))


class Bottlenecks(nn.Module):
    """Of ResNet-50: what 1 x 1 convolutions read and add to, and a shortcut of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [(8, 1), (16, 1), (16, 2), (16, 1)]
        self.first, bodies, shortcuts, c = nn.Conv2d(3, 8, 3, 1, 1), list[nn.Module](), list[nn.Module](), 8
        for n, stride in blocks:
            inside = (
                nn.Conv2d(c, 6, 1),
                nn.ReLU(),
                nn.Conv2d(6, 6, 3, stride, 1),
                nn.ReLU(),
                nn.Conv2d(6, n, 1),
            )
            bodies.append(nn.Sequential(*inside))
            shortcuts.append(nn.Conv2d(c, n, 1, stride) if stride > 1 or n != c else nn.Identity())
            c = n
        self.bodies, self.shortcuts = nn.ModuleList(bodies), nn.ModuleList(shortcuts)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for body, shortcut in zip(self.bodies, self.shortcuts, strict=True):
            x = F.relu(body(x) + shortcut(x))
        return x.mean((2, 3))


class Crossed(nn.Module):
    """A value that is read again behind what is added to it, a plain sum of two, a convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 1, 1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, size, 1, size // 2) for size in (1, 1, 3, 1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.convs[0](x) + x
        u, v = self.convs[1](x), self.convs[2](y)
        t = self.convs[3](u) + self.convs[4](v)
        return self.convs[6](t + self.convs[5](u + v))


@pytest.mark.parametrize("name", [*NETWORKS, "bottlenecks", "crossed"])
def test_each_thread_has_a_part_of_an_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", joins_rows)
    of_planes, made = Planes.of, list[int]()

    def counted(*args: Any, **kwargs: Any) -> Planes:
        made.append(kwargs.get("parts", 1))
        return of_planes(*args, **kwargs)

    monkeypatch.setattr(Planes, "of", counted)
    monkeypatch.setitem(NETWORKS, "bottlenecks", Bottlenecks)
    monkeypatch.setitem(NETWORKS, "crossed", Crossed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fast, exact = converted(name, torch.randn(1, 3, 12, 8))
        assert fast.report.chosen == "joined rows", fast.report
        for threads, batch in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (2, 3)):
            torch.set_num_threads(threads)
            made.clear()
            again = copy.deepcopy(fast)
            for _ in range(2):  # the second on memory that was used
                x = torch.randn(batch, 3, 12, 8)
                close(again(x), exact(x.double()))
            if name == "bottlenecks":
                parted = [parts for parts in made if parts > 1]
                assert {*parted} == ({threads} if 1 < threads < 5 and batch == 1 else set())
    finally:
        torch.set_num_threads(before)


def test_sums_and_their_relus_are_the_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", joins)
    held = program(converted("in place", torch.randn(2, 3, 8, 8))[0])
    steps = scheduled(held.steps, held.plans)
    # a convolution past the block and two blocks that change width, each with a sum, one without; the end
    assert [(len(step.sources), step.activation) for step in steps] == [
        *((1, "none"), (2, "relu")),
        (2, "relu"),
        *((1, "none"), (2, "relu")),
        *[(1, "none")] * 3,
    ]
    assert [step.does for step in steps[-3:-1]] == ["mean", "flat"]
    odd = program(converted("odd", torch.randn(2, 3, 8, 8))[0])
    assert sum(len(step.sources) == 2 and step.segment is None for step in odd.steps) >= 2


@pytest.mark.parametrize("relu", [F.relu, partial(F.relu, inplace=True), torch.relu])
def test_a_relu_is_one_however_it_is_called(
    relu: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "seconds", joins)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = relu(self.a(x) + x)
            return relu(self.c(relu(self.b(y))) + y)

    model, x = Plain().eval().requires_grad_(False), torch.randn(2, 3, 6, 6)
    masks = {n: m for n, m in random_masks(model, 0.5).items() if m.dim() > 1}
    fast = sparse.convert(model, masks, x)
    assert [s.activation for s in scheduled(program(fast).steps, program(fast).plans)] == ["relu", "relu"]
    for n, mask in masks.items():
        model.get_parameter(n).data.mul_(mask)
    close(fast(x), copy.deepcopy(model).double()(x.double()))


def test_other_weights_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", joins)
    x = torch.randn(3, 3, 8, 8)
    fast, _ = converted("in place", x)
    state = fast.state_dict()
    before = fast(x)
    fast.load_state_dict({name: 2 * t if name.endswith("weight") else t for name, t in state.items()})
    after = fast(x)
    assert not torch.allclose(after, before)
    fast.load_state_dict(state)
    assert torch.equal(fast(x), before)


def test_a_layer_that_is_called_twice_is_told_in_both_its_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).flatten(1).sum(1) + self.a(F.avg_pool2d(x, 2)).flatten(1).sum(1)

    tried = list[str]()

    def each_its_own(calls: Mapping[str, Call], sample: Any) -> Any:
        joins(calls, sample)
        tried.extend(name for name in calls if name == "sparse_conv2d_rows")  # once a layer
        fast = "dense" if len(tried) == 1 else "sparse_conv2d_rows"
        whole = {"converted": 1e-7, "mixed": 1e-5}
        return times({n: whole.get(n.split()[0], 1e-6 if n == fast else 1e-3) for n in calls})

    monkeypatch.setattr(timing, "seconds", each_its_own)
    model, x = Twice().eval(), torch.randn(2, 3, 8, 8)
    report = sparse.convert(model, random_masks(model, 0.3), x).report
    assert [layer.chosen for layer in report.layers] == ["dense", "sparse_conv2d_rows"]


def test_times_are_those_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks that print the same, of the same layers, are two races."""

    class Sums(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(2))
            self.more = more

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + x
            z = self.b(y) + y
            return z.sin() if self.more else z

    raced = list[str]()

    def noted(calls: Mapping[str, Call], sample: Any) -> Any:
        raced.extend(name for name in calls if name == "converted")
        return joins(calls, sample)

    monkeypatch.setattr(timing, "seconds", noted)
    first, second = Sums(False).eval(), Sums(True).eval()
    second.load_state_dict(first.state_dict())
    masks, x = random_masks(first, 0.5), torch.randn(2, 3, 6, 6)
    assert repr(first) == repr(second)
    for model, count in ((first, 1), (second, 2), (first, 2)):
        sparse.convert(model, masks, x)
        assert len(raced) == count


def test_what_does_not_pay_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(calls: Mapping[str, Call], sample: Any) -> Any:
        return times({n: 1e-9 if n == "converted" else s for n, s in joins(calls, sample).items()})

    monkeypatch.setattr(timing, "seconds", apart)
    fast, _ = converted("in place", torch.randn(2, 3, 8, 8))
    assert fast.report.chosen == "converted"
    assert {*fast.report.networks} >= {"original", "converted", "joined"}
    assert not [m for m in fast.modules() if isinstance(m, Joined)]


def test_layers_that_are_slower_apart_are_joined_and_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one small layer that is faster in another layout keeps a whole network apart."""

    def clock(calls: Mapping[str, Call], sample: Any) -> Any:
        taken = {"sparse_conv2d": 7e-3, "sparse_conv2d_rows": 4e-3, "columns": 1e-7}
        return times({name: taken.get(name, 1e-2) for name in calls})

    monkeypatch.setattr(timing, "seconds", clock)
    torch.manual_seed(0)
    model = Block(3, 8, 2, False).eval()
    fast = sparse.convert(model, random_masks(model, 0.5), torch.randn(2, 3, 8, 8))
    assert {"joined", "joined rows"} <= {*fast.report.networks}


def efficient() -> nn.Module:
    block = zoo.efficientnet.MBConvConfig
    settings = block(1, 3, 1, 8, 8, 1, 1, 1), block(4, 5, 2, 8, 12, 2, 1, 1)
    return zoo.EfficientNet(settings, 0.2, num_classes=7, last_channel=16)


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: zoo.mobilenet_v2(num_classes=7, width_mult=0.25),
    "mobilenet_v3": lambda: zoo.mobilenet_v3_small(num_classes=7, width_mult=0.25),
    "efficientnet": efficient,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_network_is_one_foreign_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", joins_rows)
    torch.manual_seed(0)
    model = WHOLE[name]().eval()
    x = torch.randn(1, 3, 48, 48)
    fast, exact = of(model, x)
    assert fast.report.chosen == "joined rows", fast.report.checks
    assert [node.op for node in fast.network.graph.nodes] == ["placeholder", "call_module", "output"]
    y = fast(x)
    with torch.no_grad():
        own = copy.deepcopy(exact).float()(x)
        assert check(y, exact(x.double()), "fp32", terms=2000, own=own).fault is None
    (held,) = program(fast).run.chains.values()
    assert isinstance(held, InRows)
    assert isinstance(held.run, partial)  # and nothing between the kernels
    apart = torch.stack([x, x], -1)[..., 0]  # in other orders in memory
    for same in (apart, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(fast(same), y)


@pytest.mark.parametrize(
    "strange",
    [
        lambda y: y.mean((1, 2), keepdim=True) + y,
        lambda y: y.mean((2, 3), keepdim=True, dtype=torch.float64).float() * y,
        lambda y: F.adaptive_avg_pool2d(y, (2, 1)),
        lambda y: y * y,
        lambda y: y * y[:, :1],
        lambda y: y.mul_(F.adaptive_avg_pool2d(y, 1)),
        lambda y: torch.add(y, y, alpha=2),
        lambda y: F.hardswish(y, inplace=True) + y,
    ],
)
@pytest.mark.parametrize("clock", [joins, joins_rows])
def test_what_is_no_step_stays_what_it_is(
    clock: Any, strange: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(strange(self.b(F.relu(self.a(x)) + x)))

    monkeypatch.setattr(timing, "seconds", clock)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    fast, exact = of(Around().eval(), x)
    close(fast(x), exact(x.double()))
    for module in fast.modules():
        if isinstance(module, Joined):
            assert {step.does for step in module.steps} == {"sum"}


def test_layers_of_activations_are_those_of_the_kernels() -> None:
    assert {"none", *LAYERS} == {*ACTIVATIONS}
    x = torch.randn(100) * 4
    for name, (kind, in_place) in LAYERS.items():
        y = x.clone()
        assert in_place(y) is y
        torch.testing.assert_close(y, ACTIVATIONS[name](x))
        torch.testing.assert_close(y, kind()(x))
