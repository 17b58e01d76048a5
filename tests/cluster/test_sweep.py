"""A sweep's folder tells what is done, whoever computed it: resumed, extended, failed, killed."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from inline import SETTINGS, Inline

from sparselth.cluster import local
from sparselth.cluster.executor import How, Task
from sparselth.cluster.grid import Grid
from sparselth.cluster.local import Local, Processes
from sparselth.cluster.store import Layout, is_sweep, read
from sparselth.cluster.sweep import plan_sweep, sweep
from sparselth.cluster.worker import Worker
from sparselth.errors import Interrupted, SparselthError, UsageError
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.run import go, plan
from sparselth.lock import locked
from sparselth.report.sweep import Numbers, table
from sparselth.runs import RunRecord

Contents = Callable[[Path], dict[str, bytes]]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_point_is_a_run_like_any_other(
    rates: Grid, inline: Inline, tmp_path: Path, run_contents: Contents
) -> None:
    """Its folder has the bits that the run alone has, in a forked worker."""
    said = list[str]()
    done = sweep(rates, out=tmp_path / "sweep", executor=inline, told=said.append)
    assert inline.taken == ["rate=0.2", "rate=0.5"]
    assert done.record.complete
    assert done.wall is not None
    assert done.wall.computed == 2
    assert [text.partition(" ")[0] for text in said] == ["[1/2]", "[2/2]"]
    run = done.record.layout.runs[1]
    planned = plan(run.config, out=tmp_path / "alone")
    planned = replace(planned, environment=planned.environment | {"break_even": run.break_even})
    go(planned, False, type("Silent", (Worker,), {})())
    assert run_contents(tmp_path / "alone") == run_contents(tmp_path / "sweep" / "rate=0.5")
    assert sweep(rates, out=tmp_path / "sweep", executor=inline).wall is None  # nothing is missing
    assert len(inline.taken) == 2


def test_more_workers_than_points_split_the_seeds(
    rates: Grid, tmp_path: Path, inline: Inline, run_contents: Contents
) -> None:
    """And what a seed computes is what it computes beside others."""
    split, whole = Inline(number=4), tmp_path / "whole"
    one = replace(rates, axes={"rate": [0.5]})
    record = sweep(one, out=tmp_path / "split", executor=split).record
    assert split.taken == ["rate=0.5,seeds=0", "rate=0.5,seeds=1"]
    whole.mkdir()
    layout = Layout.read(tmp_path / "split")
    both = replace(layout.runs[0], name="rate=0.5", config=replace(layout.runs[0].config, seeds=(0, 1)))
    replace(layout, runs=[both]).write(whole)  # with the same break-even densities
    sweep(one, out=whole, resume=True, executor=inline)
    together = run_contents(whole / "rate=0.5")
    for name in split.taken:
        for file, content in run_contents(tmp_path / "split" / name).items():
            if file.startswith("cells/"):
                assert content == together[file]
    assert len(record.cells("rate=0.5")) == 4
    assert {one["seed"] for one in record.cells("rate=0.5")} == {0, 1}


def test_it_goes_on_with_more_points_seeds_and_levels_and_keeps_what_is_there(
    rates: Grid, inline: Inline, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    one = replace(rates, axes={"rate": [0.5]}, settings=SETTINGS | {"seeds": (0,)})
    sweep(one, out=out, executor=inline)
    ticket = out / "rate=0.5" / "cells" / "seed0-ticket-01.safetensors"
    before = ticket.stat().st_mtime_ns
    more = replace(rates, axes={"rate": [0.5, 0.2]}, settings=SETTINGS | {"levels": 2})
    with pytest.raises(SparselthError, match="3 of 3 runs are unfinished; add `resume`"):
        sweep(more, out=out, executor=inline)
    record = sweep(more, out=out, executor=inline, resume=True).record
    assert inline.taken[1:] == ["rate=0.5", "rate=0.5,seeds=1", "rate=0.2"]
    assert ticket.stat().st_mtime_ns == before
    assert [len(record.cells(point)) for point in record.points] == [6, 6]
    with pytest.raises(SparselthError, match=r"has the point rate=0.2 and keeps it"):
        sweep(one, out=out, executor=inline, resume=True)
    with pytest.raises(SparselthError, match=r"seeds 0 and keeps them"):
        sweep(replace(more, settings=more.settings | {"seeds": (1,)}), out=out, executor=inline, resume=True)
    with pytest.raises(SparselthError, match=r"begun with another steps \(60 there, 61 here\)"):
        sweep(replace(more, settings=more.settings | {"steps": 61}), out=out, executor=inline, resume=True)


def test_an_axis_of_lists_is_resumed_and_named(rates: Grid, inline: Inline, tmp_path: Path) -> None:
    """sweep.json has lists where configurations have tuples."""
    arms = replace(
        rates,
        axes={"arms": [("ticket",), ("ticket", "reinit")]},
        settings={name: value for name, value in SETTINGS.items() if name != "arms"} | {"seeds": (0,)},
    )
    sweep(arms, out=tmp_path / "sweep", executor=inline)
    record = sweep(arms, out=tmp_path / "sweep", resume=True, executor=inline).record
    assert record.layout.axes == arms.axes
    assert [*Numbers(record).labels.values()] == ["arms=ticket", "arms=ticket+reinit"]
    assert "imp over arms ticket, ticket+reinit: 2 points" in table(record)


def test_what_failed_is_listed_and_tried_again_by_resume(rates: Grid, inline: Inline, tmp_path: Path) -> None:
    out, said = tmp_path / "sweep", list[str]()
    out.mkdir()
    plan_sweep(rates, out=out, resume=False, executor=inline, how=How(), told=said.append).layout.write(out)
    (out / "rate=0.2").write_text("no folder")
    record = sweep(rates, out=out, resume=True, executor=inline, told=said.append).record
    assert "expected a folder for the run, found a file" in record.failed["rate=0.2"]
    assert record.finished == ["rate=0.5"]
    assert said[-2].startswith("[1/2] rate=0.2: failed: ")
    (out / "rate=0.2").unlink()
    record = sweep(rates, out=out, resume=True, executor=inline).record
    assert record.complete
    assert record.failed == {}
    assert inline.taken == ["rate=0.2", "rate=0.5", "rate=0.2"]


def test_a_network_that_ends_its_process_ends_its_run(
    rates: Grid, inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker computes in a thread, whose end would be heard by nobody."""

    def leaves(self: ImpConfig, cells: object, place: object) -> None:
        raise SystemExit(4)

    monkeypatch.setattr(ImpConfig, "compute", leaves)
    record = sweep(replace(rates, axes={"rate": [0.5]}), out=tmp_path / "sweep", executor=inline).record
    assert "worker 0 ended without a result, exit code 1" in record.failed["rate=0.5,seeds=0"]


def test_a_plugin_that_is_needed_is_asked_for(rates: Grid, inline: Inline, tmp_path: Path) -> None:
    """Of a score, too, whose name is held against nothing when a configuration is read."""
    how: dict[str, Any] = {"out": tmp_path, "executor": inline, "how": How(), "told": lambda text: None}
    layout = plan_sweep(rates, resume=False, **how).layout
    theirs = [replace(run, config=replace(run.config, score="mine")) for run in layout.runs]
    replace(layout, runs=theirs, plugins=["/mine.py"]).write(tmp_path)
    with pytest.raises(SparselthError, match=r"was begun with `plugin` /mine.py; give it again .*'mine'"):
        Layout.read(tmp_path)


def test_scores_in_another_order_go_on(tmp_path: Path, inline: Inline) -> None:
    """As a run of at-init does: what is new comes behind."""
    grid = Grid("at-init", {"rate": [0.5]}, {"dataset": "mnist5k", "seeds": (0,), "score": ("snip",)})
    how: dict[str, Any] = {"out": tmp_path, "executor": inline, "how": How(), "told": lambda text: None}
    plan_sweep(grid, resume=False, **how).layout.write(tmp_path)
    more = replace(grid, settings=grid.settings | {"score": ("magnitude", "snip")})
    (run,) = plan_sweep(more, resume=True, **how).layout.runs
    assert run.config.score == ("snip", "magnitude")


def test_a_run_that_failed_as_it_drew_is_tried_again_too(
    rates: Grid, inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its cells are finished by then."""
    one = replace(rates, axes={"rate": [0.5]}, settings=SETTINGS | {"seeds": (0,)})

    def full(self: ImpConfig, record: RunRecord, folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(ImpConfig, "draw", full)
        record = sweep(one, out=tmp_path / "sweep", executor=inline).record
    assert record.complete
    assert "No space left on device" in record.failed["rate=0.5"]
    assert sweep(one, out=tmp_path / "sweep", resume=True, executor=inline).record.failed == {}
    assert inline.taken == ["rate=0.5", "rate=0.5"]


def test_a_run_whose_worker_died_is_tried_once_more(rates: Grid, tmp_path: Path) -> None:
    said, once, twice = list[str](), Inline(dying={"rate=0.2": 1}), Inline(dying={"rate=0.2": 2})
    assert sweep(rates, out=tmp_path / "once", executor=once, told=said.append).record.complete
    assert any("rate=0.2: its worker ended without a result; it is tried once more" in text for text in said)
    record = sweep(rates, out=tmp_path / "twice", executor=twice).record
    assert record.failed == {"rate=0.2": "its worker ended without a result"}
    assert twice.taken.count("rate=0.2") == 2


def test_a_worker_that_does_not_see_the_folder_says_so(rates: Grid, inline: Inline, tmp_path: Path) -> None:
    planned = plan_sweep(
        rates, out=tmp_path / "sweep", resume=False, executor=inline, how=How(), told=lambda text: None
    )
    run, there = planned.layout.runs[0], tmp_path / "elsewhere"
    task = Task(run.name, str(there), "0" * 16, run.config.to_json(), {}, How(), (), str(tmp_path))
    assert "does not see" in Worker().compute(task).error
    there.mkdir()
    planned.layout.write(there)  # another sweep's
    assert "choose another `out`" in Worker().compute(task).error
    assert not (there / run.name).exists()


def test_what_another_head_has_written_meanwhile_is_kept(
    rates: Grid, inline: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the folder between this one's plan and its lock."""
    first, second = (replace(rates, axes={"rate": [rate]}) for rate in (0.2, 0.5))
    how: dict[str, Any] = {"out": tmp_path / "sweep", "resume": True, "executor": inline}

    @contextmanager
    def late(path: Path) -> Iterator[None]:
        with locked(path):
            if not is_sweep(path):
                plan_sweep(first, **how, how=How(), told=lambda text: None).layout.write(path)
            yield

    monkeypatch.setattr("sparselth.cluster.sweep.locked", late)
    with pytest.raises(SparselthError, match=r"has the point rate=0.2 and keeps it"):
        sweep(second, **how)
    assert {run.point for run in Layout.read(tmp_path / "sweep").runs} == {"rate=0.2"}
    assert inline.taken == []


def test_every_point_is_held_against_its_images_before_anything_starts(
    rates: Grid, inline: Inline, tmp_path: Path
) -> None:
    """Floats are no bytes that could be put into [0, 1]: the data tells, not the configuration."""
    file = tmp_path / "floats.py"
    file.write_text(
        "import numpy as np\n"
        "x, y = np.random.default_rng(0).random((400, 1, 28, 28), dtype=np.float32), np.arange(400) % 10\n"
        "def load(): return x[:300], y[:300], x[300:], y[300:]\n"
    )
    settings = SETTINGS | {"dataset": f"{file}:load"}
    mixed = replace(rates, axes={"inputs": ["standard", "unit"]}, settings=settings)
    with pytest.raises(UsageError, match="`inputs` unit: expected images of bytes"):
        sweep(mixed, out=tmp_path / "sweep", executor=inline)
    assert not (tmp_path / "sweep").exists()


def test_folders_of_something_else_and_altered_ones_are_refused(
    rates: Grid, inline: Inline, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(SparselthError, match="expected a sweep or nothing"):
        sweep(rates, out=tmp_path, executor=inline)
    with pytest.raises(SparselthError, match="not the folder of a sweep"):
        read(tmp_path)
    done = tmp_path / "sweep"
    sweep(replace(rates, axes={"rate": [0.5]}), out=done, executor=inline)
    text = (done / "sweep.json").read_text()
    (done / "sweep.json").write_text(text.replace('"imp"', '"strong"', 1))
    with pytest.raises(SparselthError, match=r"sweep.json: cannot be read \(its checksum"):
        read(done)


@pytest.mark.whole
def test_processes_of_this_machine_killed_stopped_and_gone_on_with(
    rates: Grid, inline: Inline, tmp_path: Path, run_contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed amidst a cell, then the sweep by a signal: the bits are an undisturbed one's."""
    out, quiet = tmp_path / "sweep", tmp_path / "quiet"
    long = replace(rates, settings=SETTINGS | {"steps": 300})
    quiet.mkdir()
    layout = plan_sweep(
        long, out=quiet, resume=False, executor=inline, how=How(), told=lambda text: None
    ).layout
    layout.write(quiet)
    sweep(long, out=quiet, resume=True, executor=inline)
    out.mkdir()
    layout.write(out)
    crews, said = list[Processes](), list[str]()
    made = Processes.__init__

    def remembered(self: Processes, places: Any) -> None:
        made(self, places)
        crews.append(self)

    monkeypatch.setattr(Processes, "__init__", remembered)

    def disturb() -> None:
        cells = out / "rate=0.2" / "cells.jsonl"
        while not lines(cells):
            time.sleep(0.02)
        crews[0].all[0].process.kill()
        while not any("tried once more" in text for text in said) or lines(cells) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        sweep(long, out=out, resume=True, executor=Local(1), told=said.append)
    thread.join(10)
    assert not thread.is_alive()
    assert any("killed by signal 9" in text for text in said)
    kept = {file: file.stat().st_mtime_ns for file in (out / "rate=0.2" / "cells").iterdir()}
    assert kept
    record = sweep(long, out=out, resume=True, executor=inline).record
    assert record.complete
    for name in ("rate=0.2", "rate=0.5"):
        assert run_contents(out / name) == run_contents(quiet / name)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # none was computed again


def test_a_worker_that_ends_amidst_a_word_has_died() -> None:
    """As one that the system kills for its memory."""
    ours, theirs = Pipe()
    with theirs:
        os.write(theirs.fileno(), struct.pack("!i", 100) + b"half")
    process = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    crew = Processes([])
    crew.all.append(local._Process(process, ours, None, Task("a", "", "", {}, {}, How(), (), "")))
    (ended,) = crew.wait(1.0)
    assert ended.died
    assert "killed by signal 9 (out of memory?" in ended.error


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[dict[str, str]]()

    class Popen:
        def __init__(self, words: list[str], **more: Any) -> None:
            seen.append(more["env"])

        def wait(self, timeout: float) -> int:
            return 0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(local.subprocess, "Popen", Popen)
    assert Local().workers("cuda") == 2
    with pytest.raises(UsageError, match="`workers` 3: expected at most 2"):
        Local(3).workers("cuda")
    task = Task("a", "", "", {}, {}, How(), (), "")
    with Local().crew("cuda") as crew:
        crew.start(task)
        crew.start(task)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["3", "5"]
