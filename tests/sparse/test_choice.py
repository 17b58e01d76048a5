"""The clock chooses: dense unless sparse wins, never what is wrong; the cache saves the clock."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conversions import (
    NATIVE,
    close,
    csr,
    dense,
    lenet_5,
    lenet_300_100,
    prefer,
    random_masks,
    times,
    timing,
    weights,
)
from sparselth import sparse
from sparselth.kernels import _native
from sparselth.kernels.csr_tiled import TiledCsr
from sparselth.kernels.step_parts import Call


def test_real_clock_zeros_in_the_weights_and_the_table(cache: Path) -> None:
    torch.manual_seed(0)
    model, shape = lenet_300_100()
    masks = random_masks(model, 0.05)
    with torch.no_grad():
        for name, weight in weights(model).items():
            weight.mul_(masks[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(64, *shape)
    converted = sparse.convert(model, None, x)
    close(converted(x), dense(model, masks, x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    text = sparse.explain(converted)
    assert text.splitlines()[0].split()[:5] == ["layer", "weight", "kept", "chosen", "bytes"]
    assert "chosen: " in text
    assert "compaction: 1 inputs 784 -> 784, outputs 300 -> " in text
    held = sum(layer.bytes for layer in converted.report.layers)
    assert sparse.weight_bytes(converted) == held
    assert all(len(line) < 400 for line in text.splitlines())
    assert cache.exists()


def test_choice_in_the_cache_is_not_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        asked.extend(calls)
        return times(dict.fromkeys(calls, 1e-3))

    monkeypatch.setattr(timing, "seconds", timer)
    model, shape = lenet_5()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    first = sparse.convert(model, masks, x).report
    assert asked
    asked.clear()
    second = sparse.convert(model, masks, x).report
    assert not asked
    assert [layer.times for layer in second.layers] == [layer.times for layer in first.layers]
    sparse.convert(model, masks, torch.randn(9, *shape))
    assert asked  # another batch
    for broken in ("no JSON", "[]", json.dumps(dict.fromkeys(json.loads(cache.read_text()), 1))):
        asked.clear()
        cache.write_text(broken)
        sparse.convert(model, masks, x)
        assert asked


def test_the_clock_is_not_fooled_by_slow_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def disturbed() -> None:
        nonlocal calls
        calls += 1
        sleep(0.001 if calls % 3 else 0.003)

    monkeypatch.setattr(timing.clock, "time", SimpleNamespace(perf_counter=lambda: now))
    found = timing.seconds({"disturbed": disturbed, "slow": lambda: sleep(0.002)})
    assert found["disturbed"] < found["slow"]
    assert not found.steady
    assert timing.seconds({"even": lambda: sleep(0.002)}).steady


def test_dense_is_taken_unless_sparse_wins_by_three_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        return times({name: 0.98 if name.split()[0] in (*NATIVE, "mixed") else 1.0 for name in calls})

    monkeypatch.setattr(timing, "seconds", timer)
    model, shape = lenet_300_100()
    converted = sparse.convert(model, random_masks(model, 0.1), torch.randn(8, *shape))
    assert {layer.chosen for layer in converted.report.layers} == {"dense"}
    assert all(math.isinf(layer.pays_after) for layer in converted.report.layers)


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
def test_a_wrong_candidate_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = csr.bind_csr_tiled

    def wrong(packed: TiledCsr, *rest: object) -> Call:
        call: Call = right(replace(packed, values=1.01 * packed.values), *rest)
        return call

    monkeypatch.setattr(csr, "bind_csr_tiled", wrong)
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed"))
    model, shape = lenet_300_100()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    converted = sparse.convert(model, masks, x)
    assert "csr_tiled" not in {layer.chosen for layer in converted.report.layers}
    assert "(wrong by" in sparse.explain(converted)
    close(converted(x), dense(model, masks, x))
