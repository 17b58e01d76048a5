"""Scores: what is ranked stays in order, whatever its sign; what pruning keeps are the largest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparselth import pruning
from sparselth.errors import SparselthError, UsageError
from sparselth.kernels import bitmask  # noqa: F401  TRITON_INTERPRET is read before
from sparselth.models import Linear, Model, get_model
from sparselth.params import Params
from sparselth.scores import SCORES, Batch, Scored, ranked, register

MODEL = Model("", (1, 1, 7), (Linear(11), Linear(3)), {}, "")
BATCH = torch.zeros(1, 1, 1, 7), torch.zeros(1, dtype=torch.int64)
NUMBERS = st.sampled_from([-2.5, -1.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 3.0, float("inf"), -float("inf")])


@given(values=st.lists(NUMBERS, min_size=1, max_size=40))
def test_ranks_are_in_the_order_of_the_scores(values: list[float]) -> None:
    scores = torch.tensor(values)
    found = ranked("s", scores, torch.ones(len(values), dtype=torch.bool))
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert torch.equal(scores[:, None] < scores, found[:, None] < found)
    assert torch.equal(scores[:, None] == scores, found[:, None] == found)


def test_float64_scores_keep_their_order() -> None:
    close = 1 + torch.arange(5, dtype=torch.float64) * 2**-50
    found = ranked("s", close.flip(0), torch.ones(5, dtype=torch.bool))
    assert torch.equal(found.argsort(), torch.tensor([4, 3, 2, 1, 0]))


def test_numbers_from_0_on_in_fp32_stay_as_they_are() -> None:
    scores, mask = torch.tensor([0.5, 0.0, -1.0, 3.0]), torch.tensor([True, True, False, True])
    assert ranked("s", scores, mask) is scores
    assert ranked("s", scores.double(), mask).dtype == torch.float32


def test_what_is_pruned_may_be_anything() -> None:
    mask = torch.tensor([True, False, True])
    found = ranked("s", torch.tensor([-1.0, float("nan"), -2.0]), mask)
    assert found[0] > found[2] > 0
    with pytest.raises(SparselthError, match="score s: 1 of its numbers are NaN"):
        ranked("s", torch.tensor([float("nan"), 1.0, 2.0]), mask)
    with pytest.raises(SparselthError, match=r"score s: expected one number a weight, \[3\], got \[2\]"):
        ranked("s", torch.zeros(2), mask)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_by_a_signed_score_keeps_the_largest(scope: str) -> None:
    params: Params = MODEL.params
    draw = torch.Generator().manual_seed(0)
    mask = params.full_mask()
    scores = torch.randn(params.mask_size, generator=draw)
    keep = pruning.ladder(params, 1, 0.5, scope)[1]
    found = pruning.prune(params, ranked("s", scores, mask), mask, keep)
    if scope == "global":
        expected = torch.zeros_like(mask)
        expected[scores.masked_fill(~mask, -9).topk(keep["all"]).indices] = True
        assert torch.equal(found, expected)
        return
    for spec in params.weights:
        kept = scores[spec.span][found[spec.span]]
        assert len(kept) == keep[spec.name]
        assert kept.min() > scores[spec.span][mask[spec.span] & ~found[spec.span]].max()


def test_magnitude_ranks_as_pruning_always_did() -> None:
    model = get_model("lenet-300-100")
    params, mask = model.params, model.params.full_mask()
    weights = torch.randn(params.size, generator=torch.Generator().manual_seed(0))
    keep = pruning.ladder(params, 1, 0.2, "layer")[1]
    scores = SCORES["magnitude"].score(model, weights, mask, BATCH, torch.Generator())
    expected = pruning.prune(params, weights[: params.mask_size], mask, keep)
    assert torch.equal(pruning.prune(params, ranked("magnitude", scores, mask), mask, keep), expected)


def test_random_is_the_generators_draw() -> None:
    mask = MODEL.params.full_mask()
    weights = torch.zeros(MODEL.params.size)
    one, same, other = (
        SCORES["random"].score(MODEL, weights, mask, BATCH, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == mask.shape


def test_change_and_movement_compare_with_the_start_by_hand() -> None:
    """Of weights that grew, shrank, changed sign and stayed; padding and biases behind them are not read."""
    model = Model("", (1, 1, 2), (Linear(2),), {}, "")
    mask = model.params.full_mask()
    start, weights = torch.full((2, model.params.size), torch.nan)
    mask[4:] = False
    start[:4], weights[:4] = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([4.0, -0.5, -0.5, 3.0])
    draw = torch.Generator()
    found = {
        name: SCORES[name].of(model, weights, mask, BATCH, draw, start=lambda: start)[:4].tolist()
        for name in ("change", "movement")
    }
    assert found == {"change": [3.0, -1.5, 0.0, 0.0], "movement": [3.0, 1.5, 1.0, 0.0]}


def test_the_start_is_read_where_it_is_wanted_alone() -> None:
    def never() -> Tensor:
        raise AssertionError

    weights, mask = torch.ones(MODEL.params.size), MODEL.params.full_mask()
    SCORES["magnitude"].of(MODEL, weights, mask, BATCH, torch.Generator(), start=never)
    with pytest.raises(AssertionError):
        SCORES["movement"].of(MODEL, weights, mask, BATCH, torch.Generator(), start=never)


def test_a_score_is_known_with_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORES, "things", dict(SCORES.items()))

    def mine(network: Model, weights: Tensor, mask: Tensor, batch: Batch, draw: torch.Generator) -> Tensor:
        raise AssertionError

    assert register("mine", "what it means")(mine) is mine
    assert register("ours", "what that means", autograd=False)(mine) is mine
    assert SCORES["mine"] == Scored(mine, "what it means", True)
    assert SCORES["ours"] == Scored(mine, "what that means", False)


def test_a_score_is_registered_once() -> None:
    with pytest.raises(UsageError, match="score 'magnitude': there is one"):

        @register("magnitude", "another")
        def again(
            network: Model, weights: Tensor, mask: Tensor, batch: Batch, draw: torch.Generator
        ) -> Tensor:
            raise AssertionError

    with pytest.raises(UsageError, match="unknown score 'magnitud': did you mean 'magnitude'"):
        SCORES["magnitud"]
