"""Dry launches: the real launchers on CPU tensors; Triton specialises every launch for sm_90 and runs none.

    python tests/kernels/dry.py [NAME ...]    each op at its target, large and odd shapes: are grids legal?
    python tests/kernels/dry.py --compile     and does every kernel compile, in what shared memory?

What Triton knows of a kernel, types, which numbers are 1 or multiples of 16, which pointers are multiples of
16, comes from its own binder, as on a device. What a kernel would have written is zeros. Large memory is
only reserved, so that shapes may be as large as on a device.

Runs in a process without the interpreter.
"""

from __future__ import annotations

import argparse
import atexit
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver, jit

from sparselth.kernels import _choose, replica_parts
from sparselth.kernels.bitmask import launch_count, launch_pack, launch_unpack
from sparselth.kernels.block_conv2d import BlockFilters, block_conv2d
from sparselth.kernels.block_linear import BlockWeight, block_linear
from sparselth.kernels.csr_lanes import LanedCsr, csr_lanes
from sparselth.kernels.hash_weights import LAWS, Keys
from sparselth.kernels.hash_weights import launch as hash_launch
from sparselth.kernels.linear_grad_update import linear_grad_update
from sparselth.kernels.magnitude_threshold import launch as magnitude_launch
from sparselth.kernels.masked_conv2d import masked_conv2d
from sparselth.kernels.masked_linear import masked_linear
from sparselth.kernels.masked_update import masked_adam_many, masked_sgd_many
from sparselth.kernels.seed_conv2d import seed_conv2d
from sparselth.kernels.seed_linear import SeedWeight, seed_linear
from sparselth.kernels.slot_linear import Slots, slot_linear

TARGET = GPUTarget("cuda", 90, 32)
GRID = (2**31 - 1, 65535, 65535)  # of compute capability 9.0, as of any since 3.0
SHARED = 232448  # bytes a program may have on an H100 or H200
ALLOCATORS = (
    *((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")),
    *((Tensor, "new_empty"), (Tensor, "new_empty_strided")),
)
COMMITTED = 2**24  # bytes: larger memory is left as the system gives it, zeros that take no place


class _Driver:
    """A device that is there in name."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_device_interface(self) -> Any:
        return torch.cpu


@dataclass(frozen=True)
class Kernel:
    """A kernel, specialised: what its compilation takes."""

    fn: Any
    signature: Mapping[str, Any]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.fn.__name__)

    def source(self) -> ASTSource:
        return ASTSource(self.fn, self.signature, self.constants, self.attributes)

    def compile(self) -> Any:
        return triton.compile(self.source(), target=TARGET, options=dict(self.options))


@dataclass
class Launches:
    """What was launched: how often which kernel, distinct ones in order, largest grids, what is wrong."""

    count: Counter[str] = field(default_factory=Counter)
    kernels: dict[Any, Kernel] = field(default_factory=dict)
    grids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def grid(self, name: str, grid: Any) -> None:
        sizes = tuple(int(n) for n in (grid if isinstance(grid, tuple | list) else (grid,)))
        for axis, size, most in zip("xyz", sizes, GRID, strict=False):
            if not 1 <= size <= most:
                self.wrong.append(f"{name}: grid {sizes}, {axis} is not from 1 to {most:,}")
        padded = sizes + (1,) * (3 - len(sizes))
        self.grids[name] = tuple(map(max, padded, self.grids.get(name, (0, 0, 0))))


@contextmanager
def launches() -> Iterator[Launches]:
    """Inside, Triton's launches are noted, not run; every op takes its Triton path, on CPU tensors."""
    found = Launches()

    def do_compile(self: Any, key: Any, signature: Any, device: int, *more: Any) -> None:
        constants, options, attributes, *_ = more
        found.kernels[self.fn, key] = Kernel(self, signature, constants, attributes, options.__dict__)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.count[self.fn.__name__] += 1
        plain(self, *args, grid=grid, warmup=True, **kwargs)
        found.grid(self.fn.__name__, grid(kwargs) if callable(grid) else grid)

    def lacks(backend: str, *args: Any, **kwargs: Any) -> str:
        return "" if backend == "triton" else why(backend, *args, **kwargs)

    plain, why = jit.JITFunction.run, _choose.lacks
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(jit.JITFunction, "_do_compile", do_compile))
        stack.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        for owner, name in ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, _zeros(getattr(owner, name))))
        stack.enter_context(mock.patch.object(_choose, "lacks", lacks))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        yield found


def _zeros(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        t = allocate(*args, **kwargs)
        return t.zero_() if t.device.type != "meta" and t.nbytes < COMMITTED else t

    return call


LISTED: list[Kernel] = []  # here for the pool's processes, which are forked and find it full


@dataclass(frozen=True)
class Compiled:
    """How a compilation went: bytes of shared memory, or an error; whether Triton's cache had it."""

    name: str
    seconds: float
    shared: int
    cached: bool
    error: str
    keys: tuple[str, ...]  # folders of Triton's cache

    @property
    def wrong(self) -> str:
        if self.error:
            return f"{self.name}: {self.error}"
        return f"{self.name}: {self.shared:,} bytes of shared memory" if self.shared > SHARED else ""


def _compile(i: int, launchers: bool) -> Compiled:
    kernel, hits, keys = LISTED[i], [], []

    def listener(*, cache_hit: bool, metadata_group: dict[str, str], **_: Any) -> None:
        hits.append(cache_hit)
        keys.append(Path(next(iter(metadata_group.values()))).parent.name)

    began = time.perf_counter()
    triton.knobs.compilation.listener = listener
    shared, error = 0, ""
    try:
        done = kernel.compile()
        shared = int(done.metadata.shared)
        if launchers:
            keys += launcher(done)
    except Exception as e:
        error = f"{type(e).__name__}: {str(e).strip()[-500:]}; {dict(kernel.signature)}"
    taken = time.perf_counter() - began
    return Compiled(kernel.name, taken, shared, all(hits), error, tuple(keys))


def compiled(kernels: list[Kernel], launchers: bool = False) -> Iterator[Compiled]:
    """All of them, on all cores, in order; with the C modules that Triton 3.6 launches them by, if asked."""
    LISTED[:] = kernels
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from pool.imap(partial(_compile, launchers=launchers), range(len(kernels)), chunksize=1)


def launcher(kernel: Any) -> list[str]:
    """Build what a kernel is launched by, and Triton's module of helpers, into its cache: which folders.

    They are linked against a libcuda that has the names and nothing else, and are not loaded.
    """
    from triton.backends.nvidia import driver as cuda
    from triton.runtime import build

    loaded: list[str] = []

    def load(name: str, path: str) -> Any:
        loaded.append(Path(path).parent.name)
        return mock.MagicMock()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "_load_module_from_path", load))
        stack.enter_context(mock.patch.object(cuda, "library_dirs", _libraries))
        cuda.CudaLauncher(kernel.src, kernel.metadata)
        cuda.CudaUtils.__init__(object.__new__(cuda.CudaUtils))
    return loaded


@lru_cache(maxsize=1)
def _libraries() -> list[str]:
    """A folder with a libcuda.so.1 to link against."""
    from triton.backends.nvidia import driver as cuda

    folder = Path(tempfile.mkdtemp(prefix="libcuda"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = Path(cuda.__file__).read_text() + Path(cuda.__file__).with_name("driver.c").read_text()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\s*\()", text)))
    source = folder / "libcuda.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True)
    return [str(folder)]


# What to launch: each op at the shape of its target, at large ones, at odd ones


def half(*shape: int, device: str = "cpu") -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=device)


def single(*shape: int, device: str = "cpu") -> Tensor:
    return torch.empty(*shape, device=device)


def octets(*shape: int, device: str = "cpu") -> Tensor:
    return torch.empty(*shape, dtype=torch.uint8, device=device)


def _bitmask() -> None:
    for shape in ((4096, 4096), (3, 7), (65537, 4098 * 8), (70001, 3), (3, 2**33)):
        bits = octets(*shape[:-1], -(-shape[-1] // 8), device="meta")
        for rows in (False, True):
            launch_count(bits, None, rows, kernels="triton")
        launch_count(bits, bits, False, kernels="triton")
        launch_unpack(bits, shape[-1], kernels="triton")
        for mask in (octets(*shape, device="meta"), single(*shape, device="meta")):
            launch_pack(mask, kernels="triton")


def _masked_linear() -> None:
    for r, b, n, k in (
        *((1, 512, 4096, 4096), (100, 60, 300, 784), (3, 17, 33, 65)),
        *((1, 200000, 64, 64), (1, 3, 9000000, 9), (1, 3, 9, 9000000), (70000, 2, 3, 4)),
    ):
        for make in (half, single):
            x, w, scores = (make(*s).requires_grad_() for s in ((r, b, k), (r, n, k), (r, n, k)))
            mask, bias = octets(r, n, -(-k // 8)), make(r, n).requires_grad_()
            masked_linear(x, w, mask, bias, scores, "triton").sum().backward()


def _masked_conv2d() -> None:
    for r, b, c, h, n, k, stride in (
        *((30, 60, 64, 32, 64, 3, 1), (15, 60, 6, 14, 16, 5, 1), (2, 3, 3, 7, 5, 3, 2)),
        *(
            (1, 60000, 3, 8, 8, 3, 1),
            (1, 2, 3, 8, 70000, 1, 1),
            (1, 2, 70000, 4, 8, 1, 1),
            (1, 1, 3, 2, 5000000, 1, 1),
            (1, 1, 5000000, 2, 3, 1, 1),
            (70000, 1, 1, 3, 2, 2, 1),
        ),
    ):
        for make in (half, single):
            x, w = make(r, b, c, h, h).requires_grad_(), make(r, n, c, k, k).requires_grad_()
            mask, bias = octets(r, n, -(-c * k * k // 8)), make(r, n).requires_grad_()
            masked_conv2d(x, w, mask, bias, stride, k // 2, kernels="triton").sum().backward()


def _masked_update() -> None:
    for r, sizes in ((1, [10**8]), (100, [266200, 100]), (3, [7, 9000]), (1, [2**32 + 9]), (70000, [9, 3])):
        w, g, a, b = ([single(r, p, device="meta") for p in sizes] for _ in range(4))
        masks, lr = [octets(r, -(-p // 8), device="meta") for p in sizes], single(r, device="meta").double()
        counts, active = [single(r, device="meta")] * len(sizes), octets(r, device="meta")
        masked_adam_many(w, g, masks, (a, b), counts, lr, kernels="triton")
        masked_adam_many(w, g, masks, (a, b), counts, lr, decoupled=True, active=active, kernels="triton")
        masked_sgd_many(w, g, masks, a, lr, momentum=0.9, active=active, kernels="triton")
        masked_sgd_many(w, g, masks, None, lr, kernels="triton")


def _linear_grad_update() -> None:
    for r, n, k, b in (
        *((100, 300, 784, 60), (100, 10, 100, 60), (1, 4096, 4096, 512), (3, 7, 9, 5)),
        *((1, 9, 4000000, 3), (1, 4000000, 9, 3), (60000, 3, 2, 1)),
    ):
        for optimizer, moments in (("adam", 2), ("sgd", 1)):
            dy, x, w, bias = single(r, n, b), single(r, k, b), single(r, n, k), single(r, n)
            states, small = ([torch.empty_like(t) for _ in range(moments)] for t in (w, bias))
            step, lr = single(r), torch.zeros(r, dtype=torch.float64)
            bits, active = octets(r, n, -(-k // 8)), octets(r)
            linear_grad_update(
                *(dy, x, w, states, bits, bias, small),
                step=step,
                lr=lr,
                active=active,
                optimizer=optimizer,
                kernels="triton",
            )


def _magnitude_threshold() -> None:
    for shapes in (
        [(1, 10000, 10000)],
        [(100, 300, 784), (100, 100, 300)],
        [(2, 3, 7)],
        [(1, 65537, 4098)],
        [(70000, 3, 5)],
    ):
        for make in (single, half):
            weights = [make(*shape) for shape in shapes]
            masks = [octets(r, n, -(-k // 8)) for r, n, k in shapes]
            gone = torch.zeros(shapes[0][0], dtype=torch.int64)
            magnitude_launch(weights, gone, [], kernels="triton")
            magnitude_launch(weights, gone, masks, kernels="triton")


def _csr_lanes() -> None:
    some = torch.rand(512, 1024, generator=torch.Generator().manual_seed(0)) < 0.1
    for keep, batches in ((some, (1, 3, 8, 16, 1000)), (some[:9, :33], (1, 7, 700000))):
        for dtype in (torch.bfloat16, torch.float32):
            packed = LanedCsr.from_dense(keep.to(dtype), keep)
            for batch in batches:
                x, bias = torch.empty(keep.shape[1], batch, dtype=dtype), torch.empty(len(keep), dtype=dtype)
                csr_lanes(packed, x, bias, kernels="triton")


def _slot_linear() -> None:
    some = torch.rand(512, 1024, generator=torch.Generator().manual_seed(0)) < 0.1
    for keep, batches in ((some, (16, 32, 128, 300)), (some[:9, :33], (1, 17, 70000))):
        slots = Slots.from_dense(keep.bfloat16(), keep)
        for batch in batches:
            slot_linear(slots, half(batch, keep.shape[1]), half(len(keep)), kernels="triton")
            slot_linear(slots, half(keep.shape[1], batch).t(), kernels="triton")


def _block_linear() -> None:
    for block, (n, k), batches in (
        *((64, (4096, 4096), (1, 128, 4096)), (128, (4096, 4096), (1, 4096)), (16, (40, 70), (3, 200000))),
        *((32, (2**18, 32), (1, 64)),),
    ):
        live = torch.zeros(-(-n // block), -(-k // block), dtype=torch.bool)
        live[:, ::4] = True
        for make in (half, single):
            keep = live.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
            weight = BlockWeight.from_dense(keep.to(make(1).dtype), keep, block)
            for batch in batches:
                block_linear(make(batch, k), weight, make(n), kernels="triton")


def _block_conv2d() -> None:
    for block, (n, c, k), images in (
        *((64, (256, 256, 3), ((32, 28), (1, 7))), (16, (20, 24, 1), ((3, 5), (100000, 3)))),
        *((32, (2**18, 8, 1), ((2, 2),)),),
    ):
        for make in (half, single):
            keep = torch.zeros(n, c, k, k, dtype=torch.bool)
            keep[:block, :block] = True
            weight = BlockFilters.from_dense(keep.to(make(1).dtype), keep, block)
            for batch, size in images:
                block_conv2d(make(batch, c, size, size), weight, make(n), padding=k // 2, kernels="triton")


def _replica_parts() -> None:
    for r, n, b, size in (
        (100, 784, 60, 1),
        (30, 3072, 60, 32),
        (3, 9, 7, 3),
        (70000, 5, 2, 1),
        (1, 9, 70000, 2),
    ):
        one, labels = torch.zeros(1, dtype=torch.int64), torch.zeros(r, b, dtype=torch.int64)
        lr, count = torch.zeros(r, dtype=torch.float64), single(r)
        replica_parts.begin_step(one, single(9).double(), count, lr, single(r), one, 5, "triton")
        order, x = torch.zeros(r, 2, b, dtype=torch.int64), single(r, b, n)
        images = octets(90, n), labels.new_zeros(90), single(n), single(n)
        replica_parts.gather(*images, order, one, x, labels, "triton")
        y = single(r, b, size, size, 8).movedim(1, -2).movedim(-1, 1)
        replica_parts.bias_relu(y, single(r, 8), "triton")
        if size > 1:
            pooled = single(r, b, size // 2, size // 2, 8).movedim(1, -2).movedim(-1, 1)
            replica_parts.max_pool(y, pooled, 2, "triton")
            for cuts in (False, True):
                replica_parts.max_pool_backward(pooled, y, pooled, y, 2, cuts, "triton")
        for bias in (None, single(r, 10)):
            replica_parts.cross_entropy_grad(single(r, 10, b), labels, bias, "triton")


def _hash_weights() -> None:
    for n, k in ((4096, 4096), (300, 784), (64, 27), (3, 1), (65537, 65537), (3 * 10**8, 3)):
        for law in LAWS:
            keys = Keys.of(2**64 - 1, 3, law)
            for generation in (0, 7, torch.empty(n, k, dtype=torch.int32, device="meta")):
                hash_launch(keys, law, 0.1, 2**31, n, k, generation, torch.device("meta"))


def _seed_linear() -> None:
    for b, n, k in (
        *((1, 8192, 8192), (16, 8192, 8192), (60, 300, 784), (33, 65, 130)),
        *((200000, 64, 64), (3, 9000000, 9), (3, 9, 9000000)),
    ):
        w = SeedWeight((n, k), octets(n, -(-k // 8)), 1, 2)
        for make in (half, single):
            x, bias = make(b, k).requires_grad_(), make(n).requires_grad_()
            scores = single(n, k).requires_grad_()
            seed_linear(x, w, bias, scores, "triton").sum().backward()


def _seed_conv2d() -> None:
    for b, c, h, n, k, stride in (
        *((60, 64, 32, 64, 3, 1), (1, 512, 4, 512, 3, 1), (2, 3, 7, 5, 3, 2)),
        *((60000, 3, 8, 8, 3, 1), (1, 3, 8, 70000, 1, 1), (1, 70000, 4, 8, 1, 1)),
    ):
        w = SeedWeight((n, c, k, k), octets(n, -(-c * k * k // 8)), 1, 2)
        for make in (half, single):
            x, bias = make(b, c, h, h).requires_grad_(), make(n).requires_grad_()
            scores = single(n, c, k, k).requires_grad_()
            seed_conv2d(x, w, bias, scores, stride, k // 2, "triton").sum().backward()


OPS: dict[str, Callable[[], None]] = {
    "bitmask": _bitmask,
    "masked_linear": _masked_linear,
    "masked_conv2d": _masked_conv2d,
    "masked_update": _masked_update,
    "linear_grad_update": _linear_grad_update,
    "magnitude_threshold": _magnitude_threshold,
    "csr_lanes": _csr_lanes,
    "slot_linear": _slot_linear,
    "block_linear": _block_linear,
    "block_conv2d": _block_conv2d,
    "replica_parts": _replica_parts,
    "hash_weights": _hash_weights,
    "seed_linear": _seed_linear,
    "seed_conv2d": _seed_conv2d,
}


def kernels_of(name: str) -> list[Any]:
    """The kernels that an op's file launches: those that no other kernel calls."""
    module = sys.modules[f"sparselth.kernels.{name}"]
    own = [k for k in vars(module).values() if isinstance(k, jit.JITFunction) and k.module == module.__name__]
    return [k for k in own if k.__name__.endswith("_kernel")]


def quick(name: str) -> Launches:
    """What an op launches at its target, large and odd shapes."""
    with launches() as found:
        OPS[name]()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile every kernel for sm_90 too")
    parser.add_argument("names", nargs="*", choices=[*OPS, []], metavar="NAME", help=", ".join(OPS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for name in args.names or OPS:
        began = time.perf_counter()
        found = quick(name)
        faults = list(dict.fromkeys(found.wrong))
        said = f"{sum(found.count.values())} launches of {len(found.kernels)} kernels"
        if args.compile:
            done = list(compiled(list(found.kernels.values())))
            faults += [one.wrong for one in done if one.wrong]
            said += f", {sum(one.cached for one in done)} from the cache"
        wrong += len(faults)
        print(f"{name}: {said}, {time.perf_counter() - began:.1f} s", *faults, sep="\n  ", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
