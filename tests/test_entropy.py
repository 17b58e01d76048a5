"""Small numbers to bytes and back: exact, close to their entropy, the same bytes everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselth.entropy import CODED, decode, encode, entropy


def drawn(n: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(np.uint8)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 4095, 4096, 8192, 100_003])
def test_a_mask_comes_back(n: int, share: float) -> None:
    mask = drawn(n, share)
    data = encode(mask)
    np.testing.assert_array_equal(decode(data, n), mask)
    assert data.size <= -(-n // 8) + 1  # never more than a bit each


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=300), st.integers(1, 40))
def test_any_numbers_come_back(numbers: list[int], times: int) -> None:
    symbols = np.array(numbers * times, np.uint8)
    np.testing.assert_array_equal(decode(encode(symbols), symbols.size), symbols)


@pytest.mark.parametrize(("share", "more"), [(0.3, 1.01), (0.1, 1.02), (0.02, 1.06)])
def test_bytes_are_near_the_entropy(share: float, more: float) -> None:
    mask = drawn(200_000, share)
    ideal = -200_000 / 8 * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert entropy(mask) == pytest.approx(ideal, rel=0.02)
    assert entropy(mask) <= encode(mask).size <= more * entropy(mask)


def test_rare_symbols_among_many() -> None:
    symbols = np.zeros(100_000, np.uint8)
    symbols[::391] = np.arange(256, dtype=np.uint8)  # each once
    data = encode(symbols)
    np.testing.assert_array_equal(decode(data, symbols.size), symbols)
    assert data.size < 2500  # 256 of 8 + 8.6 bits, and as many lines of a table


def test_half_of_the_weights_are_packed_bits() -> None:
    mask = drawn(266_200, 0.5)
    data = encode(mask)
    assert (data[0], data.size) == (1, 1 + 266_200 // 8)
    np.testing.assert_array_equal(np.packbits(mask, bitorder="little"), data[1:])


def test_the_same_bytes_in_any_version() -> None:
    """Files that are written today are read tomorrow."""
    symbols = np.minimum(np.random.default_rng(7).geometric(0.4, 20_000) - 1, 255)
    data = encode(symbols)
    assert data[0] == CODED
    assert hashlib.sha256(data.tobytes()).hexdigest()[:16] == "620b53f2ee096256"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_other_bytes_are_refused(share: float) -> None:
    mask = drawn(20_000, share)
    data = encode(mask)
    for wrong in (data[:-1], data[:1], data[:0], np.append(data, np.uint8(0)), data[:40]):
        with pytest.raises(ValueError, match=r"expected|ends|not what was coded"):
            decode(wrong, mask.size)
    with pytest.raises(ValueError, match="expected a vector of bytes"):
        decode(data[None], mask.size)
    if share < 0.5:
        flipped, different = data.copy(), 0
        flipped[len(data) // 2] ^= 1
        try:
            different = int((decode(flipped, mask.size) != mask).sum())
        except ValueError:
            different = 1
        assert different


def test_numbers_beyond_a_byte_are_refused() -> None:
    for wrong in (np.array([256]), np.array([-1])):
        with pytest.raises(ValueError, match="from 0 to 255"):
            encode(wrong)
