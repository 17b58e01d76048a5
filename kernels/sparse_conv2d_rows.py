r"""Convolution with a sparse weight on images as torch has them, for inference on CPUs: fast for one image.

    y[b, n, p, q] = act(bias[n] + sum over kept (n, c, i, j) of v x[b, c, p s + i - pad, q s + j - pad])
    adds: the same with the old y[b, n, p, q] in the sum

| name   | shape          | dtype |                           Floor, bytes and FLOPs:
| x      | [B, C, H, W]   | fp32  |  contiguous               x, y and the bias once each,
| y      | [B, N, P, Q]   | fp32  |  contiguous               4 + 2 bytes a kept weight,
| bias   | [N]            | fp32  |                           2 kept P Q B FLOPs
| packed | `ConvRows` |       |  the kept weights and where they are

`sparse_conv2d` has 16 images side by side and wants a layout of its own; here pixels are side by side. The
images that are worked on are copied into planes with zeros around them, one for each channel, in which all
places of y that are computed at once are one run, across the ends of rows; a kept weight is the distance from
such a run to its input. Small images lie below each other in a plane, so the layout depends on the batch that
it is meant for; any batch is right. Between convolutions the copy can be saved: `Planes` are images that lie
as they are read.

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

from sparselth.kernels import _activations, _native
from sparselth.kernels._activations import ACTIVATIONS
from sparselth.kernels._choose import use_native

LINE = 16  # floats of a cache line
RUN = 96  # places of y that registers hold, of one filter
VECTORS = 12  # of a run, in registers
MOST = VECTORS * LINE  # places of a run, in the largest vectors
NEAR = 24 << 10  # bytes of the planes that stay in the first-level cache
FAR = 192 << 10  # bytes of the planes that stay in the second-level cache
FURTHER = 768 << 10  # as many more as make runs longer, up to MOST: they would leave registers empty
WORTH = 14  # kept weights of a filter that pay for another block of channels
WORK = 1 << 18  # FLOPs that pay for another thread
SHARE = 8  # pieces for each thread that make up for unequal ones


@dataclass(frozen=True, eq=False)
class Planes:
    """Images [B, C, H, W] as convolutions may read them in place and write them: a plane for each channel.

    In `parts` an image is so many images of fewer rows, without zeros: where each is one thread's, no core
    fetches ahead what another one writes. Convolutions alone take such; a shorter run may be summed up in
    another order.
    """

    memory: Tensor  # [B parts, C, pitch], zeros around each image; behind the last one room for some vectors
    size: tuple[int, int]
    row: int  # floats from one row to the next
    padding: int  # rows of zeros above an image, columns of them before it
    parts: int = 1

    @staticmethod
    def of(
        batch: int,
        channels: int,
        size: tuple[int, int],
        row: int = 0,
        padding: int = 0,
        pitch: int = 0,
        parts: int = 1,
    ) -> Planes:
        """Zeros; without more than a size the images have none around them. Each begins with a cache line.

        `parts`: a divisor of the rows, of images without zeros around them.
        """
        pitch = pitch or -(-size[0] // parts * size[1] // LINE) * LINE
        row, floats = row or size[1], batch * parts * channels * pitch
        lead = -padding * (row + 1) % LINE
        memory = torch.zeros(lead + floats + 4 * LINE, dtype=torch.float32, device="cpu")
        return Planes(
            memory[lead : lead + floats].view(batch * parts, channels, pitch), size, row, padding, parts
        )

    @property
    def batch(self) -> int:
        return len(self.memory) // self.parts

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, C, H, W]"""
        return self.batch, self.memory.shape[1], *self.size

    @property
    def images(self) -> Tensor:
        """[B, C, H, W]; in parts [B parts, C, H / parts, W]."""
        b, c, pitch = self.memory.shape
        first = self.memory.storage_offset() + self.padding * (self.row + 1)
        strides = c * pitch, pitch, self.row, 1
        return self.memory.as_strided((b, c, self.size[0] // self.parts, self.size[1]), strides, first)

    def get(self) -> Tensor:
        """[B, C, H, W] in memory of its own."""
        images: Tensor = self.images.unflatten(0, (self.batch, self.parts)).transpose(1, 2)
        return images.clone(memory_format=torch.contiguous_format).view(self.shape)

    def put(self, images: Tensor) -> None:
        """Fill it with [B, C, H, W]."""
        parts = images.unflatten(2, (self.parts, -1)).transpose(1, 2)
        self.images.unflatten(0, (self.batch, self.parts)).copy_(parts)

    @property
    def geometry(self) -> tuple[int, ...]:
        return (*self.memory.shape, *self.size, self.row, self.padding, self.parts)

    @property
    def bare(self) -> bool:
        """Whether zeros stand behind images alone: there the rest of a vector may be written."""
        return self.padding == 0 and self.row == self.size[1] and self.memory.shape[2] % LINE == 0


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
    unit: int  # floats that a cell counts: of 1 x 1 filters a plane, else 1
    group: int  # images that lie below each other
    strip: int  # rows of y that are worked on at a time
    blocks: int  # of channels
    starts: Tensor  # int32 [blocks * N + 1]: where the kept weights of a block and filter begin
    cells: Tensor  # uint16 [kept], times unit: from the first place of a run to its input, within a block
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
        wider = -(-row // LINE) * LINE
        short, long = (-(-((down - 1) * r + across) // LINE) for r in (row, wider))
        if short == long and long * LINE > RUN and more[1]:
            row = wider  # as many vectors, and of each column of the kernel they lie alike in all its rows

        # As many small images as registers hold, else strips of a large one.
        image, one = image_rows * row, (down - 1) * row + across
        group = max(1, min(batch, 1 + (RUN - one) // image))
        group = -(-batch // -(-batch // group)) if batch else 1
        fits, further = (size // (4 * max(1, c) * several * row) - more[0] for size in (FAR, FURTHER))
        fits = max(1, fits, min(further, -(-MOST // row)))
        strips = -(-down // fits) if group == 1 else 1
        strip = -(-down // strips)
        strip += strip % 2 if strips > 1 else 0  # pairs for a pool
        run = ((group - 1) * image_rows + strip - 1) * row + across
        reach = more[0] * row + more[1]

        def pitch_for(rows: int) -> int:
            lines = -(-(((group - 1) * image_rows + rows + more[0]) * row + more[1]) // LINE)
            # odd, or the same lines of all channels would share a few places of a cache
            return LINE * (lines | 1 if run > RUN else lines)

        out, inner, i, j = weight.nonzero().unbind(1)
        kept = len(out)
        near = -(-4 * c * several * (min(run, RUN) + reach) // NEAR)
        worth = max(1, min(c, kept // (WORTH * max(1, n))))
        wanted = max(1, min(near, worth))
        flat = kernel == [1, 1]
        pitch, whole = pitch_for(strip), pitch_for(down)
        if stride == 1 and -(-c // max(1, (1 << 16) // whole)) <= worth:
            pitch = whole  # then all of an image may lie in planes
        unit = pitch if flat else 1
        together = (1 << 16) // (several * pitch // unit)
        if not together:
            raise ValueError(f"images of {size[0]} x {size[1]} are too wide")
        blocks = max(wanted, -(-c // together))
        block = inner * blocks // max(1, c)
        part = block * n + out
        order = torch.sort(part, stable=True).indices
        starts = torch.zeros(blocks * n + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.bincount(part, minlength=blocks * n).cumsum(0)
        first = (block * c + blocks - 1) // blocks
        plane = ((inner - first) * planes[0] + i % stride) * planes[1] + j % stride
        cells = plane * (pitch // unit) + i // stride * row + j // stride
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
            unit=unit,
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
    def direct(self) -> bool:
        """Whether x may lie as it is read."""
        (kh, kw), (down, _) = self.shape[2:], self.out
        if kh == kw == 1:  # in planes that have no zeros between rows
            return self.stride == 1 and self.padding == 0
        return self.stride == 1 and (down + self.more[0]) * self.row + self.more[1] <= self.pitch

    def room(self, batch: int) -> Planes | None:
        """Zeros for an x that is read in place; None where that cannot be."""
        if not self.direct:
            return None
        if self.unit > 1:
            return Planes.of(batch, self.shape[1], self.size)
        return Planes.of(batch, self.shape[1], self.size, self.row, self.padding, self.pitch)

    def reads(self, x: Planes) -> bool:
        """Whether these are read in place."""
        fits = x.memory.shape[2] == self.pitch and x.parts == 1
        fits |= self.unit > 1 and x.memory.shape[2] % LINE == 0
        return self.direct and fits and x.row == self.row and x.padding == self.padding

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
        cells = self.cells.long() * self.unit
        plane, at = cells // self.pitch, cells % self.pitch
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
    packed: ConvRows, x: Tensor, bias: Tensor | None = None, activation: str = "none", pool: bool = False
) -> Tensor:
    """The dense convolution."""
    y = F.conv2d(x, packed.to_dense().to(x.dtype), bias, packed.stride, packed.padding)
    y = ACTIVATIONS[activation](y)
    return F.max_pool2d(y, 2) if pool else y


def sparse_conv2d_rows(
    packed: ConvRows,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    pool: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """act(conv(x, W) + b) as [B, N, P, Q]; act is one of ACTIVATIONS; `pool` adds a maximum of 2 x 2."""
    return sparse_conv2d_rows_call(packed, bias, activation, pool, kernels)(x)


def sparse_conv2d_rows_call(
    packed: ConvRows,
    bias: Tensor | None = None,
    activation: str = "none",
    pool: bool = False,
    kernels: str = "auto",
) -> Callable[[Tensor], Tensor]:
    """`sparse_conv2d_rows` of any x, for repeated calls: what a batch needs is made once."""
    _activations.number(activation)
    _native.refuse_gradient(bias=bias, values=packed.values)
    n, _, _, _ = packed.shape
    places = packed.halves if pool else packed.out
    if not use_native(kernels):

        def plain(x: Tensor) -> Tensor:
            x = x.contiguous()
            _image("x", x, len(x), _inputs(packed))
            return reference(packed, x, bias, activation, pool)

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
            arguments, call = _bind(packed, len(x), bias, activation, pool)
        arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
        call()
        free.append((arguments, call))
        return y

    return run


def bind_sparse_conv2d_rows(
    packed: ConvRows,
    x: Tensor | Planes,
    bias: Tensor | None,
    y: Tensor | Planes,
    activation: str = "none",
    pool: bool = False,
    kernels: str = "auto",
    adds: bool = False,
) -> Callable[[], None]:
    """`sparse_conv2d_rows` on fixed tensors: each call of what this returns is one foreign call.

    `adds`: y = act(y + conv(x, W) + b). x and y may be `Planes`, but for y with a pool; what `packed.room`
    made is read in place, other planes are copied first, as tensors are.
    """
    _activations.number(activation)
    _native.refuse_gradient(bias=bias, values=packed.values)
    batch = x.batch if isinstance(x, Planes) else len(x)
    _image("x", x, batch, _inputs(packed))
    _image("y", y, batch, (packed.shape[0], *(packed.halves if pool else packed.out)))
    if pool and (adds or isinstance(y, Planes)):
        raise ValueError("pool: expected a y of its own, got one that is added to, or planes")
    if not use_native(kernels):

        def run() -> None:
            inner = x.get() if isinstance(x, Planes) else x
            if adds:
                found = (y.get() if isinstance(y, Planes) else y) + reference(packed, inner, bias)
                found = ACTIVATIONS[activation](found)
            else:
                found = reference(packed, inner, bias, activation, pool)
            y.put(found) if isinstance(y, Planes) else y.copy_(found)

        return run
    direct = isinstance(x, Planes) and packed.reads(x) and not pool
    parts = x.parts if isinstance(x, Planes) and direct else 1  # which are images of their own
    shared = y.parts if isinstance(y, Planes) else 1
    if parts > 1 and shared != parts and (shared > 1 or batch > 1):
        direct, parts = False, 1
    arguments, call = _bind(packed, batch * parts, bias, activation, pool, direct, adds, parts, x, y)
    down = arguments.down
    if isinstance(x, Planes):
        arguments.x = x.memory.data_ptr() if direct else x.images.data_ptr()
        arguments.x_image, arguments.x_channel, arguments.x_row, _ = x.images.stride()
        if direct:
            arguments.pitch = x.memory.shape[2]
            arguments.unit = arguments.pitch if packed.unit > 1 else 1
        elif x.parts > 1:
            arguments.x_rows, arguments.x_part = x.size[0] // x.parts, arguments.x_image
            arguments.x_image *= x.parts
    else:
        arguments.x = x.data_ptr()
    if isinstance(y, Planes):
        arguments.y, arguments.room = y.images.data_ptr(), y.bare and y.parts >= parts
        arguments.y_image, arguments.y_channel, arguments.y_row, _ = y.images.stride()
        if parts == 1 < y.parts:
            arguments.y_rows, arguments.y_part = y.size[0] // y.parts, arguments.y_image
            arguments.y_image *= y.parts
        elif y.parts == 1 < parts:
            arguments.y_image = down * arguments.y_row
    else:
        arguments.y = y.data_ptr()
        if parts > 1:
            arguments.y_image = down * arguments.y_row
    return call


class _Arguments(ctypes.Structure):  # struct sparse_conv2d_rows
    _fields_ = [
        *[(f, ctypes.c_void_p) for f in ("starts", "cells", "values", "bounds", "bias", "x", "y", "work")],
        *[(f, ctypes.c_int64) for f in ("batch", "channels", "height", "width", "filters", "down", "across")],
        *[(f, ctypes.c_int64) for f in ("step", "padding", "planes_down", "planes_across")],
        *[(f, ctypes.c_int64) for f in ("more_rows", "more_columns", "row", "image_rows", "pitch", "unit")],
        *[(f, ctypes.c_int64) for f in ("group", "strip", "blocks", "parts", "slot")],
        *[(f, ctypes.c_int64) for f in ("x_image", "x_channel", "x_row", "y_image", "y_channel", "y_row")],
        *[(f, ctypes.c_int64) for f in ("x_rows", "x_part", "y_rows", "y_part")],
        *[(f, ctypes.c_int32) for f in ("activation", "pool", "direct", "adds", "room", "threads")],
    ]


def _bind(
    packed: ConvRows,
    batch: int,
    bias: Tensor | None,
    activation: str,
    pool: bool,
    direct: bool = False,
    adds: bool = False,
    parts: int = 1,
    *alive: object,
) -> tuple[_Arguments, Callable[[], None]]:
    """For tensors [B, C, H, W], whose addresses are still wanted; of images in `parts` each is one of B."""
    n, c, _, _ = packed.shape
    _native.vector("bias", bias, n)
    (h, w), (p, q) = packed.size, packed.out
    down = p // parts
    threads = max(1, min(_native.threads(), 1 + floor(packed, batch // parts)["flops"] // WORK))
    if direct:  # pieces with all filters
        whole = batch * -(-((down - 1) * packed.row + q) // (VECTORS * _native.lanes()))
    else:
        whole = -(-batch // packed.group) * -(-p // packed.strip)
    enough = whole >= SHARE * threads and not direct  # where x is copied for each of the parts
    shares = 1 if enough or not whole else threads // gcd(whole, threads)  # of the filters
    threads = max(1, min(threads, whole * shares))
    bounds = _bounds(packed, shares)
    slot = 0 if direct else c * packed.planes[0] * packed.planes[1] * packed.pitch + 64
    slot += n * MOST if packed.blocks > 1 else 0
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
        height=h,
        width=w,
        filters=n,
        down=down,
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
        unit=packed.unit,
        group=packed.group,
        strip=packed.strip,
        blocks=packed.blocks,
        parts=shares,
        slot=slot,
        x_image=c * h * w,
        x_channel=h * w,
        x_row=w,
        y_image=n * p * q,
        y_channel=p * q,
        y_row=q,
        x_rows=h,
        y_rows=p,
        activation=_activations.number(activation),
        pool=pool,
        direct=direct,
        adds=adds,
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


def _image(name: str, t: Tensor | Planes, batch: int, shape: tuple[int, int, int]) -> None:
    if isinstance(t, Planes):
        c, h, w = shape
        _native.check(name, t.images, (batch * t.parts, c, h // t.parts, w))
        return
    _native.check(name, t, (batch, *shape))
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous [B, C, H, W], got strides {t.stride()}")
