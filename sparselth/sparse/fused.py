"""Compressed Linear layers and ReLUs that follow each other in an `nn.Sequential`, as one autograd function.

A small network's step is mostly calls: each layer that autograd sees costs several. Here the kernels of a
run of layers are bound once, on memory of their own, and take one call forward and one backward. Memory
is taken from a pool for a forward and goes back when autograd forgets it, so that any number of forwards
may wait for their backward. A layer with a hook, other dtypes, more dimensions than [B, K], or weights so
many that calls do not matter go layer by layer, as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels.csr_linear import (
    CsrIndex,
    bind_csr_input_grad,
    bind_csr_linear,
    bind_csr_weight_grad,
    csr_input_grad,
)
from sparselth.kernels.step_parts import Call, bind_columns, bind_relu_backward, bind_rows, sequence
from sparselth.sparse.columns import refuse_second
from sparselth.sparse.trainable import COLUMNS, CompressedLinear

MOST = 1 << 18  # kept weights of a run: above it products take longer than calls
POOL = 4  # pieces of memory that are kept for a run and a size of batch
SIZES = 4  # of batches, for which a run keeps memory
Key = tuple[Any, ...]
_pools: WeakKeyDictionary[nn.Module, dict[Key, list[Workspace]]] = WeakKeyDictionary()


class FusedSequential(nn.Sequential):
    """`nn.Sequential`."""

    def forward(self, input: Tensor) -> Tensor:
        """Each module behind the other, runs of compressed layers in one call."""
        x = input
        for run in runs([*self._modules.values()]):
            if len(run) > 1 and _fits(run, x):
                x = _fused(self, run, x)
            else:
                for module in run:
                    x = cast("nn.Module", module)(x)
        return x

    def _get_name(self) -> str:
        return "Sequential"


def enter(model: nn.Module) -> None:
    """Let sequences with such runs take them in one call."""
    for module in model.modules():
        if type(module) is nn.Sequential and any(len(run) > 1 for run in runs([*module._modules.values()])):
            module.__class__ = FusedSequential


def leave(model: nn.Module) -> None:
    """Inverse of `enter`."""
    for module in model.modules():
        if type(module) is FusedSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]


def runs(modules: list[nn.Module | None]) -> Iterator[list[nn.Module | None]]:
    """The modules in order: runs of compressed layers, a ReLU behind each or not, and single ones."""
    run: list[nn.Module | None] = []
    for module in modules:
        linear = type(module) is CompressedLinear
        if run and (linear or (isinstance(module, nn.ReLU) and not isinstance(run[-1], nn.ReLU))):
            run.append(module)
            continue
        if run:
            yield run
        run = [module] if linear else []
        if not linear:
            yield [module]
    if run:
        yield run


class Workspace:
    """The calls of a run of layers for a batch on memory of their own: of activations and of gradients."""

    def __init__(self, layers: list[CompressedLinear], relus: list[bool], batch: int) -> None:
        columns = -(-batch // COLUMNS) * COLUMNS
        self.batch, self.widths = batch, [layers[0].shape[1], *(one.shape[0] for one in layers)]
        room = [torch.zeros(n, columns, dtype=torch.float32, device="cpu") for n in self.widths]
        back = [torch.zeros_like(y) for y in room[1:]]
        self.slopes: list[Tensor | None] = []  # of weights and biases, in turn
        self.index = [_index(one) for one in layers]
        self.dy, self.x = back[0], room[0]
        forward, backward = list[Call](), list[Call]()
        for i, (one, relu) in enumerate(zip(layers, relus, strict=True)):
            index, values = self.index[i], one.values.detach()
            bias = None if one.bias is None else one.bias.detach()
            forward.append(bind_csr_linear(index, values, room[i], bias, room[i + 1], relu))
            dv, db = torch.empty_like(values), None if bias is None else torch.empty_like(bias)
            self.slopes += [dv, db]
            calls = list[Call]()
            if relu or db is not None:
                calls.append(bind_relu_backward(back[i], room[i + 1] if relu else None, db))
            calls.append(bind_csr_weight_grad(index, back[i], room[i], dv))
            if i:
                calls.append(bind_csr_input_grad(index, values, back[i], back[i - 1]))
            backward = calls + backward
        self.forward, self.backward = sequence(forward), sequence(backward)
        self.fill, self.fill_dy = bind_columns(room[0][:, :batch]), bind_columns(back[-1][:, :batch])
        self.rows = bind_rows(room[-1][:, :batch])


class _Lease:
    """A workspace until nobody knows it any more."""

    def __init__(self, pool: list[Workspace], workspace: Workspace) -> None:
        self.pool, self.workspace = pool, workspace

    def __del__(self) -> None:
        if len(self.pool) < POOL:
            self.pool.append(self.workspace)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lease: _Lease, *parameters: Tensor | None) -> Tensor:
        work = lease.workspace
        work.fill(x.contiguous())
        work.forward()
        y = torch.empty(work.batch, work.widths[-1], dtype=torch.float32, device="cpu")
        work.rows(y)
        ctx.lease = lease
        ctx.save_for_backward(*parameters)  # so that torch sees who writes to them before backward
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second()
        work, parameters = ctx.lease.workspace, ctx.saved_tensors
        work.fill_dy(dy.float().contiguous())
        work.backward()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = csr_input_grad(work.index[0], parameters[0], work.dy)[:, : work.batch].t().contiguous()
        wanted = zip(work.slopes, ctx.needs_input_grad[2:], strict=True)
        return dx, None, *(t.clone() if t is not None and wants else None for t, wants in wanted)


def _fits(run: list[nn.Module | None], x: Tensor) -> bool:
    if x.dim() != 2 or x.dtype != torch.float32 or not x.is_cpu or not len(x) or _native.LIB is None:
        return False
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return False
    kept = 0
    for module in run:
        assert module is not None
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return False
        if module._backward_pre_hooks or "forward" in module.__dict__:
            return False
        if isinstance(module, CompressedLinear):
            values, bias = module.values, module.bias
            kept += values.numel()
            if values.dtype != torch.float32 or not values.is_cpu:
                return False
            if bias is not None and bias.dtype != torch.float32:
                return False
    first = run[0]
    assert isinstance(first, CompressedLinear)
    return x.shape[1] == first.shape[1] and kept <= MOST and not torch.is_autocast_enabled("cpu")


def _fused(owner: nn.Module, run: list[nn.Module | None], x: Tensor) -> Tensor:
    layers = [module for module in run if isinstance(module, CompressedLinear)]
    parameters = [p for one in layers for p in (one.weight, one.bias)]
    places = tuple(0 if p is None else p.data_ptr() for p in parameters)
    key = (*map(id, run), len(x), torch.get_num_threads(), *places)
    pools = _pools.setdefault(owner, {})
    if key not in pools:
        same = [old for old in pools if old[: len(run)] == key[: len(run)]]
        for old in same[: len(same) - SIZES + 1] if len(same) >= SIZES else []:
            del pools[old]
        pools[key] = []
    pool = pools[key]
    try:
        work = pool.pop()
    except IndexError:
        behind = zip(run, [*run[1:], None], strict=True)
        relus = [isinstance(b, nn.ReLU) for a, b in behind if isinstance(a, CompressedLinear)]
        work = Workspace(layers, relus, len(x))
    y: Tensor = _Run.apply(x, _Lease(pool, work), *parameters)
    return y


def _index(layer: CompressedLinear) -> CsrIndex:
    """The index that the layer keeps for itself, with what backward needs."""
    index = layer.indices.get(())
    if not isinstance(index, CsrIndex) or index.backward is None:
        index = layer.indices[()] = CsrIndex.from_dense(layer.mask, True)
    return index
