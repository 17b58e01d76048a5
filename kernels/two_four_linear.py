r"""Inference with an unstructured sparse W [N, K] on sparse tensor cores:  Y = act(X W^T + b)

| name | shape  | dtype                                        Floor, s = itemsize = 2:
| x    | [B, K] | bf16, fp16                                   bytes = `TwoFour.bytes()` + (BK + BN + N) s
| y    | [B, N] | as x                                         FLOPs = B N K: half of a dense product's
| bias | [N]    | as x, or None
| half | [N, K] | as x; on CUDA torch's semi-structured tensor: values, and 2 bits for each; else dense
| rest | [N, K] | as x; torch's CSR with 32-bit indices

Of every 4 weights of a row the two of largest magnitude stay in `half`. The others, 0.2 / 0.9 / 3.6 % of the
kept weights of a random mask at 95 / 90 / 80 % sparsity, go to `rest`. Both products are the vendor's. This
halves the multiplications, whatever the sparsity: for batches of 512 and more, if at all. On CPUs there is
only the reference, the dense product.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.kernels._choose import choose

ROWS, COLUMNS = 32, 64  # N and K are multiples, as cuSPARSELt and CUTLASS together want it
CAPABILITY = (8, 0)  # the first with sparse tensor cores
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class TwoFour:
    """W [N, K] in two parts."""

    half: Tensor
    rest: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.half.shape[0], self.half.shape[1]

    def bytes(self) -> int:
        """Memory on CUDA, with every index."""
        n, k = self.shape
        parts = self.rest.crow_indices(), self.rest.col_indices(), self.rest.values()
        rest = sum(t.numel() * t.element_size() for t in parts) if self.rest.values().numel() else 0
        return n * k // 2 * self.half.element_size() + n * k // 8 + rest

    @staticmethod
    def from_dense(w: Tensor, mask: Tensor | None = None) -> TwoFour:
        """The weights of w [N, K] where the bool mask is True, or where they are not 0."""
        if w.ndim != 2 or 0 in w.shape or w.dtype not in DTYPES or w.shape[0] % ROWS or w.shape[1] % COLUMNS:
            raise ValueError(
                f"expected w[N, K] in bf16 or fp16, N a multiple of {ROWS} and K of {COLUMNS}, "
                f"got {w.dtype}{list(w.shape)}"
            )
        if mask is not None and (mask.shape != w.shape or mask.dtype != torch.bool):
            raise ValueError(f"expected a bool mask{list(w.shape)}, got {mask.dtype}{list(mask.shape)}")
        if w.is_cuda and torch.cuda.get_device_capability(w.device) < CAPABILITY:
            raise ValueError(
                f"expected a GPU with sparse tensor cores, capability 8.0 or more, "
                f"got {torch.cuda.get_device_name(w.device)}"
            )
        w = torch.where((w != 0) if mask is None else mask, w, 0)
        fours = w.reshape(-1, 4)
        largest = torch.zeros_like(fours, dtype=torch.bool)
        largest.scatter_(1, fours.abs().topk(2, dim=1).indices, True)
        half = torch.where(largest, fours, 0).view(w.shape)
        left = torch.where(largest, 0, fours).view(w.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
            warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage")
            return TwoFour(torch.sparse.to_sparse_semi_structured(half) if w.is_cuda else half, _csr(left))

    def to_dense(self) -> Tensor:
        """W [N, K], 0 where it is pruned; each weight is in one part alone."""
        n, _ = self.shape
        starts, columns, values = self.rest.crow_indices(), self.rest.col_indices(), self.rest.values()
        half = self.half.to_dense() if self.half.is_cuda else self.half
        row = torch.repeat_interleave(torch.arange(n, device=values.device), starts.diff())
        return half.index_put((row, columns.long()), values)


def _csr(w: Tensor) -> Tensor:
    row, column = w.nonzero().unbind(1)
    starts = F.pad(torch.bincount(row, minlength=len(w)).cumsum(0), (1, 0)).int()
    return torch.sparse_csr_tensor(
        starts, column.int(), w[row, column], w.shape, check_invariants=False, device=w.device
    )


def reference(weight: TwoFour, x: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """The dense product."""
    y = F.linear(x, weight.to_dense(), bias)
    return y.relu() if relu else y


def floor(weight: TwoFour, batch: int) -> dict[str, int]:
    """Least traffic with this format; multiplications of half the weights."""
    n, k = weight.shape
    moved = (batch * (n + k) + n) * weight.half.element_size()
    return {"bytes": weight.bytes() + moved, "flops": batch * n * k}


def two_four_linear(
    weight: TwoFour, x: Tensor, bias: Tensor | None = None, relu: bool = False, kernels: str = "auto"
) -> Tensor:
    """act(x W^T + bias) as [B, N]; `relu` makes act the rectifier. Inference only: no gradients of weights.

    `kernels`: "torch" (semi-structured and CSR products), "reference" (the dense one), or "auto": "torch" on
    CUDA, else the reference.
    """
    n, k = weight.shape
    given = {"x": x, "weights": weight.half} | ({} if bias is None else {"bias": bias})
    got = ", ".join(f"{name} {t.dtype}{list(t.shape)} on {t.device}" for name, t in given.items())
    if x.ndim != 2 or x.shape[1] != k or not len(x) or (bias is not None and bias.shape != (n,)):
        raise ValueError(f"expected x[B, {k}], not empty, and bias[{n}]; got {got}")
    if any((t.dtype, t.device) != (x.dtype, x.device) for t in given.values()):
        raise ValueError(f"expected all of one dtype on one device; got {got}")
    has = ("torch", "reference") if x.is_cuda else ("reference",)
    return (launch if choose(kernels, has, x) == "torch" else reference)(weight, x, bias, relu)


def launch(weight: TwoFour, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Both products; the second adds to the first."""
    y = F.linear(x, weight.half, bias)
    if weight.rest.values().numel():
        y = y + (weight.rest @ x.t()).t()
    return y.relu_() if relu else y
