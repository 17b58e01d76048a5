"""Sweeps on a local Ray cluster of two nodes: the bits of other executors, workers and the head killed.

`make ray-test` installs Ray and runs them; without Ray they are skipped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inline import SETTINGS, Inline

from sparselth.cluster.executor import How
from sparselth.cluster.grid import Grid
from sparselth.cluster.ray_core import Actors, Ray
from sparselth.cluster.store import Layout
from sparselth.cluster.sweep import plan_sweep, sweep
from sparselth.errors import SparselthError

ray = pytest.importorskip("ray")
Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one core; their processes find this checkout."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), *sys.path])))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def long(rates: Grid) -> Grid:
    """Three points, some seconds each."""
    return replace(rates, axes={"rate": [0.2, 0.5, 0.7]}, settings=SETTINGS | {"steps": 300})


def begun(grid: Grid, *folders: Path) -> Layout:
    """The same sweep, with the same break-even densities, begun in each folder."""
    how, executor = How(), Inline()
    planned = plan_sweep(
        grid, out=folders[0], resume=False, executor=executor, how=how, told=lambda text: None
    )
    for folder in folders:
        folder.mkdir()
        planned.layout.write(folder)
    return planned.layout


def test_two_nodes_come_to_the_same_bits_and_a_killed_worker_costs_its_cell(
    cluster: Any, long: Grid, tmp_path: Path, run_contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near, said = tmp_path / "ray", tmp_path / "inline", list[str]()
    layout = begun(long, far, near)
    executor = Ray(address=cluster.address)
    assert executor.device("auto") == "cpu"
    assert executor.workers("cpu") == 2
    made, killed = Actors.wait, list[float]()

    def wait(self: Actors, seconds: float) -> Any:
        """As the first run has a cell, its actor's process is killed."""
        first = far / "rate=0.2" / "cells.jsonl"
        if not killed and first.exists() and first.read_bytes():
            killed.extend(file.stat().st_mtime_ns for file in (far / "rate=0.2" / "cells").iterdir())
            os.kill(json.loads((far / "rate=0.2" / ".lock").read_text())["pid"], signal.SIGKILL)
        return made(self, seconds)

    monkeypatch.setattr(Actors, "wait", wait)
    record = sweep(long, out=far, resume=True, executor=executor, told=said.append).record
    assert killed
    assert any("rate=0.2: its worker ended without a result" in text for text in said)
    assert record.complete
    assert record.failed == {}
    sweep(long, out=near, resume=True, executor=Inline())
    for run in layout.runs:
        assert run_contents(far / run.name) == run_contents(near / run.name)
    times = {file.stat().st_mtime_ns for file in (far / "rate=0.2" / "cells").iterdir()}
    assert set(killed) <= times  # what was finished is not computed again


def test_the_head_is_killed_and_a_new_one_loses_nothing(
    long: Grid, tmp_path: Path, run_contents: Contents
) -> None:
    """The sweep's own process, and all of Ray's with it, amidst the second cell; then another executor."""
    out, quiet = tmp_path / "sweep", tmp_path / "quiet"
    layout = begun(long, out, quiet)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    words = [sys.executable, "-m", "sparselth", "sweep", "imp", "--resume", "--out", str(out)]
    words += ["--executor", "ray", "--workers", "1", "--quiet"]
    process = subprocess.Popen(words, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    first = out / layout.runs[0].name / "cells.jsonl"
    while not (first.exists() and first.read_bytes()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in (first.parent / "cells").iterdir()}
    assert kept
    deadline = time.monotonic() + 60
    while True:  # an actor that lives for a moment longer holds the run's lock
        try:
            record = sweep(long, out=out, resume=True, executor=Inline()).record
            if record.complete:
                break
        except SparselthError:
            pass
        assert time.monotonic() < deadline
    sweep(long, out=quiet, resume=True, executor=Inline())
    for run in layout.runs:
        assert run_contents(out / run.name) == run_contents(quiet / run.name)
    assert kept == {file: file.stat().st_mtime_ns for file in kept}


def test_ray_is_gone_with_its_head_and_a_new_cluster_goes_on(
    long: Grid, tmp_path: Path, run_contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes of a cluster are killed amidst the second cell, then the sweep that hangs on it."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), *sys.path])))
    out, quiet = tmp_path / "sweep", tmp_path / "quiet"
    layout = begun(long, out, quiet)
    words = [sys.executable, "-m", "sparselth", "sweep", "imp", "--resume", "--out", str(out), "--quiet"]
    words += ["--executor", "ray", "--address"]
    first = out / layout.runs[0].name / "cells.jsonl"
    old = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        process = subprocess.Popen([*words, old.address], start_new_session=True, stderr=subprocess.PIPE)
        while not (first.exists() and first.read_bytes()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        old.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    finally:
        old.shutdown()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in (first.parent / "cells").iterdir()}
    assert kept
    new = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    deadline = time.monotonic() + 60
    try:
        while True:  # an actor of the old one that lives for a moment longer holds its run's lock
            done = subprocess.run([*words, new.address], capture_output=True, text=True, timeout=120)
            if not done.returncode:
                break
            assert "is running this run" in done.stderr, done.stderr
            assert time.monotonic() < deadline
    finally:
        new.shutdown()
    sweep(long, out=quiet, resume=True, executor=Inline())
    for run in layout.runs:
        assert run_contents(out / run.name) == run_contents(quiet / run.name)
    assert kept == {file: file.stat().st_mtime_ns for file in kept}


def test_what_ray_cannot_do_is_one_line(cluster: Any) -> None:
    with pytest.raises(SparselthError, match="`workers` 3: expected at most 2"):
        Ray(3, cluster.address).workers("cpu")
    with pytest.raises(SparselthError, match="the Ray cluster has no GPU"):
        Ray(address=cluster.address).workers("cuda")
