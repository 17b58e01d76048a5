"""Methods of frozen weights: which are kept, what the gradient of a score is, what changes between steps."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth import frozen as frozen_module
from sparselth.config import Recipe
from sparselth.engine.dense import Network, cross_entropy_grad
from sparselth.errors import UsageError
from sparselth.frozen import LAWS, METHODS, Frozen, Method, chance, effective, mask_of, weights_of
from sparselth.kernels.hash_weights import hash_weights
from sparselth.models import AvgPool, BatchNorm, Conv, Layer, Linear, Model, ReLU, get_model
from sparselth.params import Params, TensorSpec
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


# ---- by hand: a tensor of six weights, and what each field says

SIX = TensorSpec("a.weight", (2, 3), 0, fan_in=3, fan_out=2)
NINE = TensorSpec("b.weight", (3, 3), 16, fan_in=3, fan_out=3)
PAIR = Params((SIX, NINE), (TensorSpec("a.bias", (2,), 32),))


def scores_of(*values: float) -> Tensor:
    """Scores [M] of PAIR: those of `a`, then those of `b`, 0 between."""
    flat = torch.zeros(PAIR.mask_size)
    flat[SIX.span], flat[NINE.span] = torch.tensor(values[:6]), torch.tensor(values[6:])
    return flat


def test_every_field_is_the_method_s_own_unless_given() -> None:
    given = {"keep": 0.25, "law": "uniform", "scope": "global", "scaled": True, "every": 7, "share": 0.125}
    for method in METHODS.values():
        own = {name: getattr(method, name) for name in ("keep", "law", "scaled", "every", "share")}
        expected = Frozen(method=method.name, seed=5, scope="layer", **own)
        assert method.frozen(5) == expected
        for name, value in given.items():
            assert method.frozen(5, **{name: value}) == replace(expected, **{name: value})  # type: ignore[arg-type]
        none: dict[str, Any] = {"scaled": False, "every": 0, "share": 0.0}
        assert method.frozen(5, **none) == replace(expected, **none)
        assert method.recipe(MODEL) == method.recipes["convolve"]
        assert method.recipe(LINEAR) == method.recipes["linear"]
        assert hash(method) == hash(method.name)


LINEAR = Model("linear", (1, 2, 2), (Linear(3), ReLU(), Linear(10)), {}, "")


def test_the_ends_of_each_range_are_in_it() -> None:
    for name, least, most in (("keep", 1e-9, 1), ("share", 0, 1), ("every", 0, 10**9), ("seed", 0, 10**9)):
        for value in (least, most):
            arguments = {"method": "iterand", "seed": 0, "law": "normal", "keep": 0.5} | {name: value}
            assert getattr(Frozen(**arguments), name) == value  # type: ignore[arg-type]
    wrong = (("keep", 0), ("keep", 1.001), ("share", -1e-9), ("share", 1.001), ("every", -1), ("seed", -1))
    for name, value in wrong:
        arguments = {"method": "iterand", "seed": 0, "law": "normal", "keep": 0.5} | {name: value}
        with pytest.raises(UsageError, match=f"^`{name}` {value}: expected "):
            Frozen(**arguments)  # type: ignore[arg-type]
    for name in ("method", "law", "scope", "spread"):
        arguments = {"method": "iterand", "seed": 0, "law": "normal", "keep": 0.5} | {name: "other"}
        with pytest.raises(UsageError, match=f"^`{name}` other: expected one of "):
            Frozen(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1e-9, 1), (0.05, 1), (0.15, 2), (0.149, 1), (0.25, 3), (0.2499, 2), (0.45, 5), (1, 10)],
)
def test_kept_of_ten(keep: float, kept: int) -> None:
    assert METHODS["edge-popup"].frozen(0, keep=keep).kept(10) == kept


def test_scores_begin_uniform_as_wide_as_the_method_says_and_norms_as_they_are() -> None:
    for name in RANKED:
        bound = 6.0 if name == "iterand" else 1.0
        flat = METHODS[name].start(METHODS[name].frozen(0), PARAMS, stream(0, name, 0, "scores"))
        draw = stream(0, name, 0, "scores")
        for spec in PARAMS.weights:
            uniform = torch.rand(spec.numel, generator=draw)
            torch.testing.assert_close(flat[spec.span], (2 * uniform - 1) * sqrt(bound / spec.fan_in))
        ones = {spec.name for spec in PARAMS.unpruned if (flat[spec.span] == 1).all()}
        zeros = {spec.name for spec in PARAMS.unpruned if (flat[spec.span] == 0).all()}
        assert ones == {s.name for s in PARAMS.unpruned if s.name.split(".")[-1] in ("scale", "var")} != set()
        assert zeros == {s.name for s in PARAMS.unpruned} - ones
        assert (flat.dtype, flat.shape) == (torch.float32, (PARAMS.size,))
    for keep, odds in ((0.25, 1 / 3), (1e-6, 1 / 999), (1.0, 999)):
        method, frozen, _ = started("supermask", keep=keep)
        flat = method.start(frozen, PARAMS, torch.Generator())
        torch.testing.assert_close(flat[:M][FULL], torch.full((int(FULL.sum()),), log(odds)))


def test_layers_are_ranked_apart_or_together() -> None:
    scores = scores_of(1, 2, 3, 4, 5, -6, 10, 20, 30, 40, 50, 60, 70, 80, -90)
    for name, scope, kept in (
        ("edge-popup", "layer", {3, 4, 5, *range(20, 25)}),
        ("edge-popup", "global", {*range(17, 25)}),
        ("iterand", "layer", {2, 3, 4, *range(19, 24)}),
        ("iterand", "global", {*range(16, 24)}),
        ("signed", "global", {*range(17, 25)}),
    ):
        frozen = METHODS[name].frozen(0, keep=0.56, scope=scope)
        assert [frozen.kept(n) for n in (6, 9, 15)] == [3, 5, 8]
        assert frozen.counts(PAIR) == ([3, 5] if scope == "layer" else [8])
        mask = METHODS[name].mask(frozen, PAIR, scores)
        assert {*mask.nonzero().flatten().tolist()} == kept, (name, scope)
        if name == "signed":
            assert mask.dtype == torch.int8
            assert mask[24] == -1
            assert mask.sum() == 6
        else:
            assert mask.dtype == torch.bool


def test_small_layers_may_keep_more_and_weights_are_scaled_by_what_their_layer_keeps() -> None:
    scores = scores_of(1, 2, 3, 4, 5, -6, 10, 20, 30, 40, 50, 60, 70, 80, -90)
    frozen = METHODS["signed"].frozen(0, keep=0.4, spread="root")
    mask = METHODS["signed"].mask(frozen, PAIR, scores)
    kept = [int(mask[spec.span].count_nonzero()) for spec in PAIR.weights]
    assert kept == frozen.counts(PAIR) == [3, 3]  # of 6 and of 9; evenly it were 2 and 4
    weights = METHODS["signed"].weights(frozen, PAIR, None, "cpu")
    plain = METHODS["signed"].weights(METHODS["signed"].frozen(0, keep=1.0), PAIR, None, "cpu")
    for spec, count in zip(PAIR.weights, kept, strict=True):
        torch.testing.assert_close(weights[spec.span], plain[spec.span] * sqrt(spec.numel / count))
    with pytest.raises(UsageError, match="`spread` root: expected `scope` layer"):
        METHODS["signed"].frozen(0, scope="global", spread="root")


def test_who_spreads_by_roots() -> None:
    lenet, conv2 = get_model("lenet-300-100"), get_model("conv2")
    for name, method in METHODS.items():
        assert method.spread_over(lenet, "layer") == method.spread_over(conv2, "global") == "even"
        assert method.spread_over(conv2, "layer") == ("root" if name == "signed" else "even")


def test_the_lowest_take_the_values_of_the_highest_in_their_order() -> None:
    """Of six two are kept: two of the rest, a share of a third, get what the kept ones have."""
    scores = scores_of(0.5, 6, 0.1, 0.2, 0.3, 5, *range(9))
    for share, moved in ((1 / 3, {2: 1, 3: 5}), (0.24, {2: 1}), (0.0, {}), (1.0, {2: 1, 3: 5})):
        method, frozen, _ = started("recycle", keep=1 / 3, share=share, every=3)
        generations = torch.zeros(PAIR.mask_size, dtype=torch.int32)
        for step, told in ((2, False), (4, False), (6, True)):
            assert method.after(frozen, PAIR, step, scores, generations) is told
            if not told:
                assert not generations.any()
        assert {i: i + int(generations[i]) for i in range(6) if generations[i]} == moved
        b = generations[NINE.span].nonzero().flatten().tolist()
        assert b == [*range({1 / 3: 3, 0.24: 2, 0.0: 0, 1.0: 3}[share])]
        assert generations.dtype == torch.int32
    method, frozen, _ = started("recycle", keep=5 / 6, share=1.0, every=1)
    generations = torch.zeros(PAIR.mask_size, dtype=torch.int32)
    generations[1] = 3  # whose value it is goes along
    assert method.after(frozen, PAIR, 1, scores, generations)
    assert (int(generations[2]), int(generations[1])) == (1 + 3 - 2, 3)
    assert generations[SIX.span].nonzero().flatten().tolist() == [1, 2]  # kept ones stay
    never, still = method.frozen(0, every=0), generations.clone()
    assert not method.after(never, PAIR, 1, scores, generations)
    assert torch.equal(generations, still)
    own = METHODS["recycle"].layer_weights(frozen, 0, SIX, None, "cpu")
    some = torch.tensor([0, 1, -2, 0, 1, -1], dtype=torch.int32)
    found = METHODS["recycle"].layer_weights(frozen, 0, SIX, some, "cpu")
    assert torch.equal(found, own[[0, 2, 0, 3, 5, 4]])


def test_redraws_are_counted_where_chance_falls_below_the_share() -> None:
    scores = scores_of(*range(6), *range(9))
    method, frozen, _ = started("iterand", keep=0.5, share=0.5, every=4)
    generations = torch.zeros(PAIR.mask_size, dtype=torch.int32)
    for step in (3, 5):
        assert method.after(frozen, PAIR, step, scores, generations) is False
    assert not generations.any()
    assert method.after(frozen, PAIR, 8, scores, generations) is True
    mask = method.mask(frozen, PAIR, scores)
    expected = torch.zeros_like(generations)
    for layer, spec in enumerate(PAIR.weights):
        expected[spec.span] = ((chance(frozen, layer, spec, 8, "cpu") < 0.5) & ~mask[spec.span]).int()
    assert torch.equal(generations, expected)
    assert 0 < expected.sum() < (~mask).sum()
    assert method.after(replace(frozen, every=0), PAIR, 8, scores, generations) is False
    assert METHODS["edge-popup"].after(frozen, PAIR, 8, scores, None) is False


def test_frozen_weights_and_chances_are_hashes_of_their_places() -> None:
    for name in METHODS:
        frozen = METHODS[name].frozen(11, law="normal", keep=0.25, scaled=True)
        flat = weights_of(frozen, PAIR)
        assert (flat.shape, flat.dtype) == ((PAIR.mask_size,), torch.float32)
        for layer, spec in enumerate(PAIR.weights):
            drawn = hash_weights(11, layer, spec.shape, "normal", gain=2.0)
            assert torch.equal(flat[spec.span], drawn.flatten())
        plain = weights_of(replace(frozen, scaled=False), PAIR)
        assert torch.equal(plain[SIX.span], hash_weights(11, 0, SIX.shape, "normal").flatten())
    redraws = torch.arange(PAIR.mask_size, dtype=torch.int32)
    flat = weights_of(METHODS["iterand"].frozen(11), PAIR, redraws)
    expected = hash_weights(11, 1, NINE.shape, "signed-constant", redraws[NINE.span].view(3, 3))
    assert torch.equal(flat[NINE.span], expected.flatten())
    found = chance(METHODS["iterand"].frozen(11), 1, NINE, 5, "cpu")
    even = hash_weights(11, 1 + (1 << 31), NINE.shape, "uniform", 5, gain=sqrt(3 / 6))
    assert torch.equal(found, (even.flatten() + 1) * 0.5)
    many = chance(METHODS["iterand"].frozen(11), 0, TensorSpec("c", (100, 300), 0, 300), 5, "cpu")
    assert 0 <= many.min() < 0.001 < 0.999 < many.max() <= 1


def test_networks_and_slopes_by_hand() -> None:
    weights = scores_of(1, -2, 3, -4, 5, -6, *[2.0] * 9)
    mask = scores_of(1, 1, 0, 1, 0, 0, *[0.0] * 9).bool()
    scores, grad = scores_of(1, -1, 2, -2, 0, 3, *[1.0] * 9), scores_of(*[10.0] * 15)

    def network(name: str) -> list[float]:
        return [float(x) for x in METHODS[name].network(PAIR, mask, weights)[SIX.span]]

    def slope(name: str) -> Tensor:
        found = grad.clone()
        METHODS[name].slope(PAIR, scores, mask, weights, found)
        return found[SIX.span]

    assert network("edge-popup") == network("iterand") == [1, -2, 0, -4, 0, 0]
    third = 7 / 3
    assert network("biprop") == pytest.approx([third, -third, 0, -third, 0, 0])
    assert network("supermask") == [2, -4, 0, -8, 0, 0]
    assert METHODS["biprop"].network(PAIR, mask, weights)[NINE.span].eq(0).all()
    assert METHODS["supermask"].network(PAIR, mask, weights)[NINE.span].eq(0).all()
    one = scores_of(0, 0, 0, 1, 0, 0, *[0.0] * 9).bool()
    assert METHODS["biprop"].network(PAIR, one, weights)[3] == -4
    assert METHODS["supermask"].network(PAIR, one, weights)[3] == -24
    assert slope("edge-popup").tolist() == slope("biprop").tolist() == [10, 20, 30, 40, 0, -60]
    assert slope("iterand").tolist() == slope("signed").tolist() == [10, -20, 30, -40, 50, -60]
    odds = scores[SIX.span].sigmoid()
    torch.testing.assert_close(slope("supermask"), 20 * weights[SIX.span] * odds * (1 - odds))
    frozen = METHODS["supermask"].frozen(4)
    drawn = METHODS["supermask"].drawn(frozen, PAIR, scores, 6)
    for layer, spec in enumerate(PAIR.weights):
        expected = chance(frozen, layer, spec, 6, "cpu") < scores[spec.span].sigmoid()
        assert torch.equal(drawn[spec.span], expected)
    assert not drawn[6:16].any()
    kept = METHODS["supermask"].mask(frozen, PAIR, scores)
    assert kept[:16].nonzero().flatten().tolist() == [0, 2, 5]
    with pytest.raises(NotImplementedError):
        METHODS["edge-popup"].drawn(frozen, PAIR, scores, 6)


def test_what_is_behind_the_weights_stays_in_the_network() -> None:
    flat = torch.cat([scores_of(*range(15)), torch.tensor([7.0, 8.0]), torch.zeros(14)])
    frozen = METHODS["edge-popup"].frozen(1)
    found = effective(frozen, PAIR, flat)
    assert found[32:34].tolist() == [7, 8]
    expected = weights_of(frozen, PAIR) * mask_of(frozen, PAIR, flat)
    assert torch.equal(found[:32], expected)
    assert flat[3] == 3  # and the scores as they were
    redraws = torch.ones(PAIR.mask_size, dtype=torch.int32)
    iterand = METHODS["iterand"].frozen(1, law="normal")
    expected = weights_of(iterand, PAIR, redraws) * mask_of(iterand, PAIR, flat)
    assert torch.equal(effective(iterand, PAIR, flat, redraws)[:32], expected)


def test_recipes_of_scores() -> None:
    shared: dict[str, Any] = {"optimizer": "sgd", "cosine": True, "weight_decay": 1e-4}
    assert frozen_module._recipes(3.0, 2.0) == {
        "linear": Recipe(steps=4000, lr=3.0, batch_size=128, **shared),
        "convolve": Recipe(steps=1000, lr=2.0, batch_size=64, **shared),
    }
    shared["weight_decay"] = 0.5
    assert frozen_module._recipes(3.0, 2.0, 0.5, warmup=23) == {
        "linear": Recipe(steps=4000, lr=3.0, batch_size=128, warmup=23, **shared),
        "convolve": Recipe(steps=1000, lr=2.0, batch_size=64, warmup=5, **shared),
    }
