"""Conversion keeps the outputs, whatever is chosen."""

from __future__ import annotations

import gc
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions import (
    NATIVE,
    NETWORKS,
    close,
    dense,
    lenet_300_100,
    pools,
    prefer,
    random_masks,
    times,
    timing,
    weights,
)
from sparselth import sparse
from sparselth.check import check
from sparselth.engine.dense import init_weights
from sparselth.kernels import _native
from sparselth.kernels.step_parts import Call
from sparselth.models import MODELS
from sparselth.models.torch import sequential
from sparselth.sparse.compaction import Part
from sparselth.sparse.device import Device
from sparselth.sparse.forms import FORMS, Formed, Stage
from sparselth.sparse.segment import Segment

choosing = importlib.import_module("sparselth.sparse.choice")


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


WAYS = [
    (*NATIVE, "mixed", "columns", "to columns", "from columns"),
    ("csr_linear", "sparse_conv2d", "mixed", "columns", "to columns", "from columns"),
    ("sparse_conv2d_rows", "mixed"),
    ("CSR", "channels-last", "mixed", "to columns", "from columns", "to channels-last"),
    ("dense columns", "dense"),
    ("original",),
]
SIZES = [(0.05, 64), (0.3, 7), (0.1, 1)]  # density and batch; every network and every way meets each of them


@pytest.mark.parametrize(
    ("name", "fast", "density", "batch"),
    [
        (name, fast, *SIZES[(i + j) % len(SIZES)])
        for i, name in enumerate(NETWORKS)
        for j, fast in enumerate(WAYS)
    ],
    ids=[f"{name}-{fast[0]}" for name in NETWORKS for fast in WAYS],
)
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
# conv8 has the layers of conv6, vgg16 those of vgg19
@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n].is_chain and n not in ("conv8", "vgg16")])
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


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
def test_a_convolution_takes_the_pool_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed", "columns"))
    torch.manual_seed(0)
    model, shape = pools()
    converted = sparse.convert(model, random_masks(model, 0.5), torch.randn(20, *shape), compact=False)
    assert [form.place.name for form in converted.plan] == ["0", "3", "6", "8", "9", "10"]
    assert [form.place.after for form in converted.plan][:3] == [(5, 9, 11), (33, 5, 6), (7, 2, 2)]


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


@pytest.mark.skipif(_native.LIB is None, reason="no native kernels")
@pytest.mark.parametrize("by", [1.001, math.nan])
def test_a_wrong_network_is_never_chosen(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though every layer of it has passed its check, and it is the fastest of all."""
    monkeypatch.setattr(timing, "seconds", prefer(*NATIVE, "mixed"))
    model, shape = lenet_300_100()
    masks, x = random_masks(model, 0.1), torch.randn(8, *shape)
    assert sparse.convert(model, masks, x).report.chosen == "mixed"
    right = choosing.network

    def network(plan: list[Formed]) -> Callable[[Tensor], Tensor]:
        run = right(plan)
        return (lambda x: by * run(x)) if any(form.kind == "ours" for form in plan) else run

    monkeypatch.setattr(choosing, "network", network)
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
    cases: list[tuple[str, nn.Module, dict[str, Tensor], Tensor]] = [
        ("mask 'fc.weight': unknown parameter 'fc.weight'", model, {"fc.weight": mask}, x),
        (r"mask of 1.weight: expected a mask bool \[300, 784\]", model, {"1.weight": mask.t()}, x),
        ("mask of 1.weight: expected .* 0s and 1s", model, {"1.weight": 2 * mask}, x),
        ("expected evaluation mode", nn.Sequential(nn.Linear(3, 2)), {}, torch.randn(1, 3)),
        (r"Linear expected \[784\] inputs, got \[9\]", model, {}, torch.randn(2, 9)),
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
    for wrong in (torch.randn(2, 784), torch.randn(2, 1, 28, 29), torch.randn(2, 1, 28, 28).double()):
        with pytest.raises(ValueError, match=r"expected fp32 \[B, 1, 28, 28\]") as caught:
            converted(wrong)
        assert "\n" not in str(caught.value)
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


def test_weights_that_no_longer_fit_a_form_are_loaded_as_dense() -> None:
    draw = torch.Generator().manual_seed(0)
    model = nn.Linear(256, 256).requires_grad_(False)
    blocks = torch.rand(8, 8, generator=draw) < 0.3
    model.weight *= blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    x = torch.randn(5, 256, generator=draw)
    stage = Stage(Part("0", model, (256,), (256,)))
    net = Segment([FORMS["block_linear"].of(stage, Device.of(x), 64)])
    weight = torch.randn(256, 256, generator=draw) * (torch.rand(256, 256, generator=draw) < 0.3)
    bias = torch.randn(256, generator=draw)
    net.load_state_dict({"0.weight": weight, "0.bias": bias})
    check(net(x), nn.functional.linear(x.double(), weight.double(), bias.double()), "fp32", terms=256)
