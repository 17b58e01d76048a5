"""Masked optimizers beside torch's own, and what pruned weights may never do."""

from __future__ import annotations

import copy
import doctest
import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparselth import optim
from sparselth.kernels._triton import INTERPRET
from sparselth.optim import MaskedAdam, MaskedAdamW, MaskedSGD, fused_loses_gradients

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
OPTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "dampening": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adam": (MaskedAdam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.01}),
    "amsgrad": (MaskedAdam, torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "maximize": True}),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}),
}
every = pytest.mark.parametrize("name", OPTIONS)
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs Triton's interpreter")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.Linear(12, 5),
    )
    return net.to(memory_format=torch.channels_last)


def some(net: nn.Module, keep: float = 0.3, seed: int = 1) -> dict[Tensor, Tensor]:
    """A random mask for every parameter of more than one axis."""
    draw = torch.Generator().manual_seed(seed)
    return {p: torch.rand(p.shape, generator=draw) < keep for p in net.parameters() if p.ndim > 1}


def backward(net: nn.Module, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 6, 6, generator=draw).to(next(net.parameters()).dtype)
    loss = F.cross_entropy(net(x).float(), torch.randint(5, (4,), generator=draw))
    loss.backward()
    return loss


def spoil(masks: dict[Tensor, Tensor], value: float) -> None:
    """Write `value` into the gradients of pruned weights."""
    for p, mask in masks.items():
        assert p.grad is not None
        p.grad.masked_fill_(~mask, value)


def check_zero(optimizer: torch.optim.Optimizer, masks: dict[Tensor, Tensor]) -> None:
    for p, mask in masks.items():
        assert not p[~mask].any()
        assert p[mask].all()
        for name, t in optimizer.state[p].items():
            if name != "step":
                assert not t[~mask].any(), name
                assert t.isfinite().all()


def equal(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@every
def test_200_steps_leave_pruned_weights_and_their_state_at_zero(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    check_zero(optimizer, masks)
    for step in range(200):
        optimizer.zero_grad(set_to_none=bool(step % 3))
        backward(net, step)
        spoil(masks, [torch.nan, torch.inf, 1e30, -5.0][step % 4])
        optimizer.step()
    check_zero(optimizer, masks)


@every
def test_live_weights_take_torchs_steps_to_the_bit(name: str) -> None:
    ours, theirs, options = OPTIONS[name]
    net, rival = network(), network()
    masks, others = some(net), some(rival)
    groups = [
        [
            {"params": [p for p in n.parameters() if p.ndim > 1]},
            {"params": [p for p in n.parameters() if p.ndim == 1], "lr": 3e-3, "weight_decay": 0.0},
        ]
        for n in (net, rival)
    ]
    optimizers = [ours(groups[0], masks=masks, **options), theirs(groups[1], fused=True, **options)]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.5) for o in optimizers]
    with torch.no_grad():
        for p, mask in others.items():
            p.mul_(mask)
    for step in range(20):
        for n, o, s in zip((net, rival), optimizers, schedulers, strict=True):
            o.zero_grad()
            backward(n, step)
            spoil(masks if n is net else others, torch.nan if n is net else 0.0)
            o.step()
            s.step()
        assert equal(net, rival), step


@interpreted
@every
def test_triton_and_torch_take_the_same_steps(name: str) -> None:
    ours, _, options = OPTIONS[name]
    nets = network(), network()
    optimizers = [
        ours(n.parameters(), masks=some(n), kernels=kernels, **options)
        for n, kernels in zip(nets, ("triton", "reference"), strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    for step in range(4):
        nets[1].zero_grad()
        backward(nets[1], step)
        for p, q in zip(*(n.parameters() for n in nets), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        for n, o, s in zip(nets, optimizers, schedulers, strict=True):
            spoil(some(n), torch.nan)
            o.step()
            s.step()
        for p, q in zip(*(n.parameters() for n in nets), strict=True):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)
    check_zero(optimizers[0], some(nets[0]))
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()


@given(
    name=st.sampled_from(sorted(OPTIONS)),
    shape=st.lists(st.integers(1, 9), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    keep=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=CASES)
def test_any_shape_dtype_and_order_of_axes(
    name: str, shape: list[int], dtype: torch.dtype, keep: float, seed: int, data: st.DataObject
) -> None:
    ours, theirs, options = OPTIONS[name]
    order, grad_order = (data.draw(st.permutations(range(len(shape)))) for _ in range(2))
    draw = torch.Generator().manual_seed(seed)

    def laid(order: list[int]) -> Tensor:
        back = [order.index(i) for i in range(len(shape))]
        return (
            torch.randn([shape[i] for i in order], generator=draw, dtype=torch.float64)
            .to(dtype)
            .permute(back)
        )

    start, mask = laid(order), torch.rand(shape, generator=draw) < keep
    # torch's fused kernels run over memory as it lies: row by row they are right
    param, rival = nn.Parameter(start.clone()), nn.Parameter(start.where(mask, 0).contiguous())
    fused = fused_is_right(name)
    optimizer, other = ours([param], masks={param: mask}, **options), theirs([rival], fused=fused, **options)
    for step in range(3):
        grad = laid(grad_order)
        param.grad = grad.where(mask, [torch.nan, torch.inf, -1.0][step])
        param.grad = torch.empty_like(grad).copy_(param.grad)
        rival.grad = grad.where(mask, 0).contiguous()
        optimizer.step()
        other.step()
    assert not param[~mask].any()
    size = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}[dtype]
    assert torch.allclose(param, rival, rtol=size, atol=size, equal_nan=True)


@every
def test_one_group_of_several_dtypes(name: str) -> None:
    ours, theirs, options = OPTIONS[name]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16]
    start = [torch.linspace(-1, 1, 33).to(dtype) for dtype in dtypes]
    params, rivals = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = ours(params, **options), theirs(rivals, fused=fused_is_right(name), **options)
    for step in range(3):
        for tensors, optimizer in zip((params, rivals), optimizers, strict=True):
            for p in tensors:
                p.grad = torch.linspace(-step, 1, 33).to(p.dtype)
            optimizer.step()
    for p, q in zip(params, rivals, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=0, equal_nan=True)


def fused_is_right(name: str) -> bool:
    """Not SGD of torch 2.11 in 16 bits, where ours takes torch's plain step."""
    return OPTIONS[name][0] is not MaskedSGD or not fused_loses_gradients()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.5)])
def test_sgd_in_16_bits(momentum: float, dampening: float, dtype: torch.dtype) -> None:
    """Against the formula in float64: fused kernels of torch 2.11 take most gradients for 0."""
    start, grad = torch.linspace(-1, 1, 40), torch.linspace(1, 2, 40)
    param = nn.Parameter(start.to(dtype))
    optimizer = MaskedSGD([param], lr=0.1, momentum=momentum, dampening=dampening)
    right, buffer = param.detach().double(), torch.zeros(40, dtype=torch.float64)
    for step in range(3):
        param.grad = grad.to(dtype)
        optimizer.step()
        buffer = momentum * buffer + (1.0 if step == 0 else 1 - dampening) * param.grad.double()
        right = right - 0.1 * buffer
    error = (param.detach().double() - right).norm() / right.norm()
    assert error < 3 * {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@every
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_to_the_same_bits(name: str, way: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    optimizer = ours(net.parameters(), masks=some(net), **options)
    for step in range(3):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    if way == "state_dict":
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        twin = network(5).to(memory_format=torch.contiguous_format)
        other = ours(twin.parameters(), **options)
        twin.load_state_dict(weights)
        other.load_state_dict(state)
    elif way == "deepcopy":
        twin, other = copy.deepcopy((net, optimizer))
    else:
        twin, other = pickle.loads(pickle.dumps((net, optimizer)))
    masks = {p: other.mask(p) for p in twin.parameters() if other.mask(p) is not None}
    assert [m.tolist() for m in masks.values()] == [m.tolist() for m in some(net).values()]
    for step in range(3, 6):
        optimizer.zero_grad()
        backward(net, step)  # for both: the order of axes changes the sums of a convolution
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            assert q.grad is not None
            p.grad = torch.empty_like(p).copy_(q.grad)
        optimizer.step()
        other.step()
    check_zero(other, masks)
    assert equal(net, twin)


def test_checkpoints_go_to_torchs_own_optimizer_and_back() -> None:
    net, rival = network(), network()
    optimizer = MaskedAdam(net.parameters(), masks=some(net))
    theirs = torch.optim.Adam(rival.parameters())
    backward(net, 0)
    optimizer.step()
    theirs.load_state_dict(optimizer.state_dict())
    backward(rival, 0)
    theirs.step()  # no masks here: moments wake
    optimizer.load_state_dict(theirs.state_dict())
    check_zero(optimizer, some(net))
    optimizer.step()
    check_zero(optimizer, some(net))


@pytest.mark.parametrize("bits", [torch.zeros(26, dtype=torch.uint8), torch.zeros(1, 27, dtype=torch.uint8)])
def test_refuses_masks_of_another_size(bits: Tensor) -> None:
    net = network()
    optimizer = MaskedAdam(net.parameters(), masks=some(net))
    state = optimizer.state_dict()
    state["masks"][0] = bits
    with pytest.raises(ValueError, match="27 bytes of mask for parameter 0"):
        optimizer.load_state_dict(state)
    del state["masks"][0]
    state["masks"][99] = bits
    with pytest.raises(ValueError, match="parameter 99"):
        optimizer.load_state_dict(state)


def test_state_dict_holds_packed_masks_in_row_major_order() -> None:
    param = nn.Parameter(torch.ones(5, 2).T)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
    assert MaskedSGD([param], masks={param: mask}).state_dict()["masks"][0].tolist() == [0b01011001, 0]


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_masks_change_from_level_to_level(kernels: str) -> None:
    net = network()
    optimizer = MaskedAdam(net.parameters(), masks=some(net, 0.8), kernels=kernels)
    weight, bias = net[4].weight, net[4].bias
    backward(net, 0)
    optimizer.step()
    smaller = {p: m & (p.abs() > p.abs().median()) for p, m in some(net, 0.8).items()}
    for p, m in smaller.items():
        optimizer.set_mask(p, m)
        assert torch.equal(optimizer.mask(p), m)  # type: ignore[arg-type]
    check_zero(optimizer, smaller)
    backward(net, 1)
    optimizer.step()
    check_zero(optimizer, smaller)
    optimizer.set_mask(weight, None)
    assert optimizer.mask(weight) is None
    assert optimizer.mask(bias) is None
    backward(net, 2)
    optimizer.step()
    assert weight[~smaller[weight]].any()


@every
def test_closures_and_parameters_without_gradient(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    masks = some(net)
    late = net[5].weight
    optimizer = ours(net.parameters(), masks=masks, **options)
    calls: list[Tensor] = []

    def closure(freeze: bool) -> Tensor:
        optimizer.zero_grad()
        calls.append(backward(net, len(calls)))
        spoil(masks, torch.nan)
        if freeze:
            late.grad = None
        return calls[-1]

    before = late.detach().clone()
    assert optimizer.step(lambda: closure(True)) is calls[0]
    assert torch.equal(late, before)
    assert not optimizer.state[late]
    if name != "dampening":  # torch's own fused SGD fails on a late first gradient
        optimizer.step(lambda: closure(False))
        check_zero(optimizer, masks)
        assert not torch.equal(late, before)


def test_step_hooks_run_once() -> None:
    for cls in (torch.optim.Adam, MaskedAdam, torch.optim.AdamW, MaskedAdamW, torch.optim.SGD, MaskedSGD):
        net, calls = network(), []
        optimizer = cls(net.parameters())
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        backward(net, 0)
        optimizer.step()
        assert calls == ["before", "after"]


@every
def test_a_learning_rate_in_a_tensor(name: str) -> None:
    ours, _, options = OPTIONS[name]
    nets = network(), network()
    rates = options["lr"], torch.tensor(options["lr"], dtype=torch.float64)
    optimizers = [
        ours(n.parameters(), masks=some(n), **options | {"lr": lr}) for n, lr in zip(nets, rates, strict=True)
    ]
    for step in range(3):
        for n, o in zip(nets, optimizers, strict=True):
            backward(n, step)
            o.step()
    assert equal(*nets)


@interpreted
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_triton_reads_the_learning_rate_where_it_lies(name: str) -> None:
    ours, _, options = OPTIONS[name]
    nets, lr = (network(), network()), torch.tensor(0.1)
    optimizers = [
        ours(nets[0].parameters(), kernels="triton", **options | {"lr": lr}),
        ours(nets[1].parameters(), kernels="reference", **options),
    ]
    for step, rate in enumerate((0.1, 0.01, 0.02)):
        lr.fill_(rate)
        optimizers[1].param_groups[0]["lr"] = lr.item()
        for n, o in zip(nets, optimizers, strict=True):
            for i, p in enumerate(n.parameters()):
                p.grad = torch.full_like(p, 0.1 * step + i)
            o.step()
        for p, q in zip(*(n.parameters() for n in nets), strict=True):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernels", ["auto", pytest.param("triton", marks=interpreted)])
@every
def test_grad_scaler(name: str, kernels: str) -> None:
    ours, theirs, options = OPTIONS[name]
    net, rival = network(), network()
    masks, others = some(net), some(rival)
    optimizer = ours(net.parameters(), masks=masks, kernels=kernels, **options)
    other = theirs(rival.parameters(), fused=True, **options)
    with torch.no_grad():
        for p, mask in others.items():
            p.mul_(mask)
    for n, o in ((net, optimizer), (rival, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            o.zero_grad()
            draw = torch.Generator().manual_seed(step)
            loss = n(torch.randn(4, 3, 6, 6, generator=draw)).square().mean()
            scaler.scale(loss).backward()
            spoil(masks if n is net else others, 7.0 if n is net else 0.0)
            scaler.step(o)
            scaler.update()
    check_zero(optimizer, masks)
    assert equal(net, rival)


def test_masks_hold_under_torch_compile() -> None:
    param = nn.Parameter(torch.ones(20))
    mask = torch.arange(20) % 3 == 0
    optimizer = MaskedAdam([param], lr=0.1, masks={param: mask})
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        param.grad = torch.full((20,), 1.0 + i)
        step()
    assert not param[~mask].any()
    assert (param[mask] < 0.8).all()


def strided(t: Tensor, order: list[int]) -> Tensor:
    """The same numbers, axis `order[-1]` contiguous."""
    back = [order.index(i) for i in range(t.ndim)]
    return t.permute(order).contiguous().permute(back)


WAYS: dict[str, Callable[[nn.Module], object]] = {  # to lay parameters out anew under a living optimizer
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "contiguous": lambda net: net.to(memory_format=torch.contiguous_format),
    "data": lambda net: [
        setattr(p, "data", strided(p.data, [*range(1, p.ndim), 0])) for p in net.parameters() if p.ndim > 1
    ],
    "swap": lambda net: [
        torch.utils.swap_tensors(p, nn.Parameter(strided(p.detach(), [*range(p.ndim)][::-1])))
        for p in list(net.parameters())
    ],
}


@every
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", ["auto", pytest.param("triton", marks=interpreted)])
def test_parameters_laid_out_anew_keep_their_masks_and_moments(name: str, way: str, kernels: str) -> None:
    ours, theirs, options = OPTIONS[name]
    net, rival = network(), network()
    if way == "channels_last":
        net.to(memory_format=torch.contiguous_format)
    masks, others = some(net), some(rival)
    optimizer = ours(net.parameters(), masks=masks, kernels=kernels, **options)
    other = theirs(rival.parameters(), foreach=False, **options)  # torch's default, which asks for strides
    with torch.no_grad():
        for p, mask in others.items():
            p.mul_(mask)
    for step in range(4):
        if step == 2:
            masks = {
                q: masks[p] for p, q in zip(net.parameters(), net.parameters(), strict=True) if p in masks
            }
            WAYS[way](net)
        for p, q in zip(net.parameters(), rival.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad = torch.empty_like(p).copy_(q.grad)
        spoil(masks, torch.nan)
        spoil(others, 0.0)
        optimizer.step()
        other.step()
    check_zero(optimizer, masks)
    for p, q in zip(net.parameters(), rival.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


@every
def test_moments_laid_out_anew_by_hand(name: str) -> None:
    ours, theirs, options = OPTIONS[name]
    param, rival = (nn.Parameter(torch.linspace(1, 2, 30).view(5, 6)) for _ in range(2))
    mask = torch.arange(30).view(5, 6) % 4 > 0
    optimizer = ours([param], masks={param: mask}, **options)
    other = theirs([rival], foreach=False, **options)
    with torch.no_grad():
        rival.mul_(mask)
    for step in range(4):
        if step == 2:
            state = optimizer.state[param]
            state.update({k: strided(v, [1, 0]) for k, v in state.items() if k != "step"})
        grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        param.grad, rival.grad = grad.clone(), grad * mask
        optimizer.step()
        other.step()
    check_zero(optimizer, {param: mask})
    assert torch.allclose(param, rival, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_after_a_step(name: str, dtype: torch.dtype) -> None:
    """As torch's default optimizer where that takes it, else one line that says what to do, and is right."""
    ours, theirs, options = OPTIONS[name]
    net, rival = (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)) for _ in range(2))
    rival.load_state_dict(net.state_dict())
    masks, others = some(net), some(rival)
    optimizer, other = ours(net.parameters(), masks=masks, **options), theirs(rival.parameters(), **options)
    with torch.no_grad():
        for p, mask in others.items():
            p.mul_(mask)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        for i, p in enumerate(net.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + i))
            p.grad = noise.to(p.dtype)
        spoil(masks if net is not rival else others, torch.nan if net is not rival else 0.0)
        optimizer.step()

    for n, o in ((net, optimizer), (rival, other)):
        step(n, o, 0)
        n.to(dtype)
    before = copy.deepcopy((rival.state_dict(), other.state_dict()))
    try:
        step(rival, other, 1)
    except RuntimeError:  # halfway
        rival.load_state_dict(before[0])
        other.load_state_dict(before[1])
        step(rival, other, 1)
        with pytest.raises(ValueError, match=f"{dtype} .* torch.float32 .*load_state_dict") as error:
            step(net, optimizer, 1)
        assert "\n" not in str(error.value)
        optimizer.load_state_dict(optimizer.state_dict())
    step(net, optimizer, 1)
    step(net, optimizer, 2)
    step(rival, other, 2)
    check_zero(optimizer, masks)
    size = {torch.float64: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for p, q in zip(net.parameters(), rival.parameters(), strict=True):
        assert p.dtype == dtype
        live = masks.get(p, torch.ones(p.shape).bool())
        assert torch.allclose(p[live], q[live], rtol=size, atol=size)


@every
def test_another_shape_or_device_after_a_step_is_refused(name: str) -> None:
    ours, _, options = OPTIONS[name]
    for change, says in (
        (lambda p: p.data[:4], r"now torch.float32 \[4, 6\] on cpu, .* \[5, 6\] on cpu: "),
        (lambda p: p.data[:, ::2], r"strides \[6, 2\]"),
        (lambda p: p.data[:1].expand(5, 6), r"strides \[0, 1\]"),
    ):
        param = nn.Parameter(torch.ones(5, 6))
        optimizer = ours([param], masks={param: torch.arange(30).view(5, 6) % 3 > 0}, **options)
        param.grad = torch.ones(5, 6)
        optimizer.step()
        before = param.data = change(param)
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=says) as error:
            optimizer.step()
        assert "\n" not in str(error.value)
        assert torch.equal(param, before)
    if optimizer.state[param]:
        param.data = torch.ones(5, 6)
        param.grad = torch.ones(5, 6)
        optimizer.state[param] = {k: v.to("meta") for k, v in optimizer.state[param].items()}
        with pytest.raises(ValueError, match="on meta: cast the state"):
            optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_another_device_after_a_step(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net = nn.Linear(6, 5)
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    for _ in range(2):
        net(torch.ones(3, 6)).sum().backward()
        optimizer.step()
    net.cuda()
    optimizer.zero_grad()
    net(torch.ones(3, 6, device="cuda")).sum().backward()
    if any(optimizer.state.values()):
        with pytest.raises(ValueError, match=r"on cuda:0, .* on cpu: cast the state"):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    check_zero(optimizer, {p: m.cuda() for p, m in masks.items()})


def foreign(p: Tensor) -> None:
    MaskedAdam([p], masks={nn.Parameter(torch.ones(4, 6)): torch.ones(4, 6).bool()})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda p: MaskedAdam([p], masks={p: torch.full((4, 6), 0.5)}),
            "expected a mask bool \\[4, 6\\] or 0s and 1s, got torch.float32",
        ),
        (lambda p: MaskedAdam([p], masks={p: torch.ones(6, 4).bool()}), "expected a mask bool \\[4, 6\\]"),
        (foreign, "a parameter of this optimizer"),
        (lambda p: MaskedSGD([p], kernels="cuda"), "kernels"),
        (lambda p: MaskedSGD([p, nn.Parameter(p.detach() * 1j)]), "complex64"),
        (lambda p: MaskedAdamW([p, nn.Parameter(p.detach()[:, ::2])]), "strides \\[6, 2\\]"),
    ],
)
def test_refuses_with_a_reason(make: Callable[[Tensor], None], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(nn.Parameter(torch.ones(4, 6)))


def test_a_refused_group_leaves_no_trace() -> None:
    net = network()
    optimizer = MaskedAdam(net.parameters())
    with pytest.raises(ValueError, match="dense parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 6)[:, ::2])]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        MaskedSGD(table.parameters()).step()


def test_the_examples_run() -> None:
    found = doctest.testmod(optim)
    assert found.attempted > 10
    assert not found.failed
