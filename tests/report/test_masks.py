"""Masks in numbers: degrees and dead units by hand, overlaps against their law, the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from sparselth import tickets
from sparselth.chance import Overlap
from sparselth.config import Cell
from sparselth.models import Linear, Model, ReLU, get_model
from sparselth.params import TensorSpec
from sparselth.patterns import get_pattern
from sparselth.report.mask_laws import _random, degrees
from sparselth.report.masks import Layer, Numbers, Shared, dead_units, layers_of, overlap, sentence
from sparselth.runs import RunRecord, cell_path, read

Cli = Callable[..., tuple[int, str, str]]
NET = Model("net", (1, 1, 3), (Linear(4), ReLU(), Linear(3), ReLU(), Linear(2)), {}, "by hand")


def bits(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


HAND = {
    "fc1.weight": bits("110", "000", "001", "111"),  # the second unit has no input
    "fc2.weight": bits(
        "1000", "0100", "0010"
    ),  # its second unit reads that unit alone; nobody reads the fourth
    "fc3.weight": bits("110", "010"),  # nobody reads the third
}


def test_degrees_by_hand() -> None:
    first, second, _ = layers_of(NET, HAND)
    assert first.into.tolist() == [2, 0, 1, 3]
    assert first.out_of.tolist() == [2, 2, 2]
    assert second.out_of.tolist() == [1, 1, 1, 0]
    lenet = get_model("lenet5")
    masks = {s.name: np.ones(s.matrix, bool) for s in lenet.weights}
    masks["conv2.weight"][:, 25:50] = False  # nothing reads the second of six channels
    _, conv, *_ = layers_of(lenet, masks)
    assert conv.into.tolist() == [125] * 16
    assert conv.out_of.tolist() == [400, 0, 400, 400, 400, 400]


def test_dead_units_by_hand() -> None:
    # of the first layer: without input; read only by what nobody reads; read by nobody.
    # of the second: reads only what is dead; read by nobody
    assert dead_units(NET, HAND) == {"fc1": 3, "fc2": 2}
    assert dead_units(NET, {name: np.ones_like(mask) for name, mask in HAND.items()}) == {"fc1": 0, "fc2": 0}
    lenet = get_model("lenet5")
    masks = {s.name: np.ones(s.matrix, bool) for s in lenet.weights}
    masks["fc1.weight"][:, 25:75] = False  # two of the sixteen maps of 5 x 5
    assert dead_units(lenet, masks) == {"conv1": 0, "conv2": 2, "fc1": 0, "fc2": 0}
    resnet = get_model("resnet20@0.25")
    masks = {s.name: np.ones(s.matrix, bool) for s in resnet.weights}
    masks["conv3.weight"][:2] = False
    assert dead_units(resnet, masks)["conv3"] == 2


def test_overlap_of_random_masks_lies_within_chance_and_of_equal_ones_beyond() -> None:
    model, draw = get_model("lenet-300-100"), np.random.default_rng(0)

    def random() -> dict[str, np.ndarray]:
        found = {}
        for spec in model.weights:
            flat = np.arange(spec.numel) < spec.numel // 5
            found[spec.name] = draw.permutation(flat).reshape(spec.matrix)
        return found

    masks = [random() for _ in range(12)]
    outside = 0
    for one, other in zip(masks[::2], masks[1::2], strict=True):
        row = Shared("seeds", 1, (overlap(model, one, other),)).row("all")
        low, high = row["chance_interval"]
        outside += not low <= row["shared"] <= high
        assert row["by_chance"] == pytest.approx(0.2, abs=1e-3)
        assert low < row["by_chance"] < high
    assert outside <= 2  # of six, where one in twenty is to be
    same = Shared("seeds", 1, (overlap(model, masks[0], masks[0]),))
    assert same.row("all")["shared"] == 1.0
    first = same.row("fc1")
    exact = Overlap(0, 47_040, 47_040, 235_200)
    assert first["chance_interval"] == pytest.approx([end / 47_040 for end in exact.interval()])
    sums = [exact, Overlap(0, 6_000, 6_000, 30_000), Overlap(0, 200, 200, 1_000)]
    spread = sum(one.deviation**2 for one in sums) ** 0.5
    low, high = same.row("all")["chance_interval"]
    assert (high - low) * 53_240 == pytest.approx(2 * 1.96 * spread)


@pytest.mark.parametrize("name", ["unit", "block:4"])
def test_masks_of_random_groups_are_told_from_chance_as_rarely_as_others(name: str) -> None:
    """About 95 of 100 pairs lie within the interval; within that of single weights 5 did, or of blocks 34."""
    model, pattern = get_model("lenet-300-100"), get_pattern(name)
    assert pattern is not None
    params, draw = model.params, torch.Generator().manual_seed(0)
    rung = pattern.ladder(params, 1, 0.5, "layer")[1]
    scores = torch.rand(params.mask_size, generator=draw)
    first = pattern.prune(params, scores, params.full_mask(), rung)

    def drawn() -> dict[str, np.ndarray]:
        mask = pattern.shuffled(params, first, draw).numpy()
        return {s.name: mask[s.span].reshape(s.matrix) for s in model.weights}

    within = 0
    for _ in range(100):
        row = Shared("seeds", 1, (overlap(model, drawn(), drawn(), pattern),)).row("all")
        low, high = row["chance_interval"]
        within += low <= row["shared"] <= high
    assert within >= 88


def test_the_law_of_degrees_of_a_random_mask() -> None:
    mask = np.arange(40).reshape(5, 8) < 12
    for kind, of in (("into", 8), ("out_of", 5)):
        law = _random(Layer("", mask, 1), kind, TensorSpec("", (5, 8), 0), None)
        assert law.sum() == pytest.approx(1)
        assert (np.arange(len(law)) * law).sum() == pytest.approx(12 * of / 40)
        assert law[1] == pytest.approx(of * comb(40 - of, 11) / comb(40, 12))


@pytest.mark.parametrize(("name", "shape"), [("unit", (4, 2, 2)), ("block:2", (4, 4, 2)), ("2:4", (2, 2, 4))])
def test_the_law_of_degrees_is_that_of_masks_in_the_pattern(name: str, shape: tuple[int, ...]) -> None:
    """By all of these masks, one by one; a layer that the pattern does not fit is whole."""
    pattern, spec = get_pattern(name), TensorSpec("", (*shape, 1), 0)
    assert pattern is not None
    groups = pattern.groups(spec).numpy()
    if name == "2:4":
        fours = [np.isin(np.arange(4), two) for two in itertools.combinations(range(4), 2)]
        masks = [np.concatenate(parts) for parts in itertools.product(fours, repeat=4)]
    else:
        picked = itertools.combinations(range(int(groups.max()) + 1), 2)
        masks = [np.isin(groups, two) for two in picked]
    layers = [Layer("", mask.reshape(spec.matrix), shape[2]) for mask in masks]
    for kind in ("into", "out_of"):
        found = np.concatenate([getattr(one, kind) for one in layers])
        law = _random(layers[0], kind, spec, pattern)
        counts = np.bincount(found, minlength=len(law)) / len(found)
        np.testing.assert_allclose(law, counts, atol=1e-12)
        whole = Layer("", np.ones(spec.matrix, bool), shape[2])
        assert _random(whole, kind, spec, pattern)[-1] == pytest.approx(1)


def test_of_fours_of_odd_kernels_inputs_differ_by_where_they_lie() -> None:
    """A kernel of 3 weights has parts of 3, or of 1 and 2, of its fours."""
    spec, fours = TensorSpec("", (1, 4, 3), 0), get_pattern("2:4")
    mask = np.tile([True, True, False, False], 3).reshape(1, 12)
    law = _random(Layer("", mask, 3), "out_of", spec, fours)
    three, two = np.array([0, 0.5, 0.5, 0]), np.convolve([0.5, 0.5], [1 / 6, 4 / 6, 1 / 6])
    np.testing.assert_allclose(law, (three + two) / 2, atol=1e-12)


def test_numbers_are_those_of_the_files(finished: Callable[..., RunRecord], cli: Cli) -> None:
    record = finished("--levels", "2", "--arms", "ticket,reinit,random-mask")
    numbers, params = Numbers(record), record.config.network.params

    def mask(seed: int, arm: str, level: int) -> np.ndarray:
        file = cell_path(record.path, Cell(seed, arm, level))
        return tickets.read(file, params)[0].mask

    rows = {(one.between, one.level): one.row("all") for one in numbers.shared}
    # reinit has the ticket's mask, level 1 lies in level 0
    assert rows.keys() == {("seeds", 1), ("seeds", 2), ("levels", 2), ("random-mask", 1), ("random-mask", 2)}
    a, b = mask(0, "ticket", 2), mask(1, "ticket", 2)
    assert rows["seeds", 2]["shared"] == (a & b).sum() / a.sum()
    assert rows["levels", 2]["shared"] == 1.0
    random = [(mask(s, "ticket", 2) & mask(s, "random-mask", 2)).sum() / a.sum() for s in (0, 1)]
    assert rows["random-mask", 2]["shared"] == pytest.approx(np.mean(random))
    assert (rows["random-mask", 2]["least"], rows["random-mask", 2]["most"]) == (min(random), max(random))
    first = next(r for r in numbers.layers if (r["level"], r["seed"], r["layer"]) == (2, 1, "fc1"))
    spec = params.weights[0]
    own = b[spec.span].reshape(spec.matrix)
    assert (first["kept"], first["into"]["most"]) == (own.sum(), own.sum(1).max())
    assert np.sum(numbers.pixels()[-1]["readers"]) == a[spec.span].sum()
    counts = next(
        r["counts"] for r in degrees(numbers) if (r["level"], r["layer"], r["kind"]) == (2, "fc1", "into")
    )
    assert sum(counts) == 2 * 300
    assert sum(i * n for i, n in enumerate(counts)) == a[spec.span].sum() + b[spec.span].sum()

    code, out, _ = cli("show", "run", "--masks")
    assert code == 0
    assert "tickets of two seeds" in out
    assert " ".join(sentence(numbers).split()) in " ".join(out.split())
    data = json.loads(Path("run/figures/masks.json").read_text())
    document = json.loads(cli("show", "run", "--masks", "--json")[1])
    assert document["schema"] == "sparselth.masks/1"
    assert document["overlap"] == data["overlap"]
    for name in ("mask_degrees", "mask_overlap"):
        assert Path(f"run/figures/{name}.png").exists()
    file = cell_path(Path("run"), Cell(0, "ticket", 2))
    file.write_bytes(file.read_bytes()[:-1] + b"\0\1")
    code, _, err = cli("show", "run", "--masks")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "seed0-ticket-02.safetensors: is not what was written" in err


def test_one_seed_has_nothing_to_be_compared_with(finished: Callable[..., RunRecord]) -> None:
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    assert "is open" in sentence(Numbers(record))
    empty = replace(record, points=[p for p in record.points if not p["level"]])
    assert Numbers(empty).levels == []
    assert read(record.path).complete
