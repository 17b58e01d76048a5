"""Workers: any number of cells in a batch, memory that is short, processes that are spawned."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import Simulated

from sparselth.config import EXPERIMENTS, Cell
from sparselth.errors import Interrupted
from sparselth.experiments.base import Place
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.run import run
from sparselth.runs import RunRecord, checkpoint_path, read


def test_runs_are_the_same_at_any_number_of_replicas(
    imp: Callable[..., RunRecord], run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    flags = [
        "--levels",
        "1",
        "--seeds",
        "0-1",
        "--arms",
        "ticket,random-mask",
        "--workers",
        "1",
        "--kernels",
        "reference",
    ]
    found = {}
    for replicas in ("1", "3", "100"):
        record = imp(*flags, "--replicas", replicas, out=replicas, steps=20)
        files = run_contents(record.path)
        found[replicas] = {name.removeprefix(replicas): content for name, content in files.items()}
    assert found["1"] == found["3"] == found["100"]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def out_of_memory_in_a_capture() -> None:
    """As torch.cuda.graph ends: its exit raises, while the exception of the work is under way."""
    try:
        try:
            out_of_memory()
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        raise RuntimeError("no graph of a step") from error


@pytest.mark.parametrize("fails", [out_of_memory, out_of_memory_in_a_capture])
def test_a_batch_that_does_not_fit_is_halved(
    fails: Callable[[], None],
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    real = ImpConfig.compute

    def short(config: ImpConfig, cells: Sequence[Cell], place: Place) -> Any:
        if len(cells) > 2:
            fails()
        return real(config, cells, place)

    monkeypatch.setattr(ImpConfig, "compute", short)
    monkeypatch.chdir(tmp_path)
    flags = "imp --model lenet-300-100 --dataset mnist5k --levels 1 --seeds 0-4 --arms ticket --workers 1"
    code, _, err = cli(*flags.split(" "), "--replicas", "5", "--steps", "10", "--out", "run")
    assert code == 0
    assert "out of memory with 5 networks at once; going on with 2" in err
    assert read(Path("run")).complete


def test_one_network_that_does_not_fit_is_one_line(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def short(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImpConfig, "compute", short)
    code, out, err = cli(
        *[
            "imp",
            "--model",
            "lenet-300-100",
            "--dataset",
            "mnist5k",
            "--steps",
            "10",
            "--levels",
            "1",
            "--workers",
            "1",
            "-q",
            "--out",
            "run",
        ]
    )
    assert (code, out) == (1, "")
    assert "out of memory with one network on cpu; use a smaller --batch-size" in err
    assert len(err.strip().splitlines()) == 1


def test_workers_can_be_spawned(
    imp: Callable[..., RunRecord],
    finished: Callable[..., RunRecord],
    run_contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as on CUDA, which does not outlive a fork, and where autograd does not
    flags = ("--levels", "1", "--seeds", "0", "--arms", "ticket")
    forked = finished(*flags)
    monkeypatch.setattr("sparselth.experiments.processes._forks", lambda config: False)
    spawned = imp(*flags, "--workers", "1", out="spawned")
    assert run_contents(forked.path) == run_contents(spawned.path)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="no CPU that counts subnormals as 0")
def test_workers_count_subnormal_numbers_as_zero_and_the_caller_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Intel each costs 100 cycles and more; Adam's moments fade through them."""
    real = Simulated.compute

    def compute(self: Simulated, cells: Sequence[Cell], place: Place) -> Any:
        found = real(self, cells, place)
        assert found is not None
        product = {"product": float(torch.tensor(1e-30) * 1e-12)}
        return [replace(one, line=product | one.line) for one in found]

    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})
    monkeypatch.setattr(Simulated, "compute", compute)
    record = run(Simulated(chains=(0,), levels=0), out=tmp_path / "run", workers=1)
    assert [point["product"] for point in record.points] == [0.0]
    assert float(torch.tensor(1e-30) * 1e-12) > 0


def test_a_cell_without_a_checkpoint_is_not_said_to_be_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two cells under way that were stopped, as constructions are, one has left a checkpoint."""
    config = Simulated(chains=(0, 1), levels=0)

    def compute(self: Simulated, cells: Sequence[Cell], place: Place) -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        for file in [checkpoint_path(place.run, cell) for cell in cells if cell.seed]:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"")
        while not place.should_stop():
            time.sleep(0.01)

    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})
    monkeypatch.setattr(Simulated, "compute", compute)
    said = "0 of 2 cells are finished, 1 under way are saved, 1 under way will begin again in"
    with pytest.raises(Interrupted, match=said):
        run(config, out=tmp_path / "run", workers=1, replicas=2)
