"""`compressed-tensors`, format sparse-bitmask, as its version 0.9 reads and writes it (0.20 has it no more).

    NAME.bitmask      bits of the weight NAME.weight, uint8 [..., ceil(K / 8)], little-endian, 1 = not 0
    NAME.compressed   its values there [kept], row-major
    NAME.row_offsets  where in them each row begins, int64 [...]
    NAME.shape        int64

Rows run along the last axis, which for filters has few weights, a byte for each row at least. All other
tensors lie there as they are. A kept weight that is exactly 0 is as good as pruned there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparselth import masks
from sparselth.exchange.table import Format, Given, register
from sparselth.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = ".weight"


def write(given: Given, file: Path) -> str:
    import json

    from safetensors.torch import save

    found: dict[str, Tensor] = {}
    left_dense = 0
    for name, tensor in given.state.items():
        if name in given.masks and name.endswith(WEIGHT) and tensor.dim() > 1:
            found |= {f"{name.removesuffix(WEIGHT)}.{part}": t for part, t in packed(tensor).items()}
        else:
            left_dense += name in given.masks
            found[name] = tensor.clone().contiguous()
    about = {"format": "sparse-bitmask", "global_sparsity": round(given.masks.sparsity, 6)}
    about |= {"sparsity_structure": "unstructured"}
    write_atomically(file, save(found, metadata={"format": "pt", "sparsity_config": json.dumps(about)}))
    return f"{left_dense} pruned tensors are not called NAME.weight and lie there dense" if left_dense else ""


def packed(weight: Tensor) -> dict[str, Tensor]:
    """A weight in that format."""
    import torch

    there = weight != 0
    counts = there.sum(-1)
    bits = masks.pack(there.cpu().numpy())
    return {
        "bitmask": torch.from_numpy(bits),
        "compressed": weight[there],
        "row_offsets": counts.flatten().cumsum(0).view(counts.shape) - counts,
        "shape": torch.tensor(list(weight.shape), dtype=torch.int64, device="cpu"),
    }


register(Format("compressed-tensors", "safetensors of compressed-tensors 0.9, sparse-bitmask", write))
