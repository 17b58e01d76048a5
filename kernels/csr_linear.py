r"""Products with a sparse matrix W [N, K] of which only the kept weights are stored, for CPUs.

    y = act(W x + b),   dx = W^T dy,   dv_j = sum_b dy[n_j, b] x[k_j, b]

| name   | shape         | dtype  |                                  Floor, one column more, bytes and FLOPs:
| values | [kept]        | fp32   |  the kept weights, row by row    y, dx, dv: 2 * kept FLOPs a column,
| x, dx  | [K, B]        | fp32   |  features-major: one weight      4 + 2 bytes a kept weight, and x, y
| y, dy  | [N, B]        | fp32   |    touches B contiguous numbers  once each
| bias   | [N]           | fp32   |
| index  | `CsrIndex`    |        |  where the kept weights are

Any row stride of x, y, dx, dy is right; multiples of 16 at 64-byte alignment are fast. What lies between B
and the stride is neither read nor written. W is cut into tiles of columns, so that the part of x that a tile
needs stays in a cache and 16 bits tell a column; the kept weights of one row remain neighbours.

A pruned weight is not multiplied: NaN and infinity in x reach y through kept weights only. Results do not
depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

# Columns of a tile. Small enough for the caches: with 64 columns of x, 128 take 32 KB and 1,024 take 256 KB.
# Large enough that a row keeps some 24 weights in it, to pay for another visit of y.
NARROWEST, WIDEST, WORTH = 128, 1024, 24


@dataclass(frozen=True, eq=False)
class Csr:
    """One direction of an index: the kept weights of every row."""

    shape: tuple[int, int]
    tile: int  # columns of a tile
    starts: Tensor  # int32 [tiles + 1, rows]: where the kept weights of a row within a tile begin; the ends
    columns: Tensor  # uint16 [kept]: column less the first column of its tile
    order: Tensor | None  # int32 [kept]: which value, None: one after the other

    @property
    def kept(self) -> int:
        return self.columns.numel()

    def bytes(self) -> int:
        parts = [t for t in (self.starts, self.columns, self.order) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts)

    def counts(self) -> Tensor:
        """Kept weights of every row, int64 [rows]."""
        return (self.starts[-1] - self.starts[0]).long()

    def positions(self) -> Tensor:
        """Where in the flattened matrix every kept weight is, int64 [kept]."""
        tiles = self.starts.shape[0] - 1
        cell = torch.repeat_interleave(self.starts.diff(dim=0).t().reshape(-1).long())
        row, tile = cell // tiles, cell % tiles
        return row * self.shape[1] + tile * self.tile + self.columns.long()

    @staticmethod
    def from_dense(mask: Tensor, number: Tensor | None = None) -> Csr:
        """The rows of a mask; `number`, its transpose flattened, numbers values that lie in that order."""
        rows, inner = mask.shape
        row, column = mask.nonzero().unbind(1)
        order = None if number is None else number.index_select(0, column * rows + row)
        tile = _tile(rows, inner, row.numel())
        tiles = max(1, -(-inner // tile))
        if tiles == 1:
            cell = row
        else:
            cell = row * tiles + column // tile
            column = column % tile
        ends = torch.bincount(cell, minlength=rows * tiles).cumsum(0).view(rows, tiles).t()
        starts = torch.zeros(tiles + 1, rows, dtype=torch.int32, device="cpu")
        starts[1:] = ends
        starts[0, 1:] = ends[-1, :-1]
        return Csr((rows, inner), tile, starts, column.to(torch.uint16), order)


def _tile(rows: int, inner: int, kept: int) -> int:
    right = WORTH * rows * inner // max(1, kept)
    if right > 4 * WIDEST:
        return 1 << 16
    tiles = -(-inner // min(max(right, NARROWEST), WIDEST))
    return max(1, -(-inner // max(1, tiles)))


@dataclass(frozen=True, eq=False)
class CsrIndex:
    """Where the kept weights of W [N, K] are, by rows and, for dx, by columns."""

    forward: Csr
    backward: Csr | None

    @staticmethod
    def from_dense(mask: Tensor, backward: bool = True) -> CsrIndex:
        """The index of a bool mask [N, K], True = kept; without `backward` it knows no dx."""
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"expected a bool mask [N, K], got {mask.dtype} {list(mask.shape)}")
        forward = Csr.from_dense(mask)
        if not backward:
            return CsrIndex(forward, None)
        number = mask.reshape(-1).cumsum(0, dtype=torch.int32) - 1
        return CsrIndex(forward, Csr.from_dense(mask.t().contiguous(), number))

    @property
    def shape(self) -> tuple[int, int]:
        return self.forward.shape

    @property
    def kept(self) -> int:
        return self.forward.kept

    def bytes(self) -> int:
        """Memory of the index without the values."""
        return self.forward.bytes() + (self.backward.bytes() if self.backward else 0)

    def gather(self, dense: Tensor) -> Tensor:
        """The kept weights of a dense [N, K]."""
        return dense.reshape(-1)[self.forward.positions()]

    def to_dense(self, values: Tensor) -> Tensor:
        """The dense [N, K] of kept weights, 0 elsewhere."""
        dense = values.new_zeros(self.shape[0] * self.shape[1])
        dense[self.forward.positions()] = values
        return dense.view(self.shape)


def floor(index: CsrIndex, batch: int) -> dict[str, int]:
    """Bytes and FLOPs of `csr_linear`; input_grad and weight_grad take as many FLOPs."""
    n, k = index.shape
    return {
        "bytes": 4 * index.kept + index.forward.bytes() + 4 * batch * (n + k),
        "flops": 2 * index.kept * batch,
    }


def reference(
    index: CsrIndex, values: Tensor, x: Tensor, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """The dense product."""
    y = index.to_dense(values) @ x
    if bias is not None:
        y = y + bias[:, None]
    return y.relu() if relu else y


def csr_linear(
    index: CsrIndex,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """act(W x + b) as [N, B]; `relu` makes act the rectifier."""
    y = x.new_empty(index.shape[0], x.shape[-1]) if out is None else out
    bind_csr_linear(index, values, x, bias, y, relu, kernels)()
    return y


def csr_input_grad(
    index: CsrIndex, values: Tensor, dy: Tensor, out: Tensor | None = None, kernels: str = "auto"
) -> Tensor:
    """W^T dy as [K, B]."""
    dx = dy.new_empty(index.shape[1], dy.shape[-1]) if out is None else out
    bind_csr_input_grad(index, values, dy, dx, kernels)()
    return dx


def csr_weight_grad(
    index: CsrIndex, dy: Tensor, x: Tensor, out: Tensor | None = None, kernels: str = "auto"
) -> Tensor:
    """dy x^T at the kept weights alone, as [kept]."""
    dv = x.new_empty(index.kept) if out is None else out
    bind_csr_weight_grad(index, dy, x, dv, kernels)()
    return dv


# The bound forms check once; each call of what they return is one foreign call on the same memory. The
# values, x, ... may change between calls, not their addresses.


def bind_csr_linear(
    index: CsrIndex,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    relu: bool = False,
    kernels: str = "auto",
) -> Callable[[], None]:
    """`csr_linear` on fixed tensors, the result in `y` [N, B]."""
    n, k = index.shape
    _native.matrix("x", x, k, x.shape[-1])
    _native.matrix("y", y, n, x.shape[-1])
    _native.vector("values", values, index.kept)
    _native.vector("bias", bias, n)
    return _bind_product(index.forward, values, x, bias, y, relu, kernels)


def bind_csr_input_grad(
    index: CsrIndex, values: Tensor, dy: Tensor, dx: Tensor, kernels: str = "auto"
) -> Callable[[], None]:
    """`csr_input_grad` on fixed tensors, the result in `dx` [K, B]."""
    n, k = index.shape
    _native.matrix("dy", dy, n, dy.shape[-1])
    _native.matrix("dx", dx, k, dy.shape[-1])
    _native.vector("values", values, index.kept)
    if index.backward is None:
        raise ValueError("this index was made with backward=False and knows no dx")
    return _bind_product(index.backward, values, dy, None, dx, False, kernels)


def bind_csr_weight_grad(
    index: CsrIndex, dy: Tensor, x: Tensor, dv: Tensor, kernels: str = "auto", add: bool = False
) -> Callable[[], None]:
    """`csr_weight_grad` on fixed tensors, the result in `dv` [kept] or, with `add`, added to it."""
    n, k = index.shape
    _native.matrix("x", x, k, x.shape[-1])
    _native.matrix("dy", dy, n, x.shape[-1])
    _native.vector("dv", dv, index.kept)
    csr = index.forward
    if use_native(kernels):
        arguments = _WeightGrad(
            starts=csr.starts.data_ptr(),
            columns=csr.columns.data_ptr(),
            dy=dy.data_ptr(),
            x=x.data_ptr(),
            dv=dv.data_ptr(),
            rows=n,
            inner=k,
            tile=csr.tile,
            batch=x.shape[1],
            lddy=dy.stride(0),
            ldx=x.stride(0),
            threads=_native.threads(),
        )
        return _native.bind("csr_weight_grad" + "_add" * add, arguments, csr, dy, x, dv)
    positions = csr.positions()

    def run() -> None:
        found = (dy @ x.t()).reshape(-1)[positions]
        dv.add_(found) if add else dv.copy_(found)

    return run


class _Linear(ctypes.Structure):  # struct csr_linear
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("starts", "columns", "order", "values", "x", "bias", "y")],
        *[(name, ctypes.c_int64) for name in ("rows", "inner", "tile", "batch", "ldx", "ldy")],
        *[(name, ctypes.c_int32) for name in ("relu", "threads")],
    ]


class _WeightGrad(ctypes.Structure):  # struct csr_weight_grad
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("starts", "columns", "dy", "x", "dv")],
        *[(name, ctypes.c_int64) for name in ("rows", "inner", "tile", "batch", "lddy", "ldx")],
        ("threads", ctypes.c_int32),
    ]


def _bind_product(
    csr: Csr, values: Tensor, x: Tensor, bias: Tensor | None, y: Tensor, relu: bool, kernels: str
) -> Callable[[], None]:
    if use_native(kernels):
        arguments = _Linear(
            starts=csr.starts.data_ptr(),
            columns=csr.columns.data_ptr(),
            order=_native.address(csr.order),
            values=values.data_ptr(),
            x=x.data_ptr(),
            bias=_native.address(bias),
            y=y.data_ptr(),
            rows=csr.shape[0],
            inner=csr.shape[1],
            tile=csr.tile,
            batch=x.shape[1],
            ldx=x.stride(0),
            ldy=y.stride(0),
            relu=relu,
            threads=_native.threads(),
        )
        return _native.bind("csr_linear", arguments, csr, values, x, bias, y)
    positions = csr.positions()
    row_starts = torch.cat([csr.starts[0], csr.starts[-1, -1:]])
    columns = (positions % max(1, csr.shape[1])).int()

    ordered = values if csr.order is None else torch.empty_like(values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        w = torch.sparse_csr_tensor(
            row_starts, columns, ordered, csr.shape, check_invariants=False, device="cpu"
        )

    def run() -> None:
        if csr.order is not None:
            torch.index_select(values, 0, csr.order, out=ordered)
        if kernels == "reference":
            dense = values.new_zeros(csr.shape[0] * csr.shape[1])
            dense[positions] = ordered
            y.copy_(dense.view(csr.shape) @ x)
        else:
            y.copy_(w @ x)  # w holds the memory of `ordered`
        if bias is not None:
            y.add_(bias[:, None])
        if relu:
            y.relu_()

    return run
