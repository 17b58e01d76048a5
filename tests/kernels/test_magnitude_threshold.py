"""Against a stable sort of all and `pruning.prune`: exact counts, ties, NaN; misses, launches, grids."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oracle import DEVICE, INF, NAN, Wrong, must_repeat, pick, poisoned, surrounded
from sparselth import pruning
from sparselth.kernels import magnitude_threshold as module
from sparselth.kernels.bitmask import pack, unpack
from sparselth.kernels.magnitude_threshold import floor, launch, magnitude_threshold, split
from sparselth.models import get_model

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = ["reference", "triton"]
LENET = [(300, 784), (100, 300), (10, 100)]
LAUNCHES = ("_sample_kernel", "_open_kernel", "_sweep_kernel", "_finish_kernel")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs and pieces to a tensor; a device takes the blocks that ship."""
    monkeypatch.setattr(module, "BLOCK", pick(16, module.BLOCK))
    monkeypatch.setattr(module, "LIST", pick(64, module.LIST))
    monkeypatch.setattr(module, "CHUNK", 96)


def by_sort(weights: list[Tensor], k: Tensor, masks: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The definition: a stable sort of all survivors."""
    kept = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    if masks:
        kept = [unpack(m, w.shape[2]) for m, w in zip(masks, weights, strict=True)]
    groups = [[i] for i in range(len(weights))] if k.ndim == 2 else [list(range(len(weights)))]
    thresholds = torch.full((len(k), len(groups)), -INF, device=DEVICE)
    for r in range(len(k)):
        for c, (group, going) in enumerate(zip(groups, k[r].view(-1).tolist(), strict=True)):
            values = torch.cat([weights[i][r][kept[i][r]] for i in group]).float().abs()
            ordered, order = values.sort(stable=True)
            stays = torch.ones_like(values, dtype=torch.bool)
            stays[order[:going]] = False
            for i, part in zip(group, stays.split([int(kept[i][r].sum()) for i in group]), strict=True):
                kept[i][r, kept[i][r].clone()] = part
            if going:
                thresholds[r, c] = ordered[going - 1]
    return [pack(m) for m in kept], thresholds.view(k.shape)


class Case:
    """Random weights with a few distinct values, masks and counts."""

    def __init__(
        self,
        seed: int,
        shapes: list[tuple[int, int]],
        replicas: int = 1,
        values: int = 1000,
        keep: float = 1.0,
        layers: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weights = [
            (torch.randint(-values, values + 1, (replicas, *shape), generator=g) / 64).to(DEVICE, dtype)
            for shape in shapes
        ]
        kept = [(torch.rand(w.shape, generator=g) < keep).to(DEVICE) for w in self.weights]
        self.masks = [pack(m) for m in kept] if keep < 1 else []
        alive = torch.stack([m.flatten(1).sum(1).cpu() for m in kept], 1)  # [R, L]
        alive = alive if layers else alive.sum(1)
        self.k = (torch.rand(alive.shape, generator=g) * (alive + 1)).long()
        for w, m in zip(self.weights, kept, strict=True):
            w[~m] = NAN

    def check(self, kernels: str, repeat: bool = False) -> None:
        """In memory full of NaN, with NaN around the tensors; pruned weights are NaN anyway."""
        weights, old = ([surrounded(t) for t in ts] for ts in (self.weights, self.masks))
        with poisoned():
            runs = [launch(weights, self.k, old, kernels=kernels) for _ in range(1 + repeat)]
        (bits, thresholds), again = runs[0], runs[-1]
        masks, right = by_sort(self.weights, self.k, self.masks)
        assert thresholds.dtype == torch.float32
        if not torch.equal(thresholds.nan_to_num(-1.0, INF), right.nan_to_num(-1.0, INF)):
            raise Wrong(f"thresholds {thresholds.tolist()} instead of {right.tolist()}")
        for i, (found, expected) in enumerate(zip(split(bits, self.weights), masks, strict=True)):
            if not torch.equal(found, expected):
                raise Wrong(f"mask {i}: {int((found != expected).sum())} of {found.numel()} bytes differ")
        must_repeat({"bits": bits, "thresholds": thresholds}, {"bits": again[0], "thresholds": again[1]})


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=CASES)
@given(
    seed=st.integers(0, 2**20),
    shapes=st.lists(
        st.tuples(st.integers(1, pick(6, 700)), st.integers(1, pick(40, 700))), min_size=1, max_size=3
    ),
    replicas=st.integers(1, pick(2, 3)),
    values=st.sampled_from([0, 1, 5, 1000, 10**6]),
    keep=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    layers=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_a_stable_sort(
    kernels: str,
    seed: int,
    shapes: list[tuple[int, int]],
    replicas: int,
    values: int,
    keep: float,
    layers: bool,
    dtype: torch.dtype,
) -> None:
    Case(seed, shapes, replicas, values, keep, layers, dtype).check(kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_goes_and_everything_goes(dtype: torch.dtype, kernels: str) -> None:
    case = Case(2, [(5, 16), (3, 7), (1, 1)], 3, 20, 0.5, dtype=dtype)
    masks = [m.clone() for m in case.masks]
    masks[0][0, 1], masks[0][1, 2], masks[1][2] = 0, 255, 0  # an empty row, a full one, an empty tensor
    case.weights[0][1, 2] = 0.5
    case.masks = masks
    alive = sum(unpack(m, w.shape[2]).flatten(1).sum(1) for m, w in zip(masks, case.weights, strict=True))
    for case.k in (
        torch.zeros(3, dtype=torch.int64),
        alive,
        torch.stack([alive[0] * 0, alive[1], alive[2] // 2]),
    ):
        case.check(kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", pick(DTYPES[:1], DTYPES))
@pytest.mark.parametrize(
    ("shapes", "replicas", "values", "keep", "layers"),
    [
        ([(20, 80), (9, 25), (1, 5)], 1, 3, 0.6, False),
        ([(20, 80), (9, 25), (1, 5)], 1, 10**6, 1.0, True),
        ([(12, 64), (3, 7)], 2, 10**6, 0.7, True),
        *pick(
            [],
            [
                (LENET, 3, 10**6, 0.5, False),
                (LENET, 2, 10**6, 0.8, True),
                ([(1000, 1000), (257, 513)], 1, 10**6, 1.0, False),
                ([(1000, 1000)], 2, 3, 0.9, False),  # almost only ties
                ([(999, 1003)], 1, 0, 1.0, False),  # only zeros
                ([(512, 4608), (64, 27), (1, 5)], 2, 10**6, 0.1, False),
            ],
        ),
    ],
    ids=str,
)
def test_larger_than_its_sample(
    shapes: list[tuple[int, int]],
    replicas: int,
    values: int,
    keep: float,
    layers: bool,
    dtype: torch.dtype,
    kernels: str,
) -> None:
    Case(0, shapes, replicas, values, keep, layers, dtype).check(kernels, repeat=True)


SPREADS: dict[str, Callable[[int], Tensor]] = {
    "all equal": lambda n: torch.full((n,), 0.5),
    "all zeros of both signs": lambda n: torch.zeros(n).copysign(torch.arange(n) % 2 - 0.5),
    "subnormal": lambda n: torch.arange(n).int().view(torch.float32),
    "a step": lambda n: (torch.arange(n) >= n // 5).float(),
    "falling": lambda n: torch.arange(n, 0, -1).float(),
    "periodic": lambda n: (torch.arange(n) % 8).float(),
    "huge and tiny": lambda n: torch.where(torch.arange(n) % 3 == 0, 3e38, 1e-38),
    "NaN and infinity": lambda n: torch.where(torch.arange(n) % 3 == 0, NAN, INF),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_any_distribution(spread: str) -> None:
    n = pick(400, 2**22)
    case = Case(0, [(n // 100, 100)])
    case.weights = [SPREADS[spread](n).view(1, -1, 100).to(DEVICE)]
    for part in pick((5,), (5, 2)):
        case.k = torch.tensor([n // part])
        case.check("triton")


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet5"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_is_prune(model: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels of the paper's schedule in the blocks that ship, on weights with ties."""
    monkeypatch.undo()
    net = get_model(model)
    weights = (torch.randn(net.params.mask_size, generator=torch.Generator().manual_seed(0)) * 500).round()
    mask = net.params.full_mask()
    flat = weights.to(DEVICE)[None]
    matrices = [flat[:, s.span].unflatten(1, s.matrix) for s in net.weights]
    masks: list[Tensor] = []
    ladder = pruning.ladder(net.params, 3, 0.5, scope)
    for before, after in pairwise(ladder):
        k = torch.tensor([[before[name] - after[name] for name in after]])
        k = k if scope == "layer" else k[:, 0]
        mask = pruning.prune(net.params, weights, mask, after)
        old = masks
        masks, _ = magnitude_threshold(matrices, k, old)
        for spec, found in zip(net.weights, masks, strict=True):
            right = mask[spec.span].to(DEVICE)
            assert torch.equal(unpack(found, spec.matrix[1]).flatten(), right)
    if model == "lenet5":  # the others take the interpreter too long
        bits, _ = launch(matrices, k, old, kernels="triton")
        assert all(torch.equal(a, b) for a, b in zip(split(bits, matrices), masks, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_goes_last_after_infinity_and_zeros_have_no_sign(dtype: torch.dtype, kernels: str) -> None:
    least = torch.finfo(dtype).smallest_normal
    if dtype != torch.bfloat16 or DEVICE == "cuda":  # whose subnormal numbers the interpreter takes for 0
        least *= torch.finfo(dtype).eps
    w = torch.tensor([[[NAN, INF, -0.0, 1.0, 0.0, -INF, -NAN, least, -1.0]]], device=DEVICE).to(dtype)
    assert w[0, 0, 7] > 0
    bits = {torch.float32: 0x7FC12345, torch.float16: 0x7E55, torch.bfloat16: 0x7FC5}[dtype]
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    payload = torch.tensor(bits, dtype=integer).view(dtype)
    w = torch.cat([w, payload.view(1, 1, 1).to(DEVICE)], 2)
    order = [2, 4, 7, 3, 8, 1, 5, 0, 6, 9]
    for k in range(len(order) + 1):
        bits, threshold = launch([w], torch.tensor([k]), [], kernels=kernels)
        kept = unpack(split(bits, [w])[0], len(order)).flatten()
        assert sorted(order[k:]) == kept.nonzero().flatten().tolist()
        right = w[0, 0, order[k - 1]].abs().float() if k else torch.tensor(-INF)
        assert torch.equal(threshold.cpu().nan_to_num(7.0), right.cpu().nan_to_num(7.0).view(1))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", pick(DTYPES[:1], DTYPES))
def test_strides_and_addresses(dtype: torch.dtype, kernels: str) -> None:
    case = Case(3, [(9, 24), (5, 16)], 2, 50, 0.7, dtype=dtype)
    right, _ = by_sort(case.weights, case.k, case.masks)
    # as in a flat buffer, but off the 16-byte grid
    flat = torch.full((2, 403), NAN, device=DEVICE, dtype=dtype)
    views = [flat[:, 1:217].view(2, 9, 24), flat[:, 220:300].view(2, 5, 16)]
    bits = torch.full((2, 60), 255, dtype=torch.uint8, device=DEVICE)
    masks = [bits[:, 3:30].view(2, 9, 3), bits[:, 41:51].view(2, 5, 2)]
    empty = torch.empty(24, 9, 2, device=DEVICE, dtype=dtype)
    transposed = [empty.mT.mT.permute(2, 1, 0), case.weights[1]]
    for to, of in ((views, case.weights), (masks, case.masks), (transposed, case.weights)):
        for a, b in zip(to, of, strict=True):
            a.copy_(b)
    for weights in (views, transposed):
        assert not weights[0].is_contiguous()
        found, _ = launch(weights, case.k, masks, kernels=kernels)
        for a, b in zip(split(found, weights), right, strict=True):
            assert torch.equal(a, b)


class Counted:
    """A kernel whose launches are counted, and whose grids are noted; it runs where `run` is True."""

    def __init__(self, kernel: Any, run: bool = True) -> None:
        self.kernel, self.run, self.grids = kernel, run, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.grids.append(grid)
        return self.kernel[grid] if self.run else lambda *args, **kwargs: None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], dict[str, Counted]]:
    def count(run: bool) -> dict[str, Counted]:
        kernels = {name: Counted(getattr(module, name), run) for name in LAUNCHES}
        for name, kernel in kernels.items():
            monkeypatch.setattr(module, name, kernel)
        return kernels

    return count


@pytest.mark.parametrize("miss", ["none", "sigmas", "blind sample", "blind below", "room"])
def test_a_missed_bracket_is_widened(
    miss: str, counted: Callable[[bool], dict[str, Counted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(1, [(pick(12, 6000), 64), (3, 7)], 2, 10**6)
    case.k.fill_(100)
    if miss in ("blind sample", "blind below"):
        # an adversary who knows which weights are looked at: these are all larger, or smaller, than the rest
        seen = sampled(case.weights)
        for w, places in zip(case.weights, seen, strict=True):
            w.clamp_(min=1)
            w.flatten(1)[:, places] *= 2.0**40 if miss == "blind sample" else 2.0**-40
    if miss == "sigmas":
        monkeypatch.setattr(module, "SIGMAS", 0.001)
    job, rooms = module._Job, []

    class Cramped(job):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if miss == "room" and not rooms:
                self.capacity = 3
            rooms.append(self.capacity)

    monkeypatch.setattr(module, "_Job", Cramped)
    kernels = counted(True)
    case.check("triton")
    tries = len(kernels["_finish_kernel"].grids)
    assert tries == 1 if miss == "none" else tries > 1
    assert len(kernels["_sweep_kernel"].grids) == 2 * tries


def test_a_bracket_of_everything_that_misses_is_an_error(
    counted: Callable[[bool], dict[str, Counted]],
) -> None:
    kernels = counted(False)  # what counts nothing proves nothing
    case = Case(1, [(12, 64)])
    case.k.fill_(100)
    with pytest.raises(RuntimeError, match="no threshold among all of"):
        case.check("triton")
    assert 1 < len(kernels["_finish_kernel"].grids) < 10


def sampled(weights: list[Tensor]) -> list[Tensor]:
    """Which weights of a replica are looked at first: the sample's keys where every weight is its place."""
    job = module._Job(weights, list(range(len(weights))), [1], [1], 1.0)
    found = []
    for n, w in zip(job.counts, weights, strict=True):
        size = w[0].numel()
        places = torch.arange(size, dtype=torch.float32, device=DEVICE)
        keys = torch.empty(1, n, dtype=torch.int32, device=DEVICE)
        module._sample_kernel[(-(-n // 16), 1)](
            places, keys, keys, torch.empty(n, dtype=torch.int64, device=DEVICE),
            n, size, 0, size, 0, job.step, 0, n, size, 0, BLOCK=16, RAGGED=False,
        )  # fmt: skip
        found.append(keys[0].view(torch.float32).long())
        assert (found[-1].diff() > 0).all()
        assert torch.equal(found[-1][:-1] // job.step, torch.arange(n - 1, device=DEVICE))
    assert job.step > 1
    return found


class Ops(TorchDispatchMode):
    """Counts torch's ops but for those that launch nothing."""

    FREE = (
        "view",
        "slice",
        "select",
        "as_strided",
        "empty",
        "expand",
        "unbind",
        "detach",
        "lift_fresh",
        "permute",
        "alias",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__.strip("_")
        if not any(name == free or name.startswith(f"{free}_") for free in self.FREE):
            self.found[name] += 1
        return op(*args, **(kwargs or {}))


def test_few_launches(counted: Callable[[bool], dict[str, Counted]]) -> None:
    """Four kernels and two sorts a ranking of one tensor, two kernels more a tensor; one upload, one wait."""
    kernels = counted(False)
    w = torch.rand(1, 20, 80, device=DEVICE)
    for weights, k, rankings in (([w], [0], 1), ([w] * 3, [0], 1), ([w] * 3, [[0, 0, 0]], 3)):
        for kernel in kernels.values():
            kernel.grids.clear()
        k = torch.tensor(k)
        with Ops() as ops:
            launch(weights, k, [], kernels="triton")
        assert {name: len(kernel.grids) for name, kernel in kernels.items()} == {
            "_sample_kernel": len(weights),
            "_open_kernel": rankings,
            "_sweep_kernel": len(weights),
            "_finish_kernel": rankings,
        }
        assert ops.found.pop("sort") == 2 * rankings
        # on a device the plan's way there and back
        assert sum(ops.found.values()) <= pick(0, 4), ops.found


@pytest.mark.parametrize(
    ("replicas", "shape"),
    [(65_535, (3, 5)), (1, (65_537, 32_780)), (1, (1, 2**32 - 2**12)), (40, (9, 2**26))],
)
def test_grids_of_any_weights_are_a_devices(
    replicas: int, shape: tuple[int, int], counted: Callable[[bool], dict[str, Counted]], monkeypatch: Any
) -> None:
    """At most 2**31 - 1 programs along x and 65,535 along y. Nothing is allocated."""
    monkeypatch.undo()
    kernels = {name: Counted(None, run=False) for name in LAUNCHES}
    for name, kernel in kernels.items():
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    with torch.device("meta"):
        w = torch.empty(replicas, *shape)
        new = torch.empty(replicas, module._starts([w])[1], dtype=torch.uint8)
        plan = torch.empty(replicas, 6, dtype=torch.int64)
        n = w[0].numel()
        job = module._Job([w], [0], [n // 5] * replicas, [n] * replicas, 4.0)
        job.queue([w], [], plan, new, torch.empty(replicas))
    for kernel in kernels.values():
        ((x, y),) = kernel.grids
        assert 1 <= x < 2**31
        assert 1 <= y <= 65_535


def test_replicas_beyond_one_grid(
    counted: Callable[[bool], dict[str, Counted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    kernels = counted(True)
    Case(4, [(5, 16), (3, 7)], 5, 20, 0.7, layers=True).check("triton")
    assert [grid[1] for grid in kernels["_finish_kernel"].grids] == [2, 2, 1] * 2


def test_replicas_do_not_depend_on_each_other() -> None:
    case = Case(5, [(20, 30), (3, 8)], 3, 20, 0.8, layers=True)
    together, thresholds = magnitude_threshold(case.weights, case.k, case.masks)
    for r in range(3):
        alone, t = magnitude_threshold(
            [w[r : r + 1] for w in case.weights], case.k[r : r + 1], [m[r : r + 1] for m in case.masks]
        )
        assert torch.equal(t[0], thresholds[r])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[r])
            assert a.is_contiguous()
            assert b[r].is_contiguous()


@pytest.mark.host
def test_five_million_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2**17)
    w = torch.randn(1, 5000, 1000, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([10**6])
    (mask,), threshold = magnitude_threshold([w], k)
    t = w.abs().flatten().kthvalue(10**6).values
    assert threshold == t
    assert torch.equal(unpack(mask, 1000), w.abs() > t)  # no ties at the cut
    w.fill_(0.5)
    (mask,), _ = magnitude_threshold([w], k)
    assert torch.equal(unpack(mask, 1000).flatten(), torch.arange(w.numel()) >= 10**6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_replicas_two_to_the_31_weights_apart(kernels: str) -> None:
    """4 GiB of address space; the pages between are never touched."""
    apart = 2**31 + 16
    flat = torch.empty(apart + 48, dtype=torch.float16, device=DEVICE)
    w = flat.as_strided((2, 3, 16), (apart, 16, 1))
    w.copy_(torch.arange(96).view(2, 3, 16).flip(0) / 8)
    bits, thresholds = launch([w], torch.tensor([5, 20]), [], kernels=kernels)
    assert thresholds.tolist() == [52 / 8, 19 / 8]
    for r, k in enumerate((5, 20)):
        assert torch.equal(unpack(split(bits, [w])[0], 16)[r].flatten().cpu(), torch.arange(48) >= k)


def test_no_gradients_and_new_memory() -> None:
    w = torch.randn(1, 4, 8, requires_grad=True)
    old = pack(torch.ones(1, 4, 8))
    (mask,), threshold = magnitude_threshold([w], torch.tensor([5]), [old])
    assert not threshold.requires_grad
    assert int(unpack(mask, 8).sum()) == 27
    assert (old == 255).all()


W, K = torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.int64)
M = torch.zeros(2, 3, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weights", "k", "masks", "message"),
    [
        ([], K, [], "at least one"),
        ([W[0]], K, [], r"\[R=3, N, K\], got \(3, 5\)"),
        ([W, W[:1]], K, [], r"R=2.*\(1, 3, 5\) \(tensor 1\)"),
        ([W[:, :0]], K, [], r"got \(2, 0, 5\)"),
        ([W.double()], K, [], "float64"),
        ([W, W.half()], K, [], "float16 on cpu beside torch.float32"),
        ([W], K.float(), [], "float32"),
        ([W], torch.zeros(2, 2, dtype=torch.int64), [], r"\[R=2, L=1\].*\(2, 2\)"),
        ([W, W], K, [M], "expected 2 masks"),
        ([W], K, [M.bool()], "bool"),
        ([W], K, [M[:, :2]], r"\(2, 3, 1\).*\(2, 2, 1\)"),
        ([W], K + 16, [], "replica 0: cannot prune 16 of 15"),
        ([W], K - 1, [], "cannot prune -1"),
        ([W], K + 1, [M], "cannot prune 1 of 0"),
        ([W, W], torch.tensor([[0, 0], [0, 16]]), [], "replica 1, tensor 1: cannot prune 16 of 15"),
        ([torch.zeros(1, 1, 1).expand(1, 2**16, 2**16)], K[:1], [], r"fewer than 2\*\*32"),
    ],
)
def test_bad_arguments(weights: list[Tensor], k: Tensor, masks: list[Tensor], message: str) -> None:
    for kernels in KERNELS[: pick(2, 1)]:  # these tensors are on a CPU
        with pytest.raises(ValueError, match=message):
            launch(weights, k, masks, kernels=kernels)


POINTERS = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shipped.magnitude_threshold import AOT
for aot in AOT[2:4] + AOT[-2:]:  # ragged rows divide
    signature = {name: aot.signature.get(name, "constexpr") for name in aot.kernel.arg_names}
    source = ASTSource(fn=aot.kernel, signature=signature, constexprs=aot.constants)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    offsets = re.findall(r"tt.addptr .*: .*, (.*?) loc", found)
    assert len(offsets) >= 3
    assert all("i64" in offset for offset in offsets), offsets
"""


def test_every_offset_has_64_bits(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(POINTERS)


def test_floor() -> None:
    assert floor(800) == {"bytes": 3300, "flops": 0}
    assert floor(800, 2, masked=True)["bytes"] == 1800


OPCHECK = """
import torch
from torch import library
from sparselth.kernels.bitmask import pack
from sparselth.kernels.magnitude_threshold import _op, magnitude_threshold
weights = [torch.randn(2, 3, 13), torch.randn(2, 4, 8)]
masks = [pack(torch.rand(w.shape) < 0.7) for w in weights]
for k in (torch.tensor([4, 0]), torch.tensor([[3, 2], [0, 1]])):
    library.opcheck(_op, (weights, k, masks))
    library.opcheck(_op, (weights, k, []))
    compiled = torch.compile(magnitude_threshold, fullgraph=True, backend="eager")
    for a, b in zip(compiled(weights, k, masks)[0], magnitude_threshold(weights, k, masks)[0]):
        assert torch.equal(a, b)
"""


def test_op_passes_torchs_checks(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)
