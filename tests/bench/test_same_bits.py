"""bench/same_bits.py: the comparison of two runs finds what is put there, and no more; times are judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import same_bits
from sparselth.files import load_arrays, save_arrays
from sparselth.runs import RunRecord


@pytest.fixture
def runs(finished: Callable[..., RunRecord], tmp_path: Path) -> tuple[Path, Path]:
    """Two equal runs, the second to be damaged."""
    before = finished("--levels", "1", "--seeds", "0").path.resolve()
    shutil.copytree(before, tmp_path / "after")
    return before, tmp_path / "after"


def rewrite(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_runs(runs: tuple[Path, Path]) -> None:
    found = same_bits.compare(*runs)
    assert (found.differences, found.notes) == ([], [])
    assert found.cells == 4
    files = [load_arrays(file)[0] for file in (runs[0] / "cells").iterdir()]
    assert found.arrays == sum(map(len, files))
    assert found.numbers == sum(array.size for arrays in files for array in arrays.values())


@pytest.mark.parametrize("kind", ["mask", "kept", "bias", "rewind"])
def test_a_flipped_bit(runs: tuple[Path, Path], kind: str) -> None:
    """The lowest bit of the first number of one array, wherever it is."""
    file = runs[1] / "cells" / "seed0-ticket-00.safetensors"
    arrays, header = load_arrays(file)
    name = next(name for name in arrays if name.startswith(f"{kind}/"))
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1).view(np.uint8)[0] ^= 1
    save_arrays(file, arrays, header)
    (line,) = same_bits.compare(*runs).differences
    assert line.startswith(f"cells/{file.name}: {name}: 1 of {arrays[name].size:,} numbers differ")
    assert "number 0" in line


def test_minus_zero_is_another_number(runs: tuple[Path, Path]) -> None:
    for run, zero in zip(runs, (0.0, -0.0), strict=True):
        file = run / "cells" / "seed0-ticket-00.safetensors"
        arrays, header = load_arrays(file)
        arrays["bias/fc1.bias"] = np.full(300, zero, np.float32)
        save_arrays(file, arrays, header)
    (line,) = same_bits.compare(*runs).differences
    assert "bias/fc1.bias: 300 of 300 numbers differ" in line


def test_arrays_by_name_shape_and_dtype(runs: tuple[Path, Path]) -> None:
    file = runs[1] / "cells" / "seed0-ticket-01.safetensors"
    arrays, header = load_arrays(file)
    arrays["bias/fc1.weight"] = arrays.pop("bias/fc1.bias")
    arrays["bias/fc2.bias"] = arrays["bias/fc2.bias"].astype(np.float64)
    arrays["bias/fc3.bias"] = arrays["bias/fc3.bias"][:, None]
    save_arrays(file, arrays, header)
    assert same_bits.compare(*runs).differences == [
        f"cells/{file.name}: bias/fc1.bias is missing in AFTER",
        f"cells/{file.name}: bias/fc1.weight is in AFTER alone",
        f"cells/{file.name}: bias/fc2.bias was float32 [100], is float64 [100]",
        f"cells/{file.name}: bias/fc3.bias was float32 [10], is float32 [10, 1]",
    ]


def test_a_missing_cell(runs: tuple[Path, Path]) -> None:
    """Its file, its line and its evaluations, each by itself; and the same as one too many."""
    (runs[1] / "cells" / "seed0-reinit-01.safetensors").unlink()
    rewrite(runs[1] / "cells.jsonl", lambda lines: lines.pop())
    rewrite(runs[1] / "evaluations.jsonl", lambda lines: lines.pop(0))
    first = json.loads((runs[0] / "evaluations.jsonl").read_text().splitlines()[0])["step"]
    where = "seed 0, arm random-mask, level 1, draw 0", f"seed 0, arm ticket, level 0, draw 0, step {first}"
    for order, how in ((runs, "missing in AFTER"), (runs[::-1], "in AFTER alone")):
        assert same_bits.compare(*order).differences == [
            f"cells.jsonl, {where[0]}: {how}",
            f"evaluations.jsonl, {where[1]}: {how}",
            f"cells/seed0-reinit-01.safetensors: {how}",
        ]


@pytest.mark.parametrize(("file", "name"), [("cells", "final_accuracy"), ("evaluations", "validation_loss")])
def test_a_changed_metric(runs: tuple[Path, Path], file: str, name: str) -> None:
    """By one unit in the last place; a new key is a note."""

    def change(lines: list[dict[str, Any]]) -> None:
        lines[-1][name] = float(np.nextafter(lines[-1][name], 1e9))
        lines[0]["new"] = 1

    rewrite(runs[1] / f"{file}.jsonl", change)
    found = same_bits.compare(*runs)
    (line,) = found.differences
    assert f"{file}.jsonl" in line
    assert f": {name} was " in line
    assert found.notes == [f"{file}.jsonl has new keys: new"]


def test_configurations_may_gain_fields_and_nothing_else(runs: tuple[Path, Path]) -> None:
    file = runs[1] / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "zeal": "great", "recipe": {**config["recipe"], "decay": 0}}))
    found = same_bits.compare(*runs)
    assert found.differences == []
    assert found.notes == ['config.json has new fields: recipe.decay 0, zeal "great"']
    found = same_bits.compare(*runs[::-1])
    assert found.differences == ["config.json: recipe.decay is gone", "config.json: zeal is gone"]
    file.write_text(json.dumps({**config, "rate": 0.3}))
    assert same_bits.compare(*runs).differences == ["config.json: rate was 0.2, is 0.3"]


def test_runs_without_anything_are_not_equal(runs: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "cells").mkdir(parents=True)
    shutil.copy(runs[0] / "config.json", empty)
    assert same_bits.compare(empty, empty).differences == ["nothing was computed"]


def test_headers_are_notes(runs: tuple[Path, Path]) -> None:
    file = runs[1] / "cells" / "seed0-ticket-01.safetensors"
    arrays, header = load_arrays(file)
    save_file(arrays, file, metadata={"sparselth": json.dumps(header | {"config": "0", "new": 1})})
    rewrite(runs[1] / "cells.jsonl", lambda lines: lines[0].update(proof={"file": "0"}, sha256="0"))
    found = same_bits.compare(*runs)
    assert (found.differences, found.notes) == ([], ["headers of cells differ in config, new"])


# Rows and times


def row(**other: Any) -> dict[str, Any]:
    shared = {"implementation": "auto", "kind": "auto", "shape": "8x8", "batch": 1, "dtype": "fp32"}
    return shared | {"sparsity": 0.9, "mask": "random", "check": "passed"} | other


def keyed(*rows: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    return {same_bits._key(r): r for r in rows}


def test_rows_that_are_missing_new_or_failed() -> None:
    a, b = row(), row(implementation="dense")
    assert same_bits._same_rows(keyed(a, b), keyed(b, a)).verdict == "equal"
    for other in (keyed(a), keyed(a, b, row(batch=2)), keyed(a, b | {"check": "off"})):
        result = same_bits._same_rows(keyed(a, b), other)
        assert (result.verdict, result.bad, len(result.details)) == ("differs", True, 1)
    result = same_bits._same_rows(keyed(a), keyed(a | {"joules": 1}))
    assert (result.bad, result.details) == (False, ["note: rows have new columns: joules"])


def test_the_default_table_is_what_was_measured_and_what_was_left_out() -> None:
    a = {
        "rows": [row(), row(implementation="dense compiled")],
        "left_out": ["8x8, batch 2, fp32, random 90 %"],
    }
    b = {"rows": [row(batch=2)], "left_out": ["8x8, batch 1, fp32, random 90 %"]}
    assert same_bits._same_table(a, b).verdict == "equal"
    assert same_bits._same_table(a, {**b, "left_out": []}).bad
    assert same_bits._same_table(a, {**a, "rows": a["rows"][1:]}).bad


def test_choices_differ_when_no_round_agrees() -> None:
    x, y = same_bits._key(row()), same_bits._key(row(batch=2))
    a, b = {x: {"dense", "csr"}, y: {"dense"}}, {x: {"csr"}, y: {"dense"}}
    assert same_bits._same_choices(a, b, {}, {}).verdict == "equal"
    assert same_bits._same_choices(a, {**b, y: {"csr"}}, {}, {}).bad
    assert same_bits._same_choices({}, {}, {}, {}).bad


def test_choices_between_forms_that_take_as_long_do_not_differ() -> None:
    dense, csr = (same_bits._key(row(implementation=name)) for name in ("dense", "csr"))
    key = same_bits._key(row(implementation="auto"))
    a, b = {key: {"dense"}}, {key: {"csr"}}
    close, apart = {dense: [1.0, 1.3], csr: [1.1, 1.2]}, {dense: [1.0, 1.1], csr: [1.2, 1.3]}
    assert same_bits._same_choices(a, b, close, close).verdict == "equal"
    assert same_bits._same_choices(a, b, close, apart).bad
    assert same_bits._same_choices(a, b, apart, close).bad


def test_a_form_that_was_renamed_is_the_same_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def printed(name: str) -> str:
        return json.dumps({"rows": [row(implementation="auto", takes=name), row(implementation=name)]})

    revision = same_bits.Revision("a", tmp_path, tmp_path)
    documents = []
    for name in ("csr_packed", "csr_tiled"):
        monkeypatch.setattr(same_bits.Revision, "call", lambda *_, name=name, **__: printed(name))
        documents.append(same_bits._bench(revision, "--quick"))
    assert documents[0] == documents[1]


def test_times_of_rows_are_held_against_rows_of_torch() -> None:
    ours, dense = same_bits._key(row()), same_bits._key(row(implementation="dense"))
    kinds = {ours: "auto", dense: "dense"}
    times = {ours: [1.0, 1.01, 1.02], dense: [1.0, 1.0, 1.0]}
    slower = {**times, ours: [1.2, 1.25, 1.3]}
    assert not same_bits._row_times(times, times, kinds).bad
    assert same_bits._row_times(times, slower, kinds).bad
    noisy = same_bits._row_times(times, {**slower, dense: [1.3, 1.3, 1.3]}, kinds)
    assert (noisy.verdict, noisy.bad) == ("within noise", False)
    assert same_bits._row_times(times, {}, kinds).bad


@pytest.mark.parametrize(
    ("ratios", "said", "bad"),
    [
        ([1.04, 1.05, 1.06, 1.05, 1.04], "slower", True),
        ([1.0, 1.01, 0.99, 1.02, 1.0], "not slower", False),
        ([0.9, 1.1, 1.05, 1.06, 1.07], "nothing concluded", False),
    ],
)
def test_what_is_said_of_steps(ratios: list[float], said: str, bad: bool) -> None:
    text, found = same_bits.judge([(2.0, 2.0 * ratio) for ratio in ratios])
    assert text.endswith(said)
    assert found == bad


def test_the_interval_holds_the_median_often_enough() -> None:
    draws = np.random.default_rng(0).random((2000, 10))
    inside = sum(low <= 0.5 <= high for low, high in map(same_bits.interval, np.sort(draws).tolist()))
    assert inside / 2000 >= 0.9
    assert same_bits.interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    assert same_bits.interval([float(i) for i in range(10)]) == (1.0, 8.0)


# Revisions


@pytest.mark.host
def test_a_name_that_is_no_revision_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-revision"):
        same_bits.install("no-such-revision", "before", tmp_path)
