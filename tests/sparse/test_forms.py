"""The table of forms: all of it is right, and one from outside is checked, chosen and raced as ours are."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth import sparse
from sparselth.check import check
from sparselth.errors import UsageError
from sparselth.kernels import _native
from sparselth.measure import rivals
from sparselth.measure.asked import Cell
from sparselth.measure.floors import Anchors
from sparselth.measure.layers import parse
from sparselth.measure.race_layers import Bench
from sparselth.sparse.choice import stages
from sparselth.sparse.compaction import Part, pruned_parts
from sparselth.sparse.device import Device
from sparselth.sparse.forms import FORMS, Form, Made, Stage, fitting, register
from sparselth.sparse.network import bound, network
from sparselth.sparse.programs import Step

timing = importlib.import_module("sparselth.sparse.times")
CPU = Device(torch.device("cpu"), torch.float32, "auto")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradients, a cache of its own, and the table as it was behind each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = dict(FORMS)
    with torch.no_grad():
        yield
    FORMS.things.clear()
    FORMS.things.update(known)


def prefer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A clock by which forms and networks of these names are fast."""

    def seconds(calls: Mapping[str, Callable[[], object]], sample: object) -> object:
        for call in calls.values():
            call()
        return timing.Times({name: 1e-6 if name.split()[0] in names else 1e-2 for name in calls})

    monkeypatch.setattr(timing, "seconds", seconds)


def pruned(module: nn.Module, block: int = 0) -> nn.Module:
    """With 20 % of its weights, one by one or in blocks of channels at one tap."""
    g = torch.Generator().manual_seed(0)
    w = module.weight
    assert isinstance(w, Tensor)
    side = block or 1
    small = torch.rand(-(-len(w) // side), -(-w.shape[1] // side), *w.shape[2:], generator=g) < 0.2
    w.mul_(small.repeat_interleave(side, 0).repeat_interleave(side, 1)[: len(w), : w.shape[1]])
    return module


def examples() -> dict[str, tuple[list[nn.Module], Tensor]]:
    torch.manual_seed(0)
    images = torch.randn(3, 32, 6, 6)
    return {
        "linear": ([pruned(nn.Linear(48, 40)), nn.ReLU()], torch.randn(5, 48)),
        "one image": ([pruned(nn.Linear(48, 40, bias=False))], torch.randn(1, 48)),
        "linear in blocks": ([pruned(nn.Linear(96, 80), 16), nn.ReLU()], torch.randn(5, 96)),
        "conv": ([pruned(nn.Conv2d(32, 9, 3, padding=1)), nn.ReLU(), nn.MaxPool2d(2)], images),
        "conv in blocks": ([pruned(nn.Conv2d(32, 48, 3), 16), nn.ReLU(), nn.MaxPool2d(2)], images),
        "depthwise": ([pruned(nn.Conv2d(32, 32, 3, 2, 1, groups=32)), nn.Hardswish()], images),
        "depthwise in place": ([pruned(nn.Conv2d(32, 32, 5, 1, 2, groups=32)), nn.ReLU6(True)], images),
        "conv and SiLU": ([pruned(nn.Conv2d(32, 48, 3), 16), nn.SiLU()], images),
        "pixels": ([pruned(nn.Conv2d(32, 9, 1)), nn.Sigmoid()], images[:1, :, :1, :1]),
        "pool": ([nn.AvgPool2d(3, 1, 1), nn.ReLU()], images),
        "largest": ([nn.MaxPool2d(3, 2, 1), nn.ReLU()], images),
        "flatten": ([nn.Flatten()], images),
        "vectors": ([nn.Hardswish()], torch.randn(1, 37)),
        "several vectors": ([nn.SiLU()], torch.randn(3, 37)),
    }


def stage_of(modules: list[nn.Module], x: Tensor) -> Stage:
    (stage,) = stages(pruned_parts(nn.Sequential(*modules).eval(), None, x))
    return stage


def test_every_form_of_a_cpu_is_right_alone_and_as_a_network() -> None:
    met = set()
    for modules, x in examples().values():
        stage = stage_of(modules, x)
        exact, _ = stage.double(x)
        found = fitting(stage, CPU, len(x))
        assert found[0].name == "dense"
        for form in found:
            formed = form.of(stage, CPU, len(x))
            call, result = bound(formed, x)
            call()
            for y in (result(), network([formed])(x)):
                assert not check(y, exact, "fp32", terms=stage.terms).fault, form.name
            if stage.product and form.name != "dense":
                assert formed.bytes > 0
                assert (formed.seconds > 0) == (form.kind != "dense")
            met.add(form.name)
    wanted = {"dense", "channels-last", "dense columns", "columns", "maxima"}
    wanted |= {"CSR", "block_linear", "block_conv2d"}
    if _native.LIB is not None:
        wanted |= {"csr_linear", "csr_tiled", "sparse_conv2d", "sparse_conv2d_rows", "depthwise_rows"}
        wanted.add("max_pool_rows")
    assert met == wanted


SIZES = (3, 2, 1), (2, None, 0), ((3, 2), (2, 1), (1, 0)), ((2, 5), 3, (0, 2)), ([3, 3], [2, 2], [1, 1])


@pytest.mark.parametrize("size", [*SIZES, ((3,), (2,), (1,))])
@pytest.mark.parametrize("name", ["maxima", "max_pool_rows"])
def test_maxima_are_those_of_torch_to_the_bit(name: str, size: Any) -> None:
    """NaN and infinity too."""
    pool, x = nn.MaxPool2d(*size), torch.randn(2, 3, 11, 8)
    x[0, 0, 4, 4], x[1, 1, 0, 0], x[1, 2] = torch.nan, torch.inf, -torch.inf
    formed = FORMS[name].of(stage_of([pool], torch.randn_like(x)), CPU, 2)
    y = network([formed])(x)
    torch.testing.assert_close(y, pool(x), rtol=0, atol=0, equal_nan=True)
    assert y.is_contiguous()
    strange = nn.MaxPool2d(3, 2, dilation=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d((1, 3), 1)
    for other in strange:
        assert not FORMS[name].fits(stage_of([other], torch.randn(2, 3, 11, 8)), CPU, 2)


def test_a_device_has_its_own_forms() -> None:
    half = Device(torch.device("cpu"), torch.bfloat16, "triton")  # as CUDA, in Triton's interpreter
    layer = nn.Linear(64, 32).bfloat16()
    names = [form.name for form in fitting(stage_of([layer], torch.zeros(3, 64).bfloat16()), half, 3)]
    assert sorted(names) == ["csr_lanes", "dense", "slot_linear", "two_four_linear"]
    kinds = [FORMS[name].kind for name in names]
    assert kinds == ["dense", "torch", "ours", "ours"]


def no_dead_inputs(stage: Stage, device: Device, batch: int) -> Made:
    """What a stranger would write: the product of the inputs that are read."""
    read = (stage.weight != 0).any(0).nonzero()[:, 0]
    w, bias = stage.weight[:, read].contiguous(), stage.bias
    run = stage.behind(lambda x: F.linear(x[:, read], w, bias))
    return Made(run, 4 * w.numel() + 8 * len(read))


STRANGER = Form(
    "read_inputs", "ours", "rows", lambda stage, device, batch: stage.linear and batch > 1, no_dead_inputs
)


def chosen(converted: sparse.Converted) -> list[str]:
    return [layer.chosen for layer in converted.report.layers]


def test_a_form_from_outside_is_chosen_and_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    register(STRANGER)
    prefer(monkeypatch, "read_inputs", "mixed")
    model = nn.Sequential(pruned(nn.Linear(48, 40)), nn.ReLU(), nn.Linear(40, 7)).eval()
    x = torch.randn(6, 48)
    converted = sparse.convert(model, None, x, compact=False)
    assert chosen(converted) == ["read_inputs"] * 2
    assert not check(converted(x), model.double()(x.double()), "fp32", terms=48).fault
    model.float()
    assert "read_inputs" not in sparse.convert(model, None, x[:1], compact=False).report.layers[0].times

    unlimited = Anchors("cpu", ("fp32",), {1: 1e30}, {"fp32": 1e30})
    few = [rival for rival in rivals.rivals() if rival.name in ("dense eager", "read_inputs")]
    bench = Bench("cpu", unlimited, few, rounds=lambda race: [race.round() for _ in range(5)])
    rows = bench.measure(Cell(parse("32x48"), 4, "fp32", "random", 0.9))
    assert [row["implementation"] for row in rows] == ["dense eager", "read_inputs"]
    assert {row["check"] for row in rows} == {"passed"}


def test_a_wrong_form_and_one_that_raises_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Made:
        made = no_dead_inputs(*given)
        return replace(made, call=lambda x: made.call(x) * (1 + 1e-4))

    def one_wrong_number(*given: Any) -> Made:
        made = no_dead_inputs(*given)
        return replace(made, call=lambda x: made.call(x).index_fill_(0, torch.tensor(0), 7.0))

    def other_shape(*given: Any) -> Made:
        made = no_dead_inputs(*given)
        return replace(made, call=lambda x: made.call(x)[1:])

    def broken(*given: Any) -> Made:
        raise OSError("no such library\nand more")

    def broken_later(*given: Any) -> Made:
        def run(x: Tensor) -> Tensor:
            raise RuntimeError

        return Made(run, 0)

    makers = {f.__name__: f for f in (wrong, one_wrong_number, other_shape, broken, broken_later)}
    for name, make in makers.items():
        register(replace(STRANGER, name=name, make=make))
    prefer(monkeypatch, *makers, "mixed", "native")
    model, x = nn.Sequential(pruned(nn.Linear(48, 40))).eval(), torch.randn(6, 48)
    converted = sparse.convert(model, None, x, compact=False)
    assert not {*chosen(converted)} & {*makers}
    assert converted.report.left_out == {"0 broken": "no such library", "0 broken_later": "RuntimeError"}
    text = sparse.explain(converted)
    assert "no candidate: 0 broken: no such library" in text
    assert text.count("not taken)") == 3
    assert not check(converted(x), model.double()(x.double()), "fp32", terms=48).fault


def test_dense_comes_first_whatever_is_registered_when() -> None:
    others = dict(FORMS)
    FORMS.things.clear()
    register(replace(STRANGER, kind="dense"))
    FORMS.things.update(others)
    found = fitting(stage_of([nn.Linear(8, 4)], torch.zeros(2, 8)), CPU, 2)
    assert [form.name for form in found[:2]] == ["dense", "read_inputs"]


def test_misuse_is_one_line() -> None:
    for form, message in (
        (replace(STRANGER, kind="mine"), "form 'read_inputs': expected kind dense, torch, ours, got 'mine'"),
        (
            replace(STRANGER, layout="turn"),
            "expected layout rows, channels-last, turned, columns, got 'turn'",
        ),
        (replace(STRANGER, name="dense"), "form 'dense': there is one of that name already"),
    ):
        with pytest.raises(UsageError, match=message):
            register(form)
    with pytest.raises(UsageError, match="did you mean 'csr_linear'"):
        FORMS["csr_liner"]


def test_forms_of_sparse_weights_do_not_hold_the_dense_one() -> None:
    for name in list(examples())[:9]:
        modules, x = examples()[name]
        stage = stage_of(modules, x)
        shape, batch = stage.weight.shape, len(x)
        formed = [f.of(stage, CPU, batch) for f in fitting(stage, CPU, batch) if f.kind != "dense"]
        del stage, modules
        gc.collect()
        alive = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and not t.is_sparse_csr]
        assert formed
        assert shape not in [t.shape for t in alive]


@pytest.mark.parametrize("relu", [False, True])
def test_what_was_saved_before_there_were_other_activations_keeps_its_relu(relu: bool) -> None:
    part, activation = Part("fc", nn.Linear(2, 2), (2,), (2,)), "relu" if relu else "none"
    stage, step = object.__new__(Stage), object.__new__(Step)
    stage.__setstate__({"part": part, "relu": relu, "pool": None, "select": None, "blocks": None})
    step.__setstate__({"value": 2, "sources": (0, 1), "segment": None, "relu": relu})
    assert stage == Stage(part, activation)
    assert step == Step(2, (0, 1), activation=activation)
    assert "relu" not in {**vars(stage), **vars(step)}
