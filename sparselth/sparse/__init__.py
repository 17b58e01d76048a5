"""Pruned networks made small and fast: `compact`, `convert`, `explain`, `weight_bytes`, and in training:
`compress`, `dense`, `masks_left`."""

from sparselth.sparse.compaction import Compacted, Units, compact
from sparselth.sparse.compress import compress, dense, masks_left
from sparselth.sparse.convert import convert
from sparselth.sparse.converted import Converted, explain, weight_bytes

__all__ = [
    "Compacted",
    "Converted",
    "Units",
    "compact",
    "compress",
    "convert",
    "dense",
    "explain",
    "masks_left",
    "weight_bytes",
]
