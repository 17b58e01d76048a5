r"""Products with a sparse matrix W [N, K] for inference, for CPUs: `csr_linear` in a layout of its own.

    y = act(W x + b)

| name   | shape       | dtype  |                                    Floor, bytes and FLOPs:
| x      | [K, B]      | fp32   |  features-major                    2 * kept FLOPs a column,
| y      | [N, B]      | fp32   |                                    4 + 2 bytes a kept weight, and
| bias   | [N]         | fp32   |                                    x, y and the bias once each
| packed | `TiledCsr`    |        |  the kept weights and where they are

The kept weights lie in the order in which they are read: blocks of rows, in each of them tiles of columns,
in each of these the rows that have something there, those that keep the most first. A tile's part of x fits
into a first-level cache and a block's part of y into a second-level one, so the layout depends on the batch
that it is meant for; any batch is right. Rows of x and y as in `csr_linear`; nothing between B and their
stride is read or written.

A pruned weight is not multiplied: NaN and infinity in x reach y through kept weights only. Results do not
depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

WIDE = 64  # columns that are worked on at a time
NEAR = 28 << 10  # bytes of x that stay in the first-level cache; 10 / 7 of it where they are copied first
FAR = 192 << 10  # bytes of y that stay in the second-level cache
WORTH = 9  # kept weights that pay for another visit to a row of y
WORK = 1 << 19  # FLOPs that pay for another thread
NARROW = 16  # columns: fewer take as long
BLOCKS, ENOUGH = 16, 4096  # so many blocks, for threads to share, where each keeps this many weights


@dataclass(frozen=True, eq=False)
class TiledCsr:
    """The kept weights of W [N, K] in the order in which they are read."""

    shape: tuple[int, int]
    tile: int  # columns of a tile
    firsts: Tensor  # int32 [blocks + 1]: the first row of a block
    cells: Tensor  # int32 [blocks * tiles + 1]: the first of the visits to a tile within a block
    starts: Tensor  # int32 [visits + 1]: where the kept weights of a visit begin
    rows: Tensor  # uint16 [visits]: row less the first one of its block
    columns: Tensor  # uint16 [kept]: column less the first one of its tile
    values: Tensor  # fp32 [kept]

    @staticmethod
    def from_dense(weight: Tensor, batch: int) -> TiledCsr:
        """The numbers of a weight [N, K] that are not zero, for about `batch` columns of x."""
        if weight.dim() != 2 or weight.dtype != torch.float32 or not weight.is_cpu:
            raise ValueError(
                f"expected a weight [N, K] in fp32 on a CPU, "
                f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        weight = weight.detach()
        n, k = weight.shape
        row, column = weight.nonzero().unbind(1)
        kept, wide = len(row), min(max(batch, 1), WIDE)
        tile = _tile(n, k, kept, wide, NEAR if batch <= WIDE else NEAR * 10 // 7)
        tiles = max(1, -(-k // tile))
        firsts = _firsts(torch.bincount(row, minlength=n), wide)
        blocks = len(firsts) - 1
        block = torch.repeat_interleave(torch.arange(blocks, device="cpu"), firsts.diff())  # of every row

        # Visits: all rows in the first and the last tile, which begin and end them, else those that keep any.
        cell = row * tiles + column // tile
        counts = torch.bincount(cell, minlength=n * tiles).view(n, tiles)
        wanted = counts > 0
        wanted[:, 0] = wanted[:, -1] = True
        visit_row, visit_tile = wanted.nonzero().unbind(1)
        count = counts[visit_row, visit_tile]
        place = block[visit_row] * tiles + visit_tile
        order = torch.argsort(place * (tile + 1) + tile - count, stable=True)
        starts = torch.zeros(len(order) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(count[order], 0, out=starts[1:])
        cells = torch.zeros(blocks * tiles + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(torch.bincount(place, minlength=blocks * tiles), 0, out=cells[1:])
        # The entries, now row by row, tile by tile: each visit's are neighbours.
        before = counts.view(-1).cumsum(0) - counts.view(-1)
        source = torch.repeat_interleave(
            before[visit_row[order] * tiles + visit_tile[order]] - starts[:-1], count[order]
        ) + torch.arange(kept, device="cpu")
        return TiledCsr(
            shape=(n, k),
            tile=tile,
            firsts=firsts.int(),
            cells=cells.int(),
            starts=starts.int(),
            rows=(visit_row - firsts[block[visit_row]])[order].to(torch.uint16),
            columns=(column % tile)[source].to(torch.uint16),
            values=weight[row, column][source],
        )

    @property
    def kept(self) -> int:
        return self.values.numel()

    def bytes(self) -> int:
        """Memory of values and index."""
        parts = (self.firsts, self.cells, self.starts, self.rows, self.columns, self.values)
        return sum(t.numel() * t.element_size() for t in parts)

    def to_dense(self) -> Tensor:
        """The dense [N, K], 0 where nothing is kept."""
        tiles = max(1, -(-self.shape[1] // self.tile))
        cell = torch.repeat_interleave(self.cells.diff().long())
        rows = self.firsts.long()[cell // tiles] + self.rows.long()
        visit = torch.repeat_interleave(self.starts.diff().long())
        dense = self.values.new_zeros(self.shape)
        dense[rows[visit], (cell % tiles * self.tile)[visit] + self.columns.long()] = self.values
        return dense


def _tile(rows: int, inner: int, kept: int, wide: int, size: int) -> int:
    """Columns of a tile: `size` bytes of x, which a cache holds, but enough for visits to be worth it."""
    near = max(size // (4 * wide), WORTH * rows * inner // max(1, kept))
    tiles = -(-inner // min(max(near, 1), 1 << 16))
    return max(1, -(-inner // max(1, tiles)))


def _firsts(counts: Tensor, wide: int) -> Tensor:
    """The first row of each block: about equal numbers of kept weights, and so many rows at most."""
    rows, kept = len(counts), int(counts.sum())
    most = min(FAR // (4 * wide), 1 << 15)
    blocks = max(1, min(BLOCKS, kept // ENOUGH), -(-rows // most))
    work = (counts + kept // max(1, rows) + 1).cumsum(0)  # a row costs something even when it is empty
    if not rows:
        return torch.zeros(2, dtype=torch.int64, device="cpu")
    bounds: list[int] = torch.searchsorted(
        work, work[-1:] * torch.arange(1, blocks, device="cpu") // blocks
    ).tolist()
    return torch.tensor(sorted({0, *bounds, rows}), device="cpu")


def floor(packed: TiledCsr, batch: int) -> dict[str, int]:
    """Bytes and FLOPs of `csr_tiled`."""
    n, k = packed.shape
    return {"bytes": packed.bytes() + 4 * batch * (n + k), "flops": 2 * packed.kept * batch}


def reference(packed: TiledCsr, x: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """The dense product."""
    y = packed.to_dense() @ x
    if bias is not None:
        y = y + bias[:, None]
    return y.relu() if relu else y


def csr_tiled(
    packed: TiledCsr, x: Tensor, bias: Tensor | None = None, relu: bool = False, kernels: str = "auto"
) -> Tensor:
    """act(W x + b) as [N, B]; `relu` makes act the rectifier."""
    y = x.new_empty(packed.shape[0], x.shape[-1])
    bind_csr_tiled(packed, x, bias, y, relu, kernels)()
    return y


def bind_csr_tiled(
    packed: TiledCsr, x: Tensor, bias: Tensor | None, y: Tensor, relu: bool = False, kernels: str = "auto"
) -> Callable[[], None]:
    """`csr_tiled` on fixed tensors: each call of what this returns is one foreign call."""
    n, k = packed.shape
    _native.matrix("x", x, k, x.shape[-1])
    _native.matrix("y", y, n, x.shape[-1])
    _native.refuse_gradient(values=packed.values)
    _native.vector("bias", bias, n)
    if not use_native(kernels):

        def run() -> None:
            y.copy_(reference(packed, x, bias, relu))

        return run
    arguments = _Tiled(
        **{
            name: getattr(packed, name).data_ptr()
            for name in ("cells", "starts", "rows", "columns", "values", "firsts")
        },
        x=x.data_ptr(),
        bias=_native.address(bias),
        y=y.data_ptr(),
        blocks=len(packed.firsts) - 1,
        tiles=max(1, -(-k // packed.tile)),
        inner=k,
        tile=packed.tile,
        batch=x.shape[1],
        ldx=x.stride(0),
        ldy=y.stride(0),
        relu=relu,
        threads=min(_native.threads(), 1 + floor(packed, max(x.shape[1], NARROW))["flops"] // WORK),
    )
    return _native.bind("csr_tiled", arguments, packed, x, bias, y)


class _Tiled(ctypes.Structure):  # struct csr_tiled
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("cells", "starts", "rows", "columns", "values", "firsts")],
        *[(name, ctypes.c_void_p) for name in ("x", "bias", "y")],
        *[(name, ctypes.c_int64) for name in ("blocks", "tiles", "inner", "tile", "batch", "ldx", "ldy")],
        *[(name, ctypes.c_int32) for name in ("relu", "threads")],
    ]
