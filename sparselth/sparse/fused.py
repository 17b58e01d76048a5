"""Compressed Linear layers and ReLUs that follow each other in an `nn.Sequential`, as one autograd function.

A small network's step is mostly calls: each layer that autograd sees costs several. Here the kernels of a
run of layers are bound once, on memory of their own, and take one call forward and one backward. Memory
is taken from a pool for a forward and goes back when autograd forgets it, so that any number of forwards
may wait for their backward. A layer with a hook, other dtypes, more dimensions than [B, K], or weights so
many that calls do not matter go layer by layer, as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels.csr_linear import (
    Csr,
    CsrIndex,
    bind_csr_input_grad,
    bind_csr_linear,
    bind_csr_weight_grad,
)
from sparselth.kernels.step_parts import Call, bind_relu_backward, bind_transpose, sequence
from sparselth.sparse.columns import ColumnsReLU, refuse_second
from sparselth.sparse.trainable import COLUMNS, CompressedLinear

MOST = 1 << 18  # kept weights of a run: above it products take longer than calls
WIDE = 128  # of a batch, for each thread, go through a run at once: what they leave fits a second-level cache
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
            parameters = _taken(run, x) if len(run) > 1 else None
            if parameters is not None:
                x = _fused(self, run, x, parameters)
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
        if run and (linear or (_is_relu(module) and not _is_relu(run[-1]))):
            run.append(module)
            continue
        if run:
            yield run
        run = [module] if linear else []
        if not linear:
            yield [module]
    if run:
        yield run


def _is_relu(module: nn.Module | None) -> bool:
    """Whether it computes what torch's does: a class of a user's that is one may do something else."""
    return module is not None and type(module).forward in (nn.ReLU.forward, ColumnsReLU.forward)


class _Place:
    """Where a tensor lies that is another one at each call: a field of the arguments of kernels."""

    def __init__(self, field: str) -> None:
        self.field, self.calls = field, list[tuple[Any, int]]()

    def add(self, call: Call, numbers: int = 0) -> Call:
        """The call, which takes the tensor from this number on."""
        self.calls.append((_native.arguments(call), 4 * numbers))
        return call

    def point(self, t: Tensor) -> None:
        """Let the calls take t, contiguous fp32, which the caller keeps alive."""
        here = t.data_ptr()
        for arguments, offset in self.calls:
            setattr(arguments, self.field, here + offset)


class Workspace:
    """The calls of a run of layers for a batch, on memory of their own.

    A block of the batch goes through all layers before the next one does, so that what a layer leaves still
    lies in a cache where the next one looks for it. Columns that pad a block are 0 in x and in dy. Units that
    no kept weight of the next layer reads are not computed, and gradients of their weights are 0.
    """

    def __init__(self, layers: list[CompressedLinear], relus: list[bool], batch: int) -> None:
        self.layers, self.relus, self.batch = layers, relus, batch
        self.widths = [layers[0].shape[1], *(one.shape[0] for one in layers)]
        self.dead = _dead(layers)
        self.index = [_index(one, self.dead[i], i > 0) for i, one in enumerate(layers)]
        self.parameters = [p if p is None else p.detach() for one in layers for p in (one.values, one.bias)]
        self.unwanted = [p if p is None else torch.empty_like(p) for p in self.parameters]
        self.x, self.y, self.dy, self.dx = (_Place(field) for field in ("x", "y", "x", "y"))
        self.slopes = [_Place(field) for _ in layers for field in ("dv", "dbias")]
        blocks = -(-batch // (WIDE * _native.threads()))
        wide = _padded(-(-batch // blocks))
        self.spans = [(first, min(wide, batch - first)) for first in range(0, batch, wide)]
        x = _room(self.widths[0], wide)  # of one block: backward turns it once more
        self.rooms = [
            [x if size == wide else _room(self.widths[0], size), *(_room(n, size) for n in self.widths[1:])]
            for _, size in self.spans
        ]
        self.dys = [_room(self.widths[-1], size) for _, size in self.spans]
        self.inner = [_room(n, wide) for n in self.widths[1:-1]]  # gradients, of one block at a time
        self.run_forward = sequence([call for i in range(len(self.spans)) for call in self._forward(i)])
        self.run_backward = self._backwards(None)
        self.run_with_dx: Call | None = None

    def forward(self, x: Tensor) -> Tensor:
        """y [B, N] of x [B, K], contiguous fp32."""
        y = torch.empty(self.batch, self.widths[-1], dtype=torch.float32, device="cpu")
        self.x.point(x)
        self.y.point(y)
        self.run_forward()
        return y

    def backward(self, x: Tensor, dy: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of x and of all parameters, None where they are not wanted; dy [B, N] as x."""
        dx: Tensor | None = None
        if wanted[0]:
            if self.run_with_dx is None:
                self.index[0] = _index(self.layers[0], self.dead[0], True)
                self.run_with_dx = self._backwards(_room(self.widths[0], self.spans[0][1]))
            dx = torch.empty(self.batch, self.widths[0], dtype=torch.float32, device="cpu")
            self.dx.point(dx)
        self.x.point(x)
        self.dy.point(dy)
        slopes = list[Tensor | None]()
        for i, (place, unwanted) in enumerate(zip(self.slopes, self.unwanted, strict=True)):
            wants, slope = wanted[i + 1], unwanted
            if wants and unwanted is not None:
                make = torch.zeros_like if i % 2 == 0 and self.dead[i // 2] else torch.empty_like
                slope = make(unwanted)
            if slope is not None:
                place.point(slope)
            slopes.append(slope if wants else None)
        run = self.run_backward if dx is None else self.run_with_dx
        assert run is not None
        run()
        return [dx, *slopes]

    def _forward(self, block: int) -> list[Call]:
        (first, size), room, p = self.spans[block], self.rooms[block], self.parameters
        calls = [self._turned(block)]
        for i, (index, relu) in enumerate(zip(self.index, self.relus, strict=True)):
            calls.append(bind_csr_linear(index, _known(p[2 * i]), room[i], p[2 * i + 1], room[i + 1], relu))
        return [*calls, self.y.add(bind_transpose(room[-1][:, :size], False), first * self.widths[-1])]

    def _turned(self, block: int) -> Call:
        (first, size), room = self.spans[block], self.rooms[block]
        return self.x.add(bind_transpose(room[0][:, :size], True), first * self.widths[0])

    def _backwards(self, dx: Tensor | None) -> Call:
        return sequence([call for i in range(len(self.spans)) for call in self._backward(i, dx)])

    def _backward(self, block: int, dx: Tensor | None) -> list[Call]:
        (first, size), room, add = self.spans[block], self.rooms[block], block > 0
        dy = self.dys[block]
        calls = [self.dy.add(bind_transpose(dy[:, :size], True), first * self.widths[-1])]
        before = [t if t is None else t[:, : dy.shape[1]] for t in (dx, *self.inner)]
        for i in reversed(range(len(self.index))):
            index, y = self.index[i], room[i + 1] if self.relus[i] else None
            dv, db = self.unwanted[2 * i : 2 * i + 2]
            place_dv, place_db = self.slopes[2 * i : 2 * i + 2]
            if db is not None:
                calls.append(place_db.add(bind_relu_backward(dy, y, db, add=add)))
            elif y is not None:
                calls.append(bind_relu_backward(dy, y))
            if i == 0 and len(self.spans) > 1:
                calls.append(self._turned(block))
            calls.append(place_dv.add(bind_csr_weight_grad(index, dy, room[i], _known(dv), add=add)))
            if (dy_before := before[i]) is not None:
                calls.append(bind_csr_input_grad(index, _known(self.parameters[2 * i]), dy, dy_before))
                dy = dy_before
        if dx is not None:
            calls.append(self.dx.add(bind_transpose(dx[:, :size], False), first * self.widths[0]))
        return calls


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
        ctx.lease, x = lease, x.contiguous()
        ctx.save_for_backward(x, *parameters)  # so that torch sees who writes to them before backward
        return lease.workspace.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second()
        x, *_ = ctx.saved_tensors
        wants_x, _, *wanted = ctx.needs_input_grad
        dx, *slopes = ctx.lease.workspace.backward(x, dy.contiguous(), [wants_x, *wanted])
        return dx, None, *slopes


def _padded(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


def _room(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, _padded(columns), dtype=torch.float32, device="cpu")


def _known(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def _taken(run: list[nn.Module | None], x: Tensor) -> list[Tensor | None] | None:
    """Weights and biases of a run that takes x in one call, None where it goes layer by layer."""
    if x.dim() != 2 or x.dtype != torch.float32 or not x.is_cpu or not len(x) or _native.LIB is None:
        return None
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return None
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        return None
    kept, parameters = 0, list[Tensor | None]()
    for module in run:
        assert module is not None
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return None
        if module._backward_pre_hooks or "forward" in module.__dict__:
            return None
        if isinstance(module, CompressedLinear):
            values, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if values is None or values.dtype != torch.float32 or not values.is_cpu:
                return None
            if bias is not None and bias.dtype != torch.float32:
                return None
            kept += values.numel()
            parameters += [values, bias]
    first = cast("CompressedLinear", run[0])
    if x.shape[1] != first.shape[1] or kept > MOST or torch.is_autocast_enabled("cpu"):
        return None
    return parameters


def _fused(
    owner: nn.Module, run: list[nn.Module | None], x: Tensor, parameters: list[Tensor | None]
) -> Tensor:
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
        relus = [_is_relu(b) for a, b in behind if isinstance(a, CompressedLinear)]
        layers = [module for module in run if isinstance(module, CompressedLinear)]
        work = Workspace(layers, relus, len(x))
    y: Tensor = _Run.apply(x, _Lease(pool, work), *parameters)
    return y


def _dead(layers: list[CompressedLinear]) -> list[tuple[int, ...]]:
    """Of each layer the outputs that reach none of the last one."""
    found: list[tuple[int, ...]] = [()]
    for one in reversed(layers[1:]):
        mask = one.mask
        mask[list(found[0])] = False
        found.insert(0, tuple((~mask.any(0)).nonzero().flatten().tolist()))
    return found


def _index(layer: CompressedLinear, dead: tuple[int, ...], backward: bool) -> CsrIndex:
    """The index that the layer keeps for itself, where rows of dead outputs count as empty.

    `backward`: with what the gradient of its input needs.
    """
    index = layer.indices.get(dead)
    if not isinstance(index, CsrIndex) or (backward and index.backward is None):
        mask, rows = layer.mask, list(dead)
        forward = Csr.from_dense(mask)
        forward.starts[:, rows] = forward.starts[0, rows]
        number = mask.flatten().cumsum(0, dtype=torch.int32) - 1
        mask[rows] = False
        back = Csr.from_dense(mask.t().contiguous(), number) if backward else None
        index = layer.indices[dead] = CsrIndex(forward, back)
    return index
