"""Small numbers as bytes, as few as their frequencies allow: what a mask or redraws take in a file.

An asymmetric numeral system (Duda 2013, arXiv:1311.2540) with one table of frequencies for a vector: within a
few hundred bytes of the entropy of what it codes, where zlib takes 7 to 35 % more for masks of 20 to 2 %.
Where that saves nothing, as of a mask that keeps half, the bits are packed. Symbols go to coders by turns, so
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
CODED = 255  # the first byte of what is coded; else symbols are packed, so many bits each


def entropy(symbols: NDArray[np.integer]) -> float:
    """Bytes that a vector takes at least where it is coded by the frequencies of its symbols alone."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / max(symbols.size, 1))).sum() / 8)


def encode(symbols: NDArray[np.integer]) -> Bytes:
    """The bytes of a vector of numbers from 0 to 255, coded or packed, whichever are fewer."""
    if symbols.size and not 0 <= symbols.min() <= symbols.max() <= 255:
        raise ValueError("expected numbers from 0 to 255")
    packed = _pack(symbols)
    if symbols.size and entropy(symbols) < packed.size:
        coded = _encode(symbols.astype(np.uint8))
        return coded if coded.size < packed.size else packed
    return packed


def decode(data: Bytes, n: int) -> Bytes:
    """The `n` numbers that `encode` was given; ValueError where `data` are not their bytes."""
    if data.dtype != np.uint8 or data.ndim != 1 or not data.size:
        raise ValueError("expected a vector of bytes")
    return _decode(data, n) if data[0] == CODED else _unpack(data, n)


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


def _frequencies(symbols: Bytes) -> tuple[Bytes, Words]:
    """The symbols there are, and their frequencies, at least 1 and 2**SCALE in all."""
    found, counts = np.unique(symbols, return_counts=True)
    shares = np.maximum(1, (counts << SCALE) // symbols.size)
    shares[counts.argmax()] += (1 << SCALE) - shares.sum()
    return found, shares.astype(np.uint64)


def _encode(symbols: Bytes) -> Bytes:
    """CODED; how many symbols there are, less one, which, and their frequencies, less one; states; words."""
    found, shares = _frequencies(symbols)
    n, lanes = symbols.size, _lanes(symbols.size)
    below = np.cumsum(shares) - shares
    places = np.searchsorted(found, symbols)
    states, words = np.full(lanes, LOW, np.uint64), list[NDArray[np.uint16]]()
    scale, word, wide = np.uint64(SCALE), np.uint64(WORD), np.uint64(32 - SCALE)
    for first in range((n - 1) // lanes * lanes, -1, -lanes):  # backwards, so that reading goes forwards
        now = places[first : first + lanes]
        share, state = shares[now], states[: now.size]
        full = state >= share << wide
        words.append(state[full].astype(np.uint16))
        state[full] >>= word
        high, rest = np.divmod(state, share)
        state[:] = (high << scale) + rest + below[now]
    table = np.concatenate([[CODED, found.size - 1], found]).astype(np.uint8)
    parts = [
        (shares - np.uint64(1)).astype("<u2"),
        states.astype("<u4"),
        *(w.astype("<u2") for w in words[::-1]),
    ]
    return np.concatenate([table, *(part.view(np.uint8) for part in parts)])


def _decode(data: Bytes, n: int) -> Bytes:
    size, lanes = int(data[1]) + 1 if data.size > 1 else 256, _lanes(n)
    ends = np.cumsum([2, size, 2 * size, 4 * lanes])
    if data.size < ends[-1] or (data.size - ends[-1]) % 2:
        raise ValueError("ends within its tables")
    _, found, shares, states, words = np.split(data, ends)
    share = shares.view("<u2").astype(np.uint64) + np.uint64(1)
    if share.sum() != 1 << SCALE:
        raise ValueError("its frequencies do not add up")
    state, words, at = states.view("<u4").astype(np.uint64), words.view("<u2").astype(np.uint64), 0
    places = np.repeat(np.arange(size), share.astype(np.int64))
    # of every slot of the table: its symbol's frequency, and how far it lies within
    frequency, within = (
        share[places],
        np.arange(1 << SCALE, dtype=np.uint64) - (np.cumsum(share) - share)[places],
    )
    slots, scale, word = np.uint64((1 << SCALE) - 1), np.uint64(SCALE), np.uint64(WORD)
    symbols = np.empty(n, np.uint8)
    for first in range(0, n, lanes):
        now = state[: min(lanes, n - first)]
        slot = now & slots
        symbols[first : first + now.size] = found[places[slot]]
        now[:] = frequency[slot] * (now >> scale) + within[slot]
        empty = np.flatnonzero(now < LOW)
        if at + empty.size > words.size:
            raise ValueError("ends too early")
        now[empty] = now[empty] << word | words[at : at + empty.size]
        at += empty.size
    if at != words.size or (state != LOW).any():
        raise ValueError("is not what was coded")
    return symbols
