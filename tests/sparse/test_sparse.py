"""Compaction is exact, conversion keeps the outputs, the cache saves the clock."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparselth import clock, sparse
from sparselth.check import check
from sparselth.engine.dense import init_weights
from sparselth.kernels import _choose, _graphs, _native
from sparselth.kernels.csr_tiled import TiledCsr
from sparselth.kernels.step_parts import Call
from sparselth.measure.floors import precision
from sparselth.models import MODELS
from sparselth.models.torch import sequential
from sparselth.sparse.device import Device
from sparselth.sparse.forms import FORMS, Formed

timing = importlib.import_module("sparselth.sparse.times")
converting = importlib.import_module("sparselth.sparse.convert")
csr, slots = (importlib.import_module(f"sparselth.sparse.forms.{name}") for name in ("csr", "slots"))
Timer = Callable[[Mapping[str, Call], Any], Any]
NATIVE = "csr_tiled", "sparse_conv2d", "native"  # the last is a network of ours


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparselth" / "convert.json"


def times(found: Mapping[str, float], steady: bool = True) -> Any:
    result = timing.Times(found)
    result.spread = 1.0 if steady else 2 * timing.SPREAD
    return result


def prefer(*names: str) -> Timer:
    """A clock by which candidates and networks of these names are fast, and all others slow."""

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        for call in calls.values():
            call()
        plain = {name: re.sub(" [0-9a-f]{16}$", "", name) for name in calls}  # networks have fingerprints
        return times({name: 1e-6 if plain[name] in names else 1e-2 for name in calls})

    return timer


def lenet_300_100() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(nn.Flatten(), *layers).eval(), (1, 28, 28)


def lenet_5() -> tuple[nn.Sequential, tuple[int, ...]]:
    features = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.AvgPool2d(2)),
    )
    head = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Dropout(), nn.Linear(120, 84), nn.ReLU())
    return nn.Sequential(features, nn.Flatten(), head, nn.Linear(84, 10)).eval(), (1, 28, 28)


def conv_2() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = (nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 8 * 8, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*layers, *head).eval(), (3, 16, 16)


def pools() -> tuple[nn.Sequential, tuple[int, ...]]:
    """Convolutions with a ReLU before a pool, behind it, and none; odd sizes; a pool that none takes."""
    layers = (nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 33, 3, padding=2))
    more = (nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(33, 7, 2), nn.MaxPool2d(2), nn.MaxPool2d(2))
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(7, 4)).eval(), (2, 19, 23)


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5, "conv-2": conv_2, "pools": pools}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def random_masks(model: nn.Module, density: float, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=g) < density for name, p in weights(model).items()}


@torch.no_grad()
def dense(model: nn.Sequential, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The masked network's outputs in float64."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, mask in masks.items():
        state[name] *= mask
    outputs: Tensor = torch.func.functional_call(
        model.double(), {k: v.double() for k, v in state.items()}, x.double()
    )
    model.float()
    return outputs


def close(y: Tensor, reference: Tensor) -> None:
    scale = reference.square().mean().sqrt().clamp_min(1e-6)
    assert y.dtype == torch.float32
    assert y.shape == reference.shape
    assert float((y - reference).abs().max() / scale) < 2e-5


@settings(max_examples=40)
@given(st.data())
def test_compaction_is_exact_with_planted_dead_parts(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1 << 16), "seed")
    torch.manual_seed(seed)
    pad = data.draw(st.integers(0, 1), "padding")
    c, f1, f2, hidden = (data.draw(st.integers(1, 6), name) for name in ("c", "f1", "f2", "hidden"))
    pool = data.draw(
        st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1)]), "pool"
    ).eval()
    size = 8
    convs = nn.Sequential(nn.Conv2d(c, f1, 3, padding=pad), nn.ReLU(), pool, nn.Conv2d(f1, f2, 2), nn.ReLU())
    flat = convs(torch.zeros(1, c, size, size))[0].numel()
    bias = data.draw(st.booleans(), "bias")
    model = nn.Sequential(
        convs, nn.Flatten(), nn.Linear(flat, hidden, bias), nn.ReLU(), nn.Linear(hidden, 3, bias)
    ).eval()
    masks = random_masks(model, data.draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]), "density"), seed)
    for name, mask in masks.items():
        for axis in (0, 1):
            dead = data.draw(st.sets(st.integers(0, mask.shape[axis] - 1), max_size=3), f"dead {name} {axis}")
            mask.index_fill_(axis, torch.tensor(sorted(dead), dtype=torch.long), False)
    x = torch.randn(3, c, size, size)
    found = sparse.compact(model, masks, x)
    close(found.model(x), dense(model, masks, x))
    assert not any(module.training for module in found.model.modules())


def test_unread_and_constant_units_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(0.5)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights(model).items()}
    masks["0.weight"][1] = False  # a constant
    masks["2.weight"][:, 3] = False  # nobody reads
    masks["2.weight"][2, [0, 2, 4]] = False  # reads the constant alone, and is one
    masks["0.weight"][:, :4] = False  # dead inputs
    x = torch.randn(7, 6)
    found = sparse.compact(model, masks, x)
    assert [(u.name, u.inputs, u.outputs) for u in found.units] == [
        ("0", (6, 2), (5, 3)),
        ("2", (5, 3), (4, 3)),
        ("4", (4, 3), (3, 3)),
    ]
    close(found.model(x), dense(model, masks, x))


@pytest.mark.parametrize(("padding", "mode", "left"), [(1, "zeros", 4), (0, "zeros", 3), (1, "circular", 3)])
def test_a_constant_channel_is_kept_where_the_border_sees_it(padding: int, mode: str, left: int) -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(5, 3, 3, padding=padding, padding_mode=mode)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), second).eval()
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights(model).items()}
    masks["0.weight"][[1, 3]] = False
    with torch.no_grad():
        model[0].bias[1], model[0].bias[3] = 0.7, -0.7  # the second is 0 behind ReLU, border or not
    x = torch.randn(2, 2, 6, 6)
    found = sparse.compact(model, masks, x)
    assert found.units[0].outputs == (5, left)
    close(found.model(x), dense(model, masks, x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("what", ["a dead layer", "one live row", "full", "all dead"])
def test_extreme_masks(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed", "columns"))
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    masks = random_masks(model, 2.0 if what != "all dead" else -1.0)
    second = list(masks)[1]
    if what in ("a dead layer", "one live row"):
        masks[second][:] = False
    if what == "one live row":
        masks[second][-1] = True
    x = torch.randn(4, *shape)
    reference = dense(model, masks, x)
    close(sparse.compact(model, masks, x).model(x), reference)
    close(sparse.convert(model, masks, x)(x), reference)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "fast",
    [
        (*NATIVE, "mixed", "columns", "to columns", "from columns"),
        ("csr_linear", "sparse_conv2d", "mixed", "columns", "to columns", "from columns"),
        ("sparse_conv2d_rows", "mixed"),
        ("CSR", "channels-last", "mixed", "to columns", "from columns", "to channels-last"),
        ("dense columns", "dense"),
        ("original",),
    ],
    ids=lambda fast: fast[0],
)
@pytest.mark.parametrize(("density", "batch"), [(0.05, 64), (0.3, 7), (0.1, 1)])
def test_convert_keeps_the_outputs_whatever_is_chosen(
    name: str, fast: tuple[str, ...], density: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*fast))
    torch.manual_seed(1)
    model, shape = NETWORKS[name]()
    masks = random_masks(model, density)
    converted = sparse.convert(model, masks, torch.randn(batch, *shape))
    if fast[0].startswith("csr_") and _native.LIB is not None:
        wanted = {4: "sparse_conv2d", 2: fast[0]}
        assert all(layer.chosen == wanted[len(layer.shape)] for layer in converted.report.layers)
    if fast[0] == "sparse_conv2d_rows" and _native.LIB is not None:
        images = [layer.chosen for layer in converted.report.layers if len(layer.shape) == 4]
        assert images == ["sparse_conv2d_rows"] * len(images)
    if fast[0] == "CSR":
        assert converted.report.layers[-1].chosen == "CSR"
    for size in (batch, 5):
        x = torch.randn(size, *shape)
        close(converted(x), dense(model, masks, x))
    first = converted(x)
    again = first.clone()
    converted(torch.randn(size, *shape))
    assert torch.equal(first, again)  # outputs are in memory of their own


@pytest.mark.parametrize("fast", [NATIVE, ("CSR", "sparse_conv2d_rows"), ("channels-last", "dense columns")])
@pytest.mark.parametrize("images", [False, True])
def test_dead_inputs_are_picked_out_for_dense_forms_alone(
    fast: tuple[str, ...], images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = "to columns", "from columns", "to channels-last", "from channels-last"
    monkeypatch.setattr(timing, "seconds", prefer(*fast, *moves, "mixed"))
    torch.manual_seed(0)
    first = nn.Conv2d(9, 4, 3, padding=1) if images else nn.Linear(9, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25 if images else 4, 3)).eval()
    masks = random_masks(model, 2.0)
    masks["0.weight"][:, 2:7] = False
    x = torch.randn(6, *((9, 5, 5) if images else (9,)))
    converted = sparse.convert(model, masks, x)
    assert converted.report.units[0].inputs == (9, 4)
    assert [form.place.name for form in converted.plan] == ["0", "2", "3"]
    assert converted.plan[0].place.before == tuple(x.shape[1:])
    if _native.LIB is not None or fast != NATIVE:
        assert converted.report.layers[0].chosen in fast
    close(converted(x), dense(model, masks, x))


@pytest.mark.parametrize("fast", [NATIVE, ("csr_linear", "sparse_conv2d_rows"), ("CSR", "channels-last")])
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].is_chain])
def test_every_model_of_ours(name: str, fast: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    moves = "columns", "to columns", "from columns", "to channels-last", "from channels-last"
    monkeypatch.setattr(timing, "seconds", prefer(*fast, *moves, "mixed"))
    model = MODELS[name]
    net = sequential(model, init_weights(model, torch.Generator().manual_seed(0))).requires_grad_(False)
    masks = random_masks(net, 0.1)
    x = torch.randn(2, *model.input, generator=torch.Generator().manual_seed(1))
    converted = sparse.convert(net, masks, x)
    if _native.LIB is not None:
        assert {layer.chosen for layer in converted.report.layers} <= {*fast}
    close(converted(x), dense(net, masks, x))


def test_a_network_with_shortcuts_is_refused() -> None:
    model = MODELS["resnet20"]
    net = sequential(model, init_weights(model, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="Graph"):
        sparse.convert(net, None, torch.randn(2, *model.input))


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
def test_a_convolution_takes_the_pool_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed", "columns"))
    torch.manual_seed(0)
    model, shape = pools()
    converted = sparse.convert(model, random_masks(model, 0.5), torch.randn(20, *shape), compact=False)
    assert [form.place.name for form in converted.plan] == ["0", "3", "6", "8", "9", "10"]
    assert [form.place.after for form in converted.plan][:3] == [(5, 9, 11), (33, 5, 6), (7, 2, 2)]


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


def test_times_among_other_programs_are_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        asked.extend(calls)
        return times({name: 1e-3 / len(asked) for name in calls}, steady=False)

    monkeypatch.setattr(timing, "seconds", timer)
    model, shape = lenet_300_100()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    sparse.convert(model, masks, x)
    assert {entry["spread"] for entry in json.loads(cache.read_text()).values()} == {2 * timing.SPREAD}
    before = len(asked)
    sparse.convert(model, masks, x)
    assert len(asked) == 2 * before  # and by the next conversion too


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


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
@pytest.mark.parametrize("by", [1.001, math.nan])
def test_a_wrong_network_is_never_chosen(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though every layer of it has passed its check, and it is the fastest of all."""
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed"))
    model, shape = lenet_300_100()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    assert sparse.convert(model, masks, x).report.chosen == "mixed"
    right = converting.network

    def network(plan: list[Formed]) -> Callable[[Tensor], Tensor]:
        run = right(plan)
        return (lambda x: by * run(x)) if any(form.kind == "ours" for form in plan) else run

    monkeypatch.setattr(converting, "network", network)
    converted = sparse.convert(model, masks, x)
    assert {layer.chosen for layer in converted.report.layers} == {"dense"}
    assert converted.report.checks["mixed"].fault
    assert "(wrong by" in sparse.explain(converted)
    close(converted(x), dense(model, masks, x))


@pytest.mark.parametrize("block", [16, 64])
def test_block_pruned_weights_have_a_candidate(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("block_linear", "mixed"))
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 130)).eval()
    live = {"0.weight": torch.rand(13, 19) < 0.2, "2.weight": torch.rand(9, 13) < 0.2}
    live = live if block == 16 else {"0.weight": torch.eye(4, 5).bool(), "2.weight": torch.eye(3, 4).bool()}
    spread = {name: b.repeat_interleave(block, 0).repeat_interleave(block, 1) for name, b in live.items()}
    masks = {name: spread[name][: w.shape[0], : w.shape[1]] for name, w in weights(model).items()}
    for batch in (1, 33):
        x = torch.randn(batch, 300)
        converted = sparse.convert(model, masks, x, compact=False)
        assert {layer.chosen for layer in converted.report.layers} == {"block_linear"}
        close(converted(x), dense(model, masks, x))
    random = sparse.convert(model, random_masks(model, 0.1), x)
    assert all("block_linear" not in layer.times for layer in random.report.layers)


def test_block_pruned_filters_have_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of channels at one tap, in images of any layout, with a pool behind."""
    monkeypatch.setattr(
        timing, "seconds", prefer("block_conv2d", "mixed", "to channels-last", "from channels-last")
    )
    torch.manual_seed(2)
    first, second = nn.Conv2d(40, 33, 3, 2, 1), nn.Conv2d(33, 50, (3, 2), padding=(0, 1), dilation=(1, 2))
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second).eval()
    masks = {}
    for name, w in weights(model).items():
        live = torch.rand(-(-w.shape[0] // 16), -(-w.shape[1] // 16), *w.shape[2:]) < 0.2
        masks[name] = live.repeat_interleave(16, 0).repeat_interleave(16, 1)[: w.shape[0], : w.shape[1]]
    for batch in (1, 5):
        x = torch.randn(batch, 40, 13, 14)
        converted = sparse.convert(model, masks, x, compact=False)
        chosen = [layer.chosen for layer in converted.report.layers if "block_conv2d" in layer.times]
        assert chosen == ["block_conv2d", "block_conv2d"]
        close(converted(x), dense(model, masks, x))
    random = sparse.convert(model, random_masks(model, 0.1), x)
    assert all("block_conv2d" not in layer.times for layer in random.report.layers)
    second.padding_mode = "circular"
    circular = sparse.convert(model, masks, x, compact=False)
    close(circular(x), dense(model, masks, x))
    assert sum("block_conv2d" in layer.times for layer in circular.report.layers) == 1


def test_nan_reaches_what_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed", "columns"))
    model, shape = lenet_300_100()
    x = torch.randn(5, *shape)
    converted = sparse.convert(model, random_masks(model, 0.2), x)
    x[2] = math.nan
    assert converted(x).isnan().all(1).tolist() == [False, False, True, False, False]


def test_dense_weights_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("CSR", *NATIVE, "mixed", "to columns", "from columns"))
    model = nn.Sequential(nn.Linear(211, 317), nn.ReLU(), nn.Linear(317, 10)).eval()
    converted = sparse.convert(model, random_masks(model, 0.2), torch.randn(5, 211), compact=False)
    del model
    gc.collect()
    shapes = [
        tuple(t.shape) for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and not t.is_sparse_csr
    ]
    assert (317, 211) not in shapes
    assert len(converted(torch.randn(2, 211))) == 2


def test_misuse_is_one_line() -> None:
    model, shape = lenet_300_100()
    x = torch.randn(2, *shape)
    mask = torch.ones(300, 784, dtype=torch.bool)
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)).eval()
    cases: list[tuple[str, nn.Module, dict[str, Tensor], Tensor]] = [
        ("masks: expected names among 1.weight, 3.weight", model, {"fc.weight": mask}, x),
        (r"masks\['1.weight'\]: expected bool \[300, 784\]", model, {"1.weight": mask.t()}, x),
        (r"masks\['1.weight'\]: expected bool", model, {"1.weight": mask.float()}, x),
        ("expected evaluation mode", nn.Sequential(nn.Linear(3, 2)), {}, torch.randn(1, 3)),
        ("expected a torch.nn.Sequential, got Linear", nn.Linear(3, 2).eval(), {}, torch.randn(1, 3)),
        ("layer '0': expected one of Linear, Conv2d", nn.Sequential(nn.Tanh()).eval(), {}, x),
        (r"Linear expected \[784\] inputs, got \[9\]", model, {}, torch.randn(2, 9)),
        ("expected groups=1, got 2", conv, {}, torch.randn(1, 4, 5, 5)),
        ("expected a batch in fp32", model, {}, x.double()),
        ("expected a batch in fp32", model, {}, x[:0]),
        ("expected finite numbers", model, {}, x * math.nan),
    ]
    for message, network, masks, example in cases:
        with pytest.raises(ValueError, match=message) as caught:
            sparse.convert(network, masks, example)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_converted_network_is_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed"))
    model, shape = lenet_300_100()
    x = torch.randn(2, *shape)
    converted = sparse.convert(model, None, x)
    assert not converted(x).requires_grad
    assert converted(x[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match="expected an input without gradient"):
        converted(x.requires_grad_())
    with torch.no_grad():
        converted(x)
    with pytest.raises(ValueError, match="expected inference"):
        converted.train()
    with pytest.raises(ValueError, match=r"expected fp32 \[B, 1, 28, 28\]"):
        converted(torch.randn(2, 784))
    assert converted.eval() is converted


def test_without_native_kernels(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import torch; from torch import nn; from sparselth import sparse;"
        "m = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval();"
        "x = torch.randn(3, 2, 6, 6); c = sparse.convert(m, None, x);"
        "assert torch.allclose(c(x), m(x), atol=1e-5); print(sparse.explain(c))"
    )
    settings = environment | {"SPARSELTH_NATIVE": "off", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "native kernels: off by SPARSELTH_NATIVE" in done.stdout
    assert "CSR" in done.stdout
    assert "Warning" not in done.stderr


# What CUDA has, in Triton's interpreter on a CPU: tiny layers, one by one the fastest


MOVES = "mixed", "to turned", "from turned"
NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NoWait(TorchDispatchMode):
    """Raises where an operator's shapes or values would have to come from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        waits = "_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "equal"
        assert name not in waits, name
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as index"
        return func(*args, **(kwargs or {}))


def tiny(dtype: torch.dtype, block: int | None = None) -> nn.Sequential:
    """Two layers with 20 % of their weights, or with a quarter of their blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        for weight in weights(model).values():
            n, k = weight.shape
            kept = torch.rand(n, k) < 0.2
            if block:
                down, across = (torch.arange(size) // block for size in (n, k))
                kept = (down[:, None] == across) & (across < k // block // 2) & (torch.rand(n, k) < 0.9)
            weight.mul_(kept)
    return model.to(dtype)


def like_torch(model: nn.Sequential, converted: sparse.Converted, x: Tensor) -> None:
    """As near to float64 as three times torch's own network in the same dtype, or some roundings."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        own, y = model(x), converted(x)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert y.is_contiguous()
    (numbers,) = (name for name, dtype in NUMBERS.items() if dtype == x.dtype)
    terms = max(p[0].numel() for p in model.parameters() if p.dim() > 1)
    assert not check(y, exact, numbers, terms=terms, own=own).fault


def test_waiting_is_noticed() -> None:
    x = torch.ones(3)
    for wait in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.int().repeat_interleave(x.int())):
        with pytest.raises(AssertionError), NoWait():
            wait()


@pytest.mark.parametrize(
    ("candidate", "numbers"),
    [
        *[("csr_lanes", numbers) for numbers in NUMBERS],
        *[("block_linear", numbers) for numbers in NUMBERS],
        *[(name, numbers) for name in ("slot_linear", "two_four_linear") for numbers in ("bf16", "fp16")],
    ],
)
def test_every_candidate_of_cuda(candidate: str, numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(candidate, *MOVES))
    dtype = NUMBERS[numbers]
    model = tiny(dtype, block=16 if candidate == "block_linear" else None)
    converted = sparse.convert(model, None, torch.randn(3, 64).to(dtype), compact=False, kernels="triton")
    report = converted.report
    assert not report.left_out
    first = report.layers[0]
    assert {"dense", candidate} <= {*first.times}
    assert first.chosen == candidate
    assert ("slot_linear" in first.times) == ("two_four_linear" in first.times) == (numbers != "fp32")
    assert not any(found.fault for found in first.checks.values())
    assert report.chosen == "mixed"
    assert sparse.weight_bytes(converted) == sum(layer.bytes for layer in report.layers)
    for batch in (3, 1):
        x = torch.randn(batch, 64).to(dtype)
        if candidate != "two_four_linear":  # on a CPU its reference unpacks the weights
            with NoWait(), torch.no_grad():
                converted(x)
        like_torch(model, converted, x)
    assert converted(x[:0]).dtype == dtype


def test_large_batches_have_fewer_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("dense"))
    model = nn.Sequential(nn.Linear(8, 4)).eval().bfloat16()
    for batch, names in ((16, {"csr_lanes", "slot_linear"}), (17, {"slot_linear"}), (129, set())):
        x = torch.randn(batch, 8).bfloat16()
        layer = sparse.convert(model, None, x, compact=False, kernels="triton").report.layers[0]
        assert {*layer.times} == {"dense"} | names


@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
def test_convolutions_and_views_as_on_cuda(numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[str, ...]] = {}
    fast = prefer("channels-last", "csr_lanes", *MOVES, "to channels-last", "from channels-last")

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        asked[str(len(asked))] = tuple(calls)
        return fast(calls, sample)

    monkeypatch.setattr(timing, "seconds", timer)
    torch.manual_seed(0)
    dtype = NUMBERS[numbers]
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, bias=False)
    head = nn.Flatten(), nn.ReLU(), nn.Linear(16, 5)
    model = nn.Sequential(*layers, *head).eval().to(dtype)
    x = torch.randn(1, 1, 6, 6).to(dtype)
    masks = random_masks(model, 0.7)
    with torch.no_grad():
        for name, weight in weights(model).items():
            weight.mul_(masks[name])
    converted = sparse.convert(model, None, x, kernels="triton")
    assert [layer.chosen for layer in converted.report.layers] == ["channels-last"] * 2 + ["csr_lanes"]
    # behind each convolution; one image of one channel lies either way, and one flat image turned or not
    assert [names for names in asked.values() if names[0].startswith("to")] == [
        ("to channels-last", "from channels-last")
    ] * 2
    for batch in (1, 5):
        like_torch(model, converted, torch.randn(batch, 1, 6, 6).to(dtype))


def test_a_wrong_kernel_of_cuda_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slots.slot_linear
    monkeypatch.setattr(slots, "slot_linear", lambda *a: right(*a) * 1.02)
    monkeypatch.setattr(timing, "seconds", prefer("slot_linear", "mixed", "triton"))
    model, x = tiny(torch.bfloat16), torch.randn(3, 64).bfloat16()
    converted = sparse.convert(model, None, x, kernels="triton")
    assert "slot_linear" not in {layer.chosen for layer in converted.report.layers}
    assert "slot_linear 1 us (wrong by 2e-02, not taken)" in sparse.explain(converted)
    like_torch(model, converted, x)


def test_what_a_gpu_cannot_do_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*a: object) -> None:
        raise RuntimeError("no such library\nand much more")

    monkeypatch.setattr(slots, "two_four_linear", refuse)
    monkeypatch.setattr(timing, "seconds", prefer("two_four_linear"))
    x = torch.randn(17, 64).bfloat16()
    converted = sparse.convert(tiny(torch.bfloat16), None, x, compact=False, kernels="triton")
    assert converted.report.left_out == {"0 two_four_linear": "no such library"}
    assert "two_four_linear" not in converted.report.layers[0].times
    assert "no candidate: 0 two_four_linear: no such library" in sparse.explain(converted).splitlines()
    monkeypatch.setitem(FORMS.things, "dense", replace(FORMS["dense"], make=refuse))
    with pytest.raises(RuntimeError, match="no such library"):
        sparse.convert(tiny(torch.bfloat16), None, x, kernels="triton")


def test_times_depend_on_device_dtype_and_precision(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H200", "NVIDIA H100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: names[at.index])
    keys = [
        Device(torch.device("cuda", place), dtype, "auto").key
        for place in (0, 1)
        for dtype in NUMBERS.values()
    ]
    with precision("tf32"):
        keys.append(Device(torch.device("cuda", 0), torch.float32, "auto").key)
    keys.append(Device(torch.device("cpu"), torch.float32, "auto").key)
    keys.append(Device(torch.device("cpu"), torch.float32, "triton").key)
    assert len({*keys}) == len(keys) == 9
    assert keys[1].startswith("NVIDIA H200, bf16, Triton ")
    assert keys[6].startswith("NVIDIA H200, fp32, products tf32, convolutions tf32, Triton ")

    asked: list[str] = []

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        asked.extend(calls)
        return times(dict.fromkeys(calls, 1e-3))

    monkeypatch.setattr(timing, "seconds", timer)
    for dtype, new in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)):
        asked.clear()
        model = nn.Sequential(nn.Linear(4, 4)).eval().to(dtype)
        sparse.convert(model, None, torch.randn(17, 4).to(dtype), kernels="triton")
        assert bool(asked) == new
    assert "bf16" in cache.read_text()


def test_layers_are_timed_cold_and_networks_warm_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = torch.zeros(4)
    monkeypatch.setattr(clock, "scratch", lambda: scratch)
    monkeypatch.setattr(clock, "cold", lambda call, scratch: ("cold", call, scratch))
    cuda, cpu = (Device(torch.device(name), torch.float32, "auto") for name in ("cuda", "cpu"))
    made: Any = cuda.layer_clock()(print)
    assert made == ("cold", print, scratch)
    assert cuda.network_clock() is clock.warm
    assert cpu.layer_clock() is cpu.network_clock() is clock.warm_wall


def test_what_a_graph_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA: everything is captured once, but for views; nobody asks what is not there."""
    capturing, captured = [False], [0]

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        capturing[0], captured[0] = True, captured[0] + 1
        yield
        capturing[0] = False

    def waits(*a: Any) -> Tensor:
        if capturing[0]:
            capturing[0] = False
            raise RuntimeError("operation not permitted when stream is capturing")
        return right(*a)

    samples: list[str] = []

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        samples.extend(f"{sample(call)} {name.split()[0]}" for name, call in calls.items())
        return fast(calls, sample)

    right, fast = csr.csr_lanes, prefer("csr_lanes", "dense", *MOVES)
    for name in ("CUDAGraph", "current_stream", "current_device", "synchronize", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", MagicMock())
    for name in ("side", "_end"):
        monkeypatch.setattr(_graphs, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (7, 5))
    monkeypatch.setattr(clock, "scratch", lambda: torch.zeros(1))
    monkeypatch.setattr(clock, "cold", lambda call, scratch: "cold")
    monkeypatch.setattr(clock, "warm", lambda call: "warm")
    monkeypatch.setattr(Device, "cuda", True)
    monkeypatch.setattr(csr, "csr_lanes", waits)
    monkeypatch.setattr(timing, "seconds", timer)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32)).eval().bfloat16()
    converted = sparse.convert(model, None, torch.randn(3, 1, 8, 8).bfloat16(), kernels="triton")
    assert converted.report.device == "NVIDIA H200, bf16"
    assert converted.report.left_out == {"1 csr_lanes": "operation not permitted when stream is capturing"}
    assert {*converted.report.layers[0].times} == {"dense", "slot_linear"}  # and no sparse tensor cores
    torch.cuda.set_stream.assert_called_once_with(torch.cuda.current_stream())  # type: ignore[attr-defined]
    assert captured[0] == 3  # dense, csr_lanes, slot_linear; the flat image is a view
    assert {"cold dense", "cold slot_linear", "warm dense", "warm triton"} <= {*samples}


def test_misuse_of_devices_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(torch.bfloat16), torch.randn(2, 64)
    cases: list[tuple[str, Tensor, str]] = [
        (
            "example: expected a batch in fp32 on a CPU, got torch.bfloat16; bf16 and",
            x.bfloat16(),
            "auto",
        ),
        ("layer '0': expected torch.float32 on cpu like the example, got torch.bfloat16", x, "auto"),
        ('kernels: expected "auto" or "triton", got \'reference\'', x, "reference"),
        ("example: expected a batch in fp32, bf16 or fp16", x.double(), "triton"),
    ]
    for message, example, kernels in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            sparse.convert(model, None, example, kernels=kernels)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(timing, "seconds", prefer("dense"))
    converted = sparse.convert(model, None, x.bfloat16(), kernels="triton")
    with pytest.raises(ValueError, match=r"expected bf16 \[B, 64\] on cpu, got torch.float32 \[2, 64\]"):
        converted(x)
    monkeypatch.setattr(_choose, "INTERPRET", False)
    with pytest.raises(ValueError, match="needs TRITON_INTERPRET=1"):
        sparse.convert(model, None, x.bfloat16(), kernels="triton")


def test_fp32_of_cuda_may_be_tf32() -> None:
    linear, conv = nn.Linear(1, 1), nn.Conv2d(1, 1, 1)
    fp32, bf16 = (Device(torch.device("cuda"), NUMBERS[name], "auto") for name in ("fp32", "bf16"))
    with precision("fp32"):
        assert fp32.precision(linear) == fp32.precision(conv) == "fp32"
        with precision("tf32"):
            assert fp32.precision(linear) == fp32.precision(conv) == "tf32"
            assert Device(torch.device("cpu"), torch.float32, "auto").precision(linear) == "fp32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # as torch has it by default
        assert (fp32.precision(linear), fp32.precision(conv)) == ("fp32", "tf32")
        assert fp32.precision(nn.ReLU()) == "fp32"
    assert bf16.precision(linear) == "bf16"
