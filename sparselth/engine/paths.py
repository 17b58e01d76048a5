"""Which implementation each op of a training step takes, and why: `--kernels` and the device decide.

auto       on CUDA our Triton kernels, but the vendor's products where the zeros in the weights serve;
           on a CPU our C kernels, or where they were not built what `torch` takes
triton     our Triton kernels for every op; on a CPU only in Triton's interpreter
native     a CPU's: our C kernels, which must be there, the vendor's products for dense layers
torch      a CPU's: torch's masked optimizer and MKL's sparse products
reference  dense torch: masked optimizer, the vendor's products; what everything else is held against
autograd   torch's autograd for the network, as modules of users take it whatever is asked for; else as auto
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sparselth.errors import UsageError
from sparselth.kernels import _native
from sparselth.kernels._triton import HAS_TRITON, INTERPRET

APART = "the gradient is written, and masked_update reads it"
ZEROS = "zeros lie in the weights, so the vendor's product needs no mask"


@dataclass(frozen=True)
class Path:
    """What an op takes, and why."""

    takes: Literal["triton", "native", "torch", "vendor", "auto", "autograd", "none"]
    # vendor: the whole dense network through torch's own layers, where it has convolutions; autograd: always
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
    apart = Path("none", APART)
    if kernels == "autograd":
        never, asked = Path("none", "layers are trained dense with masks"), Path("autograd", "asked for")
        return replace(
            choose("auto", device),
            masked_linear=asked,
            masked_conv2d=asked,
            linear_grad_update=apart,
            csr_linear=never,
            sparse_conv2d=never,
            step_parts=never,
        )
    if kernels == "triton":
        if not HAS_TRITON:
            raise UsageError("`kernels` triton: Triton is not installed; use `kernels` auto")
        if device != "cuda" and not INTERPRET:
            raise UsageError(
                "`kernels` triton: Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment for "
                "its slow interpreter; use `kernels` auto"
            )
        return _dense(triton)
    if kernels == "reference":
        return replace(_dense(Path("torch", "asked for")), linear_grad_update=apart)
    if device == "cuda":
        if kernels in ("native", "torch"):
            raise UsageError(f"`kernels` {kernels} is for CPUs; use `kernels` auto, or `device` cpu")
        if not HAS_TRITON:
            return replace(_dense(Path("torch", "Triton is not installed")), linear_grad_update=apart)
        measured = Path("auto", "the vendor's convolution or ours, measured once for each shape")
        return replace(_dense(triton), masked_linear=Path("torch", ZEROS), masked_conv2d=measured)
    if kernels == "native" and _native.LIB is None:
        raise UsageError(f"`kernels` native: {_native.WHY}; use `kernels` auto")
    zeros, torch = Path("torch", ZEROS), Path("torch", "Triton's kernels need a CUDA device")
    found = replace(_dense(torch), masked_linear=zeros, masked_conv2d=zeros, linear_grad_update=apart)
    if _native.LIB is None or kernels == "torch":
        why = "asked for" if kernels == "torch" else "the C kernels are not there, see native"
        mkl = Path("torch", f"MKL's sparse products: {why}")
        return replace(found, csr_linear=mkl, step_parts=mkl)
    native = Path("native", f"our C kernels, at level {_native.LEVEL}")
    vendor = Path("vendor", "zeros lie in the weights; torch's convolution, channels-last")
    found = replace(found, masked_conv2d=vendor, masked_update=native)
    return replace(found, csr_linear=native, sparse_conv2d=native, step_parts=native)


def _dense(takes: Path) -> Paths:
    """Layers that are trained dense with masks, by one path."""
    never = Path("none", "layers are trained dense with masks")
    return Paths(
        masked_linear=takes,
        masked_conv2d=takes,
        masked_update=takes,
        linear_grad_update=takes,
        magnitude_threshold=takes,
        bitmask=takes,
        csr_linear=never,
        sparse_conv2d=never,
        step_parts=never,
    )
