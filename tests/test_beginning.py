"""Runs that die while they begin, that are extended, that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import Simulated, compute

from sparselth.config import EXPERIMENTS
from sparselth.errors import SparselthError
from sparselth.experiments.agenda import Agenda
from sparselth.experiments.base import Place
from sparselth.files import dump, plain
from sparselth.runs import open_run, read

Contents = Callable[[Path], dict[str, bytes]]
CONFIG = Simulated()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment is known to these tests alone, which do not wait for the disk."""
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power fails here


def killed(path: Path, config: Simulated, call: int, **arguments: bool) -> bool:
    """Go on with a run in a child that is gone before its so many-th call that writes; whether it was."""
    child = os.fork()
    if child == 0:
        left = call
        for name in ("mkdir", "open", "pwrite", "ftruncate", "fsync", "replace", "unlink"):
            real = getattr(os, name)

            def counted(*args: object, real: Callable[..., object] = real, **named: object) -> object:
                nonlocal left
                left -= 1
                if not left:
                    os._exit(9)
                return real(*args, **named)

            setattr(os, name, counted)
        compute(path, config, **arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.whole
def test_whatever_a_killed_beginning_leaves_is_a_fresh_folder(tmp_path: Path, run_contents: Contents) -> None:
    compute(tmp_path / "whole", CONFIG)
    whole, call, plain = run_contents(tmp_path / "whole"), 1, 0
    while killed(path := tmp_path / str(call), CONFIG, call, resume=False):
        nothing = not any((path / "cells").glob("*.safetensors"))
        if nothing:  # has been computed
            plain += 1
            shutil.copytree(path, tmp_path / "other") if path.exists() else None
            compute(tmp_path / "other", replace(CONFIG, rate=0.25), resume=False)
            shutil.rmtree(tmp_path / "other")
        compute(path, CONFIG, resume=not nothing)
        assert run_contents(path) == whole
        assert not [*path.rglob("*.tmp")]
        call += 1 if nothing else 5
    assert plain > 10
    assert call > 60


@pytest.mark.whole
def test_an_extension_that_is_killed_goes_on(tmp_path: Path, run_contents: Contents) -> None:
    larger = replace(CONFIG, levels=4, chains=(0, 1, 2))
    compute(tmp_path / "whole", larger)
    compute(tmp_path / "small", CONFIG)
    whole, call = run_contents(tmp_path / "whole"), 1
    while True:
        shutil.copytree(tmp_path / "small", path := tmp_path / str(call))
        if not killed(path, larger, call):
            break
        compute(path, larger)
        assert run_contents(path) == whole
        call += 1 if call < 12 else 6  # what is rewritten first, then cells
    assert call > 50


def test_what_a_beginning_measured_holds_for_the_same_run_alone(tmp_path: Path) -> None:
    def begun(config: Simulated, environment: dict[str, Any]) -> dict[str, Any]:
        with open_run(tmp_path, config, environment, resume=True):
            found: dict[str, Any] = plain(json.loads((tmp_path / "environment.json").read_text()))
            return found

    first = {"packages": {"torch": "2"}, "cpu": "mine", "data_sha256": "0", "break_even": {"fc1": 0.5}}
    again = first | {"break_even": {"fc1": 0.25}}
    assert begun(CONFIG, first) == begun(CONFIG, again) == first
    for other in ({"cpu": "yours"}, {"data_sha256": "1"}):
        assert begun(CONFIG, again | other) == again | other
    assert begun(CONFIG, first) == first
    assert begun(replace(CONFIG, levels=2), again) == again
    (tmp_path / "environment.json").write_text("{")
    assert begun(replace(CONFIG, levels=2), first) == first


def test_a_run_that_an_older_version_began_is_stopped_and_goes_on_more_than_once(tmp_path: Path) -> None:
    environment = {"packages": {"torch": "2"}, "cpu": "mine", "data_sha256": "0", "break_even": {}}
    (tmp_path / "config.json").write_bytes(dump(CONFIG.to_json()))  # without checksums
    (tmp_path / "environment.json").write_bytes(dump(environment))
    for count in range(3):
        with open_run(tmp_path, CONFIG, environment, resume=True) as folder:
            assert (len(folder.finished), folder.damage) == (count, "")
            cells = Agenda(CONFIG, folder.finished).next()[:1]
            folder.add(CONFIG.compute(cells, Place(tmp_path, None, {})) or [])
    compute(tmp_path, CONFIG)
    assert read(tmp_path).complete
    compute(tmp_path, replace(CONFIG, levels=4))


def test_a_full_disk_while_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for calls in range(1, 9):
        left = calls

        def full(handle: int) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(SparselthError, match="No space left on device"):
                compute(tmp_path / str(calls), CONFIG, resume=False)
        compute(tmp_path / str(calls), CONFIG, resume=calls > 2)
        assert read(tmp_path / str(calls)).complete


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "cells/seed0-number-00.safetensors", "config.json", "figures/a.png"):
        file = tmp_path / name.replace("/", "-") / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        for resume in (False, True):
            with pytest.raises(SparselthError):
                compute(tmp_path / name.replace("/", "-"), CONFIG, resume=resume)
        assert [one for one in (tmp_path / name.replace("/", "-")).rglob("*") if one.is_file()] == [file]
        assert file.read_text() == "{}"


def test_a_run_is_extended_to_the_bits_of_a_larger_one(tmp_path: Path, run_contents: Contents) -> None:
    run, small = tmp_path / "run", replace(CONFIG, chains=(1,), levels=1)
    compute(run, small, stop=1)  # unfinished ones, too
    files = [run / "cells" / "seed1-number-00.safetensors"]
    for config, cells in (
        (replace(small, levels=2), 2),
        (replace(CONFIG, chains=(0, 1), levels=2), 3),
        (CONFIG, 2),
    ):
        times = {file: file.stat().st_mtime_ns for file in files}
        assert compute(run, config) == (cells, "")
        assert {file: file.stat().st_mtime_ns for file in files} == times  # finished cells are kept
        assert read(run).config == config
        assert read(run).complete
        files = [*(run / "cells").iterdir()]
    compute(tmp_path / "whole", CONFIG)
    assert run_contents(run) == run_contents(tmp_path / "whole")
    assert compute(run, replace(CONFIG, chains=(1, 0))) == (0, "")
    assert compute(run, CONFIG) == (0, "")
    assert run_contents(run) == run_contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "resume", "says"),
    [
        ({"rate": 0.25}, True, r"another rate \(0.5 there, 0.25 here\); choose another `out`"),
        ({"rate": 0.25, "levels": 9}, True, "another rate"),
        (
            {"levels": 2},
            True,
            r"other levels, and keeps its cells \(3 there, 2 here\); ask for those and more",
        ),
        ({"levels": 2, "chains": (0, 1, 2)}, True, "other levels"),
        (
            {"chains": (0, 2), "levels": 9},
            True,
            r"other chains, and keeps its cells \(\[0, 1\] there, \[0, 2\] here",
        ),
        ({"levels": 4}, False, r"fewer levels \(3 there, 4 here\); add `resume` to extend it"),
    ],
)
def test_what_would_change_finished_cells_is_refused_by_name(
    change: dict[str, Any], resume: bool, says: str, tmp_path: Path
) -> None:
    compute(tmp_path / "run", CONFIG)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(SparselthError, match=says):
        compute(tmp_path / "run", replace(CONFIG, **change), resume)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
