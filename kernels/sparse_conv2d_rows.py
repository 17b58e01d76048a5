r"""Convolution with a sparse weight on images as torch has them, for inference on CPUs: fast for one image.

    y[b, n, p, q] = act(bias[n] + sum over kept (n, c, i, j) of v x[b, c, p s + i - pad, q s + j - pad])

| name   | shape          | dtype |                           Floor, bytes and FLOPs:
| x      | [B, C, H, W]   | fp32  |  contiguous               x, y and the bias once each,
| y      | [B, N, P, Q]   | fp32  |  contiguous               4 + 2 bytes a kept weight,
| bias   | [N]            | fp32  |                           2 kept P Q B FLOPs
| packed | `ConvRows` |       |  the kept weights and where they are

`sparse_conv2d` has 16 images side by side and wants a layout of its own; here pixels are side by side. The
images that are worked on are copied into planes with zeros around them, one for each channel, in which all
places of y that are computed at once are one run, across the ends of rows; a kept weight is the distance from
such a run to its input. Small images lie below each other in a plane, so the layout depends on the batch that
it is meant for; any batch is right.

A pruned weight is not multiplied: NaN and infinity in x reach y through kept weights only. The zeros around
the image are multiplied like any pixel. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

LINE = 16  # floats of a cache line
RUN = 96  # places of y that registers hold, of one filter
LONGEST = 16  # floats of the largest vector
NEAR = 24 << 10  # bytes of the planes that stay in the first-level cache
FAR = 192 << 10  # bytes of the planes that stay in the second-level cache
WORTH = 14  # kept weights of a filter that pay for another block of channels
WORK = 1 << 18  # FLOPs that pay for another thread
SHARE = 8  # pieces for each thread that make up for unequal ones


@dataclass(frozen=True, eq=False)
class ConvRows:
    """The kept weights of W [N, C, kh, kw] in the order in which they are read, for images of one size."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    stride: int
    padding: int
    planes: tuple[int, int]  # of a channel: residues of its rows and columns
    more: tuple[int, int]  # rows and columns that the last place of y needs beyond its own
    row: int  # floats of a plane from one row to the next
    image_rows: int  # rows from one image to the one below it
    pitch: int  # floats from one plane to the next
    group: int  # images that lie below each other
    strip: int  # rows of y that are worked on at a time
    blocks: int  # of channels
    starts: Tensor  # int32 [blocks * N + 1]: where the kept weights of a block and filter begin
    cells: Tensor  # uint16 [kept]: from the first place of a run to its input, within a block
    values: Tensor  # fp32 [kept]

    @staticmethod
    def from_dense(
        weight: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 0, batch: int = 1
    ) -> ConvRows:
        """The numbers of a weight that are not zero, for images of this size, about `batch` at a time."""
        if weight.dim() != 4 or weight.dtype != torch.float32 or not weight.is_cpu:
            raise ValueError(
                f"expected a weight [N, C, kh, kw] in fp32 on a CPU, "
                f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        weight = weight.detach()
        n, c, *kernel = weight.shape
        room = [a + 2 * padding - k for a, k in zip(size, kernel, strict=True)]
        if stride < 1 or padding < 0 or min(kernel) < 1 or min(room) < 0:
            raise ValueError(
                f"expected images of {kernel[0]} x {kernel[1]} or more, "
                f"got {size[0]} x {size[1]}, padding {padding}, stride {stride}"
            )
        places = [a // stride + 1 for a in room]
        down, across = places
        more = [(k - 1) // stride for k in kernel]
        planes = [min(stride, k) for k in kernel]
        image_rows, row = (
            places[d] + more[d] - _shared(size[d], planes[d], places[d], more[d], stride, padding)
            for d in (0, 1)
        )
        several = planes[0] * planes[1]

        # As many small images as registers hold, else strips of a large one.
        image, one = image_rows * row, (down - 1) * row + across
        group = max(1, min(batch, 1 + (RUN - one) // image))
        group = -(-batch // -(-batch // group)) if batch else 1
        fits = FAR // (4 * max(1, c) * several * row) - more[0]
        strips = -(-down // max(1, fits)) if group == 1 else 1
        strip = -(-down // strips)
        strip += strip % 2 if strips > 1 else 0  # pairs for a pool
        run = ((group - 1) * image_rows + strip - 1) * row + across
        reach = more[0] * row + more[1]
        lines = -(-(((group - 1) * image_rows + strip + more[0]) * row + more[1]) // LINE)
        if run > RUN:
            lines |= 1  # else the same lines of all channels would share a few places of a cache
        pitch = lines * LINE
        together = (1 << 16) // (several * pitch)
        if not together:
            raise ValueError(f"images of {size[0]} x {size[1]} are too wide")

        out, inner, i, j = weight.nonzero().unbind(1)
        kept = len(out)
        near = -(-4 * c * several * (min(run, RUN) + reach) // NEAR)
        blocks = max(1, -(-c // together), min(near, c, kept // (WORTH * max(1, n))))
        block = inner * blocks // max(1, c)
        part = block * n + out
        order = torch.sort(part, stable=True).indices
        starts = torch.zeros(blocks * n + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.bincount(part, minlength=blocks * n).cumsum(0)
        first = (block * c + blocks - 1) // blocks
        plane = ((inner - first) * planes[0] + i % stride) * planes[1] + j % stride
        cells = plane * pitch + i // stride * row + j // stride
        return ConvRows(
            shape=(n, c, kernel[0], kernel[1]),
            size=(size[0], size[1]),
            stride=stride,
            padding=padding,
            planes=(planes[0], planes[1]),
            more=(more[0], more[1]),
            row=row,
            image_rows=image_rows,
            pitch=pitch,
            group=group,
            strip=strip,
            blocks=blocks,
            starts=starts,
            cells=cells[order].to(torch.uint16),
            values=weight[out, inner, i, j][order],
        )

    @property
    def out(self) -> tuple[int, int]:
        """P and Q."""
        (h, w), (_, _, kh, kw), twice = self.size, self.shape, 2 * self.padding
        return (h + twice - kh) // self.stride + 1, (w + twice - kw) // self.stride + 1

    @property
    def halves(self) -> tuple[int, int]:
        """P and Q after a pool of 2 x 2."""
        return self.out[0] // 2, self.out[1] // 2

    @property
    def kept(self) -> int:
        return self.values.numel()

    def bytes(self) -> int:
        """Memory of values and index."""
        return sum(t.numel() * t.element_size() for t in (self.starts, self.cells, self.values))

    def to_dense(self) -> Tensor:
        """The dense [N, C, kh, kw], 0 where nothing is kept."""
        n, c, kh, kw = self.shape
        part = torch.repeat_interleave(self.starts.diff().long())
        block, out = part // max(1, n), part % max(1, n)
        plane, at = self.cells.long() // self.pitch, self.cells.long() % self.pitch
        inner = (block * c + self.blocks - 1) // self.blocks + plane // (self.planes[0] * self.planes[1])
        i = at // self.row * self.stride + plane // self.planes[1] % self.planes[0]
        j = at % self.row * self.stride + plane % self.planes[1]
        dense = self.values.new_zeros(n, c, kh, kw)
        dense[out, inner, i, j] = self.values
        return dense


def _shared(size: int, planes: int, places: int, more: int, stride: int, padding: int) -> int:
    """How many zeros behind an image or row can be those in front of the next."""
    needed, shared = places + more, min(more, places - 1)  # so that a cell is one place of the kernel
    for residue in range(planes):
        lead = -(-max(0, padding - residue) // stride)
        tail = needed - -(-(size + padding - residue) // stride)
        shared = min(shared, lead, max(0, tail))
    return shared


def floor(packed: ConvRows, batch: int) -> dict[str, int]:
    """Bytes and FLOPs of `sparse_conv2d_rows`."""
    n, c, _, _ = packed.shape
    (h, w), (p, q) = packed.size, packed.out
    return {
        "bytes": packed.bytes() + 4 * batch * (c * h * w + n * p * q),
        "flops": 2 * packed.kept * p * q * batch,
    }


def reference(
    packed: ConvRows, x: Tensor, bias: Tensor | None = None, relu: bool = False, pool: bool = False
) -> Tensor:
    """The dense convolution."""
    y = F.conv2d(x, packed.to_dense().to(x.dtype), bias, packed.stride, packed.padding)
    y = y.relu() if relu else y
    return F.max_pool2d(y, 2) if pool else y


def sparse_conv2d_rows(
    packed: ConvRows,
    x: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    pool: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """act(conv(x, W) + b) as [B, N, P, Q]; `relu` makes act the rectifier; `pool` adds a maximum of 2 x 2."""
    return sparse_conv2d_rows_call(packed, bias, relu, pool, kernels)(x)


def sparse_conv2d_rows_call(
    packed: ConvRows,
    bias: Tensor | None = None,
    relu: bool = False,
    pool: bool = False,
    kernels: str = "auto",
) -> Callable[[Tensor], Tensor]:
    """`sparse_conv2d_rows` of any x, for repeated calls: what a batch needs is made once."""
    _native.refuse_gradient(bias=bias, values=packed.values)
    n, _, _, _ = packed.shape
    places = packed.halves if pool else packed.out
    if not use_native(kernels):

        def plain(x: Tensor) -> Tensor:
            x = x.contiguous()
            _image("x", x, len(x), _inputs(packed))
            return reference(packed, x, bias, relu, pool)

        return plain
    idle: dict[tuple[int, int], list[tuple[_Arguments, Callable[[], None]]]] = {}

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        _image("x", x, len(x), _inputs(packed))
        y = x.new_empty(len(x), n, *places)
        free = idle.setdefault((len(x), _native.threads()), [])
        try:
            arguments, call = free.pop()  # nobody else's while it works
        except IndexError:
            arguments, call = _bind(packed, len(x), bias, relu, pool)
        arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
        call()
        free.append((arguments, call))
        return y

    return run


def bind_sparse_conv2d_rows(
    packed: ConvRows,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    relu: bool = False,
    pool: bool = False,
    kernels: str = "auto",
) -> Callable[[], None]:
    """`sparse_conv2d_rows` on fixed tensors: each call of what this returns is one foreign call."""
    _native.refuse_gradient(bias=bias, values=packed.values)
    _image("x", x, len(x), _inputs(packed))
    _image("y", y, len(x), (packed.shape[0], *(packed.halves if pool else packed.out)))
    if not use_native(kernels):

        def run() -> None:
            y.copy_(reference(packed, x, bias, relu, pool))

        return run
    arguments, call = _bind(packed, len(x), bias, relu, pool, x, y)
    arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
    return call


class _Arguments(ctypes.Structure):  # struct sparse_conv2d_rows
    _fields_ = [
        *[(f, ctypes.c_void_p) for f in ("starts", "cells", "values", "bounds", "bias", "x", "y", "work")],
        *[(f, ctypes.c_int64) for f in ("batch", "channels", "height", "width", "filters", "down", "across")],
        *[(f, ctypes.c_int64) for f in ("step", "padding", "planes_down", "planes_across")],
        *[(f, ctypes.c_int64) for f in ("more_rows", "more_columns", "row", "image_rows", "pitch")],
        *[(f, ctypes.c_int64) for f in ("group", "strip", "blocks", "parts", "slot")],
        *[(f, ctypes.c_int32) for f in ("relu", "pool", "threads")],
    ]


def _bind(
    packed: ConvRows, batch: int, bias: Tensor | None, relu: bool, pool: bool, *alive: Tensor
) -> tuple[_Arguments, Callable[[], None]]:
    n, c, _, _ = packed.shape
    _native.vector("bias", bias, n)
    p, q = packed.out
    whole = -(-batch // packed.group) * -(-p // packed.strip)  # pieces with all filters
    threads = max(1, min(_native.threads(), 1 + floor(packed, batch)["flops"] // WORK))
    parts = 1 if whole >= SHARE * threads or not whole else threads // gcd(whole, threads)
    threads = max(1, min(threads, whole * parts))
    bounds = _bounds(packed, parts)
    slot = c * packed.planes[0] * packed.planes[1] * packed.pitch + 64
    slot += n * RUN // 8 * LONGEST if packed.blocks > 1 else 0
    slot += packed.group * n * p * q if pool else 0
    slot = -(-slot // LINE) * LINE
    work = _native.scratch(threads * slot + 2 * LINE)
    arguments = _Arguments(
        starts=packed.starts.data_ptr(),
        cells=packed.cells.data_ptr(),
        values=packed.values.data_ptr(),
        bounds=bounds.data_ptr(),
        bias=_native.address(bias),
        work=work.data_ptr() + -work.data_ptr() % (4 * LINE),
        batch=batch,
        channels=c,
        height=packed.size[0],
        width=packed.size[1],
        filters=n,
        down=p,
        across=q,
        step=packed.stride,
        padding=packed.padding,
        planes_down=packed.planes[0],
        planes_across=packed.planes[1],
        more_rows=packed.more[0],
        more_columns=packed.more[1],
        row=packed.row,
        image_rows=packed.image_rows,
        pitch=packed.pitch,
        group=packed.group,
        strip=packed.strip,
        blocks=packed.blocks,
        parts=parts,
        slot=slot,
        relu=relu,
        pool=pool,
        threads=threads,
    )
    alive_too = packed, bias, bounds, work
    return arguments, _native.bind("sparse_conv2d_rows", arguments, *alive_too, *alive)


def _bounds(packed: ConvRows, parts: int) -> Tensor:
    """The first filter of each part, int32 [parts + 1]: about as many kept weights in each."""
    n = packed.shape[0]
    counts = packed.starts.diff().view(packed.blocks, n).sum(0)
    work = (counts + 4).cumsum(0)  # a filter costs something even when it is empty
    bounds = torch.zeros(parts + 1, dtype=torch.int32, device="cpu")
    bounds[parts] = n
    if n:
        bounds[1:parts] = torch.searchsorted(work, work[-1:] * torch.arange(1, parts, device="cpu") // parts)
    return bounds


def _inputs(packed: ConvRows) -> tuple[int, int, int]:
    return packed.shape[1], *packed.size


def _image(name: str, t: Tensor, batch: int, shape: tuple[int, int, int]) -> None:
    _native.check(name, t, (batch, *shape))
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous [B, C, H, W], got strides {t.stride()}")
