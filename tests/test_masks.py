from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sparselth.masks import pack, unpack


@given(npst.arrays(bool, npst.array_shapes(min_dims=1, max_dims=3, max_side=40)))
def test_packing_round_trips(mask: np.ndarray) -> None:
    bits = pack(mask)
    assert bits.dtype == np.uint8
    assert bits.shape == (*mask.shape[:-1], -(-mask.shape[-1] // 8))
    found = unpack(bits, mask.shape[-1])
    assert found.dtype == bool
    np.testing.assert_array_equal(found, mask)


@given(st.integers(0, 7))
def test_bits_are_little_endian_along_the_last_axis(i: int) -> None:
    mask = np.zeros(8, bool)
    mask[i] = True
    assert pack(mask)[0] == 1 << i


def test_bits_behind_the_last_weight_are_zero() -> None:
    assert pack(np.ones((3, 5), bool)).tolist() == [[31]] * 3


def test_a_mask_takes_one_bit_a_weight() -> None:
    # a peer's mask file takes int32 per weight: 1,066,758 bytes for LeNet-300-100
    layers = [(300, 784), (100, 300), (10, 100)]
    assert sum(pack(np.ones(shape, bool)).nbytes for shape in layers) <= 33_275 + 8 * 410 // 8


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match="expected 2 bytes a row for 9 weights, got 1"):
        unpack(np.zeros((4, 3, 1), np.uint8), 9)
