"""Ops and what packs weights for them, whatever torch's default dtype and device are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ops import FILTERS, MATRIX, OPS, TAPS, WIDE, some
from oracle import same_bits
from sparselth.kernels.bitmask import count, pack, unpack
from sparselth.kernels.block_conv2d import BlockFilters
from sparselth.kernels.block_linear import BlockWeight
from sparselth.kernels.csr_lanes import LanedCsr
from sparselth.kernels.csr_linear import CsrIndex
from sparselth.kernels.csr_tiled import TiledCsr
from sparselth.kernels.depthwise_rows import DepthwiseRows
from sparselth.kernels.magnitude_threshold import magnitude_threshold
from sparselth.kernels.masked_update import (
    bind_masked_adam,
    bind_masked_sgd,
    masked_adam_many,
    masked_sgd_many,
)
from sparselth.kernels.slot_linear import Slots
from sparselth.kernels.sparse_conv2d import Conv2dIndex
from sparselth.kernels.sparse_conv2d_rows import ConvRows
from sparselth.kernels.two_four_linear import TwoFour


@pytest.fixture(params=["float64", "meta"])
def unusual(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's default dtype is float64, or its default device "meta"."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def computed(op: str, kernels: str) -> Tensor | None:
    run, tensors = OPS[op]
    found = run(**{name: t.clone() for name, t in tensors.items()}, kernels=kernels)
    return found if isinstance(found, Tensor) else None


BEFORE = {(op, kernels): computed(op, kernels) for op in OPS for kernels in ("auto", "reference")}


@pytest.mark.parametrize(("op", "kernels"), BEFORE)
def test_an_op_gives_the_same_bits(op: str, kernels: str, unusual: None) -> None:
    found, right = computed(op, kernels), BEFORE[op, kernels]
    if right is not None:
        assert found is not None
        assert (found.dtype, found.device) == (right.dtype, right.device)
        assert same_bits(found, right)


W, G = some(1, 40), some(1, 40)
BITS = pack(torch.arange(40)[None] % 3 > 0)
LR, STEP = torch.full((1,), 0.1, dtype=torch.float64), torch.ones(1)


def updated(update: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> Tensor:
    w, a, b = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    update(w, G.clone(), a, b)
    return torch.cat([w, a, b])


MAKERS: dict[str, Callable[[], Tensor]] = {
    "pack": lambda: unpack(pack(MATRIX != 0), 32),
    "count": lambda: count(pack(MATRIX != 0)),
    "threshold": lambda: magnitude_threshold([MATRIX[None]], torch.tensor([[9]], device="cpu"))[1],
    "CsrIndex": lambda: (index := CsrIndex.from_dense(MATRIX != 0)).to_dense(index.gather(MATRIX)),
    "TiledCsr": lambda: TiledCsr.from_dense(MATRIX, 4).to_dense(),
    "LanedCsr": lambda: LanedCsr.from_dense(MATRIX, MATRIX != 0).to_dense(),
    "Slots": lambda: Slots.from_dense(WIDE).to_dense(),
    "BlockWeight": lambda: BlockWeight.from_dense(MATRIX, block=16).to_dense(),
    "BlockFilters": lambda: BlockFilters.from_dense(FILTERS, block=16).to_dense(),
    "TwoFour": lambda: TwoFour.from_dense(WIDE).to_dense(),
    "Conv2dIndex": lambda: (
        index := Conv2dIndex.from_dense(FILTERS != 0, (6, 6), stride=2, padding=1)
    ).to_dense(index.gather(FILTERS)),
    "slices": lambda: index.memory if (index := TAPS.slices(20)) else TAPS.gather(FILTERS),
    "ConvRows": lambda: ConvRows.from_dense(FILTERS, (6, 6)).to_dense(),
    "DepthwiseRows": lambda: DepthwiseRows.from_dense(FILTERS[:, :1], (6, 6), 2).to_dense(),
    "bind_masked_sgd": lambda: updated(
        lambda w, g, a, b: bind_masked_sgd(w, g, a, BITS, momentum=0.9, weight_decay=0.1)(1, 0.1)
    ),
    "bind_masked_adam": lambda: updated(
        lambda w, g, a, b: bind_masked_adam(w, g, (a, b), BITS, weight_decay=0.1)(1, 0.1)
    ),
    "masked_sgd_many": lambda: updated(
        lambda w, g, a, b: masked_sgd_many([w], [g], [BITS], [a], LR, momentum=0.9)
    ),
    "masked_adam_many": lambda: updated(
        lambda w, g, a, b: masked_adam_many([w], [g], [BITS], ([a], [b]), [STEP.clone()], LR)
    ),
}
MADE = {name: make() for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_packed_weight_and_an_update_are_the_same_bits(name: str, unusual: None) -> None:
    found = MAKERS[name]()
    assert (found.dtype, found.device) == (MADE[name].dtype, MADE[name].device)
    assert same_bits(found, MADE[name])
