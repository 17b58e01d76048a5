"""What tests compare with: float64 formulas, poisoned memory, layouts; on a CPU or on a CUDA device.

Tests of Triton kernels run twice: by `make test` in Triton's interpreter, on small shapes, and on a CUDA
device (bench/gpu_check.py) on those that meet every tile. `pick` chooses between the two. Whatever is made on
`DEVICE` is where the kernels run.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

from sparselth.check import ROUNDING, check
from sparselth.kernels import _graphs, _native
from sparselth.measure.floors import precision as precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 256  # elements before and behind every tensor of a check
RESERVED = 2**26  # bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
PARTS = {"bf16": "bf16", "fp16": "fp16", "tf32": "tf32", "ieee": "fp32"}  # as `check` calls them
UNIT = {part: ROUNDING[dtype] for part, dtype in PARTS.items()}
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MOST = {"fp32": 1e-6, "tf32": 2e-3}
NAN, INF = float("nan"), float("inf")
T = TypeVar("T")


def kernels_of(way: str) -> str:
    """The argument `kernels` for a level of the native kernels, which is chosen, or for its own name."""
    if way in _native.LEVELS:
        _native.choose(way)
        return "native"
    return way


class Wrong(AssertionError):
    """A check that failed; its text says what, and by how much."""


class Skip(unittest.SkipTest):
    """A case that this machine has too little memory for."""


def pick(interpreter: T, device: T) -> T:
    """What Triton's interpreter can do within a test's time, or what a CUDA device shall do."""
    return device if DEVICE == "cuda" else interpreter


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def fill(t: Tensor) -> Tensor:
    """NaN, or for integers what no correct index or count looks like."""
    if t.is_floating_point():
        return t.fill_(NAN)
    return t.fill_(0x55555555 if t.itemsize >= 4 else 0x55)


@contextmanager
def poisoned(guard: int = GUARD) -> Iterator[None]:
    """Whatever is allocated inside is full of NaN, and nothing may write in front of it or behind it.

    Without a guard it is where it would have been, and the places around it are not looked at.
    """
    kept: list[Tensor] = []
    plain = torch.empty
    _device_constructors()  # torch's list of them, kept from its first use: not of what stands here instead

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if not t.numel() or t.device.type == "meta":
                return t
            if not guard:  # on a CPU large memory is only reserved
                if t.device.type != "cpu" or t.nbytes <= RESERVED:
                    with _disable_current_modes():  # tests count what an op launches
                        fill(t)
                return t
            wide = fill(plain(t.numel() + 2 * guard, dtype=t.dtype, device=t.device))
            kept.append(wide)
            return wide.as_strided(t.shape, t.stride(), guard)

        return call

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
    for wide in kept:
        edges = torch.cat([wide[:guard], wide[-guard:]])
        if not same_bits(edges, fill(plain(2 * guard, dtype=wide.dtype, device=wide.device))):
            raise Wrong(f"wrote outside a tensor of {wide.numel() - 2 * guard} {wide.dtype}")


def surrounded(t: Tensor, shift: int = 0) -> Tensor:
    """A copy with NaN (bytes: 255) before and behind it, `shift` elements off the 16-byte grid."""
    wide = torch.empty(t.numel() + 2 * GUARD + shift, dtype=t.dtype, device=t.device)
    wide.fill_(255 if t.dtype == torch.uint8 else NAN)
    place = wide[GUARD + shift : GUARD + shift + t.numel()].view(t.shape)
    return place.copy_(t)


def layed(t: Tensor, layout: str) -> Tensor:
    """A matrix in another order of memory, or off the 16-byte grid, with NaN around or between."""
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "sliced":
        wide = t.new_full((t.shape[0], 2 * t.shape[1] + 3), NAN)
        wide[:, 3::2] = t
        return wide[:, 3::2]
    return surrounded(t, shift=1 if layout == "off the grid" else 0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN are equal to themselves here, and 0.0 and -0.0 are not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def must_repeat(first: Mapping[str, Tensor], second: Mapping[str, Tensor], why: str = "a second run") -> None:
    for name, t in first.items():
        if not same_bits(t, second[name]):
            raise Wrong(f"{name}: {why} gave other bits")


def compare(
    found: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    part: str,
    terms: Mapping[str, int],
    absolute: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """RMS errors by `sparselth.check`, with torch's own in the same dtype; Wrong beyond what it allows.

    `absolute` is the formula on absolute values: of what cancels it gives the size it could have had.
    """
    errors = {}
    for name, r in right.items():
        scale = r
        if absolute is not None:
            could = absolute[name].double() / terms[name] ** 0.5
            scale = could if could.norm() > r.double().norm() else r
        found_here = check(found[name], r, PARTS[part], terms=terms[name], own=torchs[name], scale=scale)
        if found_here.fault:
            raise Wrong(f"{name}: {found_here.fault}")
        errors[name] = found_here.error
    return errors


def near(
    found: Tensor,
    right: Tensor,
    terms: int,
    scale: Tensor | None = None,
    dtype: str | None = None,
    what: str = "",
    capped: bool = True,
) -> None:
    """Against float64 where torch's own result is not at hand; Wrong beyond what `sparselth.check` allows.

    `scale` is the formula on absolute values, of sums that may cancel; `dtype` what `check` calls it.
    `capped`: at most MOST, however long the sums.
    """
    dtype = dtype or FLOATS[found.dtype]
    result = check(found, right, dtype, terms=terms, scale=scale)
    if capped:
        result = replace(result, allowed=min(result.allowed, MOST.get(dtype, result.allowed)))
    if DEVICE == "cpu" and found.dtype == torch.bfloat16:  # Triton's interpreter cuts off, a device rounds
        result = replace(result, allowed=max(result.allowed, 2**-7))
    if not (right if scale is None else scale).any() and found.any():
        raise Wrong(f"{what or 'it'}: not 0, where nothing is added")
    if result.fault:
        raise Wrong(f"{what}: {result.fault}" if what else result.fault)


def must_be_zero(t: Tensor, where: Tensor, what: str) -> None:
    if int(t[where].count_nonzero()):
        raise Wrong(f"{what}: {int(t[where].count_nonzero())} of {int(where.sum())} are not 0")


def need_memory(gib: float) -> None:
    """Skip where a CUDA device has less than that free."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            raise Skip(f"needs {gib:.0f} GiB, {free:.0f} are free")


def graphed(run: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    """`calls` calls as a CUDA graph."""
    _graphs.warm_up(run)
    return _graphs.capture(run, calls)


def must_replay(run: Callable[[], Mapping[str, Tensor]]) -> None:
    """A CUDA graph of the call writes, over NaN, the bits of a plain call."""
    eager, kept = run(), dict[str, Tensor]()
    graph = graphed(lambda: kept.update(run()), 1)
    for t in kept.values():
        fill(t)
    graph.replay()
    must_repeat(kept, eager, "a CUDA graph")


@contextmanager
def traffic(*unseen: Tensor) -> Iterator[list[int]]:
    """Bytes that launches in Triton's interpreter load and store, access by access; none of `unseen`."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[int] = []
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in unseen]

    def counting(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def call(builder: Any, ptrs: Any, *rest: Any, **kwargs: Any) -> Any:
            places = ptrs.data[rest[mask_at].data.astype(bool)]
            for first, end in ranges:
                places = places[(places < first) | (places >= end)]
            found.append(len(places) * ptrs.get_element_ty().primitive_bitwidth // 8)
            return access(builder, ptrs, *rest, **kwargs)

        return call

    with (
        mock.patch.object(
            InterpreterBuilder, "create_masked_load", counting(InterpreterBuilder.create_masked_load, 0)
        ),
        mock.patch.object(
            InterpreterBuilder, "create_masked_store", counting(InterpreterBuilder.create_masked_store, 1)
        ),
    ):
        yield found
