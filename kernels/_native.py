"""The native CPU kernels (kernels/native), loaded with ctypes; torch does their work where they are missing.

LIB: the library, or None. WHY: one line that says what was loaded, or why nothing was. LEVEL: "avx512",
"avx2", "plain", or None without a library.

SPARSELTH_NATIVE = auto | off | plain | avx2 | avx512 chooses the level; auto, the default, is the highest.
SPARSELTH_NATIVE_LIB = PATH loads another build of the library, for sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import torch  # first: its OpenMP runtime is the one the library then finds

LEVELS = ("plain", "avx2", "avx512")
ENTRIES = (  # of native.c
    *("csr_linear", "csr_weight_grad", "csr_weight_grad_add", "csr_tiled", "sparse_conv2d"),
    *("sparse_conv2d_add", "sparse_conv2d_weight_grad", "sparse_conv2d_rows", "depthwise_rows"),
    *("max_pool_rows", "activate_planes", "plane_means", "scale_planes", "masked_update", "gather"),
    *("bias_relu", "relu_backward", "relu_backward_add", "cross_entropy"),
    *("cross_entropy_grad", "max_pool", "max_pool_backward", "transpose"),
    *("layer_norm", "gelu", "add", "multiply", "rotary", "token_attention", "self_attention"),
    *("sequence", "hash_weights", "score_update", "seed_linear", "subset_sum"),
    *("batch_norm", "batch_norm_backward"),
)


def _load() -> tuple[ctypes.CDLL | None, str, str | None]:
    wanted = os.environ.get("SPARSELTH_NATIVE", "auto")
    if wanted == "off":
        return None, "off by SPARSELTH_NATIVE", None
    if wanted not in ("auto", *LEVELS):
        return None, f"SPARSELTH_NATIVE is {wanted!r}, not auto, off, plain, avx2 or avx512", None
    beside = [Path(__file__).with_name("_native_lib" + suffix) for suffix in EXTENSION_SUFFIXES]
    if chosen := os.environ.get("SPARSELTH_NATIVE_LIB"):
        beside = [Path(chosen)]
    path = next((path for path in beside if path.exists()), None)
    if path is None:
        return None, f"not built (no {beside[0].name}); install again where there is a C compiler", None
    try:
        lib = ctypes.CDLL(str(path))
        highest = lib.sparselth_level()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be used: {error}", None
    if missing := [entry for entry in ENTRIES if not hasattr(lib, f"sparselth_{entry}")]:
        return None, f"{path.name} was built from other sources, without {missing[0]}; install again", None
    level = highest if wanted == "auto" else LEVELS.index(wanted)
    if not lib.sparselth_choose(level):
        return None, f"SPARSELTH_NATIVE is {wanted}, but this machine goes up to {LEVELS[highest]}", None
    return lib, f"{path.name}, {LEVELS[level]}", LEVELS[level]


LIB, WHY, LEVEL = _load()


def levels() -> tuple[str, ...]:
    """The levels this machine can run, () without a library."""
    return LEVELS[: LIB.sparselth_level() + 1] if LIB else ()


def choose(level: str) -> None:
    """Let all kernels work at this level from now on; for tests."""
    if LIB is None or not LIB.sparselth_choose(LEVELS.index(level)):
        raise ValueError(f"level {level} on a machine that has {levels()}")


def lanes() -> int:
    """Floats of a vector at the level that was loaded."""
    return 4 << LEVELS.index(LEVEL or "avx512")


@cache
def first_level() -> int:
    """Bytes of a core's first-level data cache, 32 KB where nobody says."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError, ValueError):
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if level == "1" and kind == "Data" and size.endswith("K"):
                return int(size[:-1]) << 10
    return 32 << 10


def bind(entry: str, arguments: ctypes.Structure, *alive: object) -> Callable[[], None]:
    """A function that calls `sparselth_<entry>(&arguments)`; `alive` lives as long as it does."""
    assert LIB is not None, WHY
    arguments.alive = alive
    function = getattr(LIB, f"sparselth_{entry}")
    function.restype = None
    return partial(function, ctypes.byref(arguments))


def arguments(call: Callable[[], object]) -> Any:
    """What a function of `bind` passes; who changes an address in it keeps alive what lies there."""
    return cast("Any", call).args[0]._obj


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd expects a gradient of one of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_gradient(**tensors: torch.Tensor | None) -> None:
    """Raise where autograd would take what an op computes for a constant."""
    for name, t in tensors.items():
        if wants_gradient(t):
            raise ValueError(
                f"{name}: this op has no gradient, got requires_grad=True; detach() it or use torch.no_grad()"
            )


def check(
    name: str,
    t: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    contiguous: bool = False,
) -> None:
    """Refuse a tensor that is not what a C kernel reads or writes."""
    if t.dtype != dtype or not t.is_cpu or t.shape != tuple(shape) or (contiguous and not t.is_contiguous()):
        wanted = "fp32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: expected {'contiguous ' * contiguous}{wanted} {list(shape)} on a CPU, "
            f"got {t.dtype} {list(t.shape)}, strides {list(t.stride())}, on {t.device}"
        )
    if t.requires_grad:
        refuse_gradient(**{name: t})


def vector(name: str, t: torch.Tensor | None, size: int) -> None:
    """Of biases and of kept weights; None is none."""
    if t is not None:
        check(name, t, (size,), contiguous=True)


def matrix(name: str, t: torch.Tensor, rows: int, batch: int) -> None:
    """[rows, batch], whose rows may lie apart."""
    check(name, t, (rows, batch))
    if batch > 1 and t.stride(1) != 1:
        raise ValueError(f"{name}: expected its columns side by side, got strides {t.stride()}")
    if rows > 1 and t.stride(0) < batch:
        raise ValueError(f"{name}: expected rows that do not overlap, got strides {t.stride()}")


def address(t: torch.Tensor | None) -> int | None:
    """What goes into a pointer field of the arguments."""
    return None if t is None else t.data_ptr()


def scratch(size: int) -> torch.Tensor:
    """Zeros that a kernel works on; whoever measures memory tells them from weights by their mark."""
    work = torch.zeros(size, dtype=torch.float32, device="cpu")
    work.is_scratch = True  # type: ignore[attr-defined]
    return work


_here = threading.local()


def threads() -> int:
    """Threads for a call: torch's, but within `on_threads`."""
    found: int = getattr(_here, "threads", 0)
    return found or torch.get_num_threads()


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """What this thread binds works on so many."""
    before, _here.threads = getattr(_here, "threads", 0), count
    try:
        yield
    finally:
        _here.threads = before
