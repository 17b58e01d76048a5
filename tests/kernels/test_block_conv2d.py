"""Against the formula in float64; whatever the mask; dead blocks are not there, live ones count whole."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import (
    DEVICE,
    DTYPES,
    FLOATS,
    INF,
    NAN,
    UNIT,
    compare,
    must_repeat,
    must_replay,
    near,
    pick,
    poisoned,
    precision,
    surrounded,
    traffic,
)
from sparselth.kernels import _tiles
from sparselth.kernels import block_conv2d as module
from sparselth.kernels._tiles import BLOCKS, Tile
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d, choose, floor, launch
from sparselth.kernels.masked_conv2d import geometry

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
WAYS = ("triton", "torch", "reference")
MASKS = ("random", "empty", "full", "one weight", "one block row", "half of the block rows")
PARTS = [("torch", "ieee"), *[("triton", part) for part in DTYPES]]
TILES = [(kind, tile) for kind, tiles in module.TILES.items() for tile in tiles]
Pair = tuple[int, int]
SAME = ((1, 1), (1, 1), (1, 1))  # of 3 x 3
# b, c, n, size, kernel, (stride, padding, dilation), block
Setup = tuple[int, int, int, Pair, Pair, tuple[Pair, Pair, Pair], int]
TINY: list[Setup] = [
    (1, 1, 1, (1, 1), (1, 1), ((1, 1), (0, 0), (1, 1)), 16),
    (2, 37, 70, (5, 5), (3, 3), SAME, 32),
    (1, 20, 33, (6, 5), (3, 2), ((2, 1), (1, 3), (1, 2)), 16),
]
LARGE: list[Setup] = [
    (8, 64, 64, (14, 14), (3, 3), SAME, 16),
    (3, 128, 200, (9, 9), (5, 5), ((2, 2), (2, 2), (1, 1)), 128),
    (1, 512, 512, (4, 4), (3, 3), SAME, 64),
    (5, 130, 64, (7, 7), (1, 1), ((2, 2), (0, 0), (1, 1)), 64),
    (2, 64, 64, (33, 31), (3, 3), ((1, 1), (2, 2), (2, 2)), 32),
    (64, 256, 256, (14, 14), (3, 3), SAME, 64),
    (32, 256, 256, (28, 28), (3, 3), SAME, 128),
    (16, 520, 264, (7, 7), (3, 3), ((2, 2), (1, 1), (1, 1)), 32),
]


def masked(
    kind: str, n: int, c: int, kernel: Pair, block: int, seed: int = 0, density: float = 0.4
) -> Tensor:
    """A mask of blocks, with pruned weights inside the live ones too."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = -(-n // block), -(-c // block)
    live = torch.rand(rows, columns, *kernel, generator=g) < density
    if kind == "full":
        return torch.ones(n, c, *kernel, dtype=torch.bool)
    if kind == "empty":
        live[:] = False
    elif kind == "one block row":
        live[:] = False
        live[rows // 2] = True
    elif kind == "half of the block rows":
        live[::2] = False
    mask = live.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :c]
    mask &= torch.rand(n, c, *kernel, generator=g) < 0.8
    if kind == "one weight":
        mask[:] = False
        mask[n - 1, c // 2, kernel[0] - 1, kernel[1] // 2] = True
    return mask


class Problem:
    def __init__(
        self,
        b: int,
        c: int,
        n: int,
        size: Pair,
        kernel: Pair,
        where: tuple[Pair, Pair, Pair] = ((1, 1), (0, 0), (1, 1)),
        block: int = 16,
        dtype: torch.dtype = torch.float32,
        kind: str = "random",
        seed: int = 0,
        density: float = 0.4,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        shapes: tuple[tuple[int, ...], ...] = (b, c, *size), (n, c, *kernel), (n,)
        x, w, self.bias = (torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.mask = masked(kind, n, c, kernel, block, seed, density).to(DEVICE)
        self.where, self.kept = where, torch.where(self.mask, w, 0)
        self.weight = BlockFilters.from_dense(torch.where(self.mask, w, NAN), self.mask, block)

    def run(self, relu: bool = False, kernels: str = "auto") -> Tensor:
        return block_conv2d(self.x, self.weight, self.bias, *self.where, relu, kernels)

    def launch(self, *args: object) -> Tensor:
        w = self.weight
        index = w.values, w.places, w.starts, w.order, len(self.bias)
        g = geometry(w.shape[2:], *self.where)
        return launch(self.x, *index, self.bias, True, g, *args)  # type: ignore[arg-type]

    def right(self, relu: bool) -> Tensor:
        y = F.conv2d(self.x.double(), self.kept.double(), self.bias.double(), *self.where)
        return y.relu() if relu else y

    def scale(self) -> Tensor:
        """What y would be without cancellation."""
        x, w, bias = (t.abs().double() for t in (self.x, self.kept, self.bias))
        return F.conv2d(x, w, bias, *self.where)

    def check(self, y: Tensor, relu: bool = False, tf32: bool = False) -> None:
        right = self.right(relu)
        assert y.permute(0, 2, 3, 1).is_contiguous()
        assert y.dtype == self.x.dtype
        near(y, right, self.kept[0].numel(), self.scale(), "tf32" if tf32 else None)


@pytest.fixture(autouse=True, scope="module")
def ieee() -> Iterator[None]:
    """Convolutions in fp32, which are in TF32 by default on CUDA."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


LAYERS = {  # b, c, n, size, kernel, (stride, padding, dilation)
    "ones": (1, 1, 1, (1, 1), (1, 1)),
    "1x1, stride 2": (3, 67, 35, (5, 4), (1, 1), ((2, 2), (0, 0), (1, 1))),
    "3x3": (2, 17, 67, (3, 5), (3, 3), ((1, 1), (1, 1), (1, 1))),
    "5x5, stride 2": (1, 19, 20, (7, 6), (5, 5), ((2, 2), (2, 2), (1, 1))),
    "3x2, all differ": (2, 32, 16, (6, 8), (3, 2), ((2, 1), (1, 3), (1, 2))),
}


@pytest.mark.parametrize("kernels", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("layer", "block"), [(name, b) for name in LAYERS for b in BLOCKS if b <= 32 or "5x5" not in name]
)
def test_it_is_the_formula(layer: str, block: int, dtype: torch.dtype, kernels: str) -> None:
    p = Problem(*LAYERS[layer], block=block, dtype=dtype)  # type: ignore[arg-type]
    relu = layer != "3x3"
    p.check(p.run(relu, kernels), relu)


def held(part: str, setup: Setup, kind: str = "random", seed: int = 0, live: float = 0.4) -> None:
    """Twice, from tensors amid NaN and into NaN: the same bits, and no further off than torch is."""
    p = Problem(*setup, DTYPES[part], kind, seed, live)
    assert p.weight.to_dense().equal(p.kept)
    x = surrounded(p.x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weight = replace(p.weight, values=surrounded(p.weight.values))

    def run() -> dict[str, Tensor]:
        return {
            name: block_conv2d(x, weight, p.bias, *p.where, name == "relu", kernels="triton")
            for name in ("y", "relu")
        }

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        y = F.conv2d(p.x.to(dtype), p.kept.to(dtype), p.bias.to(dtype), *p.where)
        return {"y": y, "relu": y.relu()}

    with precision(part):
        with poisoned():
            found = run()
            must_repeat(run(), found)
        if kind == "empty":
            assert found["y"].equal(p.bias[:, None, None].expand_as(found["y"]))
        terms, scale = dict.fromkeys(found, p.kept[0].numel()), dict.fromkeys(found, p.scale())
        compare(found, formula(torch.double), formula(DTYPES[part]), part, terms, scale)


@pytest.mark.parametrize("setup", pick(TINY, TINY + LARGE), ids=str)
@pytest.mark.parametrize("part", DTYPES)
def test_no_further_off_than_torch(part: str, setup: Setup) -> None:
    held(part, setup, live=0.1 if setup[0] == 32 else 0.4)


@pytest.mark.parametrize("kind", MASKS[1:])
@pytest.mark.parametrize("part", DTYPES)
def test_no_further_off_than_torch_whatever_the_mask(part: str, kind: str) -> None:
    held(part, (2, 40, 50, (5, 5), (3, 3), SAME, 32), kind)


@pytest.mark.parametrize("seed", range(pick(2, 40)))
@pytest.mark.parametrize("part", DTYPES)
def test_no_further_off_than_torch_at_random_shapes(part: str, seed: int) -> None:
    draw, most = random.Random(seed), pick(4, 32)

    def pair(low: int, high: int) -> Pair:
        return draw.randint(low, high), draw.randint(low, high)

    while True:
        size, kernel, where = pair(1, most), pair(1, 5), (pair(1, 3), pair(0, 4), pair(1, 2))
        if min(geometry(kernel, *where).out(*size)) > 0:
            break
    channels = draw.randint(1, 9 * most), draw.randint(1, 9 * most)
    setup = (draw.randint(1, 4), *channels, size, kernel, where, draw.choice(BLOCKS))
    held(part, setup, seed=seed, live=draw.random())


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("part", DTYPES)
def test_in_a_cuda_graph(part: str, batch: int) -> None:
    p = Problem(batch, 512, 256, (7, 7), (3, 3), SAME, 32, DTYPES[part])
    with precision(part):
        must_replay(lambda: {"y": p.run(True)})


@pytest.mark.parametrize("kernels", WAYS)
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind: str, kernels: str) -> None:
    for block, n, c in ((16, 50, 35), (64, 128, 70)):
        p = Problem(1, c, n, (2, 3), (2, 3), ((1, 1), (1, 1), (1, 1)), block, kind=kind)
        y = p.run(kernels=kernels)
        p.check(y)
        dead = ~p.mask.flatten(1).any(1)
        wide = F.pad(dead, (0, -n % block), value=True).view(-1, block).all(1).repeat_interleave(block)[:n]
        assert y[:, wide].equal(p.bias[wide][None, :, None, None].expand_as(y[:, wide]))
        assert bool(wide.any()) == (kind not in ("random", "full"))
        if kind == "empty":
            assert not block_conv2d(p.x, p.weight, padding=1, kernels=kernels).any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_format_holds_any_mask(block: int, kind: str) -> None:
    for n, c, kernel in ((1, 1, (1, 1)), (block, 2 * block, (2, 3)), (block + 5, 2 * block - 7, (3, 1))):
        mask = masked(kind, n, c, kernel, block).to(DEVICE)
        w = torch.randn(n, c, *kernel, device=DEVICE)
        packed = BlockFilters.from_dense(torch.where(mask, w, NAN), mask, block)
        kept = torch.where(mask, w, 0)
        assert packed.to_dense().equal(kept)
        assert BlockFilters.from_dense(kept, block=block).to_dense().equal(kept)
        assert packed.to(DEVICE).to_dense().equal(kept)
        rows, columns = -(-n // block), -(-c // block)
        live = F.pad(mask.float().permute(2, 3, 0, 1), (0, columns * block - c, 0, rows * block - n))
        count = int(live.view(-1, rows, block, columns, block).amax((2, 4)).sum())
        assert packed.occupancy == count / (rows * columns * kernel[0] * kernel[1])
        assert packed.bytes() == 4 * count * block**2 + 4 * (count + rows + 1 + rows)
        lengths = packed.starts.diff()
        assert lengths.sort(descending=True).values.equal(lengths)
        assert packed.order.sort().values.equal(torch.arange(rows, dtype=torch.int32, device=DEVICE))
    assert packed.block == block


def test_a_block_is_a_run_of_channels_at_one_tap() -> None:
    w = torch.zeros(32, 48, 5, 3, device=DEVICE)
    w[16:, 32:, 4, 2] = 1
    packed = BlockFilters.from_dense(w, block=16)
    assert packed.places.tolist() == [(4 << 24) + (2 << 16) + 2]
    assert packed.occupancy == 1 / 90


@pytest.mark.parametrize(("kernels", "part"), PARTS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_infinity_pass_live_blocks_alone(value: float, kernels: str, part: str) -> None:
    w = torch.zeros(32, 48, 3, 3, dtype=DTYPES[part], device=DEVICE)
    w[:16, :16, 1, 0] = 1  # what lies to the left
    w[5, 3] = 0
    w[16:, 16:32, 1, 1] = 1
    weight = BlockFilters.from_dense(w, block=16)
    x = torch.ones(2, 48, 4, 4, dtype=w.dtype, device=DEVICE)
    x[1, 3, 2, 1] = x[:, 40] = value  # one that 16 filters see, and channels that none sees
    with precision(part):
        y, rectified = (
            block_conv2d(x, weight, padding=1, relu=relu, kernels=kernels) for relu in (False, True)
        )
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[1, :16, 2, 2] = True
    assert y.isfinite().equal(~seen)
    assert y[1, 5, 2, 2].isnan()  # the pruned weight of a live block
    assert rectified[1, 5, 2, 2].isnan()


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_what_lies_around_x_is_not_read(kernels: str) -> None:
    """Images amid NaN, and the padding is 0."""
    p = Problem(2, 32, 20, (5, 4), (3, 3), ((1, 1), (1, 1), (1, 1)))
    wide = p.x.new_full((p.x.numel() + 4096,), NAN)
    inner = wide[2048:-2048].view(2, 5, 4, 32).copy_(p.x.permute(0, 2, 3, 1))
    right = p.run(kernels=kernels)
    assert block_conv2d(inner.permute(0, 3, 1, 2), p.weight, p.bias, *p.where, kernels=kernels).equal(right)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
def test_an_empty_list_reads_neither_x_nor_weights(kind: str, tile: Tile, splits: int) -> None:
    """Such a list goes through a step of products like all others; x and what follows the weights are NaN."""
    part = "bf16" if kind == "half" else kind
    block = max(16, min(32, tile.depth))
    w = torch.zeros(3 * block, 2 * block, 1, 2, dtype=DTYPES[part], device=DEVICE)
    w[block : 2 * block, block:, 0, 1] = 1
    x = torch.ones(2, 2 * block, 2, 3, dtype=w.dtype, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    x[:, :block] = x[:, :, :, 0] = NAN
    bias = torch.arange(3 * block, device=DEVICE).to(w.dtype)  # up to 95, sums to 127
    for weight in (BlockFilters.from_dense(w, block=block), BlockFilters.from_dense(0 * w, block=block)):
        index = weight.places, weight.starts, weight.order
        g = geometry((1, 2), 1, 0, 1)
        with precision(part):
            y = launch(x, surrounded(weight.values), *index, len(bias), bias, False, g, (tile, splits))
        live = weight.places.numel() * block * w[:, -1, 0, 1]
        assert y.equal((bias + live)[:, None, None].expand_as(y))


@pytest.mark.parametrize(
    ("part", "kind", "tile"),
    [
        (part, kind, tile)
        for part in pick(["bf16", "tf32", "ieee"], list(DTYPES))
        for kind, tile in TILES
        if kind == (part if DTYPES[part] == torch.float32 else "half")
    ],
    ids=str,
)
def test_every_tile_and_split_lists(part: str, kind: str, tile: Tile) -> None:
    for block in pick((16, min(128, 2 * tile.columns)), BLOCKS):
        size, kernel, where = pick(((3, 4), (1, 2), ((1, 1), (0, 1), (1, 1))), ((9, 9), (3, 3), SAME))
        channels = pick(block + 9, 2 * block + 8), block - 3
        p = Problem(pick(1, 2), *channels, size, kernel, where, block, DTYPES[part], seed=2)
        right = p.right(True)
        with precision(part):
            assert _tiles.kind(p.x.dtype, convolution=True) == kind
            for splits in (1, 3):
                y = p.launch((tile, splits))
                assert (y.double() - right).norm() <= max(3 * UNIT[part], 1e-6) * right.norm()
                p.check(y, relu=True, tf32=part == "tf32" and DEVICE == "cuda")
                if (tile.rows, block) == (32, 16):
                    assert y.equal(p.launch((tile, splits)))


def test_the_choice_of_tiles() -> None:
    def chosen(kind: str, block: int, pixels: int, n: int, blocks: int) -> tuple[int, int, int]:
        tile, splits = choose(kind, block, pixels, -(-n // block), blocks)
        return tile.rows, min(block, tile.columns), splits

    assert chosen("half", 64, 60 * 1024, 256, 60) == (128, 64, 1)
    assert chosen("half", 128, 60 * 1024, 256, 30) == (128, 128, 1)
    assert chosen("half", 64, 60 * 64, 256, 60) == (64, 64, 1)
    assert chosen("half", 64, 16, 512, 60) == (16, 16, 1)
    assert chosen("half", 64, 16, 512, 576) == (16, 16, 8)
    assert chosen("half", 16, 49, 16, 1000) == (64, 16, 250)
    assert chosen("ieee", 64, 1024, 64, 9) == (64, 64, 9)
    assert chosen("tf32", 16, 40, 256, 0) == (64, 16, 1)
    for kind in module.TILES:
        for block in BLOCKS:
            for pixels in (1, 16, 17, 33, 100, 5000):
                tile, splits = choose(kind, block, pixels, 7, 0)
                assert splits == 1
                assert tile.rows <= 16 or tile.rows < 2 * pixels
                assert tile.columns <= max(64, block)


@pytest.mark.parametrize(
    ("batch", "c", "n", "size", "block", "blocks"),
    [
        (2**21, 64, 64, 31, 16, 16),
        (1, 64, 2**24, 2, 16, 2**22),
        (1, 2**20, 16, 3, 16, 2**19),  # one list, in as many parts as there are
    ],
)
def test_grids_are_a_devices(
    batch: int, c: int, n: int, size: int, block: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 2**31 - 1 programs along x, 65,535 along y. Nothing is allocated, nothing runs."""
    grids: list[tuple[int, ...]] = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_block_conv2d_kernel", Counted())
    monkeypatch.setattr(_tiles, "_sum_kernel", Counted())
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: nullcontext())
    x = torch.empty(batch, c, size, size, device="meta", dtype=torch.bfloat16)
    values = x.new_empty(blocks, block, block)
    places, starts, order = (
        x.new_empty(count, dtype=torch.int32) for count in (blocks, n // block + 1, n // block)
    )
    launch(x, values, places, starts, order, n, None, False, geometry((1, 1), 1, 0, 1))
    assert grids
    for first, *second in grids:
        assert 0 < first < 2**31
        assert all(0 < count <= 65_535 for count in second)


@pytest.mark.parametrize(("kernels", "part"), PARTS)
def test_strides_do_not_matter(kernels: str, part: str) -> None:
    p = Problem(3, 20, 18, (4, 5), (3, 3), SAME, dtype=DTYPES[part])
    with precision(part):
        strides_do_not_matter(p, kernels)


def strides_do_not_matter(p: Problem, kernels: str) -> None:
    right = p.run(kernels=kernels)
    wide = p.x.new_full((3, 43, 4, 5), NAN)
    wide[:, 3::2] = p.x
    bias = p.bias.new_full((36,), NAN)
    bias[::2] = p.bias
    batch_last = p.x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for x in (p.x.contiguous(), wide[:, 3::2], batch_last, F.pad(p.x, (2, 1), value=NAN)[..., 2:7]):
        found = block_conv2d(x, p.weight, bias[::2], *p.where, kernels=kernels)
        assert found.equal(right)


def test_all_ways_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks as one batch; several lists together; list by list in parts that differ in size."""
    p = Problem(2, 40, 120, (5, 6), (3, 3), ((1, 1), (1, 1), (1, 1)), kind="half of the block rows")
    for singly, gathered in ((100, 1 << 18), (0, 1 << 18), (0, 1), (0, 5000), (0, 30_000)):
        monkeypatch.setattr(module, "SINGLY", singly)
        monkeypatch.setattr(module, "GATHERED", gathered)
        found = p.run(kernels="torch")
        p.check(found)
        assert found.equal(p.run(kernels="torch"))


SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7))


@settings(max_examples=CASES)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    SIZES,
    st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 3, 5])),
    st.tuples(*[st.tuples(st.integers(low, 3), st.integers(low, 3)) for low in (1, 0, 1)]),
    st.sampled_from(BLOCKS),
    st.sampled_from(list(FLOATS)),
    st.sampled_from(MASKS),
    st.booleans(),
    st.sampled_from(["triton", "torch"]),
    st.integers(0, 10**6),
)
def test_any_shape(
    shape: tuple[int, int, int],
    size: Pair,
    kernel: Pair,
    where: tuple[Pair, Pair, Pair],
    block: int,
    dtype: torch.dtype,
    kind: str,
    relu: bool,
    kernels: str,
    seed: int,
) -> None:
    assume(min(geometry(kernel, *where).out(*size)) > 0)
    p = Problem(*shape, size, kernel, where, block, dtype, kind, seed)
    assert p.weight.to_dense().equal(p.kept)
    p.check(p.run(relu, kernels), relu)


def test_auto_and_an_empty_batch() -> None:
    p = Problem(1, 20, 30, (4, 4), (3, 3))
    usual = "triton" if DEVICE == "cuda" else "torch"
    assert p.run().equal(p.run(kernels=usual))
    for kernels in WAYS:
        assert block_conv2d(p.x[:0], p.weight, p.bias, kernels=kernels).shape == (0, 30, 2, 2)


def test_what_does_not_fit_is_said() -> None:
    w = torch.ones(20, 30, 3, 3, device=DEVICE)
    weight, x = BlockFilters.from_dense(w, block=16), torch.ones(4, 30, 5, 5, device=DEVICE)
    for args, words in (
        (
            (w[0],),
            r"expected a weight \[N, C, kh, kw\] in fp32, fp16 or bf16, got torch.float32 \[30, 3, 3\]",
        ),
        ((w[:0],), r"got torch.float32 \[0, 30, 3, 3\]"),
        ((w.double(),), "got torch.float64"),
        ((w, None, 48), "expected blocks of 16, 32, 64 or 128, got 48"),
        ((w.new_ones(1, 1, 128, 1),), "expected at most 127 x 127 taps, got 128 x 1"),
        ((w, w), r"expected a bool mask \[20, 30, 3, 3\]"),
        ((w, w[1:] > 0), r"got torch.bool \[19, 30, 3, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            BlockFilters.from_dense(*args)
    for args, words in (
        ((x[:, 1:], weight), r"expected x \[B, 30, H, W\] in torch.float32 on .*, got \[4, 29, 5, 5\]"),
        ((x[0], weight), r"got \[30, 5, 5\]"),
        ((x.half(), weight), r"got \[4, 30, 5, 5\] in torch.float16"),
        ((x.to("meta"), weight), "on meta"),
        ((x, weight, x[0, 0, 0]), r"expected bias \[20\] in torch.float32"),
        ((x[..., :2], weight), "expected a kernel no larger than the padded image"),
        ((x, weight, None, 0), "stride and dilation from 1"),
        (
            (x, weight, None, 1, 0, 1, False, "cuda"),
            "kernels='cuda': expected auto, triton, torch or reference",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            block_conv2d(*args)
    far = torch.empty(1, 30, 2**13, 2**14, device="meta")
    index = weight.values, weight.places, weight.starts, weight.order
    with pytest.raises(ValueError, match=r"expected less than 2\^31 pixels of y and numbers in an image"):
        launch(far, *index, 20, None, False, geometry((3, 3), 1, 0, 1))


def test_floor() -> None:
    weight = BlockFilters.from_dense(torch.ones(40, 50, 3, 3, device=DEVICE).half(), block=16)
    blocks = 3 * 4 * 9
    assert floor(torch.ones(7, 50, 6, 5, device=DEVICE), weight, 2, 1) == {
        "bytes": 2 * blocks * 256 + 4 * (blocks + 4 + 3) + 4 * (7 * 50 * 30 + 7 * 40 * 9 + 40),
        # for each of 3 blocks of filters what the taps of 3 x 3 pixels see: 2 + 3 + 3 rows, 2 + 3 + 2
        # columns; y, and 9 parts of it twice
        "l2_bytes": 4 * (3 * 7 * 50 * 8 * 7 + blocks * 256 + 7 * 40 * 9 * (1 + 2 * 9)),
        "flops": 2 * 7 * 9 * blocks * 256,
    }


@pytest.mark.host
@pytest.mark.parametrize(
    ("layer", "block", "parts"),
    [("1x1, stride 2", 32, 1), ("3x3", 64, 3), ("5x5, stride 2", 32, 5), ("3x2, all differ", 16, 1)],
)
def test_l2_bytes_are_what_the_kernel_loads_and_stores(layer: str, block: int, parts: int) -> None:
    p = Problem(*LAYERS[layer], block=block)  # type: ignore[arg-type]
    w = p.weight
    pixels = p.run(kernels="torch")[:, 0].numel()
    _, splits = choose("ieee", block, pixels, w.order.numel(), w.places.numel())
    assert splits == parts
    with traffic(w.places, w.starts, w.order, p.bias) as found:
        p.run(kernels="triton")
    assert sum(found) == floor(p.x, w, *p.where)["l2_bytes"]


OPCHECK = """
import pytest
import torch
from torch import library
from sparselth.kernels.block_conv2d import BlockFilters, _operator, block_conv2d

torch.manual_seed(0)
w = torch.randn(40, 20, 3, 3)
w[16:32, :16, 1] = 0
weight, x, bias = BlockFilters.from_dense(w, block=16), torch.randn(2, 20, 5, 5), torch.randn(40)
where = [3, 3, 2, 2, 1, 1, 1, 1]
for kernels in ("auto", "reference"):
    index = weight.places, weight.starts, weight.order, list(weight.runs)
    library.opcheck(_operator, (x, weight.values, *index, 40, bias, True, where, kernels))
    turned = x.contiguous(memory_format=torch.channels_last)
    library.opcheck(_operator, (turned, weight.values, *index, 40, None, False, where, kernels))
compiled = torch.compile(lambda x: block_conv2d(x, weight, bias, 2, 1), fullgraph=True, backend="aot_eager")
assert compiled(x).equal(block_conv2d(x, weight, bias, 2, 1))
with pytest.raises(RuntimeError, match="has no gradient"):
    block_conv2d(x.requires_grad_(), weight).sum().backward()
with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
    block_conv2d(x.detach(), weight, kernels="triton")
"""


@pytest.mark.host
def test_without_the_interpreter(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)


@pytest.mark.host
def test_large_tiles_take_warp_groups_and_all_stages(
    takes_warp_groups: Callable[[str, dict[str, tuple[Any, ...]], str], None],
) -> None:
    takes_warp_groups("block_conv2d", module.TILES, "BLOCK_M")
