"""What `convert` does on CUDA, in Triton's interpreter on a CPU: tiny layers, one by one the fastest."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conversions import (
    csr,
    prefer,
    random_masks,
    slots,
    times,
    timing,
    weights,
)
from sparselth import clock, sparse
from sparselth.check import check
from sparselth.kernels import _choose, _graphs
from sparselth.kernels.step_parts import Call
from sparselth.measure.floors import precision
from sparselth.sparse.device import Device
from sparselth.sparse.forms import FORMS

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
