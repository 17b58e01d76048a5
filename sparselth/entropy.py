"""Small numbers as bytes, as few as their frequencies allow: what a mask or redraws take in a file.

An asymmetric numeral system (Duda 2013, arXiv:1311.2540) with a table of frequencies: a vector takes its
entropy and a few hundred bytes, where zlib takes 7 to 35 % more for masks of 20 to 2 %. A matrix has a table
for every group of rows and columns of like density where that is shorter: masks that are found keep more of
some inputs than of others. Where coding saves nothing the bits are packed. Symbols go to coders by turns, so
that numpy codes a step of all at once. Whole numbers alone: the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
SCALE = 14  # bits of a frequency
LOW, WORD = 1 << 16, 16  # a state lies in [LOW, LOW << WORD): words of so many bits leave it and enter
PER_LANE, MOST_LANES = 4096, 256
GROUPS = ((1, 16), (16, 1), (8, 8))  # of rows and of columns, tried beside none
MOST_SYMBOLS = 4  # of a matrix in groups, each of which has a table
GROUPED = 254  # the first byte of a matrix in groups
CODED = 255  # the first byte of what is coded; else symbols are packed, so many bits each


def entropy(symbols: NDArray[np.integer]) -> float:
    """Bytes that a vector takes at least where it is coded by the frequencies of its symbols alone."""
    return _ideal(np.unique(symbols, return_counts=True)[1])


def _ideal(counts: NDArray[np.integer]) -> float:
    """Bytes of symbols that are there so often."""
    there = counts[counts > 0]
    return float(-(there * np.log2(there / max(1, there.sum()))).sum() / 8)


def encode(symbols: NDArray[np.integer]) -> Bytes:
    """The bytes of a vector of numbers from 0 to 255, coded or packed, whichever are fewer."""
    if symbols.size and not 0 <= symbols.min() <= symbols.max() <= 255:
        raise ValueError("expected numbers from 0 to 255")
    packed = _pack(symbols)
    if symbols.size and entropy(symbols) < packed.size:
        coded = _encode(symbols.astype(np.uint8), np.zeros(symbols.size, np.uint8), 1)
        return coded if coded.size < packed.size else packed
    return packed


def decode(data: Bytes, n: int) -> Bytes:
    """The `n` numbers that `encode` was given; ValueError where `data` are not their bytes."""
    if data.dtype != np.uint8 or data.ndim != 1 or not data.size:
        raise ValueError("expected a vector of bytes")
    return _decode(data, n, np.zeros(n, np.uint8), 1) if data[0] == CODED else _unpack(data, n)


def encode_matrix(symbols: NDArray[np.integer]) -> Bytes:
    """The fewest bytes of a matrix of numbers from 0 to 255, as a whole or in groups of rows and columns."""
    whole, kept = encode(symbols.ravel()), symbols != 0
    best, least = (0, 0), float(whole.size)
    for rows, columns in GROUPS if symbols.size and int(symbols.max()) < MOST_SYMBOLS else ():
        groups = _groups(_classes(kept.sum(1), rows), _classes(kept.sum(0), columns), columns)
        pairs = np.bincount(groups.astype(np.int64) * MOST_SYMBOLS + symbols.ravel())
        by_group = np.split(pairs, np.arange(MOST_SYMBOLS, pairs.size, MOST_SYMBOLS))
        bits = zip(symbols.shape, (rows, columns), strict=True)  # that say which row and column is where
        size = sum(map(_ideal, by_group)) + sum(n * (count.bit_length() - 1) / 8 for n, count in bits)
        size += 2 * np.count_nonzero(np.bincount(symbols.ravel())) * rows * columns  # tables
        if size < least:
            best, least = (rows, columns), size
    if best == (0, 0):
        return whole
    classes = _classes(kept.sum(1), best[0]), _classes(kept.sum(0), best[1])
    each = [encode(one) for one in classes]
    lengths = np.array([side.size for side in each], "<u4").view(np.uint8)
    coded = _encode(symbols.astype(np.uint8).ravel(), _groups(*classes, best[1]), best[0] * best[1])
    found = np.concatenate([np.array([GROUPED, *best], np.uint8), lengths, *each, coded])
    return min(whole, found, key=len)


def decode_matrix(data: Bytes, shape: tuple[int, int]) -> Bytes:
    """The matrix that `encode_matrix` was given; ValueError where `data` are not its bytes."""
    if data.dtype != np.uint8 or data.ndim != 1 or not data.size or data[0] != GROUPED:
        return decode(data, shape[0] * shape[1]).reshape(shape)
    rows, columns = (data[1:3] if data.size >= 11 else np.zeros(2, np.uint8)).tolist()
    if (rows, columns) not in GROUPS:
        raise ValueError("expected other groups of rows and columns")
    first, second = data[3:11].copy().view("<u4").tolist()
    if 11 + first + second > data.size:
        raise ValueError("ends within its tables")
    of_rows, of_columns, coded = np.split(data[11:], [first, first + second])
    classes = decode(of_rows, shape[0]), decode(of_columns, shape[1])
    if classes[0].max(initial=0) >= rows or classes[1].max(initial=0) >= columns:
        raise ValueError("a row or a column is in no group")
    return _decode(coded, shape[0] * shape[1], _groups(*classes, columns), rows * columns).reshape(shape)


def _classes(counts: NDArray[np.integer], groups: int) -> Bytes:
    """The group of each of several counts: as many of the smallest, and so on."""
    found = np.zeros(counts.size, np.uint8)
    found[np.argsort(counts, kind="stable")] = np.arange(counts.size) * groups // counts.size
    return found


def _groups(of_rows: Bytes, of_columns: Bytes, columns: int) -> Bytes:
    """The group of every place of the matrix, row-major."""
    found: Bytes = (of_rows[:, None] * np.uint8(columns) + of_columns).ravel()
    return found


def _pack(symbols: NDArray[np.integer]) -> Bytes:
    bits = int(symbols.max(initial=0)).bit_length()
    each = (symbols.astype(np.uint8)[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.concatenate([np.array([bits], np.uint8), np.packbits(each, bitorder="little")])


def _unpack(data: Bytes, n: int) -> Bytes:
    bits = int(data[0])
    if bits > 8 or data.size != 1 + -(-n * bits // 8):
        raise ValueError(f"expected {n} numbers of {bits} bits, found {data.size - 1} bytes")
    each = np.unpackbits(data[1:], count=n * bits, bitorder="little").reshape(n, bits)
    shifted: Bytes = (each << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return shifted


def _lanes(n: int) -> int:
    return min(MOST_LANES, 1 << max(0, (n // PER_LANE).bit_length() - 1))


def _frequencies(places: NDArray[np.int64], groups: Bytes, size: int, number: int) -> Words:
    """Frequencies [groups, symbols], at least 1 and 2**SCALE in all of a group, from 0 on without a gap."""
    counts = np.bincount(groups.astype(np.int64) * size + places, minlength=number * size)
    counts = counts.reshape(number, size)
    shares = np.maximum(1, (counts << SCALE) // np.maximum(1, counts.sum(1, keepdims=True)))
    shares[np.arange(number), counts.argmax(1)] += (1 << SCALE) - shares.sum(1)
    found: Words = shares.astype(np.uint64)
    return found


def _encode(symbols: Bytes, groups: Bytes, number: int) -> Bytes:
    """CODED; the number of symbols, less one, and which; frequencies by group, less one; states; words."""
    found, places = np.unique(symbols, return_inverse=True)
    n, lanes = symbols.size, _lanes(symbols.size)
    shares = _frequencies(places, groups, found.size, number)
    below = np.cumsum(shares, axis=1) - shares
    share_of, below_of = shares[groups, places], below[groups, places]
    states, words = np.full(lanes, LOW, np.uint64), list[NDArray[np.uint16]]()
    scale, word, wide = np.uint64(SCALE), np.uint64(WORD), np.uint64(32 - SCALE)
    for first in range((n - 1) // lanes * lanes, -1, -lanes):  # backwards, so that reading goes forwards
        share = share_of[first : first + lanes]
        state = states[: share.size]
        full = state >= share << wide
        words.append(state[full].astype(np.uint16))
        state[full] >>= word
        high, rest = np.divmod(state, share)
        state[:] = (high << scale) + rest + below_of[first : first + lanes]
    table = np.concatenate([[CODED, found.size - 1], found]).astype(np.uint8)
    tables = (shares.ravel() - np.uint64(1)).astype("<u2"), states.astype("<u4")
    parts = [*tables, *(w.astype("<u2") for w in words[::-1])]
    return np.concatenate([table, *(part.view(np.uint8) for part in parts)])


def _decode(data: Bytes, n: int, groups: Bytes, number: int) -> Bytes:
    if data.size < 2 or data[0] != CODED:
        raise ValueError("expected coded numbers")
    size, lanes = int(data[1]) + 1, _lanes(n)
    ends = np.cumsum([2, size, 2 * size * number, 4 * lanes])
    if data.size < ends[-1] or (data.size - ends[-1]) % 2:
        raise ValueError("ends within its tables")
    _, found, shares, states, words = np.split(data, ends)
    share = (shares.view("<u2").astype(np.uint64) + np.uint64(1)).reshape(number, size)
    if (share.sum(1) != 1 << SCALE).any():
        raise ValueError("its frequencies do not add up")
    state, words, at = states.view("<u4").astype(np.uint64), words.view("<u2").astype(np.uint64), 0
    # of every slot of a group's table: its symbol, that one's frequency, how far the slot lies within
    places = np.repeat(np.tile(np.arange(size), number), share.ravel().astype(np.int64))
    row = np.repeat(np.arange(number), 1 << SCALE)
    frequency, symbol = share[row, places], found[places]
    starts = (np.cumsum(share, axis=1) - share)[row, places]
    within = np.tile(np.arange(1 << SCALE, dtype=np.uint64), number) - starts
    slots, scale, word = np.uint64((1 << SCALE) - 1), np.uint64(SCALE), np.uint64(WORD)
    base = groups.astype(np.uint64) << scale
    symbols = np.empty(n, np.uint8)
    for first in range(0, n, lanes):
        now = state[: min(lanes, n - first)]
        slot = (now & slots) + base[first : first + now.size]
        symbols[first : first + now.size] = symbol[slot]
        now[:] = frequency[slot] * (now >> scale) + within[slot]
        empty = np.flatnonzero(now < LOW)
        if at + empty.size > words.size:
            raise ValueError("ends too early")
        now[empty] = now[empty] << word | words[at : at + empty.size]
        at += empty.size
    if at != words.size or (state != LOW).any():
        raise ValueError("is not what was coded")
    return symbols
