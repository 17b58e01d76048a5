"""Which implementation each op of a training step takes, and why: `--kernels` and the device decide.

reference  dense torch: masked optimizer, the vendor's products; what everything else is held against
triton     our Triton kernels for every op; on a CPU only in Triton's interpreter
auto       on CUDA our Triton kernels, but the vendor's products where the zeros in the weights serve;
           on a CPU torch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparselth.errors import UsageError
from sparselth.kernels import _native
from sparselth.kernels._triton import HAS_TRITON, INTERPRET

APART = "the gradient is written, and masked_update reads it"
ZEROS = "zeros lie in the weights, so the vendor's product needs no mask"


@dataclass(frozen=True)
class Path:
    """What an op takes, and why."""

    takes: Literal["triton", "native", "torch", "vendor", "auto", "none"]
    # vendor: the whole dense network through torch's own layers, where it has convolutions
    # auto: our kernel or the vendor's, measured for each shape; none: nothing is compressed
    why: str


@dataclass(frozen=True)
class Paths:
    """The paths of the ops of training, named as their files in kernels/."""

    masked_linear: Path
    masked_conv2d: Path
    masked_update: Path
    linear_grad_update: Path
    magnitude_threshold: Path
    bitmask: Path
    csr_linear: Path
    sparse_conv2d: Path
    step_parts: Path


def choose(kernels: str, device: str) -> Paths:
    """The paths for --kernels on "cpu" or "cuda"; UsageError where that cannot be."""
    triton = Path("triton", "runs in Triton's interpreter" if INTERPRET else "CUDA device")
    dense = Path("none", "layers are trained dense with masks")
    apart = Path("none", APART)
    if kernels == "triton":
        if not HAS_TRITON:
            raise UsageError("`kernels` triton: Triton is not installed; use `kernels` auto")
        if device != "cuda" and not INTERPRET:
            raise UsageError(
                "`kernels` triton: Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment for "
                "its slow interpreter; use `kernels` auto"
            )
        return Paths(*[triton] * 6, *[dense] * 3)
    if kernels == "reference":
        zeros = torch = Path("torch", "asked for")
        return Paths(torch, torch, torch, apart, torch, torch, dense, dense, dense)
    if device == "cuda":
        if kernels in ("native", "torch"):
            raise UsageError(f"`kernels` {kernels} is for CPUs; use `kernels` auto, or `device` cpu")
        if not HAS_TRITON:
            missing = Path("torch", "Triton is not installed")
            return Paths(missing, missing, missing, apart, missing, missing, dense, dense, dense)
        measured = Path("auto", "the vendor's convolution or ours, measured once for each shape")
        return Paths(Path("torch", ZEROS), measured, *[triton] * 4, *[dense] * 3)
    if kernels == "native" and _native.LIB is None:
        raise UsageError(f"`kernels` native: {_native.WHY}; use `kernels` auto")
    zeros, torch = Path("torch", ZEROS), Path("torch", "Triton's kernels need a CUDA device")
    if _native.LIB is None or kernels == "torch":
        why = "asked for" if kernels == "torch" else "the C kernels are not there, see native"
        mkl = Path("torch", f"MKL's sparse products: {why}")
        return Paths(zeros, zeros, torch, apart, torch, torch, mkl, dense, mkl)
    native = Path("native", f"our C kernels, at level {_native.LEVEL}")
    vendor = Path("vendor", "zeros lie in the weights; torch's convolution, channels-last")
    return Paths(zeros, vendor, native, apart, torch, torch, native, native, native)
