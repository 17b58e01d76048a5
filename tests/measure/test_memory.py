"""Held bytes and peaks against sums known beforehand; counters of energy that are made up."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from sparselth import sparse
from sparselth.files import save_arrays
from sparselth.kernels import _native
from sparselth.kernels.sparse_conv2d_rows import ConvRows, sparse_conv2d_rows_call
from sparselth.measure import energy, memory
from sparselth.measure.memory import Memory, held, peak, peaks


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_held_counts_every_storage_once() -> None:
    whole, index = torch.zeros(10, 4), torch.zeros(6, dtype=torch.int32)

    def closure() -> Tensor:
        return whole[0]

    structure = ctypes.create_string_buffer(4)
    structure.alive = index  # type: ignore[attr-defined]
    foreign = partial(print, ctypes.byref(structure))
    assert held(whole[2:3]) == (160, 0)
    assert held(closure, {"view": whole.t()}, [partial(torch.mm, whole)]) == (160, 0)
    assert held(foreign) == (0, 24)
    assert held(closure, foreign, but=(whole[:1],)) == (0, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starts, columns = torch.arange(4, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
        csr = torch.sparse_csr_tensor(starts, columns, torch.ones(3), (3, 3))
    assert held([csr]) == (12, 16 + 12)
    assert held(test_held_counts_every_storage_once) == (0, 0)


@pytest.mark.parametrize("compact", [True, False])
def test_held_finds_all_that_a_converted_network_is_made_of(compact: bool) -> None:
    torch.manual_seed(0)
    head = (nn.Linear(8 * 16, 40), nn.ReLU(), nn.Linear(40, 10))
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), *head)
    masks = {n: torch.rand_like(p) < 0.2 for n, p in model.named_parameters() if p.dim() > 1}
    converted = sparse.convert(model.eval(), masks, torch.zeros(4, 1, 8, 8), compact=compact)
    assert sum(held(converted.plan)) == sparse.weight_bytes(converted)


def test_tensors_made_of_others_are_their_parts() -> None:
    both = TwoTensor(torch.zeros(10), torch.zeros(10))
    assert held([both, both.a]) == (80, 0)


@pytest.mark.skipif(_native.LIB is None, reason=_native.WHY)
def test_what_a_kernel_works_on_is_no_weight() -> None:
    packed = ConvRows.from_dense(torch.ones(3, 2, 3, 3), (8, 8), padding=1)
    run, x = sparse_conv2d_rows_call(packed), torch.ones(1, 2, 8, 8)
    run(x)  # makes its buffers
    found = memory.running(run, lambda: run(x))
    assert found.weights == 4 * packed.kept
    assert found.indices <= packed.bytes() - found.weights + 64  # and where each thread's filters begin
    assert found.activations > 4 * 3 * 8 * 8 + 4 * 2 * 10 * 10  # y, and x with zeros around


def test_peak_is_the_highest_sum_of_what_is_alive(capfd: pytest.CaptureFixture[str]) -> None:
    def one_after_another() -> None:
        for size in (100, 1000, 500):
            torch.empty(size)

    def together() -> Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second

    capfd.readouterr()
    assert peak(one_after_another) == 4000
    assert peak(together) == 6000
    assert peak(lambda: None) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_freed_is_kept(kept: bool) -> None:
    """Three blocks of 28 MB at a time, again and again: 20,000 page faults each time, or none."""
    code = f"""
import ctypes, resource
from sparselth.measure.memory import keep_freed
if {kept}:
    assert keep_freed()
libc, size = ctypes.CDLL(None), ctypes.c_size_t(28 << 20)
libc.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(3)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = [faults() for _ in range(6)]
print(sum(found[3:]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) is kept


def test_peaks_of_several_calls_are_theirs_alone() -> None:
    kept: list[torch.Tensor] = []
    found = peaks({"kept": lambda: kept.append(torch.empty(500)), "given": lambda: torch.empty(250)})
    assert found == {"kept": 2000, "given": 1000}
    kept.clear()
    assert peaks({"freed": lambda: torch.empty(10).add_(1), "none": lambda: None})["none"] == 0


def test_peak_counts_the_scratch_of_an_operator() -> None:
    image, kernel = torch.randn(1, 4, 9, 9, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    unfolded = 8 * 4 * 9 * 49  # what a convolution in float64 needs beside its output of 8 * 4 * 49
    assert peak(lambda: torch.conv2d(image, kernel)) >= unfolded + 8 * 4 * 49


def test_running_counts_weights_and_the_widest_moment() -> None:
    net, x = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).requires_grad_(False), torch.zeros(10, 16)
    found = memory.running(net, lambda: net(x), file=7)
    assert found == Memory(4 * (16 * 32 + 32 + 32 * 8 + 8), 0, 4 * 10 * (32 + 8), file=7)
    assert found.peak == found.weights + found.activations


def test_file_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    arrays, header = {"a": torch.arange(7.0).numpy()}, {"schema": "x", "n": [1, 2]}
    save_arrays(tmp_path / "file", arrays, header)
    assert memory.file_bytes(arrays, header) == (tmp_path / "file").stat().st_size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda_is_the_allocators() -> None:
    assert peak(lambda: torch.empty(1 << 20, device="cuda"), "cuda") == 4 << 20


# ---- energy


def package(folder: Path, name: str, size: int, now: int) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "max_energy_range_uj").write_text(f"{size}\n")
    (place / "energy_uj").write_text(f"{now}\n")
    return place


def test_rapl_adds_packages_and_survives_the_end_of_a_counter(tmp_path: Path) -> None:
    first = package(tmp_path, "intel-rapl:0", 9_999_999, 9_000_000)
    second = package(tmp_path, "intel-rapl:1", 9_999_999, 0)
    package(tmp_path, "intel-rapl:0:0", 9_999_999, 0)
    meter = energy._rapl(tmp_path)
    assert meter.joules is not None
    assert meter.joules() == 0
    (first / "energy_uj").write_text("500000\n")
    (second / "energy_uj").write_text("250000\n")
    assert meter.joules() == pytest.approx(1.75)
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("7000000\n")
    assert meter.joules() == pytest.approx(1.75)


def test_without_a_counter_there_is_a_reason_and_no_figure(tmp_path: Path) -> None:
    absent = energy._rapl(tmp_path)
    place = package(tmp_path, "intel-rapl:0", 1, 0)
    (place / "energy_uj").unlink()
    for meter in (absent, energy._rapl(tmp_path)):
        assert meter.joules is None
        assert meter.why.startswith("energy: not measured")
        assert "\n" not in meter.why
        assert energy.per_call(meter, lambda: pytest.fail("called")) is None


def test_joules_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(energy, "SECONDS", 0.02)
    meter = energy.Meter(lambda: 3.0 * len(calls), "")
    assert energy.per_call(meter, lambda: calls.append(None)) == pytest.approx(3.0)
    assert len(calls) > 1


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A library that answers with these codes, and counts a joule for each reading."""

    def make(init: int = 0, handle: int = 0, read: int = 0) -> None:
        readings = []

        def energy_of(_: object, out: Any) -> int:
            readings.append(None)
            out._obj.value = 1000 * len(readings)
            return read

        def by_uuid(uuid: bytes, _: object) -> int:
            assert uuid == b"GPU-1234"
            return handle

        library = SimpleNamespace(
            nvmlInit_v2=lambda: init,
            nvmlDeviceGetHandleByUUID=by_uuid,
            nvmlDeviceGetTotalEnergyConsumption=energy_of,
        )
        monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: library)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="1234"))

    return make


def test_nvml_reads_joules(nvml: Callable[..., None]) -> None:
    nvml()
    meter = energy.meter("cuda")
    assert meter.joules is not None
    assert [meter.joules(), meter.joules()] == [2.0, 3.0]


@pytest.mark.parametrize("code", ["init", "handle", "read"])
def test_nvml_that_refuses_is_a_reason(nvml: Callable[..., None], code: str) -> None:
    nvml(**{code: 3})
    meter = energy.meter("cuda")
    assert meter.joules is None
    assert meter.why.startswith("energy: not measured")


def test_a_machine_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    assert energy.meter("cuda") == energy.Meter(
        None, "energy: not measured, there is no NVML (libnvidia-ml.so.1)"
    )
