"""A `state_dict` whose pruned weights are sparse CSR tensors of torch, [N, K], indices of 32 bits.

A filter [C_out, C_in, k, k] is the matrix [C_out, C_in * k * k], since CSR has two dimensions. What has one
dimension, or no mask, stays dense.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sparselth.errors import UsageError
from sparselth.exchange.state_dicts import write_state
from sparselth.exchange.table import Format, Given, register

if TYPE_CHECKING:
    from torch import Tensor


def write(given: Given, file: Path) -> str:
    if file.suffix == ".safetensors":
        raise UsageError(f"`out` {file}: safetensors has no sparse tensors; call it X.pt, for torch.save")
    matrices = {name: mask for name, mask in given.masks.items() if mask.dim() > 1 and mask.numel()}
    state = {
        name: csr(tensor.flatten(1), matrices[name].flatten(1)) if name in matrices else tensor
        for name, tensor in given.state.items()
    }
    write_state(state, file)
    return "filters [N, C, k, k] lie there as matrices [N, C k k]" if _filters(matrices) else ""


def csr(weight: Tensor, mask: Tensor) -> Tensor:
    """The kept entries of a matrix, those that are 0 too."""
    import torch

    row, column = mask.nonzero().unbind(1)
    starts = torch.zeros(len(weight) + 1, dtype=torch.int32, device="cpu")
    starts[1:] = torch.bincount(row, minlength=len(weight)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        values = weight[row, column]
        return torch.sparse_csr_tensor(
            starts, column.int(), values, weight.shape, check_invariants=True, device="cpu"
        )


def _filters(matrices: dict[str, Tensor]) -> bool:
    return any(mask.dim() > 2 for mask in matrices.values())


register(Format("csr", "a state_dict with torch's sparse CSR tensors, of torch.save", write))
