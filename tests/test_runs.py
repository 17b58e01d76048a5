"""Run folders: of the version before, of a plugin that is not there, of a config.json that is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from sparselth.errors import SparselthError
from sparselth.files import joined, line, load_arrays, plain, sealed
from sparselth.runs import LINES, RunRecord, read, read_config

Cli = Callable[..., tuple[int, str, str]]
FLAGS = ("--levels", "1", "--seeds", "0", "--arms", "ticket,reinit", "--workers", "1")


def older(record: RunRecord) -> None:
    """Make a folder that of a version before: config.json had no experiment, score or eval_images, nothing a
    checksum, and headers of cells the digest of a configuration with its cells.
    """
    file = record.path / "config.json"
    data = json.loads(file.read_text())
    assert [data.pop(name) for name in ("experiment", "score", "eval_images")] == ["imp", "magnitude", 0]
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


def test_a_run_whose_plugin_is_not_there_says_so(finished: Callable[..., RunRecord]) -> None:
    record = finished(*FLAGS)
    environment, config = record.path / "environment.json", record.path / "config.json"
    data, mine = json.loads(environment.read_text()), str(Path("mine.py").absolute())
    environment.write_text(json.dumps(sealed(data | {"plugins": [mine]})))
    assert read_config(record.path) == record.config  # nothing in it needs the plugin
    config.write_text(config.read_text().replace('"reinit"', '"redraw"'))
    with pytest.raises(SparselthError, match=rf"was begun with `plugin` {mine}; give it again \(unknown arm"):
        read_config(record.path)
