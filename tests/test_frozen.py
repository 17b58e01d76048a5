"""Methods of frozen weights: which are kept, what the gradient of a score is, what changes between steps."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth.engine.dense import Network, cross_entropy_grad
from sparselth.errors import UsageError
from sparselth.frozen import LAWS, METHODS, Frozen, Method, chance, effective, mask_of, weights_of
from sparselth.models import AvgPool, BatchNorm, Conv, Layer, Linear, Model, ReLU
from sparselth.streams import stream

LAYERS: tuple[Layer, ...] = (Conv(5, 3, 1, 2), BatchNorm(), ReLU(), Conv(6, 3), ReLU(), AvgPool(), Linear(10))
MODEL = Model("tiny", (1, 9, 9), LAYERS, {}, "")
PARAMS, M = MODEL.params, MODEL.params.mask_size
FULL = PARAMS.full_mask()
RANKED = [name for name in METHODS if name != "supermask"]


def started(name: str, seed: int = 3, **given: Any) -> tuple[Method, Frozen, Tensor]:
    method = METHODS[name]
    frozen = method.frozen(seed, **given)
    scores = method.start(frozen, PARAMS, stream(seed, name, 0, "scores"))
    if name == "supermask":  # which all begin alike
        scores[:M] += torch.randn(M, generator=stream(seed, name, 0, "noise")) * FULL
    return method, frozen, scores


def counted(mask: Tensor) -> dict[str, int]:
    return {spec.name: int((mask[spec.span] != 0).sum()) for spec in PARAMS.weights}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 1.0, 1e-6])
@pytest.mark.parametrize("name", RANKED)
def test_as_many_are_kept_as_was_asked_for(name: str, keep: float, scope: str) -> None:
    """The share that is kept, not the share that goes."""
    _, frozen, scores = started(name, keep=keep, scope=scope)
    mask = mask_of(frozen, PARAMS, scores)
    assert not (mask != 0)[~FULL].any()
    if scope == "layer":
        assert counted(mask) == {s.name: max(1, int(keep * s.numel + 0.5)) for s in PARAMS.weights}
    else:
        assert sum(counted(mask).values()) == max(1, int(keep * PARAMS.prunable + 0.5))
    assert counted(effective(frozen, PARAMS, scores)) == counted(mask)


def test_halves_are_rounded_up_and_equal_scores_go_by_lowest_index() -> None:
    _, frozen, scores = started("edge-popup", keep=0.5)
    scores[:M] = 1.0
    mask = mask_of(frozen, PARAMS, scores)
    (first, *_) = PARAMS.weights
    assert first.numel == 45
    assert mask[first.span].tolist() == [False] * 22 + [True] * 23


def test_what_is_ranked_is_the_magnitude_of_edge_popup_and_the_score_of_iterand() -> None:
    scores = torch.zeros(PARAMS.size)
    scores[:M] = torch.randn(M, generator=torch.Generator().manual_seed(0)) - 0.2
    for spec in PARAMS.weights:
        part = scores[spec.span]
        for name, ranked in (("edge-popup", part.abs()), ("iterand", part), ("signed", part.abs())):
            found = mask_of(METHODS[name].frozen(0, keep=0.3), PARAMS, scores)[spec.span]
            kept = ranked.argsort(descending=True)[: round(0.3 * spec.numel)]
            assert set(found.nonzero()[:, 0].tolist()) == set(kept.tolist()), name
            if name == "signed":
                assert torch.equal(found[kept].sign().float(), part[kept].sign())


@pytest.mark.parametrize("law", LAWS)
def test_scaled_weights_are_as_large_as_those_of_an_unpruned_layer(law: str) -> None:
    """A pruned layer's outputs keep their variance: fan_in times the share that is kept, not that goes."""
    for scaled, keep in ((False, 0.2), (True, 0.2)):
        weights = weights_of(METHODS["edge-popup"].frozen(1, keep=keep, law=law, scaled=scaled), PARAMS)
        for spec in PARAMS.weights[1:]:
            deviation = sqrt(2 / (spec.fan_in * (keep if scaled else 1)))
            bound = 1e-6 if law == "signed-constant" else 0.2
            assert float(weights[spec.span].square().mean().sqrt()) == pytest.approx(deviation, rel=bound)


def straight_through(name: str, frozen: Frozen, scores: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """The effective weights [M] of an explicit mask, whose gradient reaches the scores, float64."""
    w, kept = weights.double(), mask.double()
    if name == "supermask":
        chances = scores.sigmoid()
        kept = chances + (kept - chances).detach()
        scale = torch.cat([_rescaling(spec.numel, mask[spec.span]) for spec in PARAMS.weights])
        places = torch.cat([torch.arange(s.offset, s.offset + s.numel) for s in PARAMS.weights])
        return (
            (w * kept)
            .index_select(0, places)
            .mul(scale)
            .new_zeros(M)
            .index_add(0, places, (w * kept)[places] * scale)
        )
    ranked = scores if name in ("iterand", "signed") else scores.abs()
    kept = ranked + (kept - ranked).detach()
    if name != "biprop":
        return w * kept
    magnitudes, found = w.abs() * kept, w.sign() * kept.detach()
    for spec in PARAMS.weights:
        found[spec.span] *= (w[spec.span].abs() * mask[spec.span]).sum() / mask[spec.span].sum()
    return found + w.sign() * (magnitudes - magnitudes.detach())


def _rescaling(n: int, mask: Tensor) -> Tensor:
    return torch.full((n,), n / int(mask.sum()), dtype=torch.float64)


def logits(flat: Tensor, x: Tensor) -> Tensor:
    """The network by torch.nn.functional, from flat [P] and x [81, B]."""
    part = {spec.name: flat[spec.span].view(spec.shape) for spec in PARAMS.all}
    h = F.conv2d(x.T.view(-1, 1, 9, 9), part["conv1.weight"], part["conv1.bias"], 2, 1)
    h = F.batch_norm(h, None, None, part["norm1.scale"], part["norm1.shift"], training=True).relu()
    h = F.conv2d(h, part["conv2.weight"], part["conv2.bias"]).relu().mean((2, 3))
    return F.linear(h, part["fc1.weight"], part["fc1.bias"])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", METHODS)
def test_scores_get_the_gradient_that_autograd_gives_through_an_explicit_mask(name: str, law: str) -> None:
    """In float64; a sign of the score that is dropped, or a gradient of kept weights alone, is another."""
    method, frozen, scores = started(name, law=law, keep=0.4)
    x = torch.randn(81, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(16) % 10
    weights = weights_of(frozen, PARAMS)
    assert (scores[:M][FULL] < 0).any()
    mask = method.drawn(frozen, PARAMS, scores[:M], 5) if method.draws else mask_of(frozen, PARAMS, scores)
    flat = scores.clone()
    flat[:M] = method.network(PARAMS, mask, weights)

    leaf = scores.double().requires_grad_()
    other = torch.cat([straight_through(name, frozen, leaf[:M], weights, mask), leaf[M:].detach()])
    torch.testing.assert_close(flat.double(), other.detach(), rtol=1e-6, atol=1e-7)
    F.cross_entropy(logits(other, x.double()), y).backward()
    assert leaf.grad is not None

    grad = torch.zeros(1, PARAMS.size)
    net = Network(MODEL, flat[None], 16, grad)
    net.backward(cross_entropy_grad(net.forward(x[None]), y.view(1, 1, -1)))
    method.slope(PARAMS, scores[:M], mask, weights, grad[0, :M])
    for spec in PARAMS.weights:
        found, expected = grad[0, spec.span].double(), leaf.grad[spec.span]
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm()), spec.name
        assert found[mask[spec.span] == 0].any(), "pruned weights have gradients, too"


@pytest.mark.parametrize("law", LAWS)
def test_pruned_weights_are_redrawn_by_chance_and_kept_ones_never(law: str) -> None:
    method, frozen, scores = started("iterand", law=law, every=10, share=0.25)
    before, mask = weights_of(frozen, PARAMS), mask_of(frozen, PARAMS, scores)
    generations = torch.zeros(M, dtype=torch.int32)
    for step in (1, 9, 11):
        assert not method.after(frozen, PARAMS, step, scores[:M], generations)
    for turn in (1, 2, 3):
        assert method.after(frozen, PARAMS, 10 * turn, scores[:M], generations)
    assert not generations[mask].any()
    assert not generations[~FULL].any()
    pruned = FULL & ~mask
    assert 0.5 < float(generations[pruned].float().mean()) < 1.0  # three chances of a quarter
    assert set(generations[pruned].tolist()) == {0, 1, 2, 3}
    after = weights_of(frozen, PARAMS, generations)
    assert torch.equal(after[generations == 0], before[generations == 0])
    same = float((after == before)[generations > 0].float().mean())
    assert 0.3 < same < 0.7 if law == "signed-constant" else same < 0.01
    assert after[FULL].abs().min() > 0


def test_whether_a_weight_is_redrawn_depends_on_its_place_and_the_step_alone() -> None:
    frozen = METHODS["iterand"].frozen(4)
    first, second, _ = PARAMS.weights
    drawn = [chance(frozen, 1, second, step, "cpu") for step in (300, 600)]
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0], chance(frozen, 1, second, 300, "cpu"))
    assert not torch.equal(drawn[0], chance(replace(frozen, seed=5), 1, second, 300, "cpu"))
    assert not torch.equal(drawn[0][:45], chance(frozen, 0, first, 300, "cpu"))
    many = torch.cat([chance(frozen, 1, second, step, "cpu") for step in range(200)])
    assert (many >= 0).all()
    assert (many <= 1).all()
    for share in (0.1, 0.5, 0.9):
        assert float((many < share).float().mean()) == pytest.approx(share, abs=0.01)


def test_recycled_weights_have_the_values_of_the_highest_scores() -> None:
    method, frozen, scores = started("recycle", law="normal", every=5, share=0.2)
    before, mask = weights_of(frozen, PARAMS), mask_of(frozen, PARAMS, scores)
    generations = torch.zeros(M, dtype=torch.int32)
    assert not method.after(frozen, PARAMS, 4, scores[:M], generations)
    assert method.after(frozen, PARAMS, 5, scores[:M], generations)
    after = weights_of(frozen, PARAMS, generations)
    assert torch.equal(after[mask], before[mask])
    for spec in PARAMS.weights:
        n, ranked = round(0.2 * spec.numel), scores[spec.span].abs()
        order = ranked.argsort()
        low, high = order[:n].sort().values, order[-n:].sort().values
        assert torch.equal(after[spec.span][low], before[spec.span][high])
        assert int((after[spec.span] != before[spec.span]).sum()) == n
    # what was recycled is recycled: its value is still one of the first draw
    scores[:M] = scores[:M].flip(0) * FULL
    method.after(frozen, PARAMS, 10, scores[:M], generations)
    again = weights_of(frozen, PARAMS, generations)
    for spec in PARAMS.weights:
        assert set(again[spec.span].tolist()) <= set(before[spec.span].tolist())


def test_a_supermask_is_drawn_with_its_chances_and_rescaled_by_what_it_kept() -> None:
    method, frozen, scores = started("supermask", keep=0.3)
    scores[:M] = torch.where(torch.arange(M) % 2 == 0, 2.0, -2.0)
    drawn = torch.stack([method.drawn(frozen, PARAMS, scores[:M], step) for step in range(300)]).float()
    chances = torch.tensor([2.0, -2.0]).sigmoid()
    (spec, *_) = PARAMS.weights
    for odd in (0, 1):
        found = drawn[:, spec.span][:, odd::2].mean()
        assert float(found) == pytest.approx(float(chances[odd]), abs=0.02)
    assert torch.equal(mask_of(frozen, PARAMS, scores), FULL & (scores[:M] > 0))
    mask, weights = drawn[0].bool(), weights_of(frozen, PARAMS)
    network = method.network(PARAMS, mask, weights)
    for spec in PARAMS.weights:
        times = spec.numel / int(mask[spec.span].sum())
        torch.testing.assert_close(network[spec.span], weights[spec.span] * mask[spec.span] * times)


def test_binary_weights_have_one_magnitude_a_layer_the_mean_of_those_kept() -> None:
    _, frozen, scores = started("biprop", law="uniform", keep=0.3)
    mask, weights = mask_of(frozen, PARAMS, scores), weights_of(frozen, PARAMS)
    found = effective(frozen, PARAMS, scores)
    for spec in PARAMS.weights:
        kept, some = mask[spec.span], found[spec.span]
        torch.testing.assert_close(
            some[kept].abs(), weights[spec.span][kept].abs().mean().expand(int(kept.sum()))
        )
        assert torch.equal(some[kept] > 0, weights[spec.span][kept] > 0)
        assert not some[~kept].any()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep": 0.0}, "`keep` 0.0: expected a number above 0, at most 1"),
        ({"keep": 1.5}, "`keep` 1.5: expected a number above 0"),
        ({"keep": float("nan")}, "`keep` nan: expected"),
        ({"law": "gauss"}, "`law` gauss: expected one of signed-constant, normal, uniform"),
        ({"scope": "unit"}, "`scope` unit: expected one of layer, global"),
        ({"share": 2.0}, "`share` 2.0: expected a number from 0 to 1"),
        ({"every": -1}, "`every` -1: expected 0"),
    ],
)
def test_what_is_no_method_is_told_in_a_line(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        METHODS["edge-popup"].frozen(0, **wrong)
    assert str(raised.value).startswith(says)


def test_every_method_says_what_it_is_and_how_it_is_trained() -> None:
    assert list(METHODS) == ["edge-popup", "iterand", "recycle", "biprop", "supermask", "signed"]
    for name, method in METHODS.items():
        assert method.name == name
        assert method.meaning.endswith(")")
        assert len(method.meaning) < 100
        recipe = method.recipe(MODEL)
        recipe.check()
        assert (recipe.optimizer, recipe.cosine) == ("sgd", True)
    with pytest.raises(UsageError, match="edge-popup"):
        METHODS["edge-pop"]
