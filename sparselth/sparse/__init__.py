"""Pruned networks made small and fast: `compact`, `convert`, `explain`, `weight_bytes`."""

from sparselth.sparse.compaction import Compacted, Units, compact
from sparselth.sparse.convert import convert
from sparselth.sparse.converted import Converted, explain, weight_bytes

__all__ = ["Compacted", "Converted", "Units", "compact", "convert", "explain", "weight_bytes"]
