"""Packing, counting and Hamming distance: plain torch and the kernels in the interpreter against numpy."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselth import masks
from sparselth.kernels.bitmask import INTERPRET, launch_count, launch_pack, launch_unpack

CASES = int(os.environ.get("SPARSELTH_CASES", "25"))
PATHS = ["reference", "triton"] if INTERPRET or torch.cuda.is_available() else ["reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernels", PATHS)
@settings(max_examples=CASES)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    k=st.sampled_from([1, 5, 7, 8, 9, 31, 64, 97]),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_bits_are_those_of_the_files(kernels: str, shape: list[int], k: int, keep: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = (generator.random((*shape, k)) < keep for _ in range(2))
    packed = [launch_pack(torch.from_numpy(m).to(DEVICE), kernels=kernels) for m in (a, b)]
    for mask, bits in zip((a, b), packed, strict=True):
        np.testing.assert_array_equal(bits.cpu().numpy(), masks.pack(mask))
        np.testing.assert_array_equal(launch_unpack(bits, k, kernels=kernels).cpu().numpy(), mask)
    assert int(launch_count(packed[0], None, False, kernels=kernels)) == a.sum()
    assert int(launch_count(packed[0], packed[1], False, kernels=kernels)) == (a != b).sum()
    rows = launch_count(packed[0], None, True, kernels=kernels)
    np.testing.assert_array_equal(rows.cpu().numpy(), a.sum(-1))
