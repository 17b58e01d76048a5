"""Against the formula in float64, against torch to the bit, and what pruned weights may never do."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import DEVICE, UNIT, generator, graphed, must_repeat, pick
from sparselth.kernels import _native, masked_update
from sparselth.kernels._triton import INTERPRET
from sparselth.kernels.bitmask import pack, unpack
from sparselth.kernels.masked_update import (
    adam_reference,
    bind_masked_adam,
    bind_masked_sgd,
    expected_bytes,
    floor,
    masked_adam,
    masked_adam_many,
    masked_sgd,
    masked_sgd_many,
    sgd_reference,
)

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
SHAPES = [(1, 1, 1), (1, 37, 30), (3, 64, 64), (2, 131, 127)]  # R, P, M


def tensors(r: int, p: int, m: int, keep: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, g = torch.randn(2, r, p, generator=generator)
    mask = (torch.rand(r, m, generator=generator) < keep).float()
    w[:, :m] *= mask
    return w, g, mask


@pytest.mark.parametrize("keep", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_formula(shape: tuple[int, int, int], weight_decay: float, keep: float) -> None:
    w, g, mask = tensors(*shape, keep)
    a, b = torch.zeros_like(w), torch.zeros_like(w)
    expected = [t.double() for t in (w, a, b)]
    count = torch.zeros(())
    for step in range(1, 6):
        grad = g * step
        expected = list(
            adam_reference(*expected[:1], grad.double(), mask, *expected[1:], step, 1e-2, weight_decay)
        )
        count.fill_(step)
        masked_adam(w, grad.clone(), mask, (a, b), count, 1e-2, weight_decay)
        for found, right in zip((w, a, b), expected, strict=True):
            assert (found - right).norm() <= 1e-6 * right.norm().clamp_min(1)
    w, g, mask = tensors(*shape, keep)
    a = torch.zeros_like(w)
    expected = [w.double(), a.double()]
    for step in range(1, 6):
        grad = g * step
        expected = list(sgd_reference(expected[0], grad.double(), mask, expected[1], 1e-2, 0.9, weight_decay))
        masked_sgd(w, grad.clone(), mask, a, 1e-2, 0.9, weight_decay)
        for found, right in zip((w, a), expected, strict=True):
            assert (found - right).norm() <= 1e-6 * right.norm().clamp_min(1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_dense_steps_are_those_of_torch_optim_to_the_bit(optimizer: str, weight_decay: float) -> None:
    w, g, _ = tensors(1, 1000, 900, 1.0)
    parameter = torch.nn.Parameter(w.clone())
    if optimizer == "adam":
        theirs: torch.optim.Optimizer = torch.optim.Adam(
            [parameter], lr=1e-3, weight_decay=weight_decay, fused=True
        )
    else:
        theirs = torch.optim.SGD([parameter], lr=1e-3, momentum=0.9, weight_decay=weight_decay, fused=True)
    a, b, count = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(())
    for step in range(1, 21):
        parameter.grad = g * step
        theirs.step()
        if optimizer == "adam":
            masked_adam(w, g * step, None, (a, b), count.fill_(step), 1e-3, weight_decay)
        else:
            masked_sgd(w, g * step, None, a, 1e-3, 0.9, weight_decay)
        assert torch.equal(w, parameter)


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 0.1), st.sampled_from(["adam", "sgd"]))
def test_pruned_weights_and_their_moments_stay_exactly_zero(
    seed: int, keep: float, weight_decay: float, optimizer: str
) -> None:
    # in peers, momentum and weight decay wake pruned weights
    w, _, mask = tensors(2, 50, 40, keep, seed)
    moments = [torch.zeros_like(w), torch.zeros_like(w)]
    generator, count = torch.Generator().manual_seed(seed), torch.zeros(())
    for step in range(1, 201):
        g = torch.randn(w.shape, generator=generator)
        if optimizer == "adam":
            masked_adam(w, g, mask, moments, count.fill_(step), 1e-2, weight_decay)
        else:
            masked_sgd(w, g, mask, moments[0], 1e-2, 0.9, weight_decay)
    for t in (w, *moments):
        assert not t[:, :40][mask == 0].any()
    assert w[:, :40][mask == 1].all()
    assert w[:, 40:].all()  # biases live


RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "adam": {"betas": (0.9, 0.999)},
    "adamw": {"betas": (0.8, 0.99), "eps": 1e-6, "decoupled": True},
}
GUARD = 64  # floats before and behind every tensor
SEVERAL: tuple[list[tuple[int, ...]], list[float | None]] = (
    [(1,), (37,), (48, 33), (64,), (7, 16), (11,), (0,), *pick([], [(300, 784), (1000, 1001)])],
    [None, 0.3, 0.05, None, 0.0, 1.0, 0.5, *pick([], [0.2, 0.1])],
)
on_triton = pytest.mark.skipif(
    not INTERPRET and not torch.cuda.is_available(), reason="neither Triton's interpreter nor a CUDA device"
)


def rounds_once() -> bool:
    """Whether fused multiply-adds are fused in this interpreter (Triton 3.9), and the bits so torch's."""
    if not INTERPRET:
        return False
    from triton._C.libtriton import interpreter

    return hasattr(interpreter, "fma_fp32")


class State:
    """A list of tensors with everything a step needs; unmasked where a place in `keeps` is None."""

    def __init__(self, rule: str, lists: dict[str, list[Any]], lr: Tensor, weight_decay: float) -> None:
        self.rule, self.lists, self.lr, self.weight_decay = rule, lists, lr, weight_decay
        self.edges: list[Tensor] = []

    @staticmethod
    def make(
        rule: str, r: int, shapes: list[tuple[int, ...]], keeps: list[float | None], seed: int, step: int = 7
    ) -> State:
        """Pruned weights and moments 0, their gradients NaN; half of the live moments 0 too."""
        draw = torch.Generator().manual_seed(seed)
        lists: dict[str, list[Any]] = {name: [] for name in ("w", "g", "a", "b", "mask", "step")}
        for shape, keep in zip(shapes, keeps, strict=True):
            p = int(torch.tensor(shape).prod())
            live = torch.rand(r, p, generator=draw) < (1 if keep is None else keep)
            warm = live & (torch.rand(r, p, generator=draw) < 0.5)
            w, g, a, b = torch.randn(4, r, p, generator=draw)
            for name, t in (
                ("w", w.where(live, 0)),
                ("g", g.where(live, torch.nan)),
                ("a", a.where(warm, 0)),
                ("b", (b * b).where(warm, 0)),
            ):
                lists[name].append(t.view((r, *shape) if r > 1 else shape))
            bits = pack(live) if p else torch.empty(r, 0, dtype=torch.uint8)
            lists["mask"].append(None if keep is None else bits)
            lists["step"].append(torch.full((r,), float(step)))
        lr = 10 ** (-3 * torch.rand(r, generator=draw, dtype=torch.float64))
        return State(rule, lists, lr, 0.01)

    def to(self, device: str, shift: int = 0) -> State:
        """A copy, with NaN around its floats, which begin `shift` bytes behind a 16-byte boundary."""

        edges = []

        def copy(name: str, t: Tensor | None) -> Tensor | None:
            if t is None or name not in ("w", "g", "a", "b"):
                return t if t is None else t.to(device, copy=True)
            wide = torch.full((t.numel() + 2 * GUARD + 4,), torch.nan, device=device)
            start = GUARD + shift // 4
            edges.extend([wide[:start], wide[start + t.numel() :]])
            return wide[start:].as_strided(t.shape, t.stride()).copy_(t)

        lists = {name: [copy(name, t) for t in ts] for name, ts in self.lists.items()}
        state = State(self.rule, lists, self.lr.to(device), self.weight_decay)
        state.edges = edges
        return state

    def results(self) -> dict[str, Tensor]:
        return {f"{name}[{i}]": t for name in "wab" for i, t in enumerate(self.lists[name])}

    def step(self, kernels: str, active: Tensor | None = None) -> None:
        options: dict[str, Any] = RULES[self.rule] | {"weight_decay": self.weight_decay, "kernels": kernels}
        x, options = self.lists, options | {"active": active}
        if self.rule.startswith("adam"):
            masked_adam_many(x["w"], x["g"], x["mask"], (x["a"], x["b"]), x["step"], self.lr, **options)
        else:
            buffers = x["a"] if "momentum" in options else None
            masked_sgd_many(x["w"], x["g"], x["mask"], buffers, self.lr, **options)

    def same(self, right: State, before: State) -> None:
        """To the bit but for what fills no vector register: that to 2 ulp of the largest term."""
        for name in ("w", "a", "b"):
            for i, (found, wanted) in enumerate(zip(self.lists[name], right.lists[name], strict=True)):
                mask, r = self.lists["mask"][i], len(self.lr)
                found, wanted, old, g = (
                    t.cpu().as_strided((r, t.numel() // r), (t.numel() // r, 1))
                    for t in (found, wanted, before.lists[name][i], before.lists["g"][i])
                )
                p = wanted.shape[1]
                if mask is not None:
                    live = unpack(mask.cpu(), p)
                    assert not found[~live].any(), f"{name}[{i}]: a pruned weight woke"
                    assert not found[~live].signbit().any()
                    found, wanted, old, g = (t.where(live, 0) for t in (found, wanted, old, g))
                if rounds_once():
                    whole = p - p % 16
                    assert torch.equal(found[:, :whole], wanted[:, :whole]), f"{name}[{i}]"
                size = (
                    old.abs()
                    + wanted.abs()
                    + (self.lr.max().item() if name == "w" else 1) * g.abs().clamp_min(1)
                )
                assert ((found - wanted).abs() <= 2**-22 * size).all(), f"{name}[{i}]"


def compare(state: State, shift: int = 0) -> None:
    """One Triton step beside torch's; nothing beside a tensor is written, a second one has the same bits."""
    ours, again, theirs = state.to(DEVICE, shift), state.to(DEVICE, shift), state.to("cpu")
    for one in (ours, again):
        one.step("triton")
    theirs.step("reference")
    ours.same(theirs, state)
    assert torch.cat(ours.edges).isnan().all()
    must_repeat(ours.results(), again.results())


@on_triton
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_triton_step_has_torchs_bits(rule: str, replicas: int) -> None:
    shapes, keeps = SEVERAL
    compare(State.make(rule, replicas, shapes, keeps, 0))


@on_triton
@pytest.mark.parametrize("keep", [0.2, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_triton_steps_are_those_of_torch_optim(rule: str, keep: float) -> None:
    """20 steps beside torch.optim in fp32 (fused) and in float64, whose gradients are masked by hand."""
    state = State.make(rule, 1, [pick((5, 30), (300, 784))], [keep], 0).to(DEVICE)
    (w,), (mask,) = state.lists["w"], state.lists["mask"]
    live = unpack(mask, w.numel()).view(w.shape)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(rule, torch.optim.SGD)
    options = {"lr": 1e-2, "weight_decay": 0.01} | RULES[rule]
    options.pop("decoupled", None)
    copies = [torch.nn.Parameter(w.to(dtype)) for dtype in (torch.float32, torch.float64)]
    optimizers = [kind([c], fused=fused, **options) for c, fused in zip(copies, (True, None), strict=True)]
    state.lr.fill_(1e-2)
    for name in "ab":
        state.lists[name][0].zero_()
    for step in range(1, 21):
        g = torch.randn(w.shape, generator=generator(step), device=DEVICE)
        state.lists["g"][0].copy_(g.where(live, torch.nan))
        state.lists["step"][0].fill_(step)
        state.step("triton")
        for c, optimizer in zip(copies, optimizers, strict=True):
            c.grad = g.where(live, 0).to(c.dtype)
            optimizer.step()
    right = copies[1].detach()
    error, torchs = (float((t.detach().double() - right).norm() / right.norm()) for t in (w, copies[0]))
    assert error <= 3 * max(torchs, UNIT["ieee"])


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_a_graph_replays_the_step_of_a_list(rule: str) -> None:
    shapes, keeps = SEVERAL
    state = State.make(rule, 3, shapes, keeps, 0)
    eager, replayed = state.to(DEVICE), state.to(DEVICE)
    eager.step("triton")
    graph = graphed(lambda: replayed.step("triton"), 1)
    for name, t in replayed.results().items():
        t.copy_(state.results()[name])
    graph.replay()
    must_repeat(replayed.results(), eager.results(), "a CUDA graph")


@on_triton
@given(
    rule=st.sampled_from(sorted(RULES)),
    replicas=st.integers(1, 3),
    sizes=st.lists(
        st.tuples(st.integers(0, pick(70, 9000)), st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])),
        min_size=1,
        max_size=3,
    ),
    step=st.sampled_from([1, 2, 10, 1000, 100_000]),
    shift=st.sampled_from([0, 4, 8, 12]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=CASES)
def test_triton_steps_have_torchs_bits(
    rule: str, replicas: int, sizes: list[tuple[int, float | None]], step: int, shift: int, seed: int
) -> None:
    shapes = [(size,) for size, _ in sizes]
    compare(State.make(rule, replicas, shapes, [keep for _, keep in sizes], seed, step), shift)


@on_triton
@pytest.mark.parametrize("rule", RULES)
def test_triton_step_takes_any_order_of_axes(rule: str) -> None:
    state = State.make(rule, 1, [(8, 3, 4), (16, 8)], [0.4, None], 0)
    for name in ("w", "g", "a", "b"):
        # the mask is in the order of memory, and so are these
        state.lists[name] = [t.transpose(0, 1) for t in state.lists[name]]
    compare(state)


@on_triton
@pytest.mark.parametrize("rule", RULES)
def test_triton_leaves_pruned_weights_and_moments_at_zero(rule: str) -> None:
    state = State.make(rule, 2, [(41,), (16,)], [0.3, 0.5], 0).to(DEVICE)
    for step in range(1, 51):
        for g, mask, count in zip(state.lists["g"], state.lists["mask"], state.lists["step"], strict=True):
            live = unpack(mask, g.shape[1])
            g.copy_(torch.randn(g.shape).to(DEVICE).where(live, [torch.nan, torch.inf, -1e30][step % 3]))
            count.fill_(step)
        state.step("triton")
    for name in ("w", "a", "b"):
        for t, mask in zip(state.lists[name], state.lists["mask"], strict=True):
            assert t.isfinite().all()
            assert not t[~unpack(mask, t.shape[1])].any()


@on_triton
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shift", [0, 4])
def test_triton_does_not_touch_eight_pruned_weights_in_a_row(rule: str, shift: int) -> None:
    bits = torch.tensor([[0, 1, 0, 254]], dtype=torch.uint8)
    live = unpack(bits, 32)
    eights = live.view(4, 8).any(1).repeat_interleave(8)
    state = State.make(rule, 1, [(32,)], [1.0], 0)
    state.lists["mask"] = [bits]
    for name in ("w", "g", "a", "b"):
        state.lists[name][0][~eights] = torch.nan
    state = state.to(DEVICE, shift)
    state.step("triton")
    for name in ("w", "a", "b"):
        t = state.lists[name][0].cpu()
        assert t[~eights].isnan().all()
        assert t[live[0]].isfinite().all()


@on_triton
def test_replicas_do_not_see_each_other() -> None:
    together = State.make("adam", 3, [(40,), (9,)], [0.5, None], 0)
    alone = State(
        "adam",
        {n: [t if t is None else t[1:2].clone() for t in ts] for n, ts in together.lists.items()},
        together.lr[1:2],
        0.01,
    )
    ours, one = together.to(DEVICE), alone.to(DEVICE)
    ours.step("triton")
    one.step("triton")
    for name in ("w", "a", "b"):
        for t, u in zip(ours.lists[name], one.lists[name], strict=True):
            assert torch.equal(t[1:2], u)


@pytest.mark.parametrize("kernels", ["reference", pytest.param("triton", marks=on_triton)])
@pytest.mark.parametrize("rule", RULES)
def test_replicas_may_be_part_of_a_buffer_and_may_rest(rule: str, kernels: str) -> None:
    whole = State.make(rule, 3, [(40,), (9,)], [0.5, None], 0)
    device = DEVICE if kernels == "triton" else "cpu"
    wanted, found = whole.to("cpu"), whole.to(device)
    for name in ("w", "g", "a", "b"):
        buffers = [torch.full((3, 64), torch.nan, device=device) for _ in found.lists[name]]
        parts = [t[:, 8 : 8 + u.shape[1]] for t, u in zip(buffers, found.lists[name], strict=True)]
        for part, values in zip(parts, found.lists[name], strict=True):
            part.copy_(values)
        found.lists[name] = parts
    wanted.step("reference")
    found.step(kernels, torch.tensor([1, 0, 1], dtype=torch.uint8, device=device))
    for name in ("w", "a", "b"):
        for t, after, before in zip(found.lists[name], wanted.lists[name], whole.lists[name], strict=True):
            assert torch.equal(t[1].cpu(), before[1])
            assert torch.allclose(t[::2].cpu(), after[::2], rtol=1e-6, atol=1e-7)
            assert t._base is not None
            assert t._base[:, :8].isnan().all()
            assert t._base[:, 8 + t.shape[1] :].isnan().all()


@on_triton
def test_tables_are_made_once_for_the_same_tensors() -> None:
    state = State.make("adam", 1, [(40,)], [0.5], 0).to(DEVICE)
    state.step("triton")
    known = list(masked_update._TABLES)
    state.step("triton")
    assert list(masked_update._TABLES) == known
    state.lists["g"] = [torch.zeros(40, device=DEVICE)]
    state.step("triton")
    assert len(masked_update._TABLES) == len(known) + 1


@on_triton
def test_tables_of_graphs_live_as_long_as_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With captures that are none: what a graph would read must stay while it can be replayed, not longer."""
    monkeypatch.setattr(masked_update, "_CAPTURED", {})
    captures = [False]
    monkeypatch.setattr(masked_update, "_capturing", lambda lr: captures[0])

    def captured(sizes: list[tuple[int, ...]]) -> tuple[State, weakref.ref[Tensor]]:
        state = State.make("adam", 1, sizes, [0.5] * len(sizes), 0).to(DEVICE)
        captures[0] = False
        state.step("triton")
        captures[0] = True
        state.step("triton")
        ((table, _), _) = [*masked_update._CAPTURED.values()][-1]
        return state, weakref.ref(table)

    first, table = captured([(40,), (3,)])
    masked_update._TABLES.clear()
    assert table() is not None
    view = first.lists["w"][0].view(-1)[8:]  # its memory is still somebody's
    second, other = captured([(50,)])
    del first
    third, _ = captured([(60,)])
    assert (table() is None, len(masked_update._CAPTURED)) == (True, 2)  # the second tensor is gone
    del view, second, third
    captured([(70,)])
    masked_update._TABLES.clear()
    assert (other() is None, len(masked_update._CAPTURED)) == (True, 1)


def broken(**lists: list[Any]) -> State:
    state = State.make("adam", 2, [(8,), (24,)], [0.5, None], 0)
    return State("adam", state.lists | lists, state.lr, 0.01)


@pytest.mark.parametrize("kernels", ["reference", "triton"] if INTERPRET else ["reference"])
@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({"w": [torch.zeros(2, 8)]}, "equal lengths"),
        ({"w": [torch.zeros(2, 8).double(), torch.zeros(2, 24)]}, "dense fp32"),
        ({"w": [torch.zeros(2, 16)[:, ::2], torch.zeros(2, 24)]}, "each replica contiguous"),
        ({"w": [torch.zeros(8, 2).T, torch.zeros(2, 24)]}, "contiguous"),
        ({"w": [torch.zeros(16), torch.zeros(2, 24)]}, "weights \\[2, ...\\]"),
        ({"g": [torch.zeros(2, 8), torch.zeros(24, 2).T]}, "the gradient as its weights"),
        ({"b": [torch.zeros(2, 8), torch.zeros(2, 23)]}, "the moment as its weights"),
        ({"mask": [torch.zeros(2, 2, dtype=torch.uint8), None]}, "mask as uint8 \\[2, 1\\]"),
        ({"mask": [torch.zeros(2, 1), None]}, "mask as uint8"),
        ({"step": [torch.zeros(2), torch.zeros(1)]}, "step as fp32 \\[2\\]"),
    ],
)
def test_refuses_what_does_not_fit(lists: dict[str, list[Any]], says: str, kernels: str) -> None:
    with pytest.raises(ValueError, match=says):
        broken(**lists).step(kernels)


def test_refuses_a_learning_rate_of_another_kind_and_unknown_kernels() -> None:
    state = broken()
    state.lr = state.lr.float()
    with pytest.raises(ValueError, match="lr as fp64"):
        state.step("reference")
    with pytest.raises(ValueError, match="kernels"):
        broken().step("cuda")
    with pytest.raises(ValueError, match="buffers"):
        masked_sgd_many([], [], [], None, state.lr.double(), momentum=0.9)


def moved(live: Tensor, moments: int) -> int:
    """Bytes that DRAM moves for a mask [R, P], each found by its address."""
    read, written = set(), set()
    for r, i in live.nonzero().tolist():
        read |= {(array, r, 4 * i // 64) for array in range(2 + moments)}
        written |= {(array, r, 4 * i // 32) for array in range(1 + moments)}
    return 64 * len(read) + 32 * len(written) + live.shape[0] * -(-live.shape[1] // 8)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize(("r", "p"), [(1, 800), (3, 176), (2, 24)])
def test_floor_is_what_dram_moves(r: int, p: int, keep: float) -> None:
    live = torch.rand(r, p, generator=torch.Generator().manual_seed(0)) < keep
    for moments, flops in ((1, 6), (2, 14)):
        least = floor([torch.zeros(r, p)], [pack(live)], moments)
        assert least == {"bytes": moved(live, moments), "flops": flops * int(live.sum())}
    weights = [torch.zeros(1, 32), torch.zeros(1, 10)]
    assert floor(weights, [None, None], 1) == {"bytes": 20 * 42, "flops": 6 * 42}


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("moments", [1, 2])
def test_bytes_of_random_masks_are_the_mean_over_all_of_them(density: float, moments: int) -> None:
    """All 65,536 masks of 16 weights, each with its probability."""
    masks = torch.arange(2**16)
    kept = (masks[:, None] >> torch.arange(16) & 1).sum(1)
    share = torch.tensor(density, dtype=torch.float64)
    chance = share**kept * (1 - share) ** (16 - kept)
    read = 64 * (2 + moments) * (masks != 0)
    written = 32 * (1 + moments) * ((masks & 255 != 0).int() + (masks >> 8 != 0).int())
    mean = float((chance * (read + written + 2)).sum()) / 16
    assert expected_bytes(density, moments) == pytest.approx(mean, rel=1e-9)
    assert moments == 1 or density != 0.2 or round(mean, 2) == 25.66


def test_every_access_to_weights_and_moments_is_wide(
    machine_code: Callable[[str], list[dict[str, Any]]],
) -> None:
    for facts in machine_code("masked_update"):
        moments = int(facts["constants"]["MOMENTS"])
        # 8 weights a thread: two accesses of 16 bytes for each load of w, g, a, b and store of w, a, b
        assert facts["wide"] == 2 * (3 + 2 * moments), facts


# ---- the native kernel, bound to vectors on a CPU ----

LEVELS = _native.levels()


@pytest.fixture
def native_level() -> Iterator[Callable[[str], None]]:
    yield _native.choose
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


def bound(rule: str, kernels: str, state: list[Tensor], bits: Tensor | None, weight_decay: float) -> Any:
    """A bound step on [w, g, a, b]."""
    w, g, a, b = state
    options = RULES[rule] | {"weight_decay": weight_decay, "kernels": kernels}
    if rule.startswith("adam"):
        return bind_masked_adam(w, g, (a, b), bits, **options)
    return bind_masked_sgd(w, g, a if "momentum" in options else None, bits, **options)


def five_steps(step: Any, g: Tensor, live: Tensor, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for i in range(1, 6):
        g.copy_(torch.randn(live.shape, generator=draw).where(live, torch.nan)[..., : g.shape[-1]])
        step(i, 0.01 / i)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", RULES)
@given(
    st.integers(1, 3),
    st.integers(0, 150),
    st.sampled_from([None, 0.0, 0.02, 0.3, 1.0]),
    st.sampled_from([0.0, 0.01]),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_steps_have_torchs_bits(
    native_level: Any,
    level: str,
    rule: str,
    r: int,
    p: int,
    keep: float | None,
    weight_decay: float,
    offset: int,
    seed: int,
) -> None:
    native_level(level)
    draw = torch.Generator().manual_seed(seed)
    live = torch.rand(r, p, generator=draw) < (1 if keep is None else keep)
    bits = pack(live) if keep is not None and p else None
    w = torch.randn(r, p, generator=draw).where(live, 0)
    zeros = torch.zeros(r, p)
    ours = [torch.full((r * p + offset + 9,), 7.0) for _ in range(4)]
    views = [t[offset : offset + r * p].view(r, p) for t in ours]
    theirs = [t.clone() for t in (w, zeros, zeros, zeros)]
    for view, t in zip(views, theirs, strict=True):
        view.copy_(t)
    for kernels, state in (("native", views), ("torch", theirs)):
        five_steps(bound(rule, kernels, state, bits, weight_decay), state[1], live, seed)
    # torch takes what fills no vector of the flattened tensor in fp64
    whole = r * p - r * p % 16
    names = ["w", "a", "b"] if rule.startswith("adam") else ["w", "a"]
    for name, found, right in zip(names, views[:1] + views[2:], theirs[:1] + theirs[2:], strict=False):
        if level != "plain":
            assert found.flatten()[:whole].equal(right.flatten()[:whole]), name
        torch.testing.assert_close(found, right, rtol=2e-6, atol=1e-6, msg=name)  # of terms up to 4
        assert not found[~live].any()
    for t in ours:
        assert (t[:offset] == 7).all()
        assert (t[offset + r * p :] == 7).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", RULES)
def test_native_weights_alone_are_those_under_a_mask(native_level: Any, level: str, rule: str) -> None:
    native_level(level)
    draw = torch.Generator().manual_seed(0)
    live = torch.rand(1, 1000, generator=draw) < 0.1
    dense = [torch.randn(1, 1000, generator=draw).where(live, 0), *(torch.zeros(1, 1000) for _ in range(3))]
    alone = [t[live] for t in dense]
    steps = bound(rule, "native", dense, pack(live), 0.01), bound(rule, "native", alone, None, 0.01)
    for i in range(1, 20):
        dense[1].copy_(torch.randn(1, 1000, generator=draw))
        alone[1].copy_(dense[1][live])
        for step in steps:
            step(i, 0.01)
    for x, y in zip(dense, alone, strict=True):
        assert x[live].equal(y)
        assert x is dense[1] or not x[~live].any()


@pytest.mark.skipif(not LEVELS, reason=f"native kernels: {_native.WHY}")
def test_native_steps_do_not_depend_on_threads_nor_touch_dead_bytes() -> None:
    p, before = 1 << 17, torch.get_num_threads()
    draw = torch.Generator().manual_seed(0)
    live = torch.rand(1, p, generator=draw) < 0.03
    eights = live.view(-1, 8).any(1).repeat_interleave(8).view(1, p)
    start = [torch.randn(1, p, generator=draw).where(live, 0).where(eights, torch.nan) for _ in range(3)]
    start.append(start[2].abs())
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        state = [t.clone() for t in start]
        bound("adam", "native", state, pack(live), 0.01)(3, 0.01)
        results.append(state)
    torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert one[eights].equal(many[eights])
        assert one[eights].isfinite().all()
        if (_native.LEVEL or "") != "avx512":  # that level takes two bytes at a time
            assert one[~eights].isnan().all()


@pytest.mark.parametrize("kernels", ["native", "torch"] if LEVELS else ["torch"])
def test_bound_steps_refuse_what_does_not_fit(kernels: str) -> None:
    t = torch.zeros(2, 12)
    for wrong in (t.double(), torch.zeros(2, 11), torch.zeros(12, 2).T, torch.zeros(24)):
        with pytest.raises(ValueError, match="expected the"):
            bind_masked_adam(t, wrong, (t, t), kernels=kernels)
        with pytest.raises(ValueError, match="expected the"):
            bind_masked_sgd(t, t, wrong, momentum=0.9, kernels=kernels)
    for bits in (torch.zeros(2, 1, dtype=torch.uint8), torch.zeros(2, 2), torch.zeros(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="mask as uint8 \\[2, 2\\]"):
            bind_masked_sgd(t, t, None, bits, kernels=kernels)
    with pytest.raises(ValueError, match="buffer if and only if"):
        bind_masked_sgd(t, t, t, kernels=kernels)
    with pytest.raises(ValueError, match="kernels"):
        bind_masked_sgd(t, t, None, kernels="triton")
