"""Any network at inference: contenders whose checks can fail; masks, tickets, inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparselth
from sparselth.errors import SparselthError, UsageError
from sparselth.measure import case, contenders, outside
from sparselth.measure.case import Result
from sparselth.measure.contenders import CONTENDERS, Contender, CsrLinear, Field, Ready
from sparselth.measure.nets import Net, net, random_masks, zero
from sparselth.measure.race_modules import bench_module
from sparselth.report import layer_words, network_tables
from sparselth.sparse.reference import Given

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8 * 16, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        return self.head(self.fc((y + self.side(y)).flatten(1)).relu())

def make():
    return Net()

def example(batch):
    return torch.randn(batch, 3, 4, 4)
"""


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiler, no runtimes of others, no tiles, a cache of its own; a file of a network to work on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contenders, "compiled", lambda net: net)
    monkeypatch.setattr(case, "REST", 0.0)
    monkeypatch.setattr(contenders, "has_tiles", lambda: False)

    def need(*packages: str) -> None:
        raise SparselthError(f"{packages[0]} is not installed")

    monkeypatch.setattr(outside, "need", need)
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FILE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(line: str) -> None:
    assert "\n" not in line


def identity(y: Tensor) -> Tensor:
    return y


def only(result: Result, implementation: str) -> dict[str, Any]:
    (row,) = (row for row in result.rows if row["implementation"] == implementation)
    return row


def test_a_network_of_a_file_with_everything_that_is_said_of_it() -> None:
    kept: list[Result] = []
    found = net("net.py:make", 0.75)
    result = bench_module(found, (1, 4), quiet, keep=kept.append)
    json.dumps(result.rows, allow_nan=False)
    assert not result.failed
    assert [len({row["batch"] for row in one.rows}) for one in kept] == [1, 2]
    rows = [row for row in result.rows if row["batch"] == 4]
    names = ["dense", "dense channels-last", "dense compiled", "torch CSR", "sparselth"]
    assert [row["implementation"] for row in rows] == names
    assert all(0 < row["max_rel_error"] < 1e-5 and row["check"] == "passed" for row in rows)
    assert {row["dense_best"] for row in rows} < {*names[:3]}  # CSR is no dense rival
    weights = 8 * 27 + 64 + 40 * 128 + 200
    dense = 4 * (weights + 8 + 8 + 40 + 5 + 4 * 8) + 8  # biases, the norm, and how many batches it saw
    assert {row["dense_weight_bytes"] for row in rows} == {dense}
    ours, csr = rows[-1], rows[-2]
    assert csr["weight_bytes"] < dense
    assert rows[0]["weight_bytes"] == dense
    assert rows[0]["file_bytes"] > dense > ours["file_bytes"] > weights // 4 * 4
    assert [row["sparsity"] for row in rows] == [0, 0, 0, 0.75, 0.75]
    layers = result.facts["layers"]
    assert {layer["layer"] for layer in layers} == {"stem", "side", "fc", "head"}
    said = " ".join(network_tables.report(result, "here").split())
    assert "net.py:make, random mask, 25 % of the weights" in said
    assert "of 4 layers compute with kept weights alone" in said
    assert "onnxruntime is not among the rivals: onnxruntime is not installed" in said
    assert "deepsparse reached its end of life" in said


def test_who_is_wrong_is_nobodys_best_even_on_fresh_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(field: Field) -> Ready:
        return Ready(lambda given: lambda: field.net(*given.tensors) * (1 + 1e-4), (field.net.weight,))

    def remembers(field: Field) -> Ready:
        y = field.net(*field.given.tensors)
        return Ready(lambda given: lambda: y, (field.net.weight,))

    def at_once(field: Field) -> Ready:
        return Ready(lambda given: partial(identity, field.net(*given.tensors)), (field.net.weight,))

    more = (
        Contender("off", "dense", off),
        Contender("remembers", "dense", remembers),
        Contender("at once", "sparse", at_once),
    )
    monkeypatch.setattr(contenders, "CONTENDERS", (*more, *CONTENDERS))
    layer = nn.Linear(64, 64)
    masks = random_masks({"weight": (64, 64)}, 0.5)
    zero(layer, masks)
    made = Net("layer", layer.eval(), masks, lambda batch: torch.randn(batch, 64))
    result = bench_module(made, (3,), quiet)
    assert result.failed
    assert [row["implementation"] for row in result.rows if row["check"] == "failed"] == ["off", "remembers"]
    assert only(result, "off")["max_rel_error"] == pytest.approx(1e-4, rel=0.1)
    assert only(result, "at once")["speedup"] > 1  # and yet it is no dense rival
    assert {row["dense_best"] for row in result.rows} <= {"dense", "dense compiled"}
    said = " ".join(network_tables.report(result, "here").split())
    assert "CHECK FAILED: remembers at batch 3" in said


@pytest.mark.parametrize("tiles", [True, False])
def test_dense_in_bf16_is_raced_where_a_cpu_has_tiles_and_is_nobodys_best(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "has_tiles", lambda: tiles)

    def fastest(field: Field) -> Ready:
        made = contenders._bf16(field)
        whole = sum(t.numel() * t.element_size() for t in field.net.state_dict().values())
        assert made.file_bytes == pytest.approx(whole / 2, abs=8)  # counts of batches stay integers
        y = made.bind(field.given)()
        return Ready(
            lambda given: lambda: y if given is field.given else field.net(*given.tensors).bfloat16()
        )

    more = [replace(one, make=fastest) if one.name == "dense bf16" else one for one in CONTENDERS]
    monkeypatch.setattr(contenders, "CONTENDERS", more)
    result = bench_module(net("net.py:make", 0.75), (2,), quiet)
    assert not result.failed
    said = " ".join(network_tables.report(result, "here").split())
    rows = [row for row in result.rows if row["dtype"] == "bf16"]
    assert bool(rows) == tiles == ("In bf16, for which this CPU has tiles (AMX), dense bf16 takes" in said)
    if tiles:
        (row,) = rows
        assert row["speedup"] > 1
        assert row["dense_best"] in ("dense", "dense channels-last", "dense compiled")
        assert row["sparsity"] == 0
        assert 1e-4 < row["max_rel_error"] < 0.05
        assert row["check"] == "passed"
        assert "openvino bf16 is not among the rivals: openvino is not installed" in said


def test_masks_keep_an_exact_share_of_each_tensor() -> None:
    masks = random_masks({"a": (7, 9), "b": (3,), "c": (40, 5, 3, 3)}, 0.9)
    assert [int(m.sum()) for m in masks.values()] == [6, 1, 180]
    again = random_masks({"a": (7, 9), "b": (3,), "c": (40, 5, 3, 3)}, 0.9)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    found = net("net.py:make", 0.9)
    for name, mask in found.masks.items():
        weight = found.module.get_parameter(name)
        assert int((weight != 0).sum()) == int(mask.sum()) == round(0.1 * mask.numel())
    with pytest.raises(UsageError, match="`sparsity` 1: expected"):
        random_masks({"a": (2, 2)}, 1.0)


def test_the_ticket_of_a_module_brings_its_masks_and_its_weights() -> None:
    fresh = net("net.py:make", 0.0).module
    start = sparselth.snapshot(fresh)
    masks = sparselth.prune(fresh, sparsity=0.6)
    sparselth.save_ticket("ticket.safetensors", fresh, masks, start)
    found = net("net.py:make", 0.9, Path("ticket.safetensors"))
    assert found.kept == pytest.approx(0.4, abs=1e-3)
    assert found.what == "ticket of ticket.safetensors"
    for name, mask in masks.items():
        assert torch.equal(found.module.get_parameter(name), start[name] * mask)
    with pytest.raises(UsageError, match="is of a module; name its network"):
        net(None, 0.9, Path("ticket.safetensors"))
    with pytest.raises(SparselthError, match="does not fit the model"):
        net("resnet20", 0.9, Path("ticket.safetensors"))


def test_what_is_wrong_with_a_file_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "no_call.py": FILE.replace("def example(batch):", "example = 3\ndef other(batch):"),
        "raises.py": FILE.replace("torch.randn(batch, 3, 4, 4)", "1 / 0"),
        "misfit.py": FILE.replace("torch.randn(batch, 3, 4, 4)", "torch.randn(batch, 5, 4, 4)"),
        "mute.py": FILE.replace("return self.head(", "return len(x), self.head(").replace(
            ".relu())\n\n", ".relu())[:0].tolist()\n\n"
        ),
    }
    says = {
        "no_call.py": "`example` is a int; expected `example.batch.`",
        "raises.py": "`example.batch.`: ZeroDivisionError",
        "misfit.py": "example: the model cannot compute it",
        "mute.py": "gives no tensor for the example",
    }
    for name, text in wrong.items():
        Path(name).write_text(text)
        with pytest.raises(SparselthError, match=says[name]):
            bench_module(net(f"{name}:make", 0.5), (1,), quiet)
    Path("loss.py").write_text(FILE + "\ndef loss(output, target):\n    return (output - target).sum()\n")
    with pytest.raises(UsageError, match=r"expected `target\(batch\)` beside it"):
        net("loss.py:make", 0.5).objective(2)


def test_inputs_are_the_same_for_a_seed_and_draw_from_no_one_elses_numbers() -> None:
    found = net("net.py:make", 0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = found.given(2), found.given(2), found.given(2, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.tensors[0], same.tensors[0])
    assert not torch.equal(one.tensors[0], other.tensors[0])
    assert net("net.py:make", 0.5, shape=(3, 4, 4)).given(7).tensors[0].shape == (7, 3, 4, 4)


def test_csr_is_a_rival_of_linear_layers() -> None:
    layer = nn.Linear(12, 7).eval()
    layer.weight.data[torch.rand(7, 12) < 0.5] = 0
    x = torch.randn(2, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(CsrLinear(layer)(x), layer(x))
    convolutions = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    masks = random_masks({"0.weight": (4, 2, 3, 3), "2.weight": (2, 4)}, 0.5)
    with pytest.raises(SparselthError, match="most weights are elsewhere"):
        contenders.csr_layers(convolutions, masks)
    assert contenders.csr_layers(convolutions, {"2.weight": masks["2.weight"]}) == ["2"]


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_examples_go_to_convert_as_it_takes_them() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    line = nn.Linear(2, 2)
    assert contenders.example_of(Given.of(line, x)) is x
    two = contenders.example_of(Given.of(Two(), (x, y)))
    assert [*two] == ["x", "y"]
    assert contenders.example_of(Given.of(Two(), {"y": y, "x": x})).keys() == {"x", "y"}


def test_layers_that_are_not_worth_it_are_said_with_their_times() -> None:
    def layer(name: str, dense: bool, ours: float | None, shape: str = "8x8") -> dict[str, Any]:
        best = None if ours is None else "csr_tiled"
        return {
            "layer": name, "shape": shape, "kept": 0.1, "dense": dense, "dense_s": 2e-5,
            "best_sparse": best, "best_sparse_s": ours,
        }  # fmt: skip

    found = [
        layer("a", False, 1e-6),
        layer("b", True, 3e-3),
        layer("c", True, 3e-3),
        layer("d", True, 1e-5, "4x4"),
        layer("e", True, None, "2x2"),
    ]
    assert layer_words.layers(found) == [
        "1 of 5 layers compute with kept weights alone. Not worth it here, so dense:",
        "  b and 1 more, 8x8, 10 % kept: csr_tiled 3 ms, dense 20 us",
        "  d, 4x4, 10 % kept: csr_tiled alone 10 us, dense 20 us; changes of layout eat it up",
        "  e, 2x2, 10 % kept: no sparse form fits it",
    ]
    assert layer_words.layers([]) == []
    assert layer_words.layers(found, "converted") == layer_words.layers(found)
    assert layer_words.layers(found, "original")[0].startswith("Converted, the network as a whole is not")
    assert layer_words.layers(found[:1]) == ["1 of 1 layers compute with kept weights alone."]


def test_runtimes_of_others_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.undo()
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    given = Given.of(module, torch.randn(2, 3, 8, 8))
    exported = outside.Exported(module, given)
    with torch.no_grad():
        found = outside.onnxruntime(exported)
        (y,) = found.bind(given)()
        torch.testing.assert_close(y, module(*given.tensors), rtol=1e-4, atol=1e-5)
        assert found.file_bytes == exported.bytes > 4 * 4 * 27
        assert (found.peak_bytes(given) or 0) > 0


def test_the_table_of_contenders() -> None:
    """Names are unique, ours comes last, as tables take it, and every kind is known."""
    names = [one.name for one in CONTENDERS]
    assert len({*names}) == len(names)
    assert names[-1] == contenders.OURS
    assert {one.kind for one in CONTENDERS} == {"dense", "sparse", "bf16", "ours"}


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Drawing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(())


def lone(module: nn.Module) -> Net:
    masks = random_masks({"weight": (32, 32)}, 0.5)
    zero(module, masks)
    return Net("lone", module.eval(), masks, lambda batch: torch.randn(batch, 32))


def test_where_float64_cannot_be_had_it_is_not_claimed() -> None:
    notes = bench_module(lone(Cast(32, 32)), (2, 3), quiet).notes
    assert sum("cannot compute in float64" in note for note in notes) == 1
    notes = bench_module(lone(nn.Linear(32, 32)), (2,), quiet).notes
    assert not any("float64" in note for note in notes)


def test_a_network_that_cannot_be_converted_or_is_not_fp32_is_a_line() -> None:
    with pytest.raises(
        SparselthError, match=r"`model` lone: the network cannot be converted: .*other outputs"
    ):
        bench_module(lone(Drawing(32, 32)), (2,), quiet)
    Path("wide.py").write_text(FILE.replace("return Net()", "return Net().double()"))
    with pytest.raises(UsageError, match=r"`model` wide.py:make: stem.weight is torch.float64; expected"):
        net("wide.py:make", 0.5)


class Keeping(nn.Module):
    """Makes a buffer in its first call, as converted networks do, and copies without it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __deepcopy__(self, memo: object) -> Keeping:
        return Keeping()

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(torch.ones(1 << 16))
        return x + self.kept[0][0]


def test_buffers_of_the_first_call_are_memory_whoever_called_first() -> None:
    network, x = Keeping(), torch.randn(3, 8)
    network(x)  # as it is raced and checked
    found = Ready(lambda given: partial(network, *given.tensors), (), converted=network).memory(
        Given.of(network, x), "cpu", None
    )
    assert found is not None
    assert found.activations >= 4 << 16


class Choosing(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, (1e4 * y).long()


def test_integers_that_differ_in_bf16_fail_its_row_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "has_tiles", lambda: True)
    result = bench_module(lone(Choosing(32, 32)), (3,), quiet)
    assert only(result, "dense bf16")["check"] == "failed"
    assert [row["implementation"] for row in result.rows if row["check"] == "failed"] == ["dense bf16"]
    assert not result.failed


def test_the_sentence_on_bf16_names_the_faster_one() -> None:
    def row(name: str, dtype: str, seconds: float, check: str = "passed") -> dict[str, Any]:
        error = 2e-7 if dtype == "fp32" else 3e-3
        found = {"implementation": name, "dtype": dtype, "median_s": seconds, "check": check}
        return found | {"max_rel_error": error}

    ours = row("sparselth", "fp32", 4e-3)
    slow, fast = row("dense bf16", "bf16", 6e-3), row("openvino bf16", "bf16", 1e-3)
    assert network_tables._in_bf16([slow, fast, ours]) == [
        "In bf16, for which this CPU has tiles (AMX), openvino bf16 takes 1.000 ms; 4.00 times as fast as "
        "sparselth, in fp32. Off from float64 by 3.0e-03 and 2.0e-07."
    ]
    (said,) = network_tables._in_bf16([slow, ours])
    assert "dense bf16 takes 6.000 ms; sparselth 1.50 times as fast, in fp32." in said
    assert network_tables._in_bf16([ours]) == []
    assert network_tables._in_bf16([row("dense bf16", "bf16", 1e-3, "failed"), ours]) == []
    assert network_tables._in_bf16([fast, row("sparselth", "fp32", 4e-3, "failed")]) == []
