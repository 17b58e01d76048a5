"""Run folders: of the version before, of a plugin that is not there, of a config.json that is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from simulated import Simulated

from sparselth import runs, tickets
from sparselth.config import EXPERIMENTS, Cell
from sparselth.errors import SparselthError
from sparselth.experiments.base import Place
from sparselth.files import (
    checksum,
    dump,
    file_sum,
    joined,
    line,
    load_arrays,
    plain,
    save_arrays,
    sealed,
    sealed_line,
)
from sparselth.models import get_model
from sparselth.runs import (
    LINES,
    ReadOnly,
    RunRecord,
    cell_path,
    checkpoint_path,
    open_run,
    read,
    read_config,
    reporting,
)

Cli = Callable[..., tuple[int, str, str]]
FLAGS = ("--levels", "1", "--seeds", "0", "--arms", "ticket,reinit", "--workers", "1")


def older(record: RunRecord) -> None:
    """Make a folder that of a version before: config.json had no experiment, score, pattern, eval_images,
    exclude, code, augment or inputs, nothing a checksum, and headers of cells the digest of a configuration
    with its cells.
    """
    file = record.path / "config.json"
    data = json.loads(file.read_text())
    added = {"experiment": "imp", "score": "magnitude", "pattern": "unstructured", "eval_images": 0}
    added |= {"exclude": [], "code": []}
    assert {name: data.pop(name) for name in added} == added
    assert data["recipe"].pop("augment") == "none"
    assert data["recipe"].pop("inputs") == "standard"
    del data["sha256"]
    names = ("model", "dataset", "seeds", "arms", "levels", "rate", "scope", "one_shot", "rewind", "reinits")
    order = (*names, "device", "kernels", "recipe")  # in which it wrote them
    assert set(order) == set(data)
    file.write_text(json.dumps({name: data[name] for name in order}, indent=2) + "\n")
    for name in LINES:
        rows = [plain(json.loads(text)) for text in (record.path / name).read_bytes().splitlines()]
        (record.path / name).write_bytes(
            joined(line({k: v for k, v in row.items() if k != "proof"}) for row in rows)
        )
    for cell in (record.path / "cells").iterdir():
        arrays, header = load_arrays(cell)
        header["config"] = record.config.digest_before()
        cell.write_bytes(save(arrays, metadata={"sparselth": json.dumps(header)}))


@pytest.mark.whole
def test_a_run_of_the_version_before_is_read_shown_and_resumed_to_the_same_bits(
    finished: Callable[..., RunRecord], cli: Cli, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    record = finished(*FLAGS)
    table, whole = cli("show", str(record.path))[1], run_contents(record.path)
    older(record)
    before = run_contents(record.path)
    again = read(record.path)
    assert (again.config, again.points) == (record.config, record.points)
    assert again.config.digest == record.config.digest
    assert cli("show", str(record.path))[1] == table
    listed = " ".join(cli("ls", "runs", "--out", str(record.path.parent))[1].split())
    assert listed.startswith("run lenet-300-100 on mnist5k, 1 level, seed 0, 100 steps, iterative")
    assert listed.endswith("rewound to step 0: finished")

    for cell in (record.path / "cells").glob("*-01.safetensors"):
        cell.unlink()
    assert read(record.path).complete  # lines are there; cells are looked for when it goes on
    code, _, err = cli("imp", "--resume", "--quiet", "--out", str(record.path))
    assert code == 0
    assert err.count("\n") == 1
    assert "cells/seed0-ticket-01.safetensors is missing; cells/seed0-reinit-01.safetensors is missing" in err
    assert run_contents(record.path) == whole  # every file is of this version now
    assert before["cells/seed0-ticket-00.safetensors"] != whole["cells/seed0-ticket-00.safetensors"]
    again = read(record.path)
    assert (again.proven, again.damage) == (True, "")
    assert untimed(again.points) == untimed(record.points)

    flags = [*FLAGS, "--model", "lenet-300-100", "--dataset", "mnist5k", "--steps", "100", "--quiet"]
    assert cli("imp", *flags, "--out", str(record.path))[0] == 0
    code, _, err = cli("imp", *flags, "--score", "random", "--out", str(record.path))
    assert code == 1
    assert "holds a run with another score (magnitude there, random here)" in err


def untimed(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in point.items() if "seconds" not in name} for point in points]


@pytest.mark.whole
def test_a_config_json_that_is_none_is_named(finished: Callable[..., RunRecord]) -> None:
    file = finished(*FLAGS).path / "config.json"
    good = json.loads(file.read_text())
    for content, says in (
        ("{", "cannot be read as a configuration"),
        (json.dumps(good | {"rate": 0.25}), "was altered after it was written; restore it"),
        (json.dumps(good | {"levels": "1"}), "`levels` 1: expected a whole number"),
        (json.dumps(good | {"levels": 0}), "`levels` 0: expected 1 or more"),
        ("[" * 10**5, "cannot be read as a configuration"),
        ("[]", "expected a JSON object, found \\[\\]"),
        (json.dumps(good | {"speed": 9}), "unknown speed; it was written by another version"),
        (json.dumps(good | {"experiment": "strng"}), "unknown experiment 'strng'"),
    ):
        file.write_text(content)
        with pytest.raises(SparselthError, match=says) as raised:
            read_config(file.parent)
        assert str(file) in str(raised.value)


@pytest.mark.whole
def test_a_run_whose_plugin_is_not_there_says_so(finished: Callable[..., RunRecord]) -> None:
    record = finished(*FLAGS)
    environment, config = record.path / "environment.json", record.path / "config.json"
    data, mine = json.loads(environment.read_text()), str(Path("mine.py").absolute())
    environment.write_text(json.dumps(sealed(data | {"plugins": [mine]})))
    assert read_config(record.path) == record.config  # nothing in it needs the plugin
    config.write_text(config.read_text().replace('"reinit"', '"redraw"'))
    with pytest.raises(SparselthError, match=rf"was begun with `plugin` {mine}; give it again \(unknown arm"):
        read_config(record.path)


# ---- folders of an experiment whose cells cost nothing, by hand

CONFIG = Simulated(chains=(0, 1), levels=2)
CELLS = CONFIG.cells()
HERE: dict[str, Any] = {
    "packages": {"torch": "2"}, "cpu": "mine", "data_sha256": "0", "dataset": "mnist",
    "break_even": {"fc1": "0.5", "fc2": 1},
}  # fmt: skip


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment is known, and nobody waits for the disk."""
    monkeypatch.setattr(EXPERIMENTS, "things", dict(EXPERIMENTS.items()) | {"simulated": Simulated})
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def begun(path: Path, stop: int = 9, config: Simulated = CONFIG, **environment: Any) -> None:
    """So many cells of a run, one after another, in the order of `cells()`."""
    with open_run(path, config, HERE | environment, resume=True) as folder:
        for cell in config.cells()[len(folder.finished) : stop]:
            folder.add(config.compute([cell], Place(path, None, {})) or [])
        if stop > len(config.cells()):
            folder.complete()


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_begins_with_what_it_is(tmp_path: Path, simulated: None) -> None:
    path = tmp_path / "a" / "run"
    with open_run(path, CONFIG, HERE, resume=False) as folder:
        names = {file.name for file in path.iterdir()}
        assert names == {".lock", "cells", "checkpoints", "config.json", "environment.json"}
        assert (path / "config.json").read_bytes() == dump(sealed(CONFIG.to_json()))
        assert (path / "environment.json").read_bytes() == dump(sealed(HERE))
        assert (folder.path, folder.config, folder.digest) == (path, CONFIG, CONFIG.digest)
        assert (folder.damage, folder.read_only, folder.finished, folder.missing) == ("", False, set(), 6)
        assert folder.break_even == {"fc1": 0.5, "fc2": 1.0}
        with pytest.raises(SparselthError, match="is running this run"), open_run(path, CONFIG, HERE, True):
            pass
    with open_run(path, CONFIG, HERE, resume=False):
        pass  # the lock is open


def test_lines_of_a_cell_carry_their_proof(tmp_path: Path, simulated: None) -> None:
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        for cell in CELLS[:2]:
            checkpoint_path(tmp_path, cell).write_bytes(b"")
        done = CONFIG.compute(CELLS[:1], Place(tmp_path, None, {})) or []
        assert folder.add(done) == []
        more = CONFIG.compute(CELLS[1:2], Place(tmp_path, None, {})) or []
        assert folder.add(more) == []
        assert not [*(tmp_path / "checkpoints").iterdir()]
        assert folder.finished == {*CELLS[:2]}
        assert (folder.missing, folder.lost) == (4, [])
        sums = [file_sum(cell_path(tmp_path, cell)) for cell in CELLS[:2]]
        assert folder.files == dict(zip(CELLS, sums, strict=False))
    evaluations = [[line(one) for one in cell.evaluations] for cell in (*done, *more)]
    assert (tmp_path / "evaluations.jsonl").read_bytes() == joined(
        one for some in evaluations for one in some
    )
    who = [{"seed": 0, "arm": "number", "level": level, "draw": 0} for level in (0, 1)]
    assert (tmp_path / "timings.jsonl").read_bytes() == joined(
        sealed_line({**w, **cell.timings}) for w, cell in zip(who, (*done, *more), strict=True)
    )
    proofs = [
        {"config": CONFIG.digest, "needs": needs, "evaluations": checksum(*lines), "file": file}
        for needs, lines, file in zip(({}, {CELLS[0].key: sums[0]}), evaluations, sums, strict=True)
    ]
    assert (tmp_path / "cells.jsonl").read_bytes() == joined(
        sealed_line({**w, **cell.line, "proof": proof})
        for w, cell, proof in zip(who, (*done, *more), proofs, strict=True)
    )
    record = read(tmp_path)
    assert (record.path, record.config, record.proven, record.damage) == (tmp_path, CONFIG, True, "")
    pairs = zip(who, (*done, *more), strict=True)
    assert record.points == [w | cell.line | cell.timings for w, cell in pairs]
    assert record.evaluations == done[0].evaluations + more[0].evaluations
    assert record.files == folder.files
    assert record.by_level == {("number", level): [record.points[level]] for level in (0, 1)}
    assert record.planned == {("number", level): 2 for level in range(3)}
    assert (record.complete, record.diverged, record.not_computed) == (False, [], [])


def test_what_diverged_is_recorded_and_what_needs_it_is_not_missing(tmp_path: Path, simulated: None) -> None:
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        folder.add(CONFIG.compute(CELLS[:1], Place(tmp_path, None, {})) or [])
        checkpoint_path(tmp_path, CELLS[1]).write_bytes(b"")
        folder.diverge(CELLS[1], "it grew")
        assert not checkpoint_path(tmp_path, CELLS[1]).exists()
        assert (folder.lost, folder.missing) == ([CELLS[1], CELLS[2]], 3)
        with pytest.raises(SparselthError, match=rf"^{tmp_path}: .*; continue with `resume`$"):
            folder.complete()
        record = read(tmp_path)
        assert (record.not_computed, record.complete) == ([CELLS[2]], False)
        for cell in CELLS[3:]:
            assert not record.complete
            folder.add(CONFIG.compute([cell], Place(tmp_path, None, {})) or [])
            record = read(tmp_path)
        folder.complete()
        assert [(one["seed"], one["level"], one["why"]) for one in record.diverged] == [(0, 1, "it grew")]
        assert (record.complete, folder.missing) == (True, 0)
        assert [Cell.of(one) for one in record.points] == [CELLS[0], *CELLS[3:]]
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        assert folder.diverged == {CELLS[1]}
        assert folder.missing == 0


def test_a_run_that_ends_has_its_lines_in_order(tmp_path: Path, simulated: None) -> None:
    begun(tmp_path / "whole")
    path = tmp_path / "run"
    with open_run(path, CONFIG, HERE, resume=False) as folder:
        for cell in (CELLS[3], CELLS[0], CELLS[4], CELLS[1], CELLS[5], CELLS[2]):
            folder.add(CONFIG.compute([cell], Place(path, None, {})) or [])
        record = read(path)
        assert [Cell.of(one) for one in record.points] == CELLS
        assert files_of(path)["cells.jsonl"] != files_of(tmp_path / "whole")["cells.jsonl"]
        folder.complete()
    whole = files_of(tmp_path / "whole")
    assert files_of(path) == whole
    (path / "cells.jsonl").write_bytes(b"".join(reversed(whole["cells.jsonl"].splitlines(keepends=True))))
    with open_run(path, CONFIG, HERE, resume=False):
        assert files_of(path)["cells.jsonl"] == whole["cells.jsonl"]


def test_what_was_computed_from_another_file_is_open_again(tmp_path: Path, simulated: None) -> None:
    begun(tmp_path)
    before = files_of(tmp_path)
    cell_path(tmp_path, CELLS[0]).unlink()
    other = Simulated(chains=(0, 1), levels=2)
    object.__setattr__(other, "machine", 1)
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:
        sums = {cell: file_sum(cell_path(tmp_path, cell)) for cell in CELLS[1:]}
        assert folder.damage == f"cells/{CELLS[0].key}.safetensors is missing"
        assert folder.finished == {*CELLS[1:]}
        was = hashlib.sha256(before[f"cells/{CELLS[0].key}.safetensors"]).hexdigest()[:16]
        assert folder.waiting == {CELLS[0]: [(CELLS[1], was)]}
        assert folder.add(other.compute(CELLS[:1], Place(tmp_path, None, {})) or []) == [CELLS[1]]
        assert folder.finished == {CELLS[0], *CELLS[2:]}
        assert folder.waiting == {CELLS[1]: [(CELLS[2], sums[CELLS[1]])]}
        assert [Cell.of(one) for one in read(tmp_path).points] == [CELLS[0], *CELLS[2:]]
        assert folder.add(other.compute(CELLS[1:2], Place(tmp_path, None, {})) or []) == [CELLS[2]]
    cell_path(tmp_path, CELLS[3]).unlink()
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:  # the same bits: nothing is open
        assert folder.add(CONFIG.compute(CELLS[3:4], Place(tmp_path, None, {})) or []) == []
        assert folder.finished == {*CELLS} - {CELLS[2]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"break_even": {}, "data_sha256": "1"}, None),
        ({"cpu": "yours"}, "processor mine there, yours here"),
        ({"packages": {"torch": "3"}}, "torch 2 there, 3 here"),
        ({"packages": {"torch": "3"}, "cpu": "a"}, "torch 2 there, 3 here; processor mine there, a here"),
        ({"packages": {}}, "environment.json cannot be read"),
        ({"packages": None}, "environment.json cannot be read"),
    ],
)
def test_another_machine_is_named(
    change: dict[str, Any], says: str | None, tmp_path: Path, simulated: None
) -> None:
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        assert folder.begun_elsewhere(HERE | change) == says
        (tmp_path / "environment.json").unlink()
        assert folder.begun_elsewhere(HERE) == "environment.json cannot be read"


@pytest.mark.parametrize("found", [None, [], {"a": "wide"}, {"a": None}, {"a": float("nan")}, {"a": 10**400}])
def test_a_break_even_that_is_no_number_is_named(found: Any, tmp_path: Path, simulated: None) -> None:
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        environment = HERE | {"break_even": found}
        (tmp_path / "environment.json").write_bytes(dump(sealed(environment)))
        says = rf"^{tmp_path}/environment.json: cannot be read \(.*\); begin the run in another `out`$"
        with pytest.raises(SparselthError, match=says):
            _ = folder.break_even


def test_an_unfinished_run_is_gone_on_with_where_that_is_asked_for(tmp_path: Path, simulated: None) -> None:
    begun(tmp_path, 2)
    before = files_of(tmp_path)
    with (
        pytest.raises(SparselthError) as raised,
        open_run(tmp_path, CONFIG, HERE, resume=False),
    ):
        pass
    hint = "add `resume` to go on, or choose another `out`"
    assert str(raised.value) == f"{tmp_path}: unfinished, 4 of 6 cells are missing; {hint}"
    assert files_of(tmp_path) == before
    cell_path(tmp_path, CELLS[1]).unlink()
    with pytest.raises(SparselthError) as raised, open_run(tmp_path, CONFIG, HERE, resume=False):
        pass
    why = f"cells/{CELLS[1].key}.safetensors is missing"
    assert str(raised.value) == f"{tmp_path}: unfinished, 5 of 6 cells are missing ({why}); {hint}"
    with (
        pytest.raises(SparselthError, match=r"begun on other images of that name \(mnist\); choose another"),
        open_run(tmp_path, CONFIG, HERE | {"data_sha256": "1"}, resume=True),
    ):
        pass
    unsaid = {name: value for name, value in HERE.items() if name != "data_sha256"}
    with open_run(tmp_path, CONFIG, unsaid, resume=True) as folder:
        assert folder.missing == 5
    begun(tmp_path)
    with open_run(tmp_path, CONFIG, HERE | {"data_sha256": "1"}, resume=False) as folder:
        assert folder.missing == 0  # nothing of it is computed any more
    for change in ({"rate": 0.25}, {"levels": 1}, {"levels": 3}):
        with pytest.raises(SparselthError), open_run(tmp_path, replace(CONFIG, **change), HERE, resume=False):
            pass
    (tmp_path / "environment.json").write_bytes(b"{")
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        assert folder.damage == "environment.json is not what was written"
        assert (tmp_path / "environment.json").read_bytes() == b"{"
    cell_path(tmp_path, CELLS[5]).unlink()
    with (
        pytest.raises(SparselthError, match=r"environment.json: cannot be read .* begin the run in"),
        open_run(tmp_path, CONFIG, HERE, resume=True),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_read_where_that_is_enough(
    tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path / "half", 3)
    begun(tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    (tmp_path / "whole" / "cells" / "x.tmp").write_bytes(b"")
    before = files_of(tmp_path)

    def locked(path: Path) -> Any:
        raise ReadOnly(f"cannot write {path}")

    monkeypatch.setattr(runs, "locked", locked)
    with open_run(tmp_path / "whole", CONFIG, HERE, resume=False) as folder:
        assert (folder.read_only, folder.missing, len(folder.finished)) == (True, 0, 6)
    for name in ("half", "empty"):
        with pytest.raises(ReadOnly, match=name), open_run(tmp_path / name, CONFIG, HERE, resume=True):
            pass
    assert files_of(tmp_path) == before


def test_a_run_that_goes_on_remembers_plugins_and_drops_what_is_none(
    tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path, 2, plugins=["a.py", "b.py"])
    for name in ("checkpoints/x.tmp", "cells/y.tmp", "z.tmp"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(runs, "plugins", lambda: (Path("b.py"), Path("c.py")))
    header = {"schema": "sparselth.checkpoint/1", "config": CONFIG.digest}
    for cell in (CELLS[0], CELLS[2], CELLS[3]):
        save_arrays(checkpoint_path(tmp_path, cell), {}, header | {"cell": cell.key})
    save_arrays(checkpoint_path(tmp_path, CELLS[4]), {}, header | {"cell": CELLS[5].key})
    with open_run(tmp_path, CONFIG, HERE, resume=True):
        there = HERE | {"plugins": ["a.py", "b.py", "c.py"]}
        assert (tmp_path / "environment.json").read_bytes() == dump(sealed(there))
        left = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
        assert left == [f"{cell.key}.safetensors" for cell in (CELLS[2], CELLS[3])]
        assert not [*tmp_path.rglob("*.tmp")]
    larger = replace(CONFIG, levels=3)
    with open_run(tmp_path, larger, HERE, resume=True) as folder:
        assert read_config(tmp_path) == larger
        assert folder.missing == 6


def test_what_a_finished_run_left_is_removed(tmp_path: Path, simulated: None) -> None:
    """It was killed behind the last cell's lines, before that cell's checkpoint was removed."""
    begun(tmp_path, len(CELLS))
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:
        folder.complete()
    before = files_of(tmp_path)
    header = {"schema": "sparselth.checkpoint/1", "config": CONFIG.digest, "cell": CELLS[-1].key}
    save_arrays(checkpoint_path(tmp_path, CELLS[-1]), {}, header)
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:
        assert not folder.missing
    assert files_of(tmp_path) == before


def test_a_folder_holds_a_run_or_nothing_or_something_else(tmp_path: Path, simulated: None) -> None:
    assert not runs._begun(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(SparselthError, match="expected a folder for the run, found a file"):
        runs._begun(tmp_path / "file")
    path = tmp_path / "run"
    (path / "cells").mkdir(parents=True)
    (path / "cells" / "x.tmp").touch()
    (path / "y.tmp").touch()
    for name in (".lock", "environment.json"):
        (path / name).write_bytes(b"{")
    assert not runs._begun(path)
    some = ("cells/a.safetensors", "checkpoints/a", "diverged/a.json")
    for name in ("notes", "cells.jsonl", "config.json", *some):
        file = path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
        with pytest.raises(SparselthError, match=r"no config.json|cannot be read as a configuration"):
            runs._begun(path)
        file.unlink()
        if not [*file.parent.iterdir()]:
            file.parent.rmdir()
    (path / "config.json").write_bytes(dump(sealed(CONFIG.to_json())))
    (path / "cells.jsonl").touch()
    assert not runs._begun(path)
    (path / "cells.jsonl").write_bytes(b"x")
    assert runs._begun(path)


@pytest.mark.parametrize(
    "kind", [KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError]
)
@pytest.mark.parametrize("proven", [False, True])
def test_lines_that_no_report_can_be_made_of_are_named(kind: type[Exception], proven: bool) -> None:
    error = kind("a")
    whose = "" if proven else "written by an older version without checksums, and "
    record = RunRecord(Path("there"), CONFIG, [], [], proven=proven)
    with pytest.raises(SparselthError) as raised, reporting(record):
        raise error
    expected = f"there: {whose}its lines cannot be reported ({type(error).__name__}: {error})"
    assert str(raised.value) == expected
    assert raised.value.__cause__ is error


def test_the_mask_of_a_file_that_was_altered_is_not_read(tmp_path: Path) -> None:
    lenet = get_model("lenet-300-100")
    params, cell = lenet.params, Cell(3, "ticket", 1)
    mask = params.full_mask().numpy() & (np.arange(params.mask_size) % 3 > 0)
    config: Any = SimpleNamespace(model=lenet.name, network=lenet)
    (tmp_path / "cells").mkdir()
    file = cell_path(tmp_path, cell)
    tickets.save(file, params, tickets.Content(mask, np.zeros(params.size, np.float32)), cell=cell.key)
    for files in ({}, {cell: file_sum(file)}):
        record = RunRecord(tmp_path, config, [], [], files=files)
        for spec in params.weights:
            found = record.mask(3, 1, spec.name)
            assert np.array_equal(found, mask[spec.span].reshape(spec.matrix))
    record = RunRecord(tmp_path, config, [], [], files={cell: "0" * 16})
    with pytest.raises(SparselthError) as raised:
        record.mask(3, 1, "fc1.weight")
    again = "continue the run with `resume`, which computes it again"
    assert str(raised.value) == f"{file}: is not what was written; {again}"
    file.unlink()
    with pytest.raises(SparselthError, match=rf"^{file}: cannot be read \(No such file or directory\)$"):
        record.mask(3, 1, "fc1.weight")


def unproven(path: Path) -> None:
    """Make a folder that of the version before: nothing has a checksum."""
    for name in LINES:
        rows = [plain(json.loads(text)) for text in (path / name).read_bytes().splitlines()]
        lines = [line({key: value for key, value in row.items() if key != "proof"}) for row in rows]
        (path / name).write_bytes(joined(lines))
    for name in ("config.json", "environment.json"):
        (path / name).write_bytes(dump(plain(json.loads((path / name).read_bytes()))))
    for file in (path / "cells").iterdir():
        arrays, header = load_arrays(file)
        text = json.dumps(header | {"config": CONFIG.digest_before()})
        file.write_bytes(save(arrays, metadata={"sparselth": text}))


def test_times_that_are_lost_stay_unknown_and_files_are_looked_at_when_they_are_used(
    tmp_path: Path, simulated: None
) -> None:
    begun(tmp_path)
    kept = (tmp_path / "timings.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "timings.jsonl").write_bytes(b"".join(kept[1:]))
    cell_path(tmp_path, CELLS[2]).write_bytes(b"torn")
    record = read(tmp_path)
    assert record.damage == "timings.jsonl lacks seed 0 number level 0, whose times stay unknown"
    assert len(record.points) == 6
    first, *rest = record.points
    assert (first["train_seconds"], first["step_seconds"]) == (None, None)
    assert {one["train_seconds"] for one in rest} == {0.1}


def test_a_run_of_the_version_before_is_believed_by_its_headers(tmp_path: Path, simulated: None) -> None:
    begun(tmp_path, 2)
    unproven(tmp_path)
    (tmp_path / "diverged").mkdir()
    for cell, needs in ((CELLS[3], {}), (CELLS[2], {CELLS[1].key: ""}), (CELLS[1], {CELLS[0].key: ""})):
        facts = {"why": "it grew", "config": CONFIG.digest, "needs": needs}
        who = {"seed": cell.seed, "arm": cell.arm, "level": cell.level, "draw": cell.draw}
        (tmp_path / "diverged" / f"{cell.key}.json").write_bytes(dump(sealed(who | facts)))
    record = read(tmp_path)
    assert (record.proven, record.damage, record.files) == (False, "", {})
    assert [Cell.of(one) for one in record.points] == CELLS[:2]
    assert [Cell.of(one) for one in record.diverged] == CELLS[2:4]  # a finished cell has not
    shutil.rmtree(tmp_path / "diverged")
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:
        assert (folder.damage, folder.missing) == ("", 4)
    assert read(tmp_path).proven
    (tmp_path / "environment.json").write_bytes(dump(HERE))  # now without its checksum
    with (
        pytest.raises(SparselthError, match=r"environment.json: cannot be read \(it has no checksum\)"),
        open_run(tmp_path, CONFIG, HERE, resume=True),
    ):
        pass


def test_what_diverges_at_once_has_no_checkpoint(tmp_path: Path, simulated: None) -> None:
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        folder.diverge(CELLS[0], "it grew")
        assert folder.lost == CELLS[:3]
        (tmp_path / "environment.json").write_bytes(dump(sealed(HERE | {"break_even": {"a": 1e999}})))
        with pytest.raises(SparselthError, match=r"cannot be read \(a break-even is no number\)"):
            _ = folder.break_even


def test_a_finished_run_is_left_as_it_is_unless_something_is_wrong(
    tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path)
    (tmp_path / "x.tmp").touch()
    before = files_of(tmp_path)
    monkeypatch.setattr(runs, "plugins", lambda: (Path("c.py"),))
    with open_run(tmp_path, CONFIG, HERE, resume=True):
        pass
    assert files_of(tmp_path) == before
    evaluations = tmp_path / "evaluations.jsonl"
    first = before["evaluations.jsonl"].splitlines(keepends=True)[0]
    evaluations.write_bytes(before["evaluations.jsonl"] + first)
    with open_run(tmp_path, CONFIG, HERE, resume=False) as folder:
        assert (folder.missing, evaluations.read_bytes()) == (0, before["evaluations.jsonl"])
        assert folder.damage == "evaluations.jsonl, line 19, is a second one of seed 0 number level 0"
    assert json.loads((tmp_path / "environment.json").read_bytes())["plugins"] == ["c.py"]
    assert not (tmp_path / "x.tmp").exists()
    half = tmp_path / "half"
    begun(half, 2)
    (half / "x.tmp").touch()
    with open_run(half, CONFIG, HERE, resume=True) as folder:
        assert (folder.damage, (half / "x.tmp").exists()) == ("", False)


def test_while_a_run_goes_on_lines_are_held_against_their_checksums_and_files_are_not(
    tmp_path: Path, simulated: None
) -> None:
    begun(tmp_path, 5)
    cell_path(tmp_path, CELLS[0]).unlink()
    other = Simulated(chains=(0, 1), levels=2)
    object.__setattr__(other, "machine", 1)
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:
        folder.add(CONFIG.compute(CELLS[5:], Place(tmp_path, None, {})) or [])
        file, rows = tmp_path / "cells.jsonl", (tmp_path / "cells.jsonl").read_bytes().splitlines()
        assert [json.loads(row)["level"] for row in rows] == [1, 2, 0, 1, 2]
        rows[-1] = line(plain(json.loads(rows[-1])))
        file.write_bytes(joined(rows))
        gone = cell_path(tmp_path, CELLS[3])
        kept = gone.read_bytes()
        gone.unlink()
        again = folder.add(other.compute(CELLS[:1], Place(tmp_path, None, {})) or [])
        assert {*again} == {CELLS[1], CELLS[5]}
        assert folder.finished == {CELLS[0], *CELLS[2:5]}
        for cell in (CELLS[1], CELLS[5], CELLS[2]):
            done = other if cell.seed == 0 else CONFIG
            gone.write_bytes(kept)
            folder.add(done.compute([cell], Place(tmp_path, None, {})) or [])
        gone.unlink()
        folder.complete()
        rows = file.read_bytes().splitlines()
        rows[2] = line(plain(json.loads(rows[2])))
        file.write_bytes(joined(rows))
        with pytest.raises(
            SparselthError, match=r"cells.jsonl, line 3, is not what was written; continue with"
        ):
            folder.complete()


def test_cells_that_end_together_are_recorded_together(tmp_path: Path, simulated: None) -> None:
    begun(tmp_path)
    for cell in (CELLS[0], CELLS[3]):
        cell_path(tmp_path, cell).unlink()
    other = Simulated(chains=(0, 1), levels=2)
    object.__setattr__(other, "machine", 1)
    with open_run(tmp_path, CONFIG, HERE, resume=True) as folder:
        done = other.compute(CELLS[:1], Place(tmp_path, None, {})) or []
        done += CONFIG.compute(CELLS[3:4], Place(tmp_path, None, {})) or []
        assert folder.add(done) == [CELLS[1]]  # the other one has the same bits
        record = read(tmp_path)
        assert record.damage == ""
        totals = {Cell.of(point): point["total"] for point in record.points}
        assert [totals[one.cell] for one in done] == [one.line["total"] for one in done]
        assert [one["partial"] for one in record.evaluations[:3]] == [
            one["partial"] for one in done[0].evaluations
        ]


def test_what_a_version_before_wrote_is_proven_when_it_goes_on(
    tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = list[Any](), Simulated.digest_before

    def digest_before(self: Simulated, written: Any = None) -> str:
        asked.append(written)
        return real(self, written)

    monkeypatch.setattr(Simulated, "digest_before", digest_before)
    begun(tmp_path / "whole", 5)
    begun(tmp_path / "run", 5)
    whole, path = files_of(tmp_path / "whole"), tmp_path / "run"
    unproven(path)
    assert files_of(path) != whole
    with open_run(path, CONFIG, HERE, resume=True) as folder:
        assert folder.files == {cell: file_sum(cell_path(tmp_path / "whole", cell)) for cell in CELLS[:5]}
    assert asked[-1] == CONFIG.to_json()  # its lists as they were written
    assert files_of(path) == whole
    unproven(path)
    cell_path(path, CELLS[0]).unlink()
    arrays, header = load_arrays(cell_path(path, CELLS[3]))
    bare = {name: value for name, value in header.items() if name != "config"}  # as the first version wrote
    save_arrays(cell_path(path, CELLS[3]), arrays, bare)
    with open_run(path, CONFIG, HERE, resume=True) as folder:
        assert folder.finished == {*CELLS[1:5]}
        assert folder.waiting == {CELLS[0]: [(CELLS[1], "")]}
        assert load_arrays(cell_path(path, CELLS[3]))[1] == bare
        assert load_arrays(cell_path(path, CELLS[4]))[1] == header | {
            "cell": CELLS[4].key,
            "config": CONFIG.digest,
        }
    assert read(path).proven
