"""How one layer can be computed: dense, torch CSR, blocks, or our kernels; each knows its layout and bytes.

Layouts of the activations:
    rows           [B, K] or [B, C, H, W], as torch has them
    channels-last  the same images, the channels side by side
    turned         [B, K], each feature's batch side by side: what csr_infer reads and writes on CUDA
    columns        [K or C * H * W, B]: features-major, each feature's batch side by side, for our kernels
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels._tiles import BLOCKS
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d
from sparselth.kernels.block_linear import BlockWeight, block_linear
from sparselth.kernels.csr_linear import CsrIndex, bind_csr_linear
from sparselth.kernels.csr_packed import Packed, bind_csr_packed
from sparselth.kernels.sparse_conv2d import Conv2dIndex, Slices, bind_sparse_conv2d
from sparselth.kernels.sparse_conv2d_rows import PackedConv2d, sparse_conv2d_rows_call
from sparselth.kernels.step_parts import Call, bind_bias_relu, bind_max_pool
from sparselth.sparse.compaction import Part, rebuilt

COLUMNS = 16  # a batch above 1 gets room for a multiple: one cache line
VECTOR = 8  # floats that the native products take at once, or half of them


@dataclass(frozen=True)
class Place:
    """Where a form stands, without the weights it was made from."""

    name: str
    key: str  # what its time depends on
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """What is chosen at once: a layer, and the ReLU and the maximum of 2 x 2 pixels behind it.

    Where inputs of it are dead, `select` picks out the others for its dense forms; those of sparse weights
    have no use for that and take `whole`.
    """

    part: Part
    relu: bool
    pool: Part | None = None
    select: Part | None = None

    @property
    def product(self) -> bool:
        return isinstance(self.part.module, nn.Linear | nn.Conv2d)

    @property
    def kept(self) -> int:
        module = self.part.module
        return int((module.weight != 0).sum()) if isinstance(module, nn.Linear | nn.Conv2d) else 0

    @property
    def place(self) -> Place:
        part, before, after = self.part, self.before, self.after
        more = (" and ReLU" if self.relu else "") + (" and MaxPool2d" if self.pool else "")
        key = f"{part.module}{more} on {list(before)} -> {list(after)}, kept {self.kept}"
        return Place(part.name, key, before, after)

    @property
    def before(self) -> tuple[int, ...]:
        return self.select.before if self.select else self.part.before

    @property
    def after(self) -> tuple[int, ...]:
        return self.pool.after if self.pool else self.part.after

    @cached_property
    def whole(self) -> nn.Module:
        """The layer with its dead inputs."""
        module = self.part.module
        if self.select is None or not isinstance(module, nn.Linear | nn.Conv2d):
            return module
        index, weight = self.select.module.index, module.weight
        assert isinstance(index, Tensor)
        wide = weight.new_zeros(len(weight), self.before[0], *weight.shape[2:])
        wide[:, index] = weight
        return rebuilt(module, wide, module.bias)

    def double(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In float64: what it computes, and that before the ReLU."""
        y = x.double()
        for part in (self.select, self.part, self.pool):
            y = copy.deepcopy(part.module).double()(y) if part else y
        return y.relu() if self.relu else y, y

    @property
    def dense_bytes(self) -> int:
        return tensor_bytes([*self.part.module.parameters(), *self.part.module.buffers()])


@dataclass(frozen=True)
class Rows:
    """One way to compute a stage: x -> y, images and vectors batch first."""

    name: str
    place: Place
    layout: str
    run: Callable[[Tensor], Tensor]
    bytes: int = 0
    seconds: float = 0.0  # of conversion

    @property
    def gives(self) -> str:
        return "rows" if self.layout == "channels-last" and len(self.place.after) != 3 else self.layout


@dataclass(frozen=True)
class Columns:
    """One way to compute a stage features-major: `bind(x, y)`, [K, B] or [C, H, W, B], makes its calls."""

    name: str
    place: Place
    bind: Callable[[Any, Any], list[Call]]
    bytes: int = 0
    seconds: float = 0.0
    in_place: bool = False  # y is the memory of x
    slices: Callable[[int], Slices | None] | None = None  # x and y may be Slices, and x those for this batch
    layout: str = "columns"
    gives: str = "columns"


Format = Rows | Columns
OURS_CPU = "csr_linear", "csr_packed", "sparse_conv2d", "sparse_conv2d_rows"
OURS_GPU = "csr_infer", "slot_linear", "block_linear", "block_conv2d"
SPARSE = *OURS_CPU, *OURS_GPU, "two_four_linear", "CSR"
FULL = 0.5  # share of the weights in live blocks that must be kept for blocks to be tried


def formats(stage: Stage, batch: int) -> list[Format]:
    """All ways that a CPU has for a stage at about this batch, plain torch first."""
    module, relu = stage.whole, stage.relu
    found: list[Format] = [*dense(stage)]
    if isinstance(module, nn.Conv2d):
        found += blocks(stage)
        if _native.LIB is not None and has_native(module):
            with contextlib.suppress(ValueError):  # too many channels
                found.append(_sparse_conv2d(stage, module))
            with contextlib.suppress(ValueError):  # too wide
                found.append(_sparse_conv2d_rows(stage, module, batch))
    elif isinstance(module, nn.Linear):
        found += [_dense_columns(stage, module), _csr(stage, module)]
        if _native.LIB is not None:
            found += [_csr_linear(stage, module), _csr_packed(stage, module, batch)]
        found += blocks(stage)
    else:
        in_place, bind = isinstance(module, nn.Flatten | nn.ReLU), partial(_bind, module, relu)
        found.append(Columns("columns", stage.place, bind, stage.dense_bytes, in_place=in_place))
    return found


def plain(stage: Stage) -> Rows:
    """As torch does it."""
    return Rows("dense", stage.place, "rows", _torch(stage.part.module, stage), stage.dense_bytes)


def dense(stage: Stage) -> list[Rows]:
    """As torch does it; of images also with the channels side by side."""
    module, first = stage.part.module, plain(stage)
    if isinstance(module, nn.Linear) or len(stage.before) != 3:
        return [first]
    run = first.run
    if isinstance(module, nn.Conv2d):
        turned = module.weight.detach().clone(memory_format=torch.channels_last)
        run = _torch(rebuilt(module, turned, module.bias), stage)
    return [first, Rows("channels-last", stage.place, "channels-last", run, stage.dense_bytes)]


def blocks(stage: Stage, kernels: str = "auto") -> list[Rows]:
    """The form of a weight that was pruned in blocks, if it was; `kernels` as the op has it."""
    module = stage.whole
    if not isinstance(module, nn.Linear | nn.Conv2d) or (block := _block(module.weight)) is None:
        return []
    if isinstance(module, nn.Linear):
        return [_block_linear(stage, module, block, kernels)]
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return [_block_conv2d(stage, module, block, kernels)] if plain else []


def columns(features: int, batch: int) -> Tensor:
    """Room for the activations of a batch, [features, batch or more]."""
    return torch.zeros(features, batch if batch == 1 else -(-batch // COLUMNS) * COLUMNS)


def image(memory: Tensor, shape: tuple[int, ...], batch: int) -> Tensor:
    """[K, B] or [C, H, W, B] of the memory that `columns` gave."""
    return memory.view(*shape, -1)[..., :batch]


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _torch(module: nn.Module, stage: Stage) -> Callable[[Tensor], Tensor]:
    relu, pool = stage.relu, stage.pool.module if stage.pool else None
    product: Callable[[Tensor], Tensor] = module
    if isinstance(module, nn.Linear):  # a module's call takes microseconds, as long as a small layer
        w, bias = module.weight, module.bias
        product = lambda x: F.linear(x, w, bias)  # noqa: E731
    if stage.select:
        product = nn.Sequential(stage.select.module, module).eval()
    if not relu and pool is None:
        return product

    def run(x: Tensor) -> Tensor:
        y = product(x)
        if relu:
            y.relu_()
        return y if pool is None else pool(y)

    return run


def _dense_columns(stage: Stage, module: nn.Linear) -> Columns:
    w, bias, relu = module.weight, module.bias, stage.relu

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        if relu:
            return [partial(torch.mm, w, x, out=y), bind_bias_relu(y, bias)]
        if bias is None:
            return [partial(torch.mm, w, x, out=y)]
        return [partial(torch.addmm, bias[:, None], w, x, out=y)]

    return Columns("dense columns", stage.place, bind, tensor_bytes([w, bias]))


def _csr(stage: Stage, module: nn.Linear) -> Columns:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    row, column = module.weight.nonzero().unbind(1)
    starts = torch.zeros(module.out_features + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(row, minlength=module.out_features).cumsum(0)
    values = module.weight.detach()[row, column]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        w = torch.sparse_csr_tensor(starts, column.int(), values, module.weight.shape, check_invariants=False)

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        def run() -> None:
            y.copy_(w @ x)
            if bias is not None:
                y.add_(bias[:, None])
            if relu:
                y.relu_()

        return [run]

    size = tensor_bytes([starts, column.int(), values, bias])
    return Columns("CSR", stage.place, bind, size, time.perf_counter() - began)


def _csr_linear(stage: Stage, module: nn.Linear) -> Columns:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    index = CsrIndex.of(module.weight != 0, backward=False)
    values = index.gather(module.weight.detach())

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        return [bind_csr_linear(index, values, _padded(x), bias, _padded(y), relu)]

    size = tensor_bytes([values, bias]) + index.bytes()
    return Columns("csr_linear", stage.place, bind, size, time.perf_counter() - began)


def _csr_packed(stage: Stage, module: nn.Linear, batch: int) -> Columns:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    packed = Packed.of(module.weight, _whole(batch))

    def bind(x: Tensor, y: Tensor) -> list[Call]:
        return [bind_csr_packed(packed, _padded(x), bias, _padded(y), relu)]

    size = tensor_bytes([bias]) + packed.bytes()
    return Columns("csr_packed", stage.place, bind, size, time.perf_counter() - began)


def _block(weight: Tensor) -> int | None:
    """The largest block in which this weight was pruned, if it was; of a convolution at every tap."""
    there = (weight != 0).view(*weight.shape[:2], -1).permute(2, 0, 1)
    kept = int(there.sum())
    for block in reversed(BLOCKS):
        if not kept or min(weight.shape[:2]) < block:
            continue
        live = float(F.max_pool2d(there.float(), block, ceil_mode=True).sum()) * block * block
        if live < FULL * weight.numel() and kept >= FULL * live:
            return block
    return None


def _block_linear(stage: Stage, module: nn.Linear, block: int, kernels: str) -> Rows:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    weight = BlockWeight.from_dense(module.weight.detach(), None, block)

    def run(x: Tensor) -> Tensor:
        return block_linear(x, weight, bias, relu, kernels)

    size = tensor_bytes([bias]) + weight.bytes()
    return Rows("block_linear", stage.place, "rows", run, size, time.perf_counter() - began)


def _block_conv2d(stage: Stage, module: nn.Conv2d, block: int, kernels: str) -> Rows:
    began, bias, relu = time.perf_counter(), module.bias, stage.relu
    weight, pool = BlockFilters.from_dense(module.weight.detach(), None, block), stage.pool
    padding: Any = module.padding

    def run(x: Tensor) -> Tensor:
        y = block_conv2d(x, weight, bias, module.stride, padding, module.dilation, relu, kernels)
        return pool.module(y) if pool else y

    size = tensor_bytes([bias]) + weight.bytes()
    return Rows("block_conv2d", stage.place, "channels-last", run, size, time.perf_counter() - began)


def _whole(batch: int) -> int:
    """The batch in whole vectors, for which `columns` has room."""
    return batch if batch == 1 else -(-batch // VECTOR) * VECTOR


def _padded(x: Tensor) -> Tensor:
    """[K, B] with what `columns` has beside it: whole vectors take less time than parts."""
    return x.as_strided((len(x), _whole(x.shape[1])), x.stride())


def has_native(module: nn.Conv2d) -> bool:
    square = all(len({*pair}) == 1 for pair in (module.stride, module.padding))
    plain = module.dilation == (1, 1) and module.padding_mode == "zeros"
    return square and plain and not isinstance(module.padding, str)


def _sparse_conv2d(stage: Stage, module: nn.Conv2d) -> Columns:
    began, bias, relu, pool = time.perf_counter(), module.bias, stage.relu, stage.pool is not None
    size = stage.before[1], stage.before[2]
    index = Conv2dIndex.of(module.weight != 0, size, module.stride[0], int(module.padding[0]), backward=False)
    values = index.gather(module.weight.detach())

    def bind(x: Tensor | Slices, y: Tensor | Slices) -> list[Call]:
        return [bind_sparse_conv2d(index, values, x, bias, y, relu, pool=pool)]

    bytes_ = tensor_bytes([values, bias]) + index.bytes()
    return Columns(
        "sparse_conv2d", stage.place, bind, bytes_, time.perf_counter() - began, slices=index.slices
    )


def _sparse_conv2d_rows(stage: Stage, module: nn.Conv2d, batch: int) -> Rows:
    began, bias, size = time.perf_counter(), module.bias, (stage.before[1], stage.before[2])
    packed = PackedConv2d.of(module.weight, size, module.stride[0], int(module.padding[0]), batch)
    run = sparse_conv2d_rows_call(packed, bias, stage.relu, stage.pool is not None)
    bytes_ = tensor_bytes([bias]) + packed.bytes()
    return Rows("sparse_conv2d_rows", stage.place, "rows", run, bytes_, time.perf_counter() - began)


def _bind(module: nn.Module, relu: bool, x: Tensor, y: Tensor) -> list[Call]:
    """Layers without weights."""
    if isinstance(module, nn.Flatten):
        return []
    if isinstance(module, nn.ReLU):
        return [bind_bias_relu(y)]
    if isinstance(module, nn.MaxPool2d) and halves(module):
        return [bind_max_pool(x, y, relu)]
    return [partial(_pool, module, relu, x, y)]


def halves(pool: nn.MaxPool2d) -> bool:
    settings = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    return all(v in (n, (n, n)) for v, n in zip(settings, (2, 2, 0, 1), strict=True)) and not pool.ceil_mode


def _pool(module: nn.Module, relu: bool, x: Tensor, y: Tensor) -> None:
    z = module(x.permute(3, 0, 1, 2))
    y.copy_((F.relu(z) if relu else z).permute(1, 2, 3, 0))
