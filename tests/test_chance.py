"""Numbers and masks beside chance, by hand and by counting."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from sparselth.chance import Fours, Overlap, auc, ranks, shuffled_auc


def test_equal_numbers_share_the_mean_of_their_ranks() -> None:
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])), [4, 1, 4, 2, 4])
    np.testing.assert_array_equal(ranks(np.array([7.0, 7.0])), [1.5, 1.5])


def test_auc_by_hand() -> None:
    # kept 5, 3, 2 against pruned 4, 3, 1: of 9 pairs won 3 + 1.5 + 1 = 5.5
    numbers = np.array([5.0, 3.0, 2.0, 4.0, 3.0, 1.0])
    kept = np.array([True, True, True, False, False, False])
    assert auc(ranks(numbers), kept) == pytest.approx(5.5 / 9)
    assert auc(ranks(-numbers), kept) == pytest.approx(3.5 / 9)
    assert auc(ranks(np.ones(6)), kept) == 0.5
    assert auc(ranks(numbers), np.ones(6, bool)) is None
    assert auc(ranks(numbers), np.zeros(6, bool)) is None


def test_auc_is_the_share_of_pairs_that_are_in_order() -> None:
    draw = np.random.default_rng(0)
    numbers, kept = draw.integers(5, size=40).astype(np.float32), draw.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(numbers[kept], numbers[~kept])]
    assert auc(ranks(numbers), kept) == pytest.approx(np.mean(pairs))


def test_auc_of_many_weights_is_exact() -> None:
    """Sums of ranks of a million weights do not fit 24 bits."""
    kept = np.arange(1_000_000) % 2 == 0
    found = auc(ranks(np.arange(1_000_000, dtype=np.float32)), kept)
    assert found == pytest.approx(0.5 - 0.5 / 500_000, abs=1e-12)


def test_masks_shuffled_within_layers_have_that_auc_in_the_mean() -> None:
    # 2 of 3 large numbers are kept, 1 of 4 small ones: of 12 pairs 1 + 2 * 3 + 0 + 1.5 are in order
    numbers, kept = np.array([9.0, 8, 7, 3, 2, 1, 3]), np.array([1, 1, 0, 1, 0, 0, 0], bool)
    layers, ranked = [slice(0, 3), slice(3, 7)], ranks(numbers)
    found = []
    for first, second in itertools.product(itertools.combinations(range(3), 2), range(4)):
        mask = np.zeros(7, bool)
        mask[[*first, 3 + second]] = True
        found.append(auc(ranked, mask))
    assert shuffled_auc(ranked, kept, layers) == pytest.approx(np.mean(found)) == pytest.approx(8.5 / 12)
    assert shuffled_auc(ranked, kept, [slice(0, 7)]) == 0.5
    assert shuffled_auc(ranked, np.ones(7, bool), layers) is None


@pytest.mark.parametrize(("a", "b", "n"), [(3, 4, 9), (6, 7, 9), (1, 1, 2), (0, 3, 5), (5, 5, 5)])
def test_overlap_by_chance_is_hypergeometric(a: int, b: int, n: int) -> None:
    found = Overlap(0, a, b, n)
    chances = [comb(a, k) * comb(n - a, b - k) / comb(n, b) if b >= k else 0.0 for k in range(a + 1)]
    assert [found.chance(k) for k in range(a + 1)] == pytest.approx(chances)
    assert sum(chances) == pytest.approx(1)
    mean = sum(k * p for k, p in enumerate(chances))
    assert found.expected == pytest.approx(mean)
    assert found.deviation**2 == pytest.approx(
        sum((k - mean) ** 2 * p for k, p in enumerate(chances)), abs=1e-12
    )
    assert found.chance(a + 1) == 0


def test_random_masks_lie_within_the_interval_of_chance() -> None:
    draw, n = np.random.default_rng(1), 400
    masks = [np.isin(np.arange(n), draw.permutation(n)[:size]) for size in (80, 120) for _ in range(200)]
    shared = [Overlap.of(one, other) for one, other in zip(masks[:200], masks[200:], strict=True)]
    low, high = shared[0].interval()
    assert (low, high) == (17, 31)
    chances = [shared[0].chance(k) for k in range(81)]
    assert sum(chances[:low]) <= 0.025 < sum(chances[: low + 1])
    assert sum(chances[high + 1 :]) <= 0.025 < sum(chances[high:])
    outside = sum(not low <= one.shared <= high for one in shared)
    assert outside <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5
    assert np.mean([one.shared for one in shared]) == pytest.approx(
        24, abs=4 * shared[0].deviation / 200**0.5
    )
    same = Overlap.of(masks[0], masks[0])
    assert same.share == 1
    assert same.shared > same.interval()[1]


def test_the_interval_of_large_masks_takes_no_time_and_that_of_none_is_there() -> None:
    low, high = Overlap(0, 2 * 10**6, 3 * 10**6, 10**7).interval()
    middle, deviation = 6e5, Overlap(0, 2 * 10**6, 3 * 10**6, 10**7).deviation
    assert low == pytest.approx(middle - 1.96 * deviation, abs=3)
    assert high == pytest.approx(middle + 1.96 * deviation, abs=3)
    assert Overlap(0, 0, 5, 9).interval() == (0, 0)
    assert Overlap(0, 0, 5, 9).share is None


def test_of_groups_chance_is_that_of_whole_ones() -> None:
    """All pairs of masks of 5 groups of 3 that keep 2 and 3 of them, one by one."""
    masks = [
        [np.repeat([i in kept for i in range(5)], 3) for kept in itertools.combinations(range(5), count)]
        for count in (2, 3)
    ]
    shared = [Overlap.of(one, other, 3) for one, other in itertools.product(*masks)]
    counts = [one.shared for one in shared]
    assert shared[0].expected == pytest.approx(np.mean(counts))
    assert shared[0].deviation == pytest.approx(np.std(counts))
    for k in range(7):
        assert shared[0].chance(k) == pytest.approx(np.mean([count == k for count in counts]))
    assert Overlap(0, 600, 600, 1200, 30).interval() == tuple(
        30 * k for k in Overlap(0, 20, 20, 40).interval()
    )


def test_of_fours_chance_is_that_of_2_in_every_4() -> None:
    """All pairs of masks of three fours with the first of these masks, one by one."""
    fours = [np.isin(np.arange(4), kept) for kept in itertools.combinations(range(4), 2)]
    masks = [np.concatenate(parts) for parts in itertools.product(fours, repeat=3)]
    counts = [Fours.of(masks[0], other).shared for other in masks]
    found = Fours.of(masks[0], masks[1])
    assert found.expected == pytest.approx(np.mean(counts))
    assert found.deviation == pytest.approx(np.std(counts))
    for k in range(-1, 8):
        assert found.chance(k) == pytest.approx(np.mean([count == k for count in counts]), abs=1e-12)
    many = Fours(0, 20_000, 20_000, 40_000)
    low, high = many.interval()
    assert (high - low) / 2 == pytest.approx(1.96 * (40_000 / 12) ** 0.5, rel=0.01)
