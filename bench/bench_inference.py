"""One layer at inference: the code of `sparselth bench` under pytest-benchmark.

Each case is a cell of that command's table: every implementation checked against float64 and raced, in the
printed table and in `extra_info`. What pytest-benchmark times, and compares with an earlier run, is `auto`:
the layer as `sparse.convert` gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparselth.measure.asked import Cell
from sparselth.measure.floors import Anchors
from sparselth.measure.layers import parse
from sparselth.measure.memory import keep_freed
from sparselth.measure.race_layers import Bench
from sparselth.measure.rivals import rivals
from sparselth.report.bench_tables import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ("300x784", "1024x1024", "4096x4096", "64x64x3x3@32x32")
BATCHES = (1, 64, 256)


@pytest.fixture(scope="module")
def anchors() -> Anchors:
    keep_freed()
    torch.set_num_threads(1)
    found = Anchors(DEVICE, ("fp32",))
    found.measure()
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(shape: str, batch: int, anchors: Anchors, benchmark: Any, show: Callable[[str], None]) -> None:
    wanted = [rival for rival in rivals() if rival.name != "dense compiled"]  # its seconds go into compiling
    cell = Cell(parse(shape), batch, "fp32", "random", 0.9)
    bench = Bench(DEVICE, anchors, wanted)
    rows = bench.measure(cell)
    assert [row["check"] for row in rows] == ["passed"] * len(rows)
    names = ("median_s", "iqr_s", "speedup", "floor_fraction", "weight_bytes", "peak_bytes", "max_rel_error")
    for row in rows:
        benchmark.extra_info[row["implementation"]] = {name: row[name] for name in names}
    show(table(rows, every=True))

    with torch.no_grad():
        case, _ = bench.case(cell)
        call = next(rival for rival in wanted if rival.name == "auto").make(case).bind(case.x)[0]
        taken = next(row["median_s"] for row in rows if row["implementation"] == "auto")
        calls = max(1, int(1e-3 / taken))
        benchmark.pedantic(lambda: _done(call), rounds=20, iterations=calls, warmup_rounds=1)


def _done(call: Callable[[], object]) -> None:
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
