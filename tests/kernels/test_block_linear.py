"""Against the formula in float64; whatever the mask; dead blocks are not there, live ones count whole."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
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
from sparselth.kernels import block_linear as module
from sparselth.kernels._tiles import BLOCKS, Tile, choose
from sparselth.kernels.block_linear import BlockWeight, block_linear, floor, launch

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
WAYS = ("triton", "torch", "reference")
MASKS = ("random", "empty", "full", "one weight", "one block row", "half of the block rows")
TINY = [(1, 1, 1, 16), (33, 70, 150, 32), (5, 130, 257, 128)]  # B, N, K, block
LARGE = [
    *[(16, 300, 784, 16), (128, 256, 512, 64), (17, 1000, 520, 64), (64, 512, 128, 128)],
    *[(4096, 4096, 1024, 64), (4100, 2050, 1030, 128), (4100, 4096, 1030, 128), (2000, 4096, 512, 32)],
    (1, 256, 65536, 32),
]
PARTS = [("torch", "ieee"), *[("triton", part) for part in DTYPES]]
TILES = [(kind, tile) for kind, tiles in module.TILES.items() for tile in tiles]


def masked(kind: str, n: int, k: int, block: int, seed: int = 0, density: float = 0.4) -> Tensor:
    """A mask of blocks, with pruned weights inside the live ones too."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = -(-n // block), -(-k // block)
    live = torch.rand(rows, columns, generator=g) < density
    if kind == "full":
        return torch.ones(n, k, dtype=torch.bool)
    if kind == "empty":
        live[:] = False
    elif kind == "one block row":
        live[:] = False
        live[rows // 2] = True
    elif kind == "half of the block rows":
        live[::2] = False
    mask = live.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    mask &= torch.rand(n, k, generator=g) < 0.8
    if kind == "one weight":
        mask[:] = False
        mask[n - 1, k // 2] = True
    return mask


class Problem:
    def __init__(
        self,
        b: int,
        n: int,
        k: int,
        block: int,
        dtype: torch.dtype,
        kind: str = "random",
        seed: int = 0,
        density: float = 0.4,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        x, w, bias = (torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((b, k), (n, k), (n,)))
        self.mask = masked(kind, n, k, block, seed, density).to(DEVICE)
        self.x, self.bias, self.kept = x, bias, torch.where(self.mask, w, 0)
        self.weight = BlockWeight.from_dense(torch.where(self.mask, w, NAN), self.mask, block)

    def right(self, relu: bool) -> Tensor:
        y = F.linear(self.x.double(), self.kept.double(), self.bias.double())
        return y.relu() if relu else y

    def scale(self) -> Tensor:
        """What y would be without cancellation."""
        return F.linear(self.x.abs().double(), self.kept.abs().double(), self.bias.abs().double())

    def check(self, y: Tensor, relu: bool = False, tf32: bool = False) -> None:
        right = self.right(relu)
        assert y.is_contiguous()
        near(y, right, self.x.shape[1], self.scale(), "tf32" if tf32 else None)


@pytest.mark.parametrize("kernels", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (33, 70, 150), (5, 257, 131)], ids=lambda s: "B{}-N{}-K{}".format(*s)
)
def test_it_is_the_formula(shape: tuple[int, int, int], block: int, dtype: torch.dtype, kernels: str) -> None:
    p = Problem(*shape, block, dtype)
    p.check(block_linear(p.x, p.weight, p.bias, kernels=kernels))
    p.check(block_linear(p.x, p.weight, p.bias, relu=True, kernels=kernels), relu=True)


def held(part: str, shape: tuple[int, ...], kind: str = "random", seed: int = 0, live: float = 0.4) -> None:
    """Twice, from tensors amid NaN and into NaN: the same bits, and no further off than torch is."""
    p = Problem(*shape, DTYPES[part], kind, seed, live)  # type: ignore[arg-type]
    assert p.weight.to_dense().equal(p.kept)
    x, weight = surrounded(p.x), replace(p.weight, values=surrounded(p.weight.values))

    def run() -> dict[str, Tensor]:
        return {
            name: block_linear(x, weight, p.bias, name == "relu", kernels="triton") for name in ("y", "relu")
        }

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        y = F.linear(p.x.to(dtype), p.kept.to(dtype), p.bias.to(dtype))
        return {"y": y, "relu": y.relu()}

    with precision(part):
        with poisoned():
            found = run()
            must_repeat(run(), found)
        if kind == "empty":
            assert found["y"].equal(p.bias.expand_as(found["y"]))
        terms, scale = dict.fromkeys(found, shape[2]), dict.fromkeys(found, p.scale())
        compare(found, formula(torch.double), formula(DTYPES[part]), part, terms, scale)


@pytest.mark.parametrize("shape", pick(TINY, TINY + LARGE), ids="B{0[0]}-N{0[1]}-K{0[2]}-b{0[3]}".format)
@pytest.mark.parametrize("part", DTYPES)
def test_no_further_off_than_torch(part: str, shape: tuple[int, ...]) -> None:
    held(part, shape)


@pytest.mark.parametrize("kind", MASKS[1:])
@pytest.mark.parametrize("part", DTYPES)
def test_no_further_off_than_torch_whatever_the_mask(part: str, kind: str) -> None:
    held(part, (5, 100, 150, 32), kind)


@pytest.mark.parametrize("seed", range(pick(2, 40)))
@pytest.mark.parametrize("part", DTYPES)
def test_no_further_off_than_torch_at_random_shapes(part: str, seed: int) -> None:
    draw = random.Random(seed)
    shape = (*(draw.randint(1, pick(34, 700)) for _ in range(3)), draw.choice(BLOCKS))
    held(part, shape, seed=seed, live=draw.random())


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("batch", [3, 300])
@pytest.mark.parametrize("part", DTYPES)
def test_in_a_cuda_graph(part: str, batch: int) -> None:
    p = Problem(batch, 512, 4096, 32, DTYPES[part])
    with precision(part):
        must_replay(lambda: {"y": block_linear(p.x, p.weight, p.bias, True)})


@pytest.mark.parametrize("kernels", WAYS)
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind: str, kernels: str) -> None:
    for block, n, k in ((16, 50, 90), (64, 128, 192)):
        p = Problem(3, n, k, block, torch.float32, kind)
        y = block_linear(p.x, p.weight, p.bias, kernels=kernels)
        p.check(y)
        if kind == "empty":
            assert y.equal(p.bias.expand_as(y))
            assert not block_linear(p.x, p.weight, kernels=kernels).any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_format_holds_any_mask(block: int, kind: str) -> None:
    for n, k in ((1, 1), (block, 2 * block), (3 * block + 5, 5 * block - 7)):
        mask = masked(kind, n, k, block).to(DEVICE)
        w = torch.randn(n, k, device=DEVICE)
        packed = BlockWeight.from_dense(torch.where(mask, w, NAN), mask, block)
        kept = torch.where(mask, w, 0)
        assert packed.to_dense().equal(kept)
        assert BlockWeight.from_dense(kept, block=block).to_dense().equal(kept)
        rows, columns = -(-n // block), -(-k // block)
        live = F.pad(mask.float(), (0, columns * block - k, 0, rows * block - n))
        count = int(live.view(rows, block, columns, block).amax((1, 3)).sum())
        assert packed.occupancy == count / (rows * columns)
        assert packed.bytes() == 4 * count * block**2 + 4 * (count + rows + 1 + rows)
        lengths = packed.starts.diff()
        assert lengths.sort(descending=True).values.equal(lengths)
        assert packed.order.sort().values.equal(torch.arange(rows, dtype=torch.int32, device=DEVICE))
        assert list(lengths) == [
            length
            for lists, length in zip(packed.runs[::2], packed.runs[1::2], strict=True)
            for _ in range(lists)
        ]
        assert packed.to(DEVICE).to_dense().equal(kept)
    assert packed.block == block


def test_a_kept_weight_of_0_keeps_its_block() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool, device=DEVICE)
    mask[20, 3] = True
    w = torch.zeros(32, 32, device=DEVICE)
    assert BlockWeight.from_dense(w, mask, 16).occupancy == 0.25
    assert BlockWeight.from_dense(w, block=16).occupancy == 0


@pytest.mark.parametrize(("kernels", "part"), PARTS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_infinity_pass_live_blocks_alone(value: float, kernels: str, part: str) -> None:
    mask = torch.zeros(64, 96, dtype=torch.bool, device=DEVICE)
    mask[0:32, 0:32] = mask[32:64, 32:64] = True
    mask[5, 3] = False
    w = torch.ones(64, 96, dtype=DTYPES[part], device=DEVICE)
    for block, batch in ((16, 3), (32, 40)):
        weight = BlockWeight.from_dense(w, mask, block)
        x = torch.ones(batch, 96, dtype=w.dtype, device=DEVICE)
        x[1, 3] = x[2, 80] = value  # a column that only the first 32 rows see, and one that none sees
        with precision(part):
            y, rectified = (block_linear(x, weight, relu=relu, kernels=kernels) for relu in (False, True))
        right = torch.full_like(y, 32)
        right[:, 5] = 31  # the pruned weight of a live block
        assert y[[0, *range(2, batch)]].equal(right[1:])
        assert y[1, 32:].equal(right[1, 32:])
        assert not y[1, :32].isfinite().any()
        assert y[1, 5].isnan()
        assert rectified[1, 5].isnan()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
def test_an_empty_list_reads_neither_x_nor_weights(kind: str, tile: Tile, splits: int) -> None:
    """Such a list goes through a step of products like all others; x and what follows the weights are NaN."""
    part = "bf16" if kind == "half" else kind
    block = max(16, min(32, tile.depth))
    mask = torch.zeros(3 * block, 2 * block, dtype=torch.bool, device=DEVICE)
    mask[block : 2 * block, block:] = True
    one = torch.ones(mask.shape, dtype=DTYPES[part], device=DEVICE)
    x = torch.ones(5, 2 * block, dtype=one.dtype, device=DEVICE)
    x[:, :block] = NAN
    bias = torch.arange(3 * block, device=DEVICE).to(one.dtype)  # up to 95, sums to 127
    for w in (BlockWeight.from_dense(one, mask, block), BlockWeight.from_dense(one, mask & False, block)):
        index = w.places, w.starts, w.order
        with precision(part):
            y = launch(x, surrounded(w.values), *index, len(bias), bias, False, (tile, splits))
        live = w.places.numel() * block * mask[:, -1]
        assert y.equal((bias + live).expand_as(y))


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
        p = Problem(pick(19, 70), block + 9, pick(90, 5 * block + 8), block, DTYPES[part])
        w, right = p.weight, p.right(True)
        call = partial(launch, p.x, w.values, w.places, w.starts, w.order, len(p.bias))
        with precision(part):
            assert _tiles.kind(p.x.dtype) == kind
            for splits in (1, 3):
                y = call(p.bias, True, (tile, splits))
                assert (y.double() - right).norm() <= max(3 * UNIT[part], 1e-6) * right.norm()
                p.check(y, relu=True, tf32=part == "tf32" and DEVICE == "cuda")
                if (tile.rows, block) == (32, 16):
                    assert y.equal(call(p.bias, True, (tile, splits)))
                    assert call(None, False, (tile, splits)).isfinite().all()


def test_the_choice_of_tiles() -> None:
    def chosen(kind: str, block: int, batch: int, n: int, k: int, density: float) -> tuple[int, int, int]:
        lists = -(-n // block)
        tile, splits = choose(module.TILES[kind], block, batch, lists, int(lists * k / block * density))
        return tile.rows, min(block, tile.columns), splits

    assert chosen("half", 64, 4096, 8192, 8192, 0.1) == (256, 64, 1)
    assert chosen("half", 128, 4096, 8192, 8192, 0.1) == (256, 128, 1)
    assert chosen("half", 128, 4096, 4096, 4096, 0.1) == (256, 128, 1)
    assert chosen("half", 128, 4096, 2048, 4096, 0.1) == (128, 128, 1)
    assert chosen("half", 64, 512, 8192, 8192, 0.1) == (128, 64, 1)
    assert chosen("half", 64, 1, 8192, 8192, 0.1) == (16, 16, 1)
    assert chosen("half", 64, 32, 8192, 8192, 0.1) == (32, 32, 1)
    assert chosen("ieee", 32, 1, 64, 65536, 1.0) == (16, 16, 66)  # 4 programs of long lists
    assert chosen("half", 64, 1, 64, 64, 1.0) == (16, 16, 1)
    assert chosen("tf32", 16, 40, 256, 256, 0.0) == (64, 16, 1)
    for kind in module.TILES:
        for block in BLOCKS:
            for batch in (1, 16, 17, 33, 100, 5000):
                tile, splits = choose(module.TILES[kind], block, batch, 7, 0)
                assert splits == 1
                assert tile.rows <= 16 or tile.rows < 2 * batch
                assert tile.columns <= max(64, block)


@pytest.mark.parametrize(
    ("batch", "n", "k", "block", "blocks"),
    [
        (2**26, 64, 64, 16, 16),
        (1, 2**24, 64, 16, 2**22),
        (1, 16, 2**26, 16, 2**22),  # one list, in as many parts as there are
        (2**20, 2**20, 16, 16, 2**16),
    ],
)
def test_grids_are_a_devices(
    batch: int, n: int, k: int, block: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 2**31 - 1 programs along x, 65,535 along y. Nothing is allocated, nothing runs."""
    grids: list[tuple[int, ...]] = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_block_linear_kernel", Counted())
    monkeypatch.setattr(_tiles, "_sum_kernel", Counted())
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: nullcontext())
    x = torch.empty(batch, k, device="meta", dtype=torch.bfloat16)
    values = x.new_empty(blocks, block, block)
    columns, starts, order = (
        x.new_empty(size, dtype=torch.int32) for size in (blocks, n // block + 1, n // block)
    )
    launch(x, values, columns, starts, order, n, None, False)
    assert grids
    for first, *second in grids:
        assert 0 < first < 2**31
        assert all(0 < size <= 65_535 for size in second)


@pytest.mark.parametrize(("kernels", "part"), PARTS)
def test_strides_do_not_matter(kernels: str, part: str) -> None:
    with precision(part):
        strides_do_not_matter(kernels, DTYPES[part])


def strides_do_not_matter(kernels: str, dtype: torch.dtype) -> None:
    p = Problem(18, 40, 70, 16, dtype)
    right = block_linear(p.x, p.weight, p.bias, kernels=kernels)
    wide = p.x.new_full((18, 2 * 70 + 3), NAN)
    wide[:, 3::2] = p.x
    bias = p.bias.new_full((80,), NAN)
    bias[::2] = p.bias
    for x in (p.x.t().contiguous().t(), wide[:, 3::2], F.pad(p.x, (5, 9), value=NAN)[:, 5:75]):
        found = block_linear(x, p.weight, bias[::2], kernels=kernels)
        assert found.equal(right)
    row = p.x[:1].expand(18, 70)
    assert block_linear(row, p.weight, kernels=kernels).allclose(
        block_linear(row.contiguous(), p.weight, kernels=kernels), atol=1e-6
    )


def test_both_ways_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks as one batch, or list by list, in parts that differ in size."""
    p = Problem(7, 230, 260, 16, torch.float32)
    found = []
    for singly, gathered in ((0, 1 << 18), (100, 1 << 18), (0, 1), (0, 3000)):
        monkeypatch.setattr(module, "SINGLY", singly)
        monkeypatch.setattr(module, "GATHERED", gathered)
        found.append(block_linear(p.x, p.weight, p.bias, kernels="torch"))
        p.check(found[-1])
        assert found[-1].equal(block_linear(p.x, p.weight, p.bias, kernels="torch"))


@settings(max_examples=CASES)
@given(
    st.tuples(st.integers(1, 34), st.integers(1, 150), st.integers(1, 150)),
    st.sampled_from(BLOCKS),
    st.sampled_from(list(FLOATS)),
    st.sampled_from(MASKS),
    st.booleans(),
    st.sampled_from(["triton", "torch"]),
    st.integers(0, 10**6),
)
def test_any_shape(
    shape: tuple[int, int, int],
    block: int,
    dtype: torch.dtype,
    kind: str,
    relu: bool,
    kernels: str,
    seed: int,
) -> None:
    p = Problem(*shape, block, dtype, kind, seed)
    assert p.weight.to_dense().equal(p.kept)
    p.check(block_linear(p.x, p.weight, p.bias, relu, kernels), relu)


def test_auto_and_an_empty_batch() -> None:
    p = Problem(4, 20, 30, 16, torch.float32)
    usual = "triton" if DEVICE == "cuda" else "torch"
    assert block_linear(p.x, p.weight).equal(block_linear(p.x, p.weight, kernels=usual))
    for kernels in WAYS:
        assert block_linear(p.x[:0], p.weight, p.bias, kernels=kernels).shape == (0, 20)


def test_what_does_not_fit_is_said() -> None:
    w = torch.ones(20, 30, device=DEVICE)
    weight, x = BlockWeight.from_dense(w, block=16), torch.ones(4, 30, device=DEVICE)
    for args, words in (
        ((w[0],), r"expected a weight \[N, K\] in fp32, fp16 or bf16, got torch.float32 \[30\]"),
        ((w[:0],), r"got torch.float32 \[0, 30\]"),
        ((w.double(),), "got torch.float64"),
        ((w, None, 48), "expected blocks of 16, 32, 64 or 128, got 48"),
        ((w, w), r"expected a bool mask \[20, 30\]"),
        ((w, w[1:] > 0), r"got torch.bool \[19, 30\]"),
    ):
        with pytest.raises(ValueError, match=words):
            BlockWeight.from_dense(*args)
    for args, words in (
        ((x[:, 1:], weight), r"expected x \[B, 30\] in torch.float32 on .*, got \[4, 29\]"),
        ((x[0], weight), r"got \[30\]"),
        ((x.half(), weight), r"got \[4, 30\] in torch.float16"),
        ((x.to("meta"), weight), "on meta"),
        ((x, weight, x[0]), r"expected bias \[20\] in torch.float32"),
        ((x, weight, None, False, "cuda"), "kernels='cuda': expected auto, triton, torch or reference"),
    ):
        with pytest.raises(ValueError, match=words):
            block_linear(*args)
    far = torch.empty(1, device="meta").as_strided((2, 30), (2**23, 1))
    with pytest.raises(ValueError, match=r"less than 2\^23 numbers apart"):
        launch(far, weight.values, weight.places, weight.starts, weight.order, 20, None, False)


def test_floor() -> None:
    weight = BlockWeight.from_dense(torch.ones(40, 50, device=DEVICE).half(), block=16)
    assert floor(weight, 7) == {
        "bytes": 2 * (12 * 256 + 7 * 90 + 40) + 4 * (12 + 4 + 3),
        "l2_bytes": 2 * (3 * 7 * 50 + 12 * 256 + 7 * 40),  # x for each of 3 block rows
        "flops": 2 * 7 * 12 * 256,
    }
    # what the head of block_linear.py says of 4096 square, batch 4096, a tenth of the blocks
    for block, x_and_w in ((64, 6.4 * (256 + 64) * 64 * 64 * 16), (128, 3.2 * (256 + 128) * 128 * 32 * 16)):
        lists = 4096 // block
        mask = torch.zeros(lists, lists, dtype=torch.bool, device=DEVICE)
        mask.view(-1)[torch.arange(lists**2, device=DEVICE) * 7 % 10 == 0] = True
        index = mask.sum(1).cumsum(0).int(), torch.arange(lists, dtype=torch.int32, device=DEVICE)
        values = torch.empty(1, 1, 1, dtype=torch.bfloat16, device=DEVICE).expand(
            int(mask.sum()), block, block
        )
        columns = mask.nonzero()[:, 1].int()
        weight = BlockWeight((4096, 4096), values, columns, F.pad(index[0], (1, 0)), index[1], ())
        assert floor(weight, 4096)["l2_bytes"] == pytest.approx(2 * (x_and_w + 4096**2), rel=0.01)


@pytest.mark.host
@pytest.mark.parametrize(
    ("shape", "parts"),
    [((5, 40, 50, 16), 1), ((70, 100, 90, 32), 1), ((33, 130, 257, 128), 3), ((1, 30, 2060, 32), 7)],
)
def test_l2_bytes_are_what_the_kernel_loads_and_stores(shape: tuple[int, int, int, int], parts: int) -> None:
    p = Problem(*shape, torch.float32)
    w = p.weight
    _, splits = choose(module.TILES["ieee"], w.block, shape[0], w.order.numel(), w.places.numel())
    assert splits == parts
    with traffic(w.places, w.starts, w.order, p.bias) as found:
        block_linear(p.x, w, p.bias, kernels="triton")
    assert sum(found) == floor(w, shape[0])["l2_bytes"]


OPCHECK = """
import pytest
import torch
from torch import library
from sparselth.kernels.block_linear import BlockWeight, _operator, block_linear

torch.manual_seed(0)
w = torch.randn(40, 50)
w[16:32, :32] = 0
weight, x, bias = BlockWeight.from_dense(w, block=16), torch.randn(5, 50), torch.randn(40)
for kernels in ("auto", "reference"):
    index = weight.places, weight.starts, weight.order, list(weight.runs)
    library.opcheck(_operator, (x, weight.values, *index, 40, bias, True, kernels))
    library.opcheck(_operator, (x.t().contiguous().t(), weight.values, *index, 40, None, False, kernels))
compiled = torch.compile(lambda x: block_linear(x, weight, bias), fullgraph=True, backend="aot_eager")
assert compiled(x).equal(block_linear(x, weight, bias))
with pytest.raises(RuntimeError, match="has no gradient"):
    block_linear(x.requires_grad_(), weight).sum().backward()
with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
    block_linear(x, weight, kernels="triton")
"""


@pytest.mark.host
def test_without_the_interpreter(without_interpreter: Callable[[str], str]) -> None:
    without_interpreter(OPCHECK)


@pytest.mark.host
def test_large_tiles_take_warp_groups_and_all_stages(
    takes_warp_groups: Callable[[str, dict[str, tuple[Any, ...]], str], None],
) -> None:
    takes_warp_groups("block_linear", module.TILES, "BLOCK_M")
