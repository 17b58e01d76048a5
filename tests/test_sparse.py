"""Compaction is exact, conversion keeps the outputs, the cache saves the clock."""

from __future__ import annotations

import gc
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparselth import sparse
from sparselth.kernels import _native
from sparselth.kernels.csr_packed import Packed
from sparselth.kernels.step_parts import Call

timing = importlib.import_module("sparselth.sparse.times")
Timer = Callable[[Mapping[str, Call]], Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparselth" / "convert.json"


def times(found: Mapping[str, float], steady: bool = True) -> Any:
    result = timing.Times(found)
    result.steady = steady
    return result


def prefer(*names: str) -> Timer:
    """A clock by which candidates and networks of these names are fast, and all others slow."""

    def timer(calls: Mapping[str, Call]) -> Any:
        for call in calls.values():
            call()
        return times({name: 1e-6 if name.split()[0] in names or name in names else 1e-2 for name in calls})

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
    monkeypatch.setattr(timing, "seconds", prefer("native", "mixed", "columns"))
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
        ("native", "mixed", "columns", "to columns", "from columns"),
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
    if fast[0] == "native" and _native.LIB is not None:
        assert {layer.chosen for layer in converted.report.layers} == {"native"}
    if fast[0] == "CSR":
        assert converted.report.layers[-1].chosen == "CSR"
    for size in (batch, 5):
        x = torch.randn(size, *shape)
        close(converted(x), dense(model, masks, x))
    first = converted(x)
    again = first.clone()
    converted(torch.randn(size, *shape))
    assert torch.equal(first, again)  # outputs are in memory of their own


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
def test_a_convolution_takes_the_pool_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("native", "mixed", "columns"))
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

    def timer(calls: Mapping[str, Call]) -> Any:
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


def test_times_among_other_programs_are_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def timer(calls: Mapping[str, Call]) -> Any:
        asked.extend(calls)
        return times({name: 1e-3 / len(asked) for name in calls}, steady=False)

    monkeypatch.setattr(timing, "seconds", timer)
    model, shape = lenet_300_100()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    sparse.convert(model, masks, x)
    assert not cache.exists()
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
    def timer(calls: Mapping[str, Call]) -> Any:
        return times({name: 0.98 if name.split()[0] in ("native", "mixed") else 1.0 for name in calls})

    monkeypatch.setattr(timing, "seconds", timer)
    model, shape = lenet_300_100()
    converted = sparse.convert(model, random_masks(model, 0.1), torch.randn(8, *shape))
    assert {layer.chosen for layer in converted.report.layers} == {"dense"}
    assert all(math.isinf(layer.pays_after) for layer in converted.report.layers)


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
def test_a_wrong_candidate_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = importlib.import_module("sparselth.sparse.formats")
    right = formats.bind_csr_packed

    def wrong(packed: Packed, *rest: object) -> Call:
        call: Call = right(replace(packed, values=1.01 * packed.values), *rest)
        return call

    monkeypatch.setattr(formats, "bind_csr_packed", wrong)
    monkeypatch.setattr(timing, "seconds", prefer("native", "mixed"))
    model, shape = lenet_300_100()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    converted = sparse.convert(model, masks, x)
    assert "native" not in {layer.chosen for layer in converted.report.layers}
    assert "(wrong by" in sparse.explain(converted)
    close(converted(x), dense(model, masks, x))


@pytest.mark.parametrize("block", [16, 64])
def test_block_pruned_weights_have_a_candidate(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("blocks", "mixed"))
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 130)).eval()
    live = {"0.weight": torch.rand(13, 19) < 0.2, "2.weight": torch.rand(9, 13) < 0.2}
    live = live if block == 16 else {"0.weight": torch.eye(4, 5).bool(), "2.weight": torch.eye(3, 4).bool()}
    spread = {name: b.repeat_interleave(block, 0).repeat_interleave(block, 1) for name, b in live.items()}
    masks = {name: spread[name][: w.shape[0], : w.shape[1]] for name, w in weights(model).items()}
    for batch in (1, 33):
        x = torch.randn(batch, 300)
        converted = sparse.convert(model, masks, x, compact=False)
        assert {layer.chosen for layer in converted.report.layers} == {"blocks"}
        close(converted(x), dense(model, masks, x))
    random = sparse.convert(model, random_masks(model, 0.1), x)
    assert all("blocks" not in layer.times for layer in random.report.layers)


def test_nan_reaches_what_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("native", "mixed", "columns"))
    model, shape = lenet_300_100()
    x = torch.randn(5, *shape)
    converted = sparse.convert(model, random_masks(model, 0.2), x)
    x[2] = math.nan
    assert converted(x).isnan().all(1).tolist() == [False, False, True, False, False]


def test_dense_weights_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer("CSR", "native", "mixed", "to columns", "from columns"))
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
    monkeypatch.setattr(timing, "seconds", prefer("native", "mixed"))
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
