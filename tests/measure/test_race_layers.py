"""Clocks, floors, layers and rows of `bench`: what is checked before a time is believed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from sparselth import clock
from sparselth.errors import UsageError
from sparselth.kernels import _native
from sparselth.measure import asked, noise, race_layers, rivals
from sparselth.measure.asked import Asked, Cell
from sparselth.measure.floors import Anchors
from sparselth.measure.layers import Layer, block_of, defaults, facts, mask_of, parse
from sparselth.measure.race_layers import Bench
from sparselth.measure.rivals import Ready, Rival
from sparselth.report import bench_words

UNLIMITED = Anchors("cpu", ("fp32",), {1: 1e30}, dict.fromkeys(("fp32", "bf16", "fp16"), 1e30))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def bench(*, only: tuple[str, ...] = (), more: tuple[Rival, ...] = ()) -> Bench:
    found = [r for r in rivals.rivals() if r.name != "dense compiled" and (not only or r.name in only)]
    return Bench("cpu", UNLIMITED, [*found, *more], rounds=lambda race: [race.round() for _ in range(5)])


def test_a_race_takes_turns_and_lets_slow_rivals_go() -> None:
    order: list[str] = []

    def sample(name: str, taken: float) -> clock.Sample:
        def run() -> float:
            order.append(name)
            return taken

        return run

    race = clock.Race({"a": sample("a", 2.0), "b": sample("b", 4.0)})
    for _ in range(4):
        race.round()
    rounds = {tuple(order[i : i + 2]) for i in range(0, 8, 2)}
    assert rounds == {("a", "b"), ("b", "a")}  # who is first changes
    assert race.timings()["b"] == clock.Timing(4.0, 4.0, 4.0, 4)
    for _ in range(4):
        race.spent["b"] = 1.0
        race.round()
    assert len(race.seconds["a"]) == 8
    assert len(race.seconds["b"]) == clock.FEWEST


def test_the_first_rounds_can_be_left_out() -> None:
    values = iter([100.0, 1.0, 2.0, 3.0])
    race = clock.Race({"a": lambda: next(values)}, share=None)
    for _ in range(4):
        race.round()
    assert race.timings(skip=1)["a"].median == 2.0


def test_a_floor_is_bytes_or_flops() -> None:
    anchors = Anchors("cpu", ("fp32",), {1000: 1e9, 1_000_000: 1e8}, {"fp32": 1e10})
    assert anchors.floor(1000, 0, "fp32") == 1e-6
    assert anchors.floor(999_999, 0, "fp32") == pytest.approx(999_999e-9)  # lies in the smaller cache
    assert anchors.floor(2_000_000, 0, "fp32") == pytest.approx(2e-2)
    assert anchors.floor(1000, 1e8, "fp32") == 1e-2


def test_anchors_are_measured_and_only_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparselth.measure.floors.SIZES", (1 << 15, 1 << 22))
    monkeypatch.setattr("sparselth.measure.floors.SIDES", (128,))
    monkeypatch.setattr("sparselth.measure.floors.SECONDS", 0.01)
    anchors = Anchors("cpu", ("fp32", "bf16"))
    anchors.measure()
    first = dict(anchors.bandwidth)
    assert first[1 << 15] >= first[1 << 22] > 1e7
    assert anchors.rate["bf16"] >= anchors.rate["fp32"] > 1e7
    anchors.measure()
    assert all(anchors.bandwidth[size] >= rate for size, rate in first.items())


@pytest.mark.parametrize(
    "text", ["300x784", "64x64x3x3@32x32", "128x64x3x3@32x32/2", "16x6x5x5@14x14p0", "128x64x1x1@8x4/2"]
)
def test_shapes_are_read_and_written_alike(text: str) -> None:
    assert parse(text).text == text


@pytest.mark.parametrize("text", ["4096", "4096x", "0x4", "4x70000", "3x3x3@8x8", "4x4x9x9@5x5p0", "axb", ""])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="`shape`"):
        parse(text)


@pytest.mark.parametrize("layer", defaults(), ids=lambda layer: layer.text)
def test_default_layers(layer: Layer) -> None:
    assert parse(layer.text) == replace(layer, origin="")
    assert layer.origin


@pytest.mark.parametrize("text", ["5x7x3x3@6x5", "5x7x3x3@6x5/2", "5x7x5x5@6x5p0", "5x7x1x1@4x4/2"])
def test_flops_and_outputs_of_a_convolution(text: str) -> None:
    """Counted by a convolution of ones: the taps that meet a pixel."""
    layer = parse(text)
    mask, _ = mask_of(layer, "random", 0.5, torch.Generator().manual_seed(1))
    ones = torch.ones(1, *layer.inputs)
    y = F.conv2d(ones, mask.float(), None, layer.stride, layer.padding)
    assert tuple(y.shape[1:]) == layer.outputs
    assert layer.flops(mask) == 2 * int(y.sum())
    assert layer.flops() == layer.flops(torch.ones(layer.shape, dtype=torch.bool))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999999])
def test_masks_have_exact_counts(sparsity: float) -> None:
    layer = parse("96x128")
    mask, block = mask_of(layer, "random", sparsity, torch.Generator())
    assert block is None
    assert int(mask.sum()) == max(1, round((1 - sparsity) * 96 * 128))
    layer = parse("256x300")
    mask, block = mask_of(layer, "block", sparsity, torch.Generator())
    assert block == block_of(layer) == 32
    wide = F.pad(mask, (0, 20)).view(8, 32, 10, 32).float().sum((1, 3))
    assert int((wide > 0).sum()) == max(1, round((1 - sparsity) * 80))
    assert set(wide.flatten().tolist()) <= {0.0, 1024.0, 384.0}  # whole blocks, cut at the edge
    layer = parse("40x70x3x5@8x8p1")
    mask, block = mask_of(layer, "block", sparsity, torch.Generator())
    assert block == block_of(layer) == 16
    wide = F.pad(mask.permute(2, 3, 0, 1), (0, 10, 0, 8)).view(15, 3, 16, 5, 16).float().sum((2, 4))
    assert int((wide > 0).sum()) == max(1, round((1 - sparsity) * 225))  # of channels, each at one tap
    assert set(wide.flatten().tolist()) <= {0.0, 256.0, 128.0, 96.0, 48.0}


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("512x512x3x3@4x4", 64),
        ("128x128x3x3@16x16", 32),
        ("64x64x3x3@32x32", 16),
        ("512x256x1x1@8x8/2", 32),
        ("64x3x3x3@32x32", None),
        ("512x512", 64),
        ("512x511", 32),
    ],
)
def test_blocks_of_a_layer(text: str, block: int | None) -> None:
    assert block_of(parse(text)) == block


def test_facts_of_a_mask() -> None:
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[3, 5] = mask[4, 40] = True
    assert facts(mask) == {
        "density": pytest.approx(2 / 1536),
        "dead_rows": 30,
        "dead_columns": 46,
        "tiles_16": pytest.approx(2 / 6),
        "tiles_64": 1.0,
    }
    mask = torch.zeros(16, 32, 2, 2, dtype=torch.bool)
    mask[:, 16:, 1, 0] = True
    assert facts(mask)["tiles_16"] == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("text", "batch", "kind"),
    [
        ("64x48", 1, "random"),
        ("64x48", 5, "random"),
        ("128x160", 3, "block"),
        ("8x4x3x3@6x6/2", 2, "random"),
        ("48x56x3x3@6x5/2", 2, "block"),
    ],
)
def test_every_implementation_is_right(text: str, batch: int, kind: str) -> None:
    found = bench().measure(Cell(parse(text), batch, "fp32", kind, 0.75))
    names = [row["implementation"] for row in found]
    assert names[0] == "dense eager"
    assert names[-1] == "auto"
    assert len(names) > 3
    for row in found:
        assert row["check"] == "passed"
        assert 0 <= row["max_rel_error"] <= 1e-5
        assert row["median_s"] > 0
        assert row["iqr_s"] >= 0
        assert row["dense_best"] in names
        assert row["speedup"] == pytest.approx(row["dense_median_s"] / row["median_s"])
        assert row["weight_bytes"] > 0
        size = batch * (math.prod(parse(text).inputs) + math.prod(parse(text).outputs)) * 4
        assert row["peak_bytes"] >= row["weight_bytes"] + size
    best = {row["implementation"]: row["median_s"] for row in found if row["kind"] == "dense"}
    assert found[0]["dense_median_s"] == min(best.values())
    assert len({row["dense_best"] for row in found}) == 1  # one denominator, auto's too
    auto, eager = found[-1], found[0]
    assert auto["like"] == "dense eager"  # which takes and gives rows, as auto does
    assert auto["like_speedup"] == pytest.approx(eager["median_s"] / auto["median_s"])
    assert all(isinstance(row["noisy"], bool) for row in found)
    assert isinstance(auto["like_noisy"], bool)


def test_a_floor_counts_weights_inputs_and_outputs() -> None:
    one = bench(only=("dense eager", "CSR"))
    one.anchors = Anchors("cpu", ("fp32",), {1: 1e15}, {"fp32": 1e30})
    cell = Cell(parse("64x48"), 5, "fp32", "random", 0.75)
    rows = {row["implementation"]: row for row in one.measure(cell)}
    mask = one.case(cell)[1]
    moved = {"dense eager": 48, "CSR": int(mask.any(0).sum())}  # inputs that some output reads
    for name, row in rows.items():
        assert row["bytes"] == row["weight_bytes"] + 4 * 5 * (moved[name] + 64)
        assert row["floor_s"] == pytest.approx(row["bytes"] / 1e15)
        assert row["floor_fraction"] == pytest.approx(row["floor_s"] / row["median_s"])
    assert rows["dense eager"]["flops"] == 2 * 5 * 64 * 48
    assert rows["CSR"]["flops"] == 2 * 5 * int(mask.sum())


def test_weight_bytes_count_every_index() -> None:
    found = {
        row["implementation"]: row for row in bench().measure(Cell(parse("64x48"), 2, "fp32", "random", 0.75))
    }
    kept = 64 * 48 // 4
    assert found["dense eager"]["weight_bytes"] == found["CSR"]["dense_weight_bytes"] == 64 * 48 * 4
    assert found["CSR"]["weight_bytes"] == 4 * kept + 4 * kept + 4 * 65


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
def test_peak_bytes_count_what_a_kernel_works_on() -> None:
    """Images with zeros around them, which the first call makes and the next ones find."""
    found = bench(only=("sparse_conv2d_rows",)).measure(Cell(parse("8x6x3x3@8x8"), 2, "fp32", "random", 0.75))
    (row,) = found
    assert row["peak_bytes"] >= row["weight_bytes"] + 4 * 2 * (8 * 8 * 8 + 6 * 8 * 8) + 4 * 6 * 10 * 10


def off(by: float) -> Callable[[rivals.Case], Ready]:
    """The product, but for one number that is off by a share of the largest."""

    def make(case: rivals.Case) -> Ready:
        def bind(x: torch.Tensor) -> rivals.Bound:
            def run() -> torch.Tensor:
                y = F.linear(x, case.weight)
                y[-1, -1] += by * float(y.abs().max())
                return y

            return run, run

        return Ready(1, bind)

    return make


@pytest.mark.parametrize("by", [1e-3, math.inf, math.nan])
def test_a_wrong_result_has_no_time_and_is_nobodys_best(by: float) -> None:
    for kind in ("ours", "dense"):
        found = bench(
            only=("dense eager", "CSR"), more=(Rival("wrong", kind, lambda c: True, off(by), rows=True),)
        ).measure(Cell(parse("32x32"), 4, "fp32", "random", 0.5))
        row = found[-1]
        assert row["median_s"] is row["speedup"] is None
        assert row["max_rel_error"] == (pytest.approx(by, rel=0.1) if math.isfinite(by) else None)
        assert "against float64" in row["check"]
        assert {r["dense_best"] for r in found} == {"dense eager"}
        assert race_layers.Outcome(found, [], {}, {}).failed
        assert "FAILED wrong on 32x32" in bench_words.summary(found)


def test_what_float64_does_not_see_is_compared_with_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_layers, "EXACT", 0.0)  # eight samples of forty

    def late(case: rivals.Case) -> Ready:
        def bind(x: torch.Tensor) -> rivals.Bound:
            def run() -> torch.Tensor:
                y = F.linear(x, case.weight)
                y[1] += 1  # no sample
                return y

            return run, run

        return Ready(1, bind)

    found = bench(only=("dense eager",), more=(Rival("late", "ours", lambda c: True, late),)).measure(
        Cell(parse("32x32"), 40, "fp32", "random", 0.5)
    )
    assert found[0]["check"] == "passed"
    assert found[1]["check"] != "passed"


def test_an_implementation_that_raises() -> None:
    def broken(case: rivals.Case) -> Ready:
        raise RuntimeError("no such thing\nand more")

    one = bench(only=("dense eager",), more=(Rival("mine", "ours", lambda c: True, broken),))
    found = one.measure(Cell(parse("8x8"), 1, "fp32", "random", 0.5))
    assert found[-1]["check"] == "RuntimeError: no such thing"
    one = bench(only=("dense eager",), more=(Rival("theirs", "torch", lambda c: True, broken),))
    assert len(one.measure(Cell(parse("8x8"), 1, "fp32", "random", 0.5))) == 1
    assert one.notes == {"theirs (fp32)": "no such thing"}


def test_a_time_above_the_floor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Anchors("cpu", ("fp32",), {1: 1.0}, {"fp32": 1.0})  # a byte a second
    measured = []
    monkeypatch.setattr(slow, "measure", lambda: measured.append(1))
    one = bench(only=("dense eager",))
    one.anchors = slow
    (row,) = one.measure(Cell(parse("8x8"), 1, "fp32", "random", 0.5))
    assert len(measured) == race_layers.AGAIN
    assert "is above the floor" in row["check"]
    assert row["median_s"] is None


def test_floors_of_a_busy_machine_fail_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Anchors("cpu", ("fp32",), {1: 1.0}, {"fp32": 1.0})
    monkeypatch.setattr(slow, "measure", lambda: setattr(slow, "disturbed", True))
    one = bench(only=("dense eager",))
    one.anchors = slow
    (row,) = one.measure(Cell(parse("8x8"), 1, "fp32", "random", 0.5))
    assert row["check"] == "passed"
    assert "this machine was busy" in one.notes["whether times are possible"]


def test_anchors_know_that_others_had_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = Anchors("cpu", ("fp32",), {1: 1.0}, {"fp32": 1.0})
    monkeypatch.setattr(anchors, "_cpu", lambda: None)
    for later, disturbed in ((9.0, True), (0.0, False)):
        at = iter([0.0, later])
        monkeypatch.setattr(clock, "waited", lambda at=at: next(at))
        anchors.measure()
        assert anchors.disturbed is disturbed


def test_a_slow_anchor_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Anchors("cpu", ("fp32",), {1: 1.0}, {"fp32": 1.0})
    monkeypatch.setattr(
        slow, "measure", lambda: (slow.bandwidth.update({1: 1e30}), slow.rate.update(fp32=1e30))
    )
    one = bench(only=("dense eager",))
    one.anchors = slow
    assert one.measure(Cell(parse("8x8"), 1, "fp32", "random", 0.5))[0]["check"] == "passed"


def test_half_precision_is_measured_dense() -> None:
    one = bench()
    for dtype in ("bf16", "fp16"):
        found = one.measure(Cell(parse("32x48"), 2, dtype, "random", 0.5))
        assert {row["kind"] for row in found} == {"dense"}
        assert all(row["check"] == "passed" and row["dense_weight_bytes"] == 2 * 32 * 48 for row in found)
    assert "use dense" in bench_words.summary(found)


def test_the_default_table_has_every_layer_at_every_batch() -> None:
    cells = Asked("cpu", (0.9,)).cells()
    assert len({cell.text for cell in cells}) == len(cells)
    plain = {(cell.layer.text, cell.batch) for cell in cells if (cell.kind, cell.dtype) == ("random", "fp32")}
    assert plain >= {(layer.text, batch) for layer in defaults() for batch in asked.ORDER}
    first = cells[: len(defaults())]
    assert {(cell.batch, cell.sparsity) for cell in first} == {(64, 0.9)}  # what was asked for
    assert first[0].layer.text == asked.SWEEP.text
    assert {cell.batch for cell in cells if cell.kind == "random"} == set(asked.ORDER)
    assert {cell.dtype for cell in cells} == {"fp32", "bf16", "fp16"}
    assert {cell.kind for cell in cells} == {"random", "block"}
    swept = {cell.sparsity for cell in cells if cell.layer.text == asked.SWEEP.text and cell.batch == 8}
    assert swept == {0.9, *asked.SWEEP_SPARSITIES}


def test_time_that_is_up_leaves_the_rest_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Anchors, "measure", lambda self: (self.bandwidth.update({1: 1e30}), self.rate.update(fp32=1e30))
    )
    wanted = Asked("cpu", (0.9,), dtypes=("fp32",))
    monkeypatch.setattr(Bench, "measure", lambda self, cell: [{"cell": cell, "check": "passed"}])
    outcome = race_layers.bench_layers(wanted, 0.0, lambda text: None)
    (row,) = outcome.rows  # what was asked for is measured at least once
    assert row["cell"].sparsity == 0.9
    assert not outcome.failed
    assert len(outcome.left_out) == outcome.cells - 1 == len(wanted.cells()) - 1


@pytest.mark.parametrize(
    "wanted",
    [
        Asked("cpu", (0.9,)),
        Asked("cpu", (0.5, 0.85)),
        Asked("cpu", (0.9, 0.6), batches=(4096, 2)),
        Asked("cpu", (0.9,), kinds=("random", "block"), dtypes=("bf16", "fp32")),
    ],
)
def test_all_that_is_named_is_measured_first_and_always(
    wanted: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Anchors,
        "measure",
        lambda self: (self.bandwidth.update({1: 1.0}), self.rate.update(dict.fromkeys(self.dtypes, 1.0))),
    )
    measured: list[Cell] = []
    monkeypatch.setattr(Bench, "measure", lambda self, cell: measured.append(cell) or [])
    kept: list[race_layers.Outcome] = []
    race_layers.bench_layers(wanted, 0.0, lambda text: None, kept.append)
    assert measured[0].sparsity == wanted.sparsities[0]
    flags = wanted.sparsities, wanted.batches or (0,), wanted.dtypes or ("",), wanted.kinds or ("",)
    named = set(itertools.product(*flags))
    found = {
        (
            cell.sparsity,
            cell.batch if wanted.batches else 0,
            cell.dtype if wanted.dtypes else "",
            cell.kind if wanted.kinds else "",
        )
        for cell in measured
    }
    assert found == named
    assert len(measured) == len(named) == len(kept)
    everything = {cell.text for cell in wanted.cells()}
    assert {cell.text for cell in measured} | {*kept[-1].left_out} == everything


def test_a_race_of_layers_goes_on_while_noise_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    cell = Cell(parse("32x32"), 2, "fp32", "random", 0.5)
    for answers, wanted in (([False], 2), ([True, False], 3), ([True] * 9, 2 + noise.AGAIN)):
        turns.clear()
        one = bench(only=("dense eager", "CSR"))
        one.rounds = lambda race: turns.append(len(race.rivals)) or [race.round() for _ in range(3)]
        monkeypatch.setattr(race_layers, "_undecided", Mock(side_effect=answers))
        one.measure(cell)
        assert len(turns) == wanted


def test_noise_between_two_rivals_is_seen() -> None:
    def entry(name: str, kind: str, rows: bool = False) -> Any:
        return race_layers._Entry(
            Rival(name, kind, lambda c: True, off(0.0), rows), None, None, 0.0, None, None
        )

    entries = [
        entry("eager", "dense", True),
        entry("columns", "dense"),
        entry("mine", "ours"),
        entry("auto", "auto"),
    ]
    calm = {"first eager": 3.0, "first columns": 2.0, "first mine": 1.0, "first auto": 1.5}
    found = {name: clock.Timing(t, t, t, 9) for name, t in calm.items()}
    assert not race_layers._undecided(entries, found)
    for name in ("first columns", "first mine", "first auto", "first eager"):
        t = calm[name]
        assert race_layers._undecided(entries, found | {name: clock.Timing(t, 0.5 * t, 1.5 * t, 9)})
