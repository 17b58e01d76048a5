r"""Convolution with weights of which only the kept ones are stored, for CPUs: no im2col, no padded copy.

    y[n, p, q, b] = act(bias[n] + sum over kept (n, c, i, j) of v x[c, p s + i - pad, q s + j - pad, b])
    add: the same with the old y[n, p, q, b] in the sum

| name   | shape          | dtype |                               Floor of each pass, bytes and FLOPs:
| values | [kept]         | fp32  |  in the order of W [N, C, kh, kw]   x, y, dx, dy once each,
| x, dx  | [C, H, W, B]   | fp32  |  features-major, the batch last     4 bytes a value and
| y, dy  | [N, P, Q, B]   | fp32  |                                     2 for each row of the kernel;
| bias   | [N]            | fp32  |                                     2 kept P Q B FLOPs
| index  | `Conv2dIndex`  |       |  where the kept weights are

The batch has to be contiguous, all else may have any strides. Pixels at multiples of 64 bytes are fast: for
60 columns, room for 64. What lies between B and the stride is neither read nor written.

What a kept weight touches is a row of pixels times the batch. The kernel takes 16 columns of the batch and a
strip of the image at a time, copies the few rows of x that a row of y needs into a ring in the second-level
cache, with zeros around them, and holds up to six pixels of one filter in registers. Between convolutions
the copy can be saved: `Slices` are images that lie as the ring would. dv is found where weights are kept and
nowhere else; db comes along for nothing, since dy is read anyway.

A pruned weight is not multiplied: NaN and infinity in x reach y through kept weights only. The zeros around
the image are multiplied like any pixel. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native, _pieces
from sparselth.kernels._choose import use_native

CELL = 16  # columns of the batch that are worked on at a time; 64 bytes
RING = 448 << 10  # bytes of packed rows that a small second-level cache still holds
NEAR = 24 << 10  # bytes of x that stay in the first-level cache
WORTH, WORTH_DV = 14, 36  # kept weights of a filter that pay for another block of channels
LARGE, WORTH_LARGE = 48 << 10, 20  # a first-level cache from which on it takes more
PIXELS = 8  # of one filter in registers, at most


@dataclass(frozen=True, eq=False)
class Taps:
    """The kept weights in the order in which one direction of the product meets them."""

    starts: Tensor  # int32 [phases * blocks * filters + 1]: where those of a block and filter begin
    cells: Tensor  # uint16 [window, kept]: where x begins in the packed rows, for each rotation of the ring
    order: Tensor | None  # int32 [kept]: which value, None: one after the other; blocks come one by one
    phases: Tensor  # int32 [phases, 2]: row and column of the first place in y
    channels: int
    filters: int
    window: int  # rows of x that one row of y needs
    step: int  # from one row of y to the next
    first: tuple[int, int]  # row and column of x where the first window begins
    length: int  # columns of a strip of x, of one residue
    strip: int  # places across y that are done at a time
    places: tuple[int, int]  # down and across, of every phase
    y_step: int  # from one place to the next in y
    blocks: int  # of channels
    joined: int  # blocks at a time for dv

    @staticmethod
    def of(
        row: Tensor,
        channel: Tensor,
        i: Tensor,
        j: Tensor,
        order: Tensor | None,
        *,
        filters: int,
        channels: int,
        kernel: tuple[int, int],
        step: int,
        first: tuple[int, int],
        places: tuple[int, int],
        y_step: int,
        phases: Tensor,
    ) -> Taps:
        """From int64 [kept] each: row = phase * filters + filter and, within a row, channel ascend."""
        window, more = kernel[0], (kernel[1] - 1) // step
        column, across = max(1, window * channels * step), places[1]  # cells to a column of packed rows
        widest = min(max(PIXELS, RING // (4 * CELL * column) - more), (1 << 16) // column - more)
        if widest < min(2, across):
            raise ValueError(f"{channels} channels are too many for a kernel of {kernel[0]} x {kernel[1]}")
        strip = -(-across // -(-across // widest))
        if strip < across:
            strip -= strip % 2  # pairs for a pool
        length = strip + more
        rows, kept = len(phases) * filters, len(row)
        near = -(-column * (min(PIXELS, strip) + more) * 4 * CELL // NEAR)
        worth = WORTH_LARGE if _native.first_level() >= LARGE else WORTH
        blocks = max(1, min(near, channels, kept // (worth * max(1, rows))))
        joined = -(-blocks // max(1, kept // (WORTH_DV * max(1, rows))))
        part = (row // filters * blocks + channel * blocks // max(1, channels)) * filters + row % filters
        if blocks > 1:
            by = torch.sort(part, stable=True).indices
            channel, i, j = channel[by], i[by], j[by]
            order = (by if order is None else order[by]).int()
        starts = torch.zeros(rows * blocks + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.bincount(part, minlength=rows * blocks).cumsum(0)
        cells = torch.empty(window, kept, dtype=torch.uint16, device="cpu")
        for turn in range(window):
            line = (i + turn) % window * channels + channel
            cells[turn] = (line * step + j % step) * length + j // step
        return Taps(
            starts=starts,
            cells=cells,
            order=order,
            phases=phases.view(-1, 2),
            channels=channels,
            filters=filters,
            window=window,
            step=step,
            first=first,
            length=length,
            strip=strip,
            places=places,
            y_step=y_step,
            blocks=blocks,
            joined=joined,
        )

    def bytes(self) -> int:
        parts = [t for t in (self.starts, self.cells, self.order, self.phases) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts)


@dataclass(frozen=True, eq=False)
class Slices:
    """Images [C, H, W, B] as a convolution may read them in place: 16 of the batch at a time, row by row."""

    memory: Tensor  # [slices, H + 2 padding, C, W + 2 padding, 16], zeros around each image
    padding: int

    @property
    def images(self) -> Tensor:
        """[slices, C, H, W, 16]"""
        p, (_, h, _, w, _) = self.padding, self.memory.shape
        return self.memory[:, p : h - p, :, p : w - p].permute(0, 2, 1, 3, 4)


@dataclass(frozen=True, eq=False)
class Conv2dIndex:
    """Where the kept weights of W [N, C, kh, kw] are, for images of one size."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    stride: int
    padding: int
    forward: Taps
    backward: Taps | None

    @staticmethod
    def from_dense(
        mask: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0, backward: bool = True
    ) -> Conv2dIndex:
        """The index of a bool mask [N, C, kh, kw], True = kept; without `backward` it knows no dx."""
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(f"expected a bool mask [N, C, kh, kw], got {mask.dtype} {list(mask.shape)}")
        n, c, kh, kw = mask.shape
        h, w = size
        if stride < 1 or padding < 0 or h + 2 * padding < kh or w + 2 * padding < kw:
            raise ValueError(
                f"expected images of {kh} x {kw} or more, got {h} x {w}, padding {padding}, stride {stride}"
            )
        out, inner, i, j = mask.nonzero().t()
        forward = Taps.of(
            *(out, inner, i, j, None),
            filters=n,
            channels=c,
            kernel=(kh, kw),
            step=stride,
            first=(-padding, -padding),
            places=((h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1),
            y_step=1,
            phases=torch.zeros(1, 2, dtype=torch.int32, device="cpu"),
        )
        if not backward:
            return Conv2dIndex((n, c, kh, kw), size, stride, padding, forward, None)
        # A pixel of dx at row h meets row (h + padding - i) / stride of dy: rows i of one residue only.
        s, begin = stride, padding // stride
        residue = torch.arange(s, dtype=torch.int32, device="cpu") + s * begin - padding
        window, across = -(-kh // s), -(-kw // s)
        row = (i % s * s + j % s) * c + inner
        order = torch.sort(row, stable=True).indices
        i, j = window - 1 - i // s, across - 1 - j // s
        turned = Taps.of(
            *(row[order], out[order], i[order], j[order], order.int()),
            filters=c,
            channels=n,
            kernel=(window, across),
            step=1,
            first=(begin - window + 1, begin - across + 1),
            places=((padding + h - 1) // s - begin + 1, (padding + w - 1) // s - begin + 1),
            y_step=s,
            phases=torch.cartesian_prod(residue, residue),
        )
        return Conv2dIndex((n, c, kh, kw), size, stride, padding, forward, turned)

    @property
    def out(self) -> tuple[int, int]:
        """P and Q."""
        return self.forward.places

    @property
    def halves(self) -> tuple[int, int]:
        """P and Q after a pool of 2 x 2."""
        return self.out[0] // 2, self.out[1] // 2

    @property
    def direct(self) -> bool:
        """Whether x may lie as it is read."""
        return self.stride == 1 and self.forward.strip == self.forward.places[1]

    def slices(self, batch: int) -> Slices | None:
        """Room for an x that is read in place; None where that cannot be."""
        (_, c, _, _), (h, w), p = self.shape, self.size, self.padding
        if not self.direct:
            return None
        return Slices(
            torch.zeros(-(-batch // CELL), h + 2 * p, c, w + 2 * p, CELL, dtype=torch.float32, device="cpu"),
            p,
        )

    @property
    def kept(self) -> int:
        return self.forward.cells.shape[1]

    def bytes(self) -> int:
        """Memory of the index without the values."""
        return self.forward.bytes() + (self.backward.bytes() if self.backward else 0)

    def positions(self) -> Tensor:
        """Where in the flattened W every kept weight is, int64 [kept]."""
        n, c, kh, kw = self.shape
        taps = self.forward
        filters = torch.repeat_interleave(taps.starts.diff().long()) % max(1, n)
        cell = taps.cells[0].long()
        row, cell = cell // (taps.step * taps.length), cell % (taps.step * taps.length)
        j = cell % taps.length * taps.step + cell // taps.length
        found = ((filters * c + row % c) * kh + row // c) * kw + j
        if taps.order is None:
            return found
        return torch.empty_like(found).index_copy_(0, taps.order.long(), found)

    def gather(self, dense: Tensor) -> Tensor:
        """The kept weights of a dense [N, C, kh, kw]."""
        return dense.reshape(-1)[self.positions()]

    def to_dense(self, values: Tensor) -> Tensor:
        """The dense [N, C, kh, kw] of kept weights, 0 elsewhere."""
        n, c, kh, kw = self.shape
        dense = values.new_zeros(n * c * kh * kw)
        dense[self.positions()] = values
        return dense.view(self.shape)


def floor(index: Conv2dIndex, batch: int) -> dict[str, int]:
    """Bytes and FLOPs of `sparse_conv2d`; input_grad and weight_grad take as many."""
    n, c, _, _ = index.shape
    (h, w), (p, q) = index.size, index.out
    return {
        "bytes": 4 * index.kept + index.forward.bytes() + 4 * batch * (c * h * w + n * p * q),
        "flops": 2 * index.kept * p * q * batch,
    }


def reference(
    index: Conv2dIndex,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    """The dense convolution."""
    y = F.conv2d(x.permute(3, 0, 1, 2), index.to_dense(values), bias, index.stride, index.padding)
    y = y.relu() if relu else y
    return (F.max_pool2d(y, 2) if pool else y).permute(1, 2, 3, 0)


def reference_grads(
    index: Conv2dIndex, values: Tensor, x: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dv and db of the dense convolution."""
    pair, pad = [index.stride] * 2, [index.padding] * 2
    u, v, w = dy.permute(3, 0, 1, 2), x.permute(3, 0, 1, 2), index.to_dense(values)
    dx, dw, db = torch.ops.aten.convolution_backward(
        u, v, w, [len(w)], pair, pad, [1, 1], False, [0, 0], 1, [True, True, True]
    )
    return dx.permute(1, 2, 3, 0), index.gather(dw), db


def sparse_conv2d(
    index: Conv2dIndex,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
    kernels: str = "auto",
    pool: bool = False,
) -> Tensor:
    """act(conv(x, W) + b) as [N, P, Q, B]; `relu` makes act the rectifier; `pool` adds a maximum of 2 x 2."""
    p, q = index.halves if pool else index.out
    y = x.new_empty(index.shape[0], p, q, x.shape[-1]) if out is None else out
    bind_sparse_conv2d(index, values, x, bias, y, relu, kernels, pool)()
    return y


def sparse_conv2d_input_grad(
    index: Conv2dIndex, values: Tensor, dy: Tensor, out: Tensor | None = None, kernels: str = "auto"
) -> Tensor:
    """The gradient of x as [C, H, W, B]."""
    dx = dy.new_empty(index.shape[1], *index.size, dy.shape[-1]) if out is None else out
    bind_sparse_conv2d_input_grad(index, values, dy, dx, kernels)()
    return dx


def sparse_conv2d_weight_grad(
    index: Conv2dIndex, dy: Tensor, x: Tensor, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The gradients of the kept weights [kept] and of the bias [N]."""
    dv, db = x.new_empty(index.kept), x.new_empty(index.shape[0])
    bind_sparse_conv2d_weight_grad(index, dy, x, dv, db, kernels)()
    return dv, db


# The bound forms check once; each call of what they return is one foreign call on the same memory. The
# values, x, ... may change between calls, not their addresses.


def bind_sparse_conv2d(
    index: Conv2dIndex,
    values: Tensor,
    x: Tensor | Slices,
    bias: Tensor | None,
    y: Tensor | Slices,
    relu: bool = False,
    kernels: str = "auto",
    pool: bool = False,
) -> Callable[[], None]:
    """`sparse_conv2d` on fixed tensors, the result in `y` [N, P, Q, B].

    `pool` takes the maximum of 2 x 2 pixels; y is then [N, P // 2, Q // 2, B]. Native kernels also take
    `Slices`: as x what `index.slices` made, as y what the next layer's made.
    """
    _check(index, x, y, pool, values=(values, index.kept), bias=(bias, index.shape[0]))
    if use_native(kernels):
        return _bind("sparse_conv2d", index.forward, x, y, values=values, bias=bias, relu=relu, pool=pool)
    if isinstance(x, Slices) or isinstance(y, Slices):
        raise ValueError(f"slices: expected native kernels, got kernels={kernels!r}, {_native.WHY}")

    def run() -> None:
        y.copy_(reference(index, values, x, bias, relu, pool))

    return run


def bind_sparse_conv2d_add(
    index: Conv2dIndex,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    relu: bool = False,
    kernels: str = "auto",
) -> Callable[[], None]:
    """On fixed tensors, y [N, P, Q, B] = act(y + conv(x, W) + b): y is read once and written once."""
    _check(index, x, y, values=(values, index.kept), bias=(bias, index.shape[0]))
    if use_native(kernels):
        return _bind("sparse_conv2d_add", index.forward, x, y, values=values, bias=bias, relu=relu)

    def run() -> None:
        y.add_(reference(index, values, x, bias))
        if relu:
            y.relu_()

    return run


def bind_sparse_conv2d_input_grad(
    index: Conv2dIndex, values: Tensor, dy: Tensor, dx: Tensor, kernels: str = "auto"
) -> Callable[[], None]:
    """`sparse_conv2d_input_grad` on fixed tensors, the result in `dx` [C, H, W, B]."""
    _check(index, dx, dy, values=(values, index.kept))
    if index.backward is None:
        raise ValueError("this index was made with backward=False and knows no dx")
    if use_native(kernels):
        return _bind("sparse_conv2d", index.backward, dy, dx, values=values)

    def run() -> None:
        dx.copy_(reference_grads(index, values, dx, dy)[0])

    return run


def bind_sparse_conv2d_weight_grad(
    index: Conv2dIndex,
    dy: Tensor,
    x: Tensor,
    dv: Tensor,
    db: Tensor | None = None,
    kernels: str = "auto",
) -> Callable[[], None]:
    """`sparse_conv2d_weight_grad` on fixed tensors, the results in `dv` [kept] and `db` [N]."""
    _check(index, x, dy, dv=(dv, index.kept), db=(db, index.shape[0]))
    if use_native(kernels):
        return _bind("sparse_conv2d_weight_grad", index.forward, x, dy, dv=dv, dbias=db)

    def run() -> None:
        _, values, bias = reference_grads(index, torch.zeros_like(dv), x, dy)
        dv.copy_(values)
        if db is not None:
            db.copy_(bias)

    return run


class _Arguments(ctypes.Structure):  # struct sparse_conv2d
    _fields_ = [
        *[(f, ctypes.c_void_p) for f in ("starts", "cells", "order", "phases", "values", "bias", "x", "y")],
        *[(f, ctypes.c_void_p) for f in ("dv", "dbias", "work")],
        *[(f, ctypes.c_int64) for f in ("kept", "channels", "height", "width")],
        *[(f, ctypes.c_int64) for f in ("x_channel", "x_row", "x_column", "filters", "y_height", "y_width")],
        *[(f, ctypes.c_int64) for f in ("y_channel", "y_row", "y_column", "x_slice", "y_slice")],
        *[(f, ctypes.c_int64) for f in ("batch", "window", "step", "first_row", "first_column")],
        *[(f, ctypes.c_int64) for f in ("length", "strip", "places_down")],
        *[
            (f, ctypes.c_int64)
            for f in ("places_across", "phase_count", "y_step", "blocks", "joined", "slot")
        ],
        *[(f, ctypes.c_int32) for f in ("relu", "pool", "direct", "threads")],
    ]


def _bind(
    entry: str,
    taps: Taps,
    x: Tensor | Slices,
    y: Tensor | Slices,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    dv: Tensor | None = None,
    dbias: Tensor | None = None,
    relu: bool = False,
    pool: bool = False,
) -> Callable[[], None]:
    direct = isinstance(x, Slices)
    (x, x_slice, in_x), (y, y_slice, in_y) = _room(x), _room(y)
    kept, batch = taps.cells.shape[1], min(in_x, in_y)
    pieces = -(-batch // CELL) * -(-taps.places[1] // taps.strip)
    threads = max(1, min(_native.threads(), pieces))
    ring = 0 if direct else taps.window * taps.channels * taps.step * taps.length * CELL
    every = kept + taps.filters
    slot = ring + CELL * (every if dv is not None else 0) + CELL * PIXELS * taps.filters
    work = _pieces.take([kept + 2 * CELL + threads * slot + (pieces * every if dv is not None else 0)])
    aligned = work.data_ptr() + -work.data_ptr() % (4 * CELL)
    arguments = _Arguments(
        starts=taps.starts.data_ptr(),
        cells=taps.cells.data_ptr(),
        order=_native.address(taps.order),
        phases=taps.phases.data_ptr(),
        values=_native.address(values),
        bias=_native.address(bias),
        x=x.data_ptr(),
        y=y.data_ptr(),
        dv=_native.address(dv),
        dbias=_native.address(dbias),
        work=aligned,
        kept=kept,
        channels=x.shape[0],
        height=x.shape[1],
        width=x.shape[2],
        x_channel=x.stride(0),
        x_row=x.stride(1),
        x_column=x.stride(2),
        filters=y.shape[0],
        y_height=y.shape[1] * (1 + pool),
        y_width=y.shape[2] * (1 + pool),
        y_channel=y.stride(0),
        y_row=y.stride(1),
        y_column=y.stride(2),
        x_slice=x_slice,
        y_slice=y_slice,
        batch=batch,
        window=taps.window,
        step=taps.step,
        first_row=taps.first[0],
        first_column=taps.first[1],
        length=taps.length,
        strip=taps.strip,
        places_down=taps.places[0],
        places_across=taps.places[1],
        phase_count=len(taps.phases),
        y_step=taps.y_step,
        blocks=taps.blocks,
        joined=taps.joined,
        slot=slot,
        relu=relu,
        pool=pool,
        direct=direct,
        threads=threads,
    )
    return _native.bind(entry, arguments, taps, x, y, values, bias, dv, dbias, work)


def _room(t: Tensor | Slices) -> tuple[Tensor, int, int]:
    """[C, H, W, B] or the first slice; floats from 16 of the batch to the next; room for which batch."""
    if not isinstance(t, Slices):
        return t, CELL, t.shape[-1]
    return t.images[0], t.memory.stride(0), CELL * len(t.memory)


def _check(
    index: Conv2dIndex,
    x: Tensor | Slices,
    y: Tensor | Slices,
    pool: bool = False,
    **vectors: tuple[Tensor | None, int],
) -> None:
    n, c, _, _ = index.shape
    if isinstance(x, Slices) and not (
        index.direct and x.padding == index.padding and x.memory.is_contiguous()
    ):
        raise ValueError(f"x: expected what index.slices makes, got slices with padding {x.padding}")
    batch = x.shape[-1] if isinstance(x, Tensor) else min(_room(x)[2], _room(y)[2])
    images = {
        f"x or dx [{c}, {index.size}]": (x, (c, *index.size)),
        "y or dy": (y, (n, *(index.halves if pool else index.out))),
    }
    for name, (image, pixels) in images.items():
        t = image.images if isinstance(image, Slices) else image
        shape = (-(-batch // CELL), *pixels, CELL) if isinstance(image, Slices) else (*pixels, batch)
        _native.check(name, t, shape)
        if batch > 1 and t.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous batch, got strides {t.stride()}")
    for name, (v, size) in vectors.items():
        _native.vector(name, v, size)
