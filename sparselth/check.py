"""How near to float64 a result must be: one tolerance for tests, `bench`, `convert` and the GPU's checks.

    error    RMS of the difference to float64, relative to the RMS of what float64 gives
    largest  the largest difference, relative to the largest number that float64 gives

One rounding loses `ROUNDING` of a number at most, about half of it in RMS; a sum of n terms in fp32, in any
order, about 0.2 sqrt(n) 2^-24. Independent of each other, they add in squares. Three times that is allowed,
and where torch's own result in the same dtype is known and worse, three times its error. The RMS sees what is
a little wrong everywhere, the largest what is wrong in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Relative, of one rounding to nearest; in TF32 that of a product, whose operands are cut off
ROUNDING = {"fp32": 2**-24, "tf32": 2**-9, "bf16": 2**-8, "fp16": 2**-11}
LARGEST = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 2e-2, "fp16": 3e-3}
MARGIN = 3


@dataclass(frozen=True)
class Checked:
    """Two errors with what is allowed of each; NaN and infinity are never allowed."""

    error: float
    allowed: float
    largest: float
    allowed_largest: float
    mismatch: str | None = None  # of shapes or dtypes, which leaves nothing to compare

    @property
    def finite(self) -> bool:
        """Whether the errors are numbers."""
        return math.isfinite(self.error) and math.isfinite(self.largest)

    @property
    def fault(self) -> str | None:
        """What is wrong in one line; None: nothing."""
        if self.mismatch:
            return self.mismatch
        if not self.error <= self.allowed:  # NaN is no number below the bound
            return f"error {self.error:.1e} against float64, {self.allowed:.1e} allowed"
        if not self.largest <= self.allowed_largest:
            return f"largest error {self.largest:.1e} against float64, {self.allowed_largest:.1e} allowed"
        return None


def check(
    found: Tensor,
    reference: Tensor,
    dtype: str,
    *,
    terms: int = 1,
    own: Tensor | None = None,
    scale: Tensor | None = None,
    largest: float | None = None,
) -> Checked:
    """Compare what was computed in `dtype` ("fp32", "tf32", "bf16" or "fp16") with the same in float64.

    terms: how many numbers are added for a result. own: what torch computes in the same dtype. scale: what
    errors are relative to instead of `reference`, where that cancels. largest: the bound of that error, by
    default LARGEST of the dtype, or three times that of torch's own.
    """
    wanted = DTYPES[dtype] if own is None else own.dtype
    most, bound = allowed(dtype, terms), LARGEST[dtype] if largest is None else largest
    if found.shape != reference.shape:
        text = f"shape {list(found.shape)} instead of {list(reference.shape)}"
        return Checked(math.inf, most, math.inf, bound, text)
    if found.dtype != wanted:
        return Checked(math.inf, most, math.inf, bound, f"{found.dtype} instead of {wanted}")
    of = reference if scale is None else scale
    error, most_wrong = errors(found, reference, of)
    if own is not None:
        usual, usual_largest = errors(own, reference, of)
        most = allowed(dtype, terms, usual)
        if largest is None and math.isfinite(usual_largest):
            bound = max(bound, MARGIN * usual_largest)
    return Checked(error, most, most_wrong, bound)


def allowed(dtype: str, terms: int = 1, own: float = 0.0) -> float:
    """The RMS error that a result may have; torch may be lucky, so its own is not all that counts."""
    usual = MARGIN * math.hypot(ROUNDING[dtype] / 2, 0.2 * ROUNDING["fp32"] * terms**0.5)
    return max(min(usual, LARGEST[dtype]), MARGIN * own if math.isfinite(own) else 0.0)


def errors(found: Tensor, reference: Tensor, scale: Tensor) -> tuple[float, float]:
    """RMS and largest difference, relative to `scale`; absolute where that is all zeros."""
    if not reference.numel():
        return 0.0, 0.0
    off, of = found.double() - reference.double(), scale.double()
    rms = float(off.square().mean().sqrt()) / (float(of.square().mean().sqrt()) or 1.0)
    return rms, float(off.abs().max()) / (float(of.abs().max()) or 1.0)
