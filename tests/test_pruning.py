from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselth import pruning
from sparselth.models import MODELS, Model, get_model

LENET = get_model("lenet-300-100")

# papers' ladder of LeNet-300-100 at rate 0.2, per cent of the weights (Frankle & Carbin 2019)
PAPER = [100, 80.04, 64.06, 51.28, 41.05, 32.87, 26.32, 21.07, 16.88, 13.52, 10.83]
PAPER += [8.68, 6.95, 5.57, 4.47, 3.58, 2.87, 2.31, 1.85, 1.49, 1.19]


def test_ladder_is_the_papers() -> None:
    rungs = pruning.ladder(LENET.params, 20, 0.2, "layer")
    found = [100 * sum(rung.values()) / LENET.params.prunable for rung in rungs]
    assert found == pytest.approx(PAPER, abs=0.05)


def test_global_ladder_counts_every_weight_once() -> None:
    # a peer takes 20 % of all weights, ignored layers included, from the rest
    rungs = pruning.ladder(LENET.params, 3, 0.2, "global")
    assert [rung["all"] for rung in rungs] == [266_200, 212_960, 170_368, 136_294]


@pytest.mark.parametrize(
    ("rate", "n", "going"), [(0.5, 1, 1), (0.5, 3, 2), (0.3, 5, 2), (0.2, 2, 0), (0.1, 15, 2)]
)
def test_halves_are_rounded_up(rate: float, n: int, going: int) -> None:
    assert pruning.rounded(rate * n) == going


def weights_of(model: Model, seed: int, ties: bool) -> torch.Tensor:
    values = torch.randn(model.params.mask_size, generator=torch.Generator().manual_seed(seed))
    return values.mul(2).round() if ties else values


@given(
    model=st.sampled_from([name for name in sorted(MODELS) if MODELS[name].params.prunable < 300_000]),
    seed=st.integers(0, 10**6),
    rate=st.floats(0.01, 0.9),
    scope=st.sampled_from(["layer", "global"]),
    ties=st.booleans(),
)
def test_exact_counts_and_smallest_go(model: str, seed: int, rate: float, scope: str, ties: bool) -> None:
    net = get_model(model)
    weights, mask = weights_of(net, seed, ties), net.params.full_mask()
    for rung in pruning.ladder(net.params, 3, rate, scope)[1:]:
        new = pruning.prune(net.params, weights, mask, rung)
        kept = net.params.kept(new)
        assert sum(kept.values()) == sum(rung.values())
        if scope == "layer":
            assert kept == rung
        assert not (new & ~mask).any()
        spans = [slice(0, net.params.mask_size)]
        if scope == "layer":
            spans = [s.span for s in net.weights]
        for span in spans:
            stays, goes = new[span], mask[span] & ~new[span]
            if goes.any() and stays.any():
                assert weights[span][stays].abs().min() >= weights[span][goes].abs().max()
        mask = new


def test_equal_magnitudes_go_by_lowest_index() -> None:
    # a peer's `> threshold` removes all of layer 1 here, and nothing of the rest
    weights = torch.ones(LENET.params.mask_size)
    weights[1::2] = -1
    mask = pruning.prune(LENET.params, weights, LENET.params.full_mask(), {"all": 266_100})
    assert not mask[:100].any()
    assert sum(LENET.params.kept(mask).values()) == 266_100
    assert mask[100:235_200].all()


def test_pruned_weights_never_come_back() -> None:
    mask = LENET.params.full_mask()
    mask[:1000] = False
    weights = torch.zeros(LENET.params.mask_size)
    weights[:1000] = 9  # not a survivor, however large
    new = pruning.prune(LENET.params, weights, mask, {"all": 200_000})
    assert not new[:1000].any()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_rung_that_keeps_all_prunes_nothing(scope: str) -> None:
    mask = LENET.params.full_mask()
    rung = pruning.ladder(LENET.params, 1, 0.0, scope)[1]
    assert torch.equal(pruning.prune(LENET.params, weights_of(LENET, 0, False), mask, rung), mask)


def test_kernels_are_those_asked_for() -> None:
    mask = LENET.params.full_mask()
    with pytest.raises(ValueError, match="expected"):
        pruning.prune(LENET.params, weights_of(LENET, 0, False), mask, {"all": 9}, kernels="cuda")


def test_rung_above_the_mask_is_refused() -> None:
    mask = LENET.params.full_mask()
    mask[:1000] = False
    with pytest.raises(ValueError, match="cannot keep 266200 of 265200"):
        pruning.prune(LENET.params, torch.randn(LENET.params.mask_size), mask, {"all": 266_200})


@given(seed=st.integers(0, 10**6), rate=st.floats(0.05, 0.9))
def test_shuffle_keeps_the_counts_and_moves_the_places(seed: int, rate: float) -> None:
    # a peer's shuffle rebinds a local name: its random-mask arm is the ticket
    rung = pruning.ladder(LENET.params, 1, rate, "layer")[1]
    mask = pruning.prune(LENET.params, weights_of(LENET, seed, False), LENET.params.full_mask(), rung)
    moved = pruning.shuffle(LENET.params, mask, torch.Generator().manual_seed(seed))
    assert LENET.params.kept(moved) == LENET.params.kept(mask)
    assert not torch.equal(moved, mask)
    gap = ~LENET.params.full_mask()
    assert not moved[gap].any()


def test_shuffle_is_the_generator_s_draw() -> None:
    mask = LENET.params.full_mask()
    mask[::2] = False
    one, same, other = (
        pruning.shuffle(LENET.params, mask, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_schedule_takes_the_same_share_in_every_round() -> None:
    rungs = pruning.schedule({"all": 1000, "fc2.weight": 30}, {"all": 1, "fc2.weight": 30}, 3)
    assert rungs == [{"all": n, "fc2.weight": 30} for n in (100, 10, 1)]
    assert pruning.schedule({"all": 7}, {"all": 0}, 1) == [{"all": 0}]
    assert [rung["all"] for rung in pruning.schedule({"all": 64}, {"all": 0}, 3)] == [16, 4, 0]
    long = [rung["all"] for rung in pruning.schedule({"all": 266_200}, {"all": 2_662}, 100)]
    assert long == sorted(long, reverse=True)
    assert (len(long), long[-1]) == (100, 2_662)


def test_rounds_rank_what_the_last_one_left() -> None:
    params, seen = LENET.params, list[int]()

    def ranks(mask: torch.Tensor) -> torch.Tensor:
        """The other way round in every round: what stays is what neither would prune."""
        seen.append(int(mask.sum()))
        numbers = torch.arange(len(mask), dtype=torch.float32)
        return numbers if len(seen) % 2 else len(mask) - numbers

    keep = [{"all": 200_000}, {"all": 150_000}]
    mask = pruning.in_rounds(params, params.full_mask(), keep, ranks)
    assert seen == [266_200, 200_000]
    places = mask.nonzero()[:, 0]
    full = params.full_mask().nonzero()[:, 0]
    assert torch.equal(places, full[66_200 : 66_200 + 150_000])
