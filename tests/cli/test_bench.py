"""`sparselth bench`: one document, one table, files, and one line for what cannot be."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparselth.measure import race_layers as measure
from sparselth.report import bench_figures, bench_tables
from sparselth.runs import RunRecord

Cli = Callable[..., tuple[int, str, str]]
SMALL = ("bench", "--device", "cpu", "--quiet", "--shape", "32x48")

USAGE = {
    "--sparsity 1.0": "--sparsity 1.0: expected a number from 0 to below 1",
    "--sparsity -0.5": "--sparsity -0.5: expected a number from 0 to below 1",
    "--sparsity nan": "--sparsity nan: expected a number from 0 to below 1",
    "--sparsity most": "--sparsity most: expected a number",
    "--shape 4096": "--shape 4096: expected outputs x inputs such as 4096x4096",
    "--shape 4x4x7x7@3x3p0": "--shape 4x4x7x7@3x3p0: the kernel is larger than the padded image",
    "--shape 99999999x4": "--shape 99999999x4: expected sizes from 1 to 65,536",
    "--batch 0": "--batch 0: expected whole numbers from 1 on",
    "--batch many": "--batch many: expected whole numbers from 1 on",
    "--dtype fp8": "unknown dtype 'fp8': choose from fp32, tf32, bf16, fp16",
    "--dtype tf32 --device cpu": "--dtype tf32: a CPU has no TF32; use fp32",
    "--mask blok": "unknown mask 'blok': did you mean 'block'?",
    "--mask magnitude": "--mask magnitude: needs the tickets of a run, --run RUN",
    "--model lenet6": "unknown model 'lenet6': did you mean",
    "--model lenet5 --shape 4x4": "--model and --train: a whole network, without --shape",
    "--run there --model lenet5": "--run: the network is the run's",
    "--level 3": "--level and --seed: are those of a ticket",
    "--threads 0": "--threads 0: expected 1 or more",
    "--device gpu": "'gpu' is not one of",
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache of its own, floors that nothing reaches, no compiler, few rounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        measure.Anchors,
        "measure",
        lambda self: (
            self.bandwidth.update({1 << 15: 1e30}),
            self.rate.update(dict.fromkeys(self.dtypes, 1e30)),
        ),
    )
    monkeypatch.setattr("sparselth.measure.rivals.can_compile", lambda: False)


def one_line(err: str) -> str:
    (line,) = err.strip().splitlines()
    assert line.startswith("sparselth: ")
    return line


@pytest.mark.parametrize("flags", USAGE)
def test_usage(flags: str, cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("bench", *flags.split())
    assert code == 2
    assert USAGE[flags] in one_line(err)
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for flag, place in (("--out", "file/here"), ("--out", "/proc/here"), ("--csv", "file/rows.csv")):
        code, out, err = cli(*SMALL, flag, place)
        assert code == 1
        assert flag in one_line(err)
        assert not out
    assert (tmp_path / "file").read_text() == "mine"


def test_the_document_the_files_and_the_table(cli: Cli, tmp_path: Path) -> None:
    words = (*SMALL, "--shape", "4x3x3x3@8x8", "--batch", "1,2", "--sparsity", "0.5,0.9")
    code, out, err = cli(*words, "--out", "here", "--csv", "rows.csv")
    assert code == 0
    assert not err
    assert max(map(len, out.splitlines())) <= 110
    document = json.loads((tmp_path / "here" / "bench.json").read_text())
    assert document["schema"] == "sparselth.bench/1"
    assert document["device"]["type"] == "cpu"
    rows = document["rows"]
    assert {(r["shape"], r["batch"], r["sparsity"]) for r in rows} == {
        (shape, batch, sparsity)
        for shape in ("32x48", "4x3x3x3@8x8")
        for batch in (1, 2)
        for sparsity in (0.5, 0.9)
    }
    wanted = (
        "implementation shape batch dtype sparsity median_s iqr_s dense_best dense_median_s speedup floor_s "
        "floor_fraction weight_bytes dense_weight_bytes peak_bytes max_rel_error conversion_s pays_after mask"
    )
    assert all(set(wanted.split()) <= set(row) for row in rows)
    read = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [float(r["median_s"]) for r in read] == [r["median_s"] for r in rows]
    assert {f.name for f in (tmp_path / "here").iterdir()} == {
        "bench.json",
        *(f"{name}.{kind}" for name in ("speedup", "roofline", "memory") for kind in ("png", "svg")),
    }
    for name in ("32x48", "dense eager", "auto", "Break-even sparsity of 32x48"):
        assert name in out


def test_json_is_one_document_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli(*SMALL, "--batch", "1", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "sparselth.bench/1"
    assert {row["implementation"] for row in document["rows"]} >= {"dense eager", "auto"}
    assert [file.name for file in tmp_path.iterdir()] in ([], ["cache"])


def test_a_failed_check_is_exit_code_3(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LARGEST", dict.fromkeys(measure.LARGEST, 0.0))
    code, out, _ = cli(*SMALL, "--batch", "2", "--json")
    assert code == 3
    failed = [row for row in json.loads(out)["rows"] if row["check"] != "passed"]
    assert failed
    assert all(row["median_s"] is None for row in failed)


def test_without_a_gpu_the_cpu_is_measured_and_said(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = cli("bench", "--device", "cuda", "--shape", "16x16", "--batch", "1", "--json")
    assert code == 0
    assert one_line(err) == "sparselth: torch finds no CUDA device; the CPU is measured instead"
    assert json.loads(out)["device"]["type"] == "cpu"


def test_the_masks_of_a_ticket(cli: Cli, imp: Callable[..., RunRecord]) -> None:
    record = imp("--levels", "3", "--seeds", "0", "--arms", "ticket")
    words = (
        "bench",
        "--device",
        "cpu",
        "--quiet",
        "--json",
        "--run",
        "run",
        "--mask",
        "magnitude",
        "--batch",
        "2",
    )
    code, out, _ = cli(*words, "--sparsity", "0.36")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert {row["shape"] for row in rows} == {"300x784", "100x300", "10x100"}
    (density,) = {row["density"] for row in rows if row["shape"] == "300x784"}
    assert density == pytest.approx(record.mask(0, 2, "fc1.weight").mean(), abs=1e-6)
    code, _, err = cli(*words, "--level", "9")
    assert code == 2
    assert "no finished ticket of level 9" in one_line(err)


def row(name: str, kind: str, speedup: float, **more: Any) -> dict[str, Any]:
    return {
        "implementation": name, "kind": kind, "shape": "8x8", "origin": "", "batch": 1, "dtype": "fp32",
        "sparsity": 0.9, "mask": "random", "block": None, "density": 0.1, "dead_rows": 0, "dead_columns": 0,
        "tiles_16": 1.0, "median_s": 1e-3 / speedup, "iqr_s": 1e-5, "samples": 9, "dense_best": "dense eager",
        "dense_median_s": 1e-3, "speedup": speedup, "floor_s": 1e-5, "floor_fraction": 0.1, "bytes": 100,
        "flops": 1000, "weight_bytes": 20, "dense_weight_bytes": 256, "peak_bytes": 400,
        "max_rel_error": 1e-7, "conversion_s": 0.1, "pays_after": 100, "takes": None, "check": "passed",
    } | more  # fmt: skip


def test_the_words_name_wins_losses_and_break_even() -> None:
    rows = []
    for batch, gains in ((1, {0.5: 0.5, 0.9: 2.0}), (64, {0.5: 2.0, 0.9: 4.0}), (256, {0.5: 0.2, 0.9: 0.5})):
        for sparsity, gain in gains.items():
            place = {"batch": batch, "sparsity": sparsity}
            rows += [row("dense eager", "dense", 1.0, **place), row("csr_linear", "ours", gain, **place)]
    rows.append(row("auto", "auto", 0.9, takes="dense"))
    rows.append(row("auto", "auto", 2.0, batch=256, sparsity=0.5))
    rows.append(row("auto", "auto", 0.95, batch=64, takes="dense", iqr_s=1e-4))
    said = " ".join(bench_tables.summary(rows).split())
    assert "random 90 %, batch 1: sparse wins on 8x8: 2.00x." in said
    assert "random 90 %, batch 256: use dense on 8x8." in said
    assert "batch 1 70 %; batch 64 at or below 50 %, the lowest measured; batch 256 none up to 90 %" in said
    assert "FLAGGED: auto is below 0.97x of dense in 1 of 3 cases: 0.90x on 8x8 at batch 1 (dense)." in said
    assert "auto is below 0.97x in 1 of 3 cases by no more than the spread of the times explains" in said
    assert "the least is 0.95x (auto on 8x8, batch 64, fp32, random 90 %)." in said
    assert "not measured" in bench_tables.summary(rows[2:4])
    noisy = [row("dense eager", "dense", 1.0), row("csr_linear", "ours", 9.0, iqr_s=1e-3)]
    assert "too noisy to say on 8x8" in bench_tables.summary(noisy)


def test_figures_need_enough_rows(tmp_path: Path) -> None:
    device = {
        "type": "cpu",
        "name": "x",
        "threads": 1,
        "torch": "2",
        "bytes_per_s": {"1": 1e9},
        "flops_per_s": {"fp32": 1e9},
    }
    assert bench_figures.draw([], device, tmp_path) == []
