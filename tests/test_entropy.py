"""Small numbers to bytes and back: exact, close to their entropy, the same bytes everywhere."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselth.entropy import CODED, GROUPED, decode, decode_matrix, encode, encode_matrix, entropy


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


def uneven(rows: int, columns: int, by: str) -> np.ndarray:
    """A mask whose density goes from 2 to 40 % over its columns, its rows or both; and in no order."""
    draw = np.random.default_rng(1)
    steps = [draw.permutation(np.linspace(0.15, 0.65, n)) for n in (rows, columns)]
    share = {"columns": steps[1][None] ** 2, "rows": steps[0][:, None] ** 2, "both": np.outer(*steps)}[by]
    return (draw.random((rows, columns)) < share).astype(np.uint8)


@pytest.mark.parametrize(("by", "groups"), [("columns", (1, 16)), ("rows", (16, 1)), ("both", (8, 8))])
def test_a_matrix_is_cut_where_its_rows_and_columns_differ(by: str, groups: tuple[int, int]) -> None:
    mask = uneven(300, 400, by)
    data = encode_matrix(mask)
    assert (data[0], *data[1:3]) == (GROUPED, *groups)
    np.testing.assert_array_equal(decode_matrix(data, mask.shape), mask)
    assert data.size < entropy(mask.ravel())
    signed = np.where((np.arange(mask.size).reshape(mask.shape) % 3 == 0) & (mask > 0), 2, mask)
    np.testing.assert_array_equal(decode_matrix(encode_matrix(signed), mask.shape), signed)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 70), (64, 27), (300, 784)])
def test_a_matrix_takes_no_more_than_its_vector(shape: tuple[int, int]) -> None:
    mask = (np.random.default_rng(0).random(shape) < 0.2).astype(np.uint8)
    data = encode_matrix(mask)
    assert data.size <= encode(mask.ravel()).size
    np.testing.assert_array_equal(decode_matrix(data, shape), mask)


def test_other_bytes_of_a_matrix_are_refused() -> None:
    mask = uneven(300, 400, "both")
    data = encode_matrix(mask)
    for place in (0, 1, 2, 3, 7, 12, len(data) // 2):
        other = data.copy()
        other[place] ^= 0x41
        with suppress(ValueError):
            assert (decode_matrix(other, mask.shape) != mask).any()
    for cut in (1, 2, 5, 11, 40, len(data) - 1):
        with pytest.raises(ValueError, match=r"expected|ends|not what"):
            decode_matrix(data[:cut], mask.shape)


def test_numbers_beyond_a_byte_are_refused() -> None:
    for wrong in (np.array([256]), np.array([-1])):
        with pytest.raises(ValueError, match="from 0 to 255"):
            encode(wrong)
