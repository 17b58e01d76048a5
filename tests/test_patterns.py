"""Patterns: exact counts by hand, what stays whole, random groups, and that fast forms take what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselth import tickets
from sparselth.config import Cell
from sparselth.data import load
from sparselth.errors import UsageError
from sparselth.experiments.imp import ImpConfig
from sparselth.kernels.block_conv2d import BlockFilters
from sparselth.kernels.block_linear import BlockWeight
from sparselth.kernels.two_four_linear import TwoFour
from sparselth.models import Conv, Linear, Model, ReLU, get_model
from sparselth.models.torch import network
from sparselth.patterns import UNSTRUCTURED, get_pattern, known, pattern_of
from sparselth.pruning import rounded
from sparselth.runs import RunRecord, cell_path
from sparselth.sparse import convert

WIDE = Model("wide", (1, 8, 8), (Linear(64), ReLU(), Linear(48), ReLU(), Linear(10)), {}, "")
FILTERS = Model("filters", (16, 6, 6), (Conv(32, 3, 1), ReLU(), Conv(16, 1), ReLU(), Linear(8)), {}, "")


def pattern(name: str) -> Any:
    found = get_pattern(name)
    assert found is not None
    return found


def drawn(model: Model, seed: int = 0) -> torch.Tensor:
    return torch.randn(model.params.mask_size, generator=torch.Generator().manual_seed(seed)).abs()


def test_two_of_four_by_hand() -> None:
    model = Model("", (1, 1, 8), (Linear(2),), {}, "")
    mask, scores = model.params.full_mask(), torch.zeros(model.params.mask_size)
    scores[:16] = torch.tensor([4, 1, 3, 2, 0, 0, 0, 0, -4, -1, -3, -2, 5, 5, 6, 5.0])
    rungs = pattern("2:4").ladder(model.params, 2, 0.2, "layer")
    assert rungs == [{"fc1.weight": 16}, {"fc1.weight": 8}, {"fc1.weight": 8}]
    found = pattern("2:4").prune(model.params, scores, mask, rungs[1])
    # equal ones: the lowest index goes first
    assert found[:16].int().tolist() == [1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1]
    assert torch.equal(pattern("2:4").prune(model.params, scores, found, rungs[2]), found)


def test_blocks_by_hand_of_a_matrix_and_at_every_tap() -> None:
    square = Model("", (1, 1, 4), (Linear(4),), {}, "")
    assert pattern("block:2").groups(square.weights[0]).view(4, 4).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    taps = Model("", (4, 3, 3), (Conv(2, 2), Linear(2)), {}, "")
    groups = pattern("block:2").groups(taps.weights[0]).view(2, 4, 4)
    for tap in range(4):
        assert groups[:, :, tap].tolist() == [[2 * tap, 2 * tap, 2 * tap + 1, 2 * tap + 1]] * 2
    scores = torch.zeros(square.params.mask_size)
    scores[:16] = torch.tensor([9, 0, 2, 2, 0, 0, 2, 2, 1, 1, 3, 3, 1, 1, 3, 3.0])  # sums 9, 8, 4, 12
    rung = pattern("block:2").ladder(square.params, 1, 0.9, "layer")[
        1
    ]  # half of it: the output layer; 0.45 * 4 is 2
    assert rung == {"fc1.weight": 8}
    found = pattern("block:2").prune(square.params, scores, square.params.full_mask(), rung)
    assert found[:16].int().view(4, 4).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("name", ["2:4", "block:16", "unit"])
@pytest.mark.parametrize("model", [WIDE, FILTERS], ids=["wide", "filters"])
def test_counts_are_exact_level_by_level_and_layers_that_do_not_fit_stay_whole(
    model: Model, name: str
) -> None:
    one, params = pattern(name), model.params
    mask, whole = params.full_mask(), one.whole(params)
    for level, rung in enumerate(one.ladder(params, 3, 0.3, "layer")[1:]):
        new = one.prune(params, drawn(model, level), mask, rung)
        assert params.kept(new) == rung
        assert not (new & ~mask).any()
        for spec in params.weights:
            kept, groups = new[spec.span], one.groups(spec) if spec.name not in whole else None
            if groups is None:
                assert kept.all()
                continue
            size = len(groups) // (int(groups.max()) + 1)
            counts = torch.bincount(groups[kept], minlength=int(groups.max()) + 1)
            assert set(counts.tolist()) <= ({2} if name == "2:4" else {0, size})
        mask = new
    expected = {
        ("2:4", "wide"): set(),
        ("2:4", "filters"): set(),
        ("block:16", "wide"): {"fc3.weight"},
        ("block:16", "filters"): {"fc1.weight"},
        ("unit", "wide"): {"fc3.weight"},
        ("unit", "filters"): {"fc1.weight"},
    }
    assert set(whole) == expected[name, model.name]


@pytest.mark.parametrize("name", ["2:4", "block:16", "unit"])
def test_a_shuffled_mask_keeps_as_much_in_the_same_pattern(name: str) -> None:
    one, params = pattern(name), WIDE.params
    mask = one.prune(params, drawn(WIDE), params.full_mask(), one.ladder(params, 1, 0.4, "layer")[1])
    found = one.shuffled(params, mask, torch.Generator().manual_seed(0))
    assert params.kept(found) == params.kept(mask)
    assert not torch.equal(found, mask)
    for spec in params.weights[:2]:
        counts = torch.bincount(one.groups(spec)[found[spec.span]])
        assert len(set(counts.tolist()) - {0}) == 1


@pytest.mark.parametrize("name", ["2:4", "block:16", "unit"])
def test_a_mask_in_no_groups_is_shuffled_weight_by_weight(name: str) -> None:
    """As one may be that was carried from another network; its counts stay."""
    params = WIDE.params
    mask = drawn(WIDE) > 0.7
    found = pattern(name).shuffled(params, mask, torch.Generator().manual_seed(0))
    assert params.kept(found) == params.kept(mask)
    assert not torch.equal(found, mask)


def test_the_pattern_of_masks_is_that_of_their_largest_groups() -> None:
    params = FILTERS.params
    for name in ("unit", "block:8", "block:16", "2:4"):
        one = pattern(name)
        rung = one.ladder(params, 1, 0.5, "layer")[1]
        masks = [one.prune(params, drawn(FILTERS, seed), params.full_mask(), rung) for seed in (0, 1)]
        for spec in params.weights[:2]:
            own = [mask[spec.span] for mask in masks]
            assert pattern_of(spec, own) == name
            assert pattern_of(spec, [*own, drawn(FILTERS)[spec.span] > 0.7]) == UNSTRUCTURED
            assert pattern_of(spec, [own[0], torch.ones_like(own[0])]) == UNSTRUCTURED


def test_fast_forms_take_what_is_left() -> None:
    """No weight of a 2:4 mask is left over; blocks are as many as were kept; a converted network agrees."""
    halves, blocks = pattern("2:4"), pattern("block:16")
    for model, one in ((WIDE, halves), (WIDE, blocks), (FILTERS, blocks)):
        mask = one.prune(
            model.params, drawn(model), model.params.full_mask(), one.ladder(model.params, 1, 0.5, "layer")[1]
        )
        spec = model.weights[0]
        weight, kept = drawn(model, 1)[spec.span].view(spec.shape), mask[spec.span].view(spec.shape)
        if one is halves:
            assert TwoFour.from_dense((weight * kept).bfloat16()).rest.values().count_nonzero() == 0
            continue
        kind: Any = BlockWeight if len(spec.shape) == 2 else BlockFilters
        assert len(kind.from_dense(weight, kept, 16).places) == int(kept.sum()) // 256
    flat = torch.zeros(WIDE.params.size)
    mask = blocks.prune(
        WIDE.params, drawn(WIDE), WIDE.params.full_mask(), blocks.ladder(WIDE.params, 1, 0.7, "layer")[1]
    )
    flat[: len(mask)] = drawn(WIDE, 2) * mask
    net, x = network(WIDE, flat).eval(), torch.randn(8, 64)
    named = {spec.name: mask[spec.span].view(spec.shape) for spec in WIDE.weights}
    with torch.no_grad():
        torch.testing.assert_close(convert(net, named, x)(x), net(x), rtol=1e-4, atol=1e-4)


def by_hand(params: Any, name: str, scores: torch.Tensor, mask: torch.Tensor, keep: int) -> set[int]:
    """Places that are left where groups of all layers go by their mean, in plain Python and float64."""
    side = 4 if name == "block:4" else 0
    groups = dict[tuple[int, ...], list[int]]()
    for layer, spec in enumerate(params.weights):
        if spec.output if not side else any(n % side for n in spec.shape[:2]):
            continue  # whole
        taps = spec.numel // (spec.shape[0] * spec.shape[1])
        for i in range(spec.numel):
            row, column, tap = i // (spec.shape[1] * taps), i // taps % spec.shape[1], i % taps
            # in the order of their numbers: a row of blocks, its taps, its columns
            key = (layer, row) if not side else (layer, row // side, tap, column // side)
            if mask[spec.span.start + i]:
                groups.setdefault(key, []).append(spec.span.start + i)
    means = {key: math.fsum(float(scores[i]) for i in own) / len(own) for key, own in groups.items()}
    left = sum(map(len, groups.values()))
    for key in sorted(groups, key=lambda key: (means[key], key)):
        if left - len(groups[key]) < keep:
            break
        left -= len(groups.pop(key))
    return {i for own in groups.values() for i in own}


@pytest.mark.parametrize("name", ["unit", "block:4"])
@pytest.mark.parametrize("model", [WIDE, FILTERS], ids=["wide", "filters"])
@pytest.mark.parametrize("ties", [False, True])
def test_groups_of_all_layers_go_by_their_mean_as_by_hand(model: Model, name: str, ties: bool) -> None:
    one, params = pattern(name), model.params
    mask, rungs = params.full_mask(), one.ladder(params, 3, 0.35, "global")
    for level, rung in enumerate(rungs[1:]):
        scores = drawn(model, level)
        for i, spec in enumerate(params.weights):
            scores[spec.span] *= 2.0 ** -(i % 2)  # so that one layer goes before another
        if ties:
            scores = scores.round()
        new = one.prune(params, scores, mask, rung)
        assert not (new & ~mask).any()
        ranked = [spec for spec in params.weights if spec.name not in rung]
        found = {i for spec in ranked for i in range(spec.span.start, spec.span.stop) if new[i]}
        assert found == by_hand(params, name, scores, mask, rung["all"])
        largest = max(spec.matrix[1] for spec in ranked)
        if name == "block:4":
            assert len(found) == rung["all"]
            before = rungs[level]["all"] // 16
            assert rung["all"] == 16 * (before - rounded(0.35 * before))
        assert rung["all"] <= len(found) < rung["all"] + largest
        assert all(params.kept(new)[whole] == rung[whole] for whole in rung if whole != "all")
        mask = new
    shares = [params.kept(mask)[spec.name] / spec.numel for spec in ranked]
    assert max(shares) > 1.1 * min(shares)  # layers are not pruned alike
    with pytest.raises(ValueError, match="all: cannot keep"):
        one.prune(params, scores, mask, rungs[0])


def test_two_of_four_are_the_same_under_either_scope() -> None:
    one, params = pattern("2:4"), WIDE.params
    rungs = one.ladder(params, 1, 0.2, "global")
    assert rungs == one.ladder(params, 1, 0.2, "layer")
    layer, over_all = (
        ImpConfig(model="resnet20", pattern="2:4", scope=s, levels=1) for s in ("layer", "global")
    )
    assert layer.rungs() != over_all.rungs()  # its shortcuts and output layer are left whole under global
    assert (
        layer.rungs()
        == ImpConfig(model="resnet20", pattern="2:4", scope="global", exclude=(), levels=1).rungs()
    )
    assert ImpConfig(model="lenet-300-100", pattern="2:4", scope="global", levels=1).rungs()[1] == {
        "fc1.weight": 117_600,
        "fc2.weight": 15_000,
        "fc3.weight": 500,
    }


def test_names() -> None:
    assert get_pattern(UNSTRUCTURED) is None
    assert [known(name) for name in (UNSTRUCTURED, "2:4", "unit", "block:2", "block:128")] == [None] * 5
    for name in ("4:8", "block:", "block:1", "block:129", "block:x", "units", ""):
        assert known(name) == "expected unstructured, 2:4, unit, or blocks of 2 to 128, block:16"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pattern": "3:4"}, "`pattern` 3:4: expected unstructured, 2:4, unit"),
        ({"pattern": "2:4", "levels": 2}, "`levels` 2: 2:4 keeps half of the weights, once; expected 1"),
        (
            {"pattern": "block:16"},
            r"`pattern` block:16: fits no layer of lenet-300-100 \(fc1.weight: 300 x 784 is",
        ),
        ({"pattern": "unit", "levels": 30}, "would prune nothing"),
        (
            {"pattern": "unit", "scope": "global", "levels": 30},
            "`levels` 30: level 25 would prune nothing: at `rate` 0.2 it rounds to 251 weights, and the "
            "smallest unit has 300",
        ),
        ({"pattern": "unit", "scope": "global", "rate": 0.001}, "level 1 would prune nothing"),
    ],
)
def test_what_makes_no_experiment(changes: dict[str, Any], says: str) -> None:
    values: dict[str, Any] = {"model": "lenet-300-100", "dataset": "mnist5k", "device": "cpu"} | changes
    with pytest.raises(UsageError, match=says):
        ImpConfig(**values).check()


def test_the_plan_says_from_where_on_a_level_may_prune_nothing() -> None:
    """A unit of 784 weights, as of fc1, may be next, and is not pruned where fewer are to go."""
    values: dict[str, Any] = {"model": "lenet-300-100", "dataset": "mnist5k", "levels": 22}
    over_all = ImpConfig(**values, pattern="unit", scope="global")
    over_all.check()
    rungs, params = [rung["all"] for rung in over_all.rungs()], over_all.network.params
    assert rungs[18] - rungs[19] >= 784 > rungs[19] - rungs[20]
    said = f"; from level 20 on a level may prune nothing: it has {rungs[19] - rungs[20]} weights to prune"
    assert said in over_all.plan(load("mnist5k", Path()), 0)["levels"]
    scores, full = torch.ones(params.mask_size), params.full_mask()
    scores[params.weights[0].span] = 0
    keep = {"all": 265_200 - 783, "fc3.weight": 1000}
    assert torch.equal(pattern("unit").prune(params, scores, full, keep), full)
    for name, scope in (("unit", "layer"), ("block:4", "global")):
        assert ImpConfig(**values | {"pattern": name, "levels": 4}, scope=scope).uneven == ""


def test_a_run_in_whole_units(imp: Callable[..., RunRecord]) -> None:
    """Level 2 prunes whole rows of the lowest sums of level 1; random-mask has random rows."""
    words = "--levels 2 --rate 0.4 --seeds 0 --arms ticket,random-mask --pattern unit --workers 1"
    record = imp(*words.split(), steps=40)
    params = get_model("lenet-300-100").params

    def read(arm: str, level: int) -> tickets.Content:
        return tickets.read(cell_path(record.path, Cell(0, arm, level)), params)[0]

    for spec, left in zip(params.weights, (108, 36, 10), strict=True):
        rows = torch.from_numpy(read("ticket", 2).mask[spec.span].reshape(spec.matrix))
        before = torch.from_numpy(read("ticket", 1).weights[spec.span].reshape(spec.matrix)).abs().sum(1)
        stays = rows.any(1)
        assert torch.equal(rows, stays[:, None].expand_as(rows))
        assert int(stays.sum()) == left
        if left != 10:
            gone = before[~stays & (before > 0)]
            assert before[stays].min() >= gone.max()
            other = torch.from_numpy(read("random-mask", 2).mask[spec.span].reshape(spec.matrix))
            assert torch.equal(other, other.any(1)[:, None].expand_as(other))
            assert not torch.equal(other, rows)
    assert "whole: fc3.weight (its units are the classes)" in record.config._slower()
