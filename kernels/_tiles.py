"""Products in tiles: what a program computes, in which arithmetic; and products with lists of live blocks.

A matrix whose blocks of b x b live or not is kept as lists (`Blocks`): one list a row of blocks, of its live
ones. Lists go from the longest to the shortest, so that the last programs of a launch are short ones, and
lists of one length are neighbours: on a CPU they are one batched product. A program multiplies a tile of x
with a list, or with a part of one; block_linear and block_conv2d differ in what a step of it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparselth.kernels._triton import INTERPRET, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = (16, 32, 64, 128)

SMALL = 64  # rows; tiles of more are taken where they make ENOUGH programs
ENOUGH = 512
SPLIT_BELOW = 264  # programs: fewer leave half of a big GPU idle, and long lists are split
SHORTEST = 4  # steps of a part of a list
GROUP = 4  # tiles of rows that go through the lists side by side
SUMMED = 1024  # numbers of y that a program of _sum_kernel adds up

# On a CPU, in numbers of x that are gathered at a time: 1 MB, which a cache holds.
GATHERED = 1 << 18
SINGLY = 100  # blocks for each run of lists: up to here and up to GATHERED all blocks are one batch

Self = TypeVar("Self", bound="Blocks")


class Tile(NamedTuple):
    """What a program computes: rows x columns of the result, in steps of `depth` along the sum."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def kind(dtype: torch.dtype, convolution: bool = False) -> str:
    """How Triton multiplies: "half", or fp32 as torch's own products do, "tf32" or "ieee"."""
    if dtype not in DTYPES:
        raise ValueError(f"Triton kernels take {', '.join(map(str, DTYPES))}, got {dtype}")
    if dtype != torch.float32:
        return "half"
    # not cudnn.allow_tf32, which raises where convolutions and recurrent layers are set differently
    backends: Any = torch.backends
    vendor = backends.cudnn.conv if convolution else backends.cuda.matmul
    return "tf32" if vendor.fp32_precision == "tf32" else "ieee"


def precision(kind: str) -> str:
    """What tl.dot is told."""
    return "tf32" if kind == "tf32" else "ieee"


@dataclass(frozen=True, eq=False)
class Blocks:
    """Weights by their live blocks."""

    shape: tuple[int, ...]
    values: Tensor  # [L, b, b]; on a CPU with n innermost, so that a list is one matrix [k, n] to torch
    places: Tensor  # [L]
    starts: Tensor
    order: Tensor
    runs: tuple[int, ...]  # lists of one length: how many, how long, and so on, longest first

    @property
    def block(self) -> int:
        return self.values.shape[2]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.places, self.starts, self.order

    def bytes(self) -> int:
        """Memory of values and index."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def to(self: Self, device: torch.device | str) -> Self:
        values, places, starts, order = (t.to(device) for t in self.tensors())
        return replace(self, values=laid(values), places=places, starts=starts, order=order)


def laid(values: Tensor) -> Tensor:
    """As `Blocks.values` is on its device."""
    return values.mT.contiguous().mT if values.device.type == "cpu" else values.contiguous()


def choose(tiles: Sequence[Tile], block: int, rows: int, lists: int, blocks: int) -> tuple[Tile, int]:
    """The tile of a product with lists, and into how many parts each list is split."""
    for tile in tiles:
        if (tile.rows > 16 and tile.rows >= 2 * rows) or block < tile.columns == 128:
            continue
        programs = _programs(tile, block, rows, lists)
        if programs >= ENOUGH or tile.rows <= SMALL:
            break
    steps = blocks * block // (lists * tile.depth)
    return tile, max(1, min(SPLIT_BELOW // programs, steps // SHORTEST))


def _programs(tile: Tile, block: int, rows: int, lists: int) -> int:
    return -(-rows // tile.rows) * lists * (block // min(block, tile.columns))


def written(numbers: int, size: int, splits: int) -> int:
    """Bytes of y, and of its parts in fp32, which are written and read where lists are split."""
    return numbers * (size + (8 * splits if splits > 1 else 0))


def launch(
    kernel: Any,
    x: Tensor,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    relu: bool,
    y: Tensor,
    kind: str,
    tile: Tile,
    splits: int,
    **rest: Any,
) -> None:
    """y [rows, N] = act(x lists + bias) by `kernel`, and the sum of its parts where lists are split.

    `index` is values, places, starts and order of `Blocks`; `rest` what `kernel` alone takes.
    """
    values, *_, order = index
    (rows, n), block, lists, whole = y.shape, values.shape[2], order.numel(), splits == 1
    bias = None if bias is None else bias.contiguous()
    out = y if whole else y.new_empty(splits, rows, n, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernel[_programs(tile, block, rows, lists), splits](
            x,
            values.contiguous(),
            *index[1:],
            bias,
            out,
            rows,
            n,
            lists=lists,
            splits=splits,
            BLOCK=block,
            HAS_BIAS=whole and bias is not None,
            RELU=whole and relu,
            SPLIT=not whole,
            BLOCK_M=tile.rows,
            BLOCK_N=min(block, tile.columns),
            DEPTH=tile.depth,
            GROUP=GROUP,
            PRECISION=precision(kind),
            CORES=kind != "ieee",
            UPCAST=INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **rest,
        )
        if not whole:
            _sum_kernel[(-(-y.numel() // SUMMED),)](
                out, bias, y, y.numel(), n, splits, HAS_BIAS=bias is not None, RELU=relu, SIZE=SUMMED
            )


@triton.jit
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    size,
    N,
    splits,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SIZE: tl.constexpr,
):
    """out = act(parts[0] + parts[1] + ... + bias), `size` numbers in rows of N."""
    offs = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offs < size
    acc = tl.zeros((SIZE,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + offs, mask=inside, other=0.0)
        parts_ptr += size
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=inside)
