"""Which backend computes a call: what the argument `kernels` of every op means, in one vocabulary.

auto       the first of what the op has and the tensors allow; in Triton's interpreter only what is asked for
native     the C kernels (native/), on a CPU
torch      torch's sparse, batched or fused operations; without any of its own, an op's reference
triton     our Triton kernels, on CUDA; on a CPU in Triton's interpreter
reference  the formula by dense operations of torch, which all else is held against
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparselth.kernels import _native
from sparselth.kernels._triton import HAS_TRITON, INTERPRET

BACKENDS = ("auto", "native", "torch", "triton", "reference")


def choose(kernels: str, has: Sequence[str], t: Tensor | None = None) -> str:
    """The backend of an op that `has` these, best first, for a tensor like `t`, None on a CPU.

    Raises ValueError where the op or the machine does not have what is asked for.
    """
    if kernels == "auto":
        return next(backend for backend in has if not lacks(backend, t, asked=False))
    if kernels not in has:
        *others, last = "auto", *has
        device = "cpu" if t is None else t.device
        raise ValueError(f"kernels={kernels!r}: expected {', '.join(others)} or {last} on {device}")
    if why := lacks(kernels, t, asked=True):
        raise ValueError(f"kernels={kernels!r}: {why}")
    return kernels


def lacks(backend: str, t: Tensor | None, asked: bool) -> str:
    """Why it cannot compute, "" where it can; without being asked for it takes no interpreter."""
    if backend == "native" and _native.LIB is None:
        return f"the native kernels are missing: {_native.WHY}"
    if backend == "triton" and not HAS_TRITON:
        return "Triton is not installed"
    if backend == "triton" and (t is None or not t.is_cuda) and not (asked and INTERPRET):
        device = "cpu" if t is None else t.device.type
        return f"Triton on a {device} tensor needs TRITON_INTERPRET=1 before import"
    return ""


def use_triton(kernels: str, t: Tensor) -> bool:
    """Whether Triton computes, of an op that has it and a reference."""
    return choose(kernels, ("triton", "reference"), t) == "triton"


def use_native(kernels: str) -> bool:
    """Whether the C kernels compute, of an op that has them and torch's operations."""
    return choose(kernels, ("native", "torch", "reference")) == "native"
