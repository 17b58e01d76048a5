"""Measuring what sparsity is worth: clocks, floors, layers and whole networks, memory, energy."""
