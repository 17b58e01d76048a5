"""The layers that are measured, their masks, and how a shape is written on the command line.

300x784                    a Linear, outputs x inputs
64x64x3x3@32x32            a Conv2d: outputs x inputs x kernel @ image, padded to keep its size
128x64x3x3@32x32/2         the same with stride 2
16x6x5x5@14x14p0           with that much padding
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from sparselth.errors import UsageError
from sparselth.machine import memory_bytes
from sparselth.models import Conv, Model, get_model

LARGEST = 65536
BLOCKS = 64, 32, 16
SQUARES = 1024, 2048, 4096, 8192
# On images of 32 x 32, as CIFAR-10 has them: filters by stage; ResNet-18's stages begin with a stride of 2.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RESNET18 = (64, 128, 256, 512)


@dataclass(frozen=True)
class Layer:
    """One Linear [N, K], or one Conv2d [N, C, k, k] on images of `size`; `origin`: whose layer it is."""

    shape: tuple[int, ...]
    size: tuple[int, int] | None = None
    stride: int = 1
    padding: int = 0
    origin: str = ""

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of the weight; K is all that feeds one output."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def text(self) -> str:
        """As on the command line."""
        name = "x".join(map(str, self.shape))
        if self.size is None:
            return name
        padding = "" if self.padding == self.shape[-1] // 2 else f"p{self.padding}"
        stride = "" if self.stride == 1 else f"/{self.stride}"
        return f"{name}@{self.size[0]}x{self.size[1]}{stride}{padding}"

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of what one sample gives it."""
        return (self.shape[1],) if self.size is None else (self.shape[1], *self.size)

    @property
    def outputs(self) -> tuple[int, ...]:
        if self.size is None:
            return (self.shape[0],)
        down = (
            (s + 2 * self.padding - k) // self.stride + 1
            for s, k in zip(self.size, self.shape[2:], strict=True)
        )
        return (self.shape[0], *down)

    def flops(self, mask: Tensor | None = None) -> int:
        """Of one sample; with a mask, of its kept weights. Zeros around an image are not multiplied."""
        if self.size is None:
            return 2 * (prod(self.shape) if mask is None else int(mask.sum()))
        reach = []
        for size, kernel, out in zip(self.size, self.shape[2:], self.outputs[1:], strict=True):
            places = torch.arange(out, device="cpu") * self.stride - self.padding
            seen = places + torch.arange(kernel, device="cpu")[:, None]
            reach.append(((seen >= 0) & (seen < size)).sum(1))
        taps = reach[0][:, None] * reach[1]
        kept = prod(self.shape[:2]) if mask is None else mask.sum((0, 1))
        return 2 * int((taps * kept).sum())


def parse(text: str) -> Layer:
    """The layer that `--shape` names."""
    words = re.sub("n", r"([0-9]{1,9})", "nxn(?:xnxn@nxn(?:/n)?(?:pn)?)?")
    found = re.fullmatch(words, text.strip())
    if not found:
        raise UsageError(
            f"`shape` {text}: expected outputs x inputs such as 4096x4096, or a convolution such as "
            "64x64x3x3@32x32 (outputs x inputs x kernel @ image, then /2 for a stride, p0 for a padding)"
        )
    n, k, *rest = (None if part is None else int(part) for part in found.groups())
    numbers = [number for number in (n, k, *rest[:5]) if number is not None]
    if min(numbers) < 1 or max(numbers) > LARGEST:
        raise UsageError(f"`shape` {text}: expected sizes from 1 to {LARGEST:,}")
    assert n
    assert k
    if rest[0] is None:
        return Layer((n, k))
    down, across, height, width, stride, padding = rest
    assert down
    assert across
    assert height
    assert width
    if (padding or 0) > max(down, across):
        raise UsageError(f"`shape` {text}: expected a padding up to the size of the kernel")
    if down != across and padding is None:
        raise UsageError(f"`shape` {text}: a kernel that is not square needs its padding, such as p1")
    layer = Layer(
        (n, k, down, across), (height, width), stride or 1, down // 2 if padding is None else padding
    )
    if min(layer.outputs) < 1:
        raise UsageError(f"`shape` {text}: the kernel is larger than the padded image")
    return layer


def check_memory(layers: Sequence[Layer], batches: Sequence[int], what: str) -> None:
    """Raise UsageError where layers and activations, in fp32 and float64, are more than there is memory."""
    weights = sum(prod(layer.shape) for layer in layers)
    images = max(batches) * max(prod(layer.inputs) + prod(layer.outputs) for layer in layers)
    needed, there = 24 * weights + 16 * images, memory_bytes()
    if needed > there:
        raise UsageError(
            f"{what}: takes about {needed / 1e9:,.0f} GB with a `batch` of {max(batches):,}, there are "
            f"{there / 1e9:.0f}"
        )


def defaults() -> list[Layer]:
    """The different layers of LeNet-300-100, LeNet-5, VGG-16 and ResNet-18, and squares."""
    found = [*of_model(get_model("lenet-300-100")), *of_model(get_model("lenet5"))]
    channels, size = 3, 32
    for filters in VGG16:
        for n in filters:
            found.append(Layer((n, channels, 3, 3), (size, size), 1, 1, "VGG-16"))
            channels = n
        size //= 2
    found += _resnet18()
    found.append(Layer((10, 512), origin="VGG-16, ResNet-18"))
    found += [Layer((n, n), origin="square") for n in SQUARES]
    return distinct(found)


def strong() -> list[Layer]:
    """Squares that no cache holds as dense weights, and convolutions of few and of many weights a place."""
    squares = [Layer((n, n), origin="square") for n in SQUARES if n >= 2048]
    return [*squares, *(parse(text) for text in ("64x64x3x3@32x32", "512x512x3x3@4x4"))]


def _resnet18() -> Iterable[Layer]:
    size = 32
    yield Layer((RESNET18[0], 3, 3, 3), (size, size), 1, 1, "ResNet-18")
    yield Layer((RESNET18[0], RESNET18[0], 3, 3), (size, size), 1, 1, "ResNet-18")
    for before, n in pairwise(RESNET18):
        yield Layer((n, before, 3, 3), (size, size), 2, 1, "ResNet-18")
        yield Layer((n, before, 1, 1), (size, size), 2, 0, "ResNet-18")
        size //= 2
        yield Layer((n, n, 3, 3), (size, size), 1, 1, "ResNet-18")


def of_model(model: Model) -> list[Layer]:
    """The layers of a network with weights, in order."""
    found = []
    for spec, layer, before, _ in model.producers:
        if isinstance(layer, Conv):
            found.append(Layer(spec.shape, (before[1], before[2]), layer.stride, layer.padding, model.name))
        else:
            found.append(Layer(spec.shape, origin=model.name))
    return found


def distinct(found: Iterable[Layer]) -> list[Layer]:
    """Every shape once, with all its origins."""
    by_text: dict[str, list[Layer]] = {}
    for layer in found:
        by_text.setdefault(layer.text, []).append(layer)
    return [
        Layer(
            same[0].shape,
            same[0].size,
            same[0].stride,
            same[0].padding,
            ", ".join(dict.fromkeys(layer.origin for layer in same)),
        )
        for same in by_text.values()
    ]


def mask_of(layer: Layer, kind: str, sparsity: float, draw: torch.Generator) -> tuple[Tensor, int | None]:
    """A random mask of the weight with exact counts, and the side of the blocks that it was drawn in.

    A block of a convolution has its channels at one tap: neighbours in channels-last images.
    """
    n, c, *kernel = layer.shape
    taps = prod(kernel)
    if kind in ("random", "strong"):
        return _random(n * c * taps, sparsity, draw).view(layer.shape), None
    block = block_of(layer)
    assert block is not None
    down, across = -(-n // block), -(-c // block)
    blocks = _random(down * taps * across, sparsity, draw).view(down, taps, across)
    mask = blocks.repeat_interleave(block, 0).repeat_interleave(block, 2)[:n, :, :c]
    return mask.movedim(1, 2).reshape(layer.shape).contiguous(), block


def block_of(layer: Layer) -> int | None:
    """The largest block of which a weight has 64 or more; None: it is too small for blocks."""
    n, c, *kernel = layer.shape
    taps = prod(kernel)
    return next((b for b in BLOCKS if n >= b and c >= b and (n // b) * (c // b) * taps >= 64), None)


def facts(mask: Tensor) -> dict[str, float]:
    """What a kernel could use of a mask: density, dead rows and columns, and tiles that hold a weight.

    Tiles of a convolution's matrix [N, (tap, channel)].
    """
    rows = mask.movedim(1, -1).flatten(1)
    inputs = mask.transpose(0, 1).flatten(1)
    return {
        "density": float(mask.float().mean()),
        "dead_rows": int((~rows.any(1)).sum()),
        "dead_columns": int((~inputs.any(1)).sum()),
        "tiles_16": occupancy(rows, 16),
        "tiles_64": occupancy(rows, 64),
    }


def occupancy(mask: Tensor, tile: int) -> float:
    """Share of the tiles of a matrix that hold a kept weight."""
    n, k = mask.shape
    wide = torch.zeros(-(-n // tile) * tile, -(-k // tile) * tile, dtype=torch.bool, device="cpu")
    wide[:n, :k] = mask
    held = wide.view(-(-n // tile), tile, -1, tile).any(3).any(1)
    return float(held.float().mean())


def _random(size: int, sparsity: float, draw: torch.Generator) -> Tensor:
    """Exactly round((1 - sparsity) * size) kept, at least one."""
    kept = max(1, round((1 - sparsity) * size))
    mask = torch.zeros(size, dtype=torch.bool, device="cpu")
    mask[torch.randperm(size, generator=draw, device="cpu")[:kept]] = True
    return mask
