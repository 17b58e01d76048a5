"""The detector finds each kind of race that is planted, and nothing in a kernel without one."""

from __future__ import annotations

import pytest
import torch

from races import Race, watched
from sparselth.kernels._triton import INTERPRET, tl, triton

pytestmark = [pytest.mark.host, pytest.mark.skipif(not INTERPRET, reason="Triton's interpreter is off")]


@triton.jit
def _copy(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """No race."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)


@triton.jit
def _overlapping(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)


@triton.jit
def _all_to_one(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // 2, tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)


@triton.jit
def _shift(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Each reads what the next one writes."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(y_ptr + offs + 1, mask=offs + 1 < N, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < N)


@triton.jit
def _back(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Between threads of a program there is no order without a barrier."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 1.0, mask=offs < N)
    x = tl.load(y_ptr + offs, mask=offs < N, other=0.0)
    tl.store(x_ptr + offs, x, mask=offs < N)


@triton.jit
def _count(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """An atomic, which the first program reads."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < N, other=0.0)))
    if tl.program_id(0) == 0:
        tl.store(x_ptr, tl.load(y_ptr))


@triton.jit
def _reset(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(y_ptr, 0.0)
    tl.atomic_add(y_ptr, 1.0)


@triton.jit
def _bytes(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Words and, as bytes, a part of the next program's word."""
    word = tl.program_id(0)
    tl.store(y_ptr + word, 1.0)
    tl.store(y_ptr.to(tl.pointer_type(tl.uint8)) + 4 * word + 5, tl.full((), 7, tl.uint8))


@triton.jit
def _careless(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Adds what lies behind N."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < N)))


def run(kernel: object, programs: int = 3, block: int = 16, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.arange(64.0), torch.zeros(64)
    kernel[programs,](x, y, n, BLOCK=block)  # type: ignore[index]
    return x, y


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (_overlapping, r"_overlapping: y_ptr, number 15 of \[64\]: written by two programs"),
        (_all_to_one, r"y_ptr, number 0 of \[64\]: written twice by one program"),
        (_shift, r"y_ptr, number (16|32) of \[64\]: read by one program and written by another"),
        (_back, r"y_ptr, number \d+ of \[64\]: read by the program that wrote it before"),
        (_count, r"y_ptr, number 0 of \[64\]: an atomic's, and read plainly"),
        (_reset, r"y_ptr, number 0 of \[64\]: an atomic's, and written plainly"),
        (_bytes, r"y_ptr, number 1 of \[64\]: written by two programs"),
    ],
    ids=lambda kernel: getattr(kernel, "__name__", ""),
)
def test_a_planted_race_is_found(kernel: object, words: str) -> None:
    with watched(), pytest.raises(Race, match=words):
        run(kernel)


@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_without_a_race_passes(seed: int) -> None:
    with watched(seed=seed):
        _, y = run(_copy)
    assert torch.equal(y, torch.where(torch.arange(64) < 40, torch.arange(64.0), 0))


def test_what_a_mask_holds_back_is_garbage() -> None:
    with watched():
        assert run(_careless, 1)[1][0] == 15 * 16 / 2  # all of the block is inside
        assert run(_careless, 1, 16, 10)[1][0].isnan()


def test_programs_run_in_a_drawn_order() -> None:
    """So that what is not a race between addresses, like a value of the host's, is met in several orders."""
    found = set()
    for seed in range(6):
        with watched(seed=seed):
            run(_copy)
            found.add(tuple(run(_overlapping_values)[1][:3].tolist()))
    assert len(found) > 1


@triton.jit
def _overlapping_values(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    old = tl.atomic_add(y_ptr + 4, 1.0)
    tl.store(y_ptr + tl.program_id(0), old)


def test_a_grid_that_no_device_takes_is_found() -> None:
    for grid in ((0,), (1, 65536), (1, 1, 65536)):
        with watched(), pytest.raises(Exception, match="is not from 1 to"):
            _copy[grid](torch.zeros(64), torch.zeros(64), 0, BLOCK=16)
