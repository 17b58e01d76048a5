"""dW, mask and step in one: beside float64, torch.optim and masked_update; NaN where nothing may look."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import (
    UNIT,
    compare,
    graphed,
    must_be_zero,
    must_repeat,
    pick,
    precision,
    same_bits,
)
from sparselth.kernels import linear_grad_update as module
from sparselth.kernels._triton import INTERPRET
from sparselth.kernels.bitmask import pack, unpack
from sparselth.kernels.linear_grad_update import floor, linear_grad_update
from sparselth.kernels.masked_update import (
    adam_reference,
    masked_adam_many,
    masked_sgd_many,
    sgd_reference,
)

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
DEVICE = "cpu" if INTERPRET else "cuda"
KERNELS = ["reference", "triton"] if INTERPRET or torch.cuda.is_available() else ["reference"]
COUNT = {"adam": 2, "sgd": 1}
PARTS = ["adam", "sgd", "tf32"]  # tf32: Adam, products in TF32
TRITON = pytest.mark.skipif("triton" not in KERNELS, reason="neither Triton's interpreter nor a CUDA device")
LENET = [(300, 784), (100, 300), (10, 100)]
# Of a few weights one may be the whole RMS: then each of the dozen roundings of its update counts, and they
# lose as much as so many terms of a sum: 12 (0.5 / 0.2)^2, see `sparselth.check`
FEW, CHAIN = 100, 75
GAP = 16  # floats of NaN around every tensor


class Layer:
    """R replicas of a layer in flat buffers [R, P], one each of w, a and b, full of NaN where nothing lies.

    Pruned weights and moments are 0, live moments not; replicas have steps and learning rates of their own.
    """

    def __init__(
        self,
        r: int,
        n: int,
        k: int,
        b: int,
        keep: float | None = 0.4,
        *,
        optimizer: str = "adam",
        bias: bool = True,
        batch_major: bool = True,
        shift: int = 0,
        warm: bool = True,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.shape, self.optimizer, self.warm = (r, n, k, b), optimizer, warm
        self.live = torch.rand(r, n, k, generator=draw) < (1 if keep is None else keep)
        self.bits = None if keep is None else pack(self.live).to(DEVICE)
        self.at = GAP + shift, GAP + shift + n * k + GAP
        width = -(-(self.at[1] + n + GAP) // 16) * 16
        self.flat = [torch.full((r, width), torch.nan) for _ in range(1 + COUNT[optimizer])]
        for i, flat in enumerate(self.flat):
            weight, vector = self.views(flat)
            for t, live in ((weight, self.live), (vector, torch.tensor(bias))):
                values = torch.randn(t.shape, generator=draw)
                values = values * 0.1 if i == 0 else (values * values + 0.01) * warm
                t.copy_(values.where(live, 0 if t is weight else torch.nan))
        self.flat = [flat.to(DEVICE) for flat in self.flat]
        self.has_bias = bias
        self.new_batch(seed, batch_major)
        self.lr = (10 ** (-3 * torch.rand(r, generator=draw, dtype=torch.float64))).to(DEVICE)
        self.step = torch.randint(1, 9, (r,), generator=draw).float().to(DEVICE)
        self.options: dict[str, Any] = {"weight_decay": 0.01, "optimizer": optimizer}

    def new_batch(self, seed: int, batch_major: bool = True) -> None:
        draw = torch.Generator().manual_seed(seed + 10**7)
        r, n, k, b = self.shape
        both = (torch.randn(r, b, size, generator=draw).mT for size in (n, k))
        self.dy, self.x = ((t if batch_major else t.contiguous()).to(DEVICE) for t in both)

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        (_, n, k, _), (first, second), r = self.shape, self.at, len(flat)
        return flat[:, first : first + n * k].view(r, n, k), flat[:, second : second + n].view(r, n, 1)

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weight and moments, bias and moments."""
        pairs = [self.views(flat) for flat in self.flat]
        return [w for w, _ in pairs], [b for _, b in pairs]

    def take(self, kernels: str, **options: Any) -> None:
        (w, *moments), (bias, *others) = self.parts()
        optional: tuple[Any, Any] = (bias, others) if self.has_bias else (None, ())
        linear_grad_update(
            self.dy,
            self.x,
            w,
            moments,
            self.bits,
            *optional,
            step=self.step,
            lr=self.lr,
            kernels=kernels,
            **self.options | options,
        )

    def expected(self) -> list[Tensor]:
        """What the flat buffers hold after a step, in float64."""
        dw = torch.bmm(self.dy.double(), self.x.mT.double()).cpu()
        db = self.dy.double().sum(2, keepdim=True).cpu()
        wanted = [flat.double().cpu() for flat in self.flat]
        pairs = [self.views(flat) for flat in wanted]
        decay = self.options["weight_decay"]
        grads = [dw.where(self.live, 0), db][: 1 + self.has_bias]
        for g, state in zip(grads, zip(*pairs, strict=True), strict=False):
            for i in range(self.shape[0]):
                flat: list[Any] = [t[i].reshape(1, -1) for t in state]
                mask, rate = torch.ones(flat[0].shape), float(self.lr[i])
                known = [flat[0], g[i].view(1, -1), mask, *flat[1:]]
                if self.optimizer == "adam":
                    new: Any = adam_reference(*known, int(self.step[i]), rate, decay)
                else:
                    new = sgd_reference(*known, rate, 0.9, decay)
                for t, value in zip(state, new, strict=True):
                    t[i] = value.view(t[i].shape)
        return wanted

    def named(self, flat: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Weights, biases and their moments."""
        found = {}
        for name, t in zip("wab", flat or self.flat, strict=False):
            found[name], found[f"bias {name}"] = self.views(t)
        return found

    def alone(self, i: int, before: list[Tensor]) -> Layer:
        """Replica i as it was in `before`, without the others."""
        one = Layer.__new__(Layer)
        one.__dict__ |= self.__dict__
        one.shape = (1, *self.shape[1:])
        one.live, one.flat = self.live[i : i + 1], [t[i : i + 1].clone() for t in before]
        one.bits = None if self.bits is None else self.bits[i : i + 1].clone()
        one.dy, one.x = (t[i : i + 1] for t in (self.dy, self.x))
        one.lr, one.step = self.lr[i : i + 1].clone(), self.step[i : i + 1].clone()
        return one

    def copies(self) -> list[Tensor]:
        return [flat.clone() for flat in self.flat]

    def check(self, wanted: list[Tensor], before: list[Tensor]) -> None:
        """NaN where NaN was, zeros where nothing lives, and all else right to a few roundings."""
        for flat, right, old in zip(self.flat, wanted, before, strict=True):
            found, start = flat.cpu().double(), old.cpu().double().nan_to_num()
            assert torch.equal(found.isnan(), right.isnan())
            terms = (self.shape[3] * right.isfinite().sum()) ** 0.5  # of sums that may cancel
            found, right = found.nan_to_num(), right.nan_to_num()
            assert (found - right).norm() <= 1e-6 * (right.norm() + start.norm()) + 1e-7 * terms
            assert not self.views(flat)[0].cpu()[~self.live].any()


def optimizer_of(part: str) -> str:
    return "sgd" if part == "sgd" else "adam"


def unit_of(part: str) -> str:
    return "tf32" if part == "tf32" else "ieee"


def held(
    part: str,
    shape: tuple[int, int, int, int],
    keep: float | None,
    gone: tuple[int, ...] = (),
    **options: Any,
) -> None:
    """A step no further off than the reference's; a second one, and those not active, to the bit."""
    layer, again, theirs = (Layer(*shape, keep, optimizer=optimizer_of(part), **options) for _ in range(3))
    active = None
    if gone:
        active = torch.ones(shape[0], dtype=torch.bool, device=DEVICE)
        active[list(gone)] = False
    before, wanted = layer.copies(), [t.to(DEVICE) for t in layer.expected()]
    with precision(unit_of(part)):
        layer.take("triton", active=active)
        again.take("triton", active=active)
        theirs.take("reference", active=active)
    for found, right, old in zip(layer.flat, wanted, before, strict=True):
        right[list(gone)] = old[list(gone)].double()
        assert same_bits(found[list(gone)], old[list(gone)])
        assert torch.equal(found.isnan(), right.isnan())  # nothing outside a tensor, all of what is inside
    named = layer.named()
    for name in list(named)[::2]:
        must_be_zero(named[name], ~layer.live.to(DEVICE), f"pruned {name}")
    must_repeat(again.named(), named)
    terms = dict.fromkeys(named, shape[3] + (CHAIN if layer.live.sum() < FEW else 0))
    compare(named, layer.named(wanted), theirs.named(), unit_of(part), terms)


@TRITON
@pytest.mark.parametrize("keep", [None, 0.2, 1.0])
@pytest.mark.parametrize("shape", pick([(10, 36)], [*LENET, (1, 1), (37, 131), (1000, 1024)]), ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_no_further_off_than_torch(part: str, shape: tuple[int, int], keep: float | None) -> None:
    held(part, (2, *shape, pick(9, 60)), keep)


@TRITON
@pytest.mark.parametrize(
    ("replicas", "options"),
    [
        (3, {"gone": (0, 2)}),
        (2, {"gone": (0, 1)}),
        (2, {"batch_major": False}),
        (2, {"shift": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", PARTS)
def test_no_further_off_than_torch_whatever_the_layout(
    part: str, replicas: int, options: dict[str, Any]
) -> None:
    held(part, (replicas, *pick((10, 36), (300, 784)), pick(9, 60)), 0.3, **options)


@TRITON
@pytest.mark.parametrize("seed", range(pick(3, 100)))
@pytest.mark.parametrize("part", PARTS)
def test_no_further_off_than_torch_at_random_shapes(part: str, seed: int) -> None:
    draw, most = random.Random(seed), pick(50, 900)
    n, k = draw.randint(1, most), draw.choice([1, 4, 8]) * draw.randint(1, most // 4)
    shape = (draw.randint(1, 4), n, k, draw.randint(1, pick(20, 130)))
    keep, shift = draw.choice([None, 0.0, 0.1, 0.5]), draw.choice([0, 1, 4])
    held(part, shape, keep, seed=seed, shift=shift, batch_major=draw.random() < 0.7)


@TRITON
@pytest.mark.parametrize("part", PARTS)
def test_replicas_together_and_alone(part: str) -> None:
    replicas = pick(3, 100)
    layer = Layer(replicas, *pick((10, 36, 9), (300, 784, 60)), 0.3, optimizer=optimizer_of(part))
    before = layer.copies()
    with precision(unit_of(part)):
        layer.take("triton")
        for i in (0, replicas // 2, replicas - 1):
            one = layer.alone(i, before)
            one.take("triton")
            must_repeat(one.named(), layer.named([t[i : i + 1] for t in layer.flat]), "company")


@TRITON
@pytest.mark.parametrize("part", PARTS)
def test_replicas_beyond_one_launch(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    held(part, (5, 10, 36, 9), 0.3, gone=(1, 4))


@TRITON
@pytest.mark.parametrize(
    ("r", "n", "k", "programs"), [(70_000, 10, 20, 70_000), (2, 40_000, 40_000, 2 * 625 * 1250)]
)
def test_grids_are_a_devices(r: int, n: int, k: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 2**31 - 1 programs along x, 65,535 along y. Nothing is allocated, nothing runs."""
    grids: list[tuple[int, int]] = []

    class Counted:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_kernel", Counted())
    monkeypatch.setattr(module, "use_triton", lambda kernels, t: True)
    dy, x, w = (torch.empty(1, device=DEVICE).expand(r, *size) for size in ((n, 5), (k, 5), (n, k)))
    monkeypatch.setattr(module, "_check", lambda *given: None)
    step, lr = torch.ones(r, device=DEVICE), torch.ones(r, dtype=torch.float64, device=DEVICE)
    linear_grad_update(dy, x, w, [w, w], None, step=step, lr=lr)
    assert all(0 < x < 2**31 and 0 < y <= 65_535 for x, y in grids)
    assert sum(x * y for x, y in grids) == programs


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("part", PARTS)
def test_a_cuda_graph_reads_steps_rates_and_flags_anew(part: str) -> None:
    layer = Layer(3, 100, 300, 60, 0.3, optimizer=optimizer_of(part))
    active = torch.tensor([True, True, False], device=DEVICE)
    start = layer.copies()

    def again(run: Callable[[], object]) -> dict[str, Tensor]:
        for t, old in zip(layer.flat, start, strict=True):
            t.copy_(old)
        run()
        return {name: t.clone() for name, t in layer.named().items()}

    def take() -> None:
        layer.take("triton", active=active)

    with precision(unit_of(part)):
        graph = graphed(take, 1)
        for step in (3, 7):
            layer.x.mul_(-1.5)
            layer.step.fill_(step)
            layer.lr.mul_(0.5)
            active.logical_not_()
            must_repeat(again(graph.replay), again(take), "a CUDA graph")


SHAPES = [(1, 1, 1, 1), (1, 10, 100, 60), (3, 33, 36, 17), (2, 7, 131, 13), (1, 64, 128, 16)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("optimizer", COUNT)
@pytest.mark.parametrize("keep", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_the_formula(
    shape: tuple[int, int, int, int], keep: float | None, optimizer: str, kernels: str
) -> None:
    layer = Layer(*shape, keep, optimizer=optimizer)
    before, wanted = layer.copies(), layer.expected()
    layer.take(kernels)
    layer.check(wanted, before)


@pytest.mark.parametrize("kernels", KERNELS)
@given(
    r=st.integers(1, 3),
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 80), st.sampled_from([4, 8, 60, 64, 68, 72])),
    b=st.integers(1, 37),
    keep=st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
    optimizer=st.sampled_from(sorted(COUNT)),
    bias=st.booleans(),
    batch_major=st.booleans(),
    shift=st.sampled_from([0, 1, 4]),
    active=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=CASES)
def test_steps_are_the_formula_and_replicas_alone(
    kernels: str, r: int, active: list[bool], **options: Any
) -> None:
    layer = Layer(r, **options)
    before, wanted = layer.copies(), layer.expected()
    layer.take(kernels, active=torch.tensor(active[:r], device=DEVICE))
    after = layer.copies()
    gone = [i for i in range(r) if not active[i]]
    for found, old, right in zip(after, before, wanted, strict=True):
        assert torch.equal(found[gone].view(torch.int32), old[gone].view(torch.int32))
        right[gone] = old[gone].double().cpu()
    layer.check(wanted, before)
    for i in set(range(r)) - set(gone):
        alone = layer.alone(i, before)
        alone.take(kernels)
        for found, together in zip(alone.flat, after, strict=True):
            assert torch.equal(found[0].view(torch.int32), together[i].view(torch.int32))


@pytest.mark.parametrize(
    ("kernels", "part"), [(kernels, part) for kernels in KERNELS for part in PARTS[: 2 + (DEVICE == "cuda")]]
)
@pytest.mark.parametrize("keep", pick([0.3], [0.2, 1.0]))
def test_twenty_steps_are_those_of_torch_optim(keep: float, kernels: str, part: str) -> None:
    with precision(unit_of(part)):
        twenty_steps(kernels, part, keep)


def twenty_steps(kernels: str, part: str, keep: float) -> None:
    optimizer = optimizer_of(part)
    layer = Layer(2, *pick((10, 36, 20), (300, 784, 60)), keep, optimizer=optimizer, warm=False)
    layer.lr.copy_(torch.tensor([1e-2, 1e-3]))
    start = [t.cpu().clone() for part in layer.parts() for t in part[:1]]
    theirs: list[list[Any]] = []
    for dtype in (torch.float64, torch.float32):
        for i in range(2):
            params = [torch.nn.Parameter(t[i].to(dtype)) for t in start]
            options: dict[str, Any] = {"lr": float(layer.lr[i]), "weight_decay": 0.01}
            if optimizer == "adam":
                theirs.append([params, torch.optim.Adam(params, **options), i])
            else:
                theirs.append([params, torch.optim.SGD(params, momentum=0.9, **options), i])
    for step in range(1, 21):
        layer.new_batch(step)
        layer.step.fill_(step)
        layer.take(kernels)
        for params, optim, i in theirs:
            dy, x = (t[i].cpu().to(params[0].dtype) for t in (layer.dy, layer.x))
            params[0].grad = (dy @ x.mT).where(layer.live[i], 0)
            params[1].grad = dy.sum(1, keepdim=True)
            optim.step()
    for i in range(2):
        for tensors, right, own in zip(layer.parts(), theirs[i][0], theirs[2 + i][0], strict=True):
            found = tensors[0][i].cpu().double()
            error, usual = ((t - right).norm() / right.norm() for t in (found, own.double()))
            assert error <= 3 * max(usual, UNIT[unit_of(part)])
    assert not layer.parts()[0][0].cpu()[~layer.live].any()


@TRITON
@pytest.mark.parametrize("optimizer", COUNT)
@pytest.mark.parametrize("k", [64, 37])
def test_a_batch_of_one_has_the_bits_of_masked_update(k: int, optimizer: str) -> None:
    # then the gradient is a product, and rounds the same everywhere
    layer = Layer(2, 9, k, 1, 0.4, optimizer=optimizer)
    weights, biases = ([t.clone() for t in part] for part in layer.parts())
    grads = [torch.bmm(layer.dy, layer.x.mT), layer.dy.sum(2, keepdim=True)]
    masks = [pack(layer.live.flatten(1)).to(DEVICE), None]
    if optimizer == "adam":
        both = [weights[1], biases[1]], [weights[2], biases[2]]
        steps = [layer.step, layer.step]
        lists = [weights[0], biases[0]], grads, masks
        masked_adam_many(*lists, both, steps, layer.lr, weight_decay=0.01, kernels="triton")
    else:
        lists = [weights[0], biases[0]], grads, masks
        masked_sgd_many(
            *lists, [weights[1], biases[1]], layer.lr, momentum=0.9, weight_decay=0.01, kernels="triton"
        )
    layer.take("triton")
    for found, right in zip(chain(*layer.parts()), chain(weights, biases), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("part", PARTS)
def test_nan_and_infinity_end_at_pruned_weights(part: str, kernels: str) -> None:
    layer = Layer(2, *pick((12, 30), (20, 70)), 9, 0.4, optimizer=optimizer_of(part))
    for step in range(1, pick(11, 201)):
        layer.new_batch(step)
        layer.step.fill_(step)
        layer.x[:, :, 0] = [torch.nan, torch.inf, 1e38][step % 3]
        with precision(unit_of(part)):
            layer.take(kernels)
    for t in layer.parts()[0]:
        assert not t.cpu()[~layer.live].any()
        assert not t.cpu()[layer.live].isfinite().any()


@TRITON
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("k", [32, 28, 31])
def test_eight_pruned_weights_in_a_row_are_not_touched(k: int, part: str) -> None:
    layer = Layer(1, 2, k, 5, 0.5, optimizer=optimizer_of(part), shift=k % 3)
    layer.live[:] = unpack(torch.tensor([0, 1, 0, 6], dtype=torch.uint8), k)
    layer.bits = pack(layer.live).to(DEVICE)
    eights = torch.tensor([0, 1, 0, 1]).bool().repeat_interleave(8)[:k]
    for t in layer.parts()[0]:
        t[:, :, ~eights] = torch.nan
    with precision(unit_of(part)):
        layer.take("triton")
    for t in layer.parts()[0]:
        assert t[:, :, ~eights].isnan().all()
        assert t[layer.live.to(DEVICE)].isfinite().all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_rates_in_fp32_flags_in_bytes_vectors_of_bias_and_sgd_without_momentum(kernels: str) -> None:
    layer = Layer(2, 5, 12, 6, 0.5, optimizer="sgd")
    start = layer.copies()
    (w, _), (bias, _) = layer.parts()
    rates = torch.tensor([0.5, 0.25], device=DEVICE)
    right = layer.copies()[0]
    for part, g in zip(layer.views(right), (layer.dy @ layer.x.mT, layer.dy.sum(2, True)), strict=True):
        mask = layer.live.to(DEVICE) if part.shape[2] > 1 else torch.ones_like(part).bool()
        part[1] -= (0.25 * g.where(mask, 0))[1]
    linear_grad_update(
        layer.dy,
        layer.x,
        w,
        [],
        layer.bits,
        bias.squeeze(2),
        step=layer.step,
        lr=rates,
        active=torch.tensor([0, 1], dtype=torch.uint8, device=DEVICE),
        momentum=0.0,
        optimizer="sgd",
        kernels=kernels,
    )
    assert torch.allclose(layer.flat[0], right, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(layer.flat[0][0].nan_to_num(), start[0][0].nan_to_num())
    assert torch.equal(layer.flat[1].nan_to_num(), start[1].nan_to_num())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dy": torch.zeros(2, 5, 7)}, "x as torch.float32 \\[2, 12, 7\\]"),
        ({"dy": torch.zeros(5, 6)}, "dy \\[R, N, B\\]"),
        ({"x": torch.zeros(2, 12, 6).double()}, "x as torch.float32"),
        ({"weight": torch.zeros(2, 12, 5).mT}, "weight contiguous within a replica"),
        ({"weight": torch.zeros(2, 5, 13)}, "weight as"),
        ({"moments": []}, "expected 2 moments"),
        ({"moments": [torch.zeros(2, 5, 12)] * 2}, "a moment of the weight contiguous"),
        ({"bias_moments": []}, "expected 2 moments"),
        ({"bias": torch.zeros(2, 4)}, "bias as torch.float32 \\[2, 5\\]"),
        ({"bits": torch.zeros(2, 5, 12, dtype=torch.uint8)}, "bits as torch.uint8 \\[2, 5, 2\\]"),
        ({"bits": torch.zeros(2, 2, 5, dtype=torch.uint8).mT}, "bits contiguous"),
        ({"step": torch.zeros(2).double()}, "step as torch.float32"),
        ({"lr": torch.zeros(1)}, "lr as torch.float64 or torch.float32 \\[2\\]"),
        ({"lr": torch.zeros(4)[::2]}, "lr contiguous"),
        ({"active": torch.zeros(2)}, "active as torch.bool or torch.uint8"),
        ({"optimizer": "adamw"}, 'optimizer "adam" or "sgd"'),
        ({"kernels": "cuda"}, "kernels"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], says: str, kernels: str) -> None:
    layer = Layer(2, 5, 12, 6)
    (weight, *moments), (bias, *bias_moments) = layer.parts()
    call: dict[str, Any] = {"dy": layer.dy, "x": layer.x, "weight": weight, "moments": moments}
    call |= {"bits": layer.bits, "bias": bias, "bias_moments": bias_moments}
    call |= {"step": layer.step, "lr": layer.lr, "kernels": kernels}
    change = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in change.items()}
    with pytest.raises(ValueError, match=says):
        linear_grad_update(**call | change)


def test_floor_counts_what_memory_moves() -> None:
    weight, bias = torch.zeros(2, 3, 20), torch.zeros(2, 3)
    bits = torch.zeros(2, 3, 3, dtype=torch.uint8)
    bits[0, 0] = torch.tensor([0, 1, 15])
    data, flops = 4 * 2 * 7 * 23, 2 * 2 * 3 * 20 * 7
    assert floor(weight, 7) == {"bytes": 24 * 120 + data, "flops": flops}
    # weights 8 to 19 are written, 0 to 31 fetched; 6 biases are both
    bytes = 2 * (4 * (32 + 12) + 8 * 6) + 18 + data
    assert floor(weight, 7, bits, bias, 1) == {"bytes": bytes, "flops": flops}
    assert floor(weight, 7, bits | 255) == {"bytes": 3 * (4 * 2 * 64 + 4 * 120) + 18 + data, "flops": flops}


@pytest.mark.host
def test_weights_and_moments_take_16_bytes_an_access(
    machine_code: Callable[[str], list[dict[str, Any]]],
) -> None:
    for facts in machine_code("linear_grad_update"):
        if facts["constants"]["UNIT_W"] == "4":
            # 16 weights a thread: four accesses for each load and store of w and its moments
            assert facts["wide"] >= 8 * (1 + int(facts["constants"]["MOMENTS"])), facts
