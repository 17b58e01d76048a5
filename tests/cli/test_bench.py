"""`sparselth bench`: one document, one table, files, and one line for what cannot be."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparselth.errors import SparselthError
from sparselth.measure import race_layers as measure
from sparselth.measure import race_modules, race_networks
from sparselth.measure.case import Keep, Result
from sparselth.measure.memory import Memory
from sparselth.report import bench_figures, bench_tables, bench_words, drawing
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
    "--model lenet5 --sparsity 0.5,0.9": "--sparsity: a whole network is measured at one",
    "--strong --model lenet5": "--strong: layers of frozen weights, without --model",
    "--strong --mask block": "--strong: layers of frozen weights",
    "--data-dir here": "--data-dir: only the tickets of --run",
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
    assert max(map(len, out.splitlines())) <= 80
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
        "floor_fraction weight_bytes dense_weight_bytes peak_bytes max_rel_error conversion_s pays_after "
        "mask noisy"
    )
    assert all(set(wanted.split()) <= set(row) for row in rows)
    assert document["partial"] is False
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


def test_strong_layers_beside_dense(cli: Cli) -> None:
    flags = ("--strong", "--shape", "9x7x3x3@6x6/2", "--batch", "1,60", "--json")
    code, out, _ = cli(*SMALL, *flags)
    rows = json.loads(out)["rows"]
    assert code == 0, [(row["implementation"], row["check"]) for row in rows if row["check"] != "passed"]
    ours = [row for row in rows if row["implementation"] in ("seed_linear", "seed_conv2d")]
    assert [(row["shape"], row["batch"]) for row in ours] == [
        *(("32x48", 1), ("32x48", 60), ("9x7x3x3@6x6/2", 1), ("9x7x3x3@6x6/2", 60))
    ]
    assert all(row["mask"] == "strong" and row["sparsity"] == 0.5 and row["speedup"] for row in ours)
    assert [row["weight_bytes"] for row in ours] == [32 * 6, 32 * 6, 9 * 8, 9 * 8]
    assert all(row["dense_weight_bytes"] == 4 * 32 * 48 for row in ours[:2])


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
        "noisy": False, "like": "dense eager", "like_speedup": speedup, "like_noisy": False,
    } | more  # fmt: skip


def test_the_words_name_wins_losses_and_break_even() -> None:
    rows = []
    for batch, gains in ((1, {0.5: 0.5, 0.9: 2.0}), (64, {0.5: 2.0, 0.9: 4.0}), (256, {0.5: 0.2, 0.9: 0.5})):
        for sparsity, gain in gains.items():
            place = {"batch": batch, "sparsity": sparsity}
            rows += [row("dense eager", "dense", 1.0, **place), row("csr_linear", "ours", gain, **place)]
    rows.append(row("auto", "auto", 0.9, takes="dense"))
    rows.append(row("auto", "auto", 2.0, batch=256, sparsity=0.5))
    rows.append(row("auto", "auto", 0.95, batch=64, takes="dense", like_noisy=True))
    said = bench_words.summary(rows)
    assert "random 90 %, batch 1: sparse wins on 8x8: 2.00x." in said
    assert "random 90 %, batch 256: use dense on 8x8." in said
    assert "batch 1 70 %; batch 64 at or below 50 %, the lowest measured; batch 256 none up to 90 %" in said
    assert (
        "FLAGGED: auto beside dense with the same layout of input and output: below 0.97x in 1 of 3 cases: "
        "0.90x on 8x8 at batch 1 (dense); too noisy to say in 1 of 3 cases."
    ) in said
    assert "not measured" in bench_words.summary(rows[2:4])
    noisy = [row("dense eager", "dense", 1.0), row("csr_linear", "ours", 9.0, noisy=True)]
    assert "too noisy to say on 8x8" in bench_words.summary(noisy)
    assert "wins" not in bench_words.summary(noisy)


def swept(*points: tuple[float, float, bool]) -> str:
    """What is said of the break-even, of (sparsity, speed-up, whether noise decides it)."""
    rows = []
    for sparsity, gain, noisy in points:
        rows.append(row("dense eager", "dense", 1.0, sparsity=sparsity))
        rows.append(row("csr_linear", "ours", gain, sparsity=sparsity, noisy=noisy))
    (said,) = (line for line in bench_words.summary(rows).splitlines() if line.startswith("Break-even"))
    return said.partition("ones: ")[2].rstrip(".")


def test_noise_claims_no_break_even() -> None:
    low, high = (0.5, 0.5, False), (0.9, 2.0, False)
    assert swept(low, high) == "batch 1 70 %"
    assert swept(low, (0.8, 9.0, True), high) == "batch 1 from 50 % to 90 %, too noisy between"
    assert swept(low, (0.8, 0.7, False), (0.85, 1.4, True), high) == (
        "batch 1 from 80 % to 90 %, too noisy between"
    )
    assert swept((0.5, 0.5, True), (0.9, 2.0, True)) == "batch 1 too noisy to say"
    assert swept(low, (0.9, 2.0, True)) == "batch 1 none up to 50 %, too noisy above"
    assert swept((0.5, 0.5, True), high) == "batch 1 at or below 90 %, too noisy below"
    assert swept((0.3, 0.1, True), low, high, (0.95, 0.1, True)) == "batch 1 70 %"


def test_a_table_marks_what_noise_decides_and_fits_its_width() -> None:
    best = [row("dense eager", "dense", 1.0), row("sparse_conv2d_rows", "ours", 123.0, noisy=True)]
    best += [row("auto", "auto", 0.97, takes="sparse_conv2d_rows"), row("CSR", "torch", 1.0, check="off")]
    for every in (False, True):
        for width in (60, 80, 95, 140):
            lines = bench_tables.table(best, every, width).splitlines()
            assert max(map(len, lines)) <= width
            assert sum("123x?" in line for line in lines) == 1
            assert ("floor" in lines[0]) == (width > 80 or (every and width == 80))
            assert ("pays" in lines[0]) == (width == 140)
            said = bench_tables.legend("cpu", every, width)
            assert ("pays: after" in said) == (width == 140)
            assert "speed-up: over dense at its best on the same line" in said
        assert sum("FAILED" in line for line in bench_tables.table(best, True).splitlines()) == 1
    assert "?" not in bench_tables.table([row("dense eager", "dense", 1.0), row("CSR", "torch", 2.0)])


DEVICE = {
    "type": "cpu",
    "name": "a machine",
    "threads": 1,
    "torch": "2",
    "bytes_per_s": {"32768": 1e11, "1000000000": 1e10},
    "flops_per_s": {"fp32": 1e11},
}


def test_figures_need_enough_rows(tmp_path: Path) -> None:
    assert bench_figures.draw([], DEVICE, tmp_path) == []


def test_points_of_the_roofline_have_names() -> None:
    rows = []
    for i, shape in enumerate(("300x784", "64x64x3x3@8x8", "2048x2048")):
        place = {"shape": shape, "bytes": 100 * 4**i, "flops": 1000 * 9**i}
        rows += [row("dense eager", "dense", 1.0, **place), row("csr_linear", "ours", 2.0, **place)]
        rows += [row("CSR", "torch", 1.5, **place), row("auto", "auto", 2.0, **place)]
    fig = bench_figures._roofline(rows, DEVICE)
    assert fig
    (axes,) = fig.axes
    texts = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in texts} == {r["shape"] for r in rows}
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    labels = [line.get_label() for line in axes.lines]
    assert labels[:3] == ["dense eager", "CSR", "csr_linear"]
    assert all(len(line.get_xdata()) for line in axes.lines)
    crowd = [{**r, "batch": batch} for r in rows for batch in range(1, 40)]
    fig = bench_figures._roofline(crowd, DEVICE)
    assert fig
    texts = [text for text in fig.axes[0].texts if text.get_text()]
    assert len(texts) == 3  # a layer's, not one for each batch size
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_legends_name_what_is_there() -> None:
    """One sparsity and one batch size: lines of a single point are seen, too."""
    names = [f"form {i}" for i in range(11)]  # more than there are colours
    rows = [row("dense eager", "dense", 1.0), *(row(name, "ours", 2.0) for name in names)]
    fig = bench_figures._memory(rows, DEVICE)
    assert fig
    top, bottom = fig.axes
    for axes in (top, bottom):
        for line in axes.lines:
            seen = len(line.get_xdata()) > 1 or line.get_marker() not in ("None", "", None)
            assert seen, line.get_label()
    looks = {(line.get_color(), line.get_marker()) for line in top.lines}
    assert len(looks) == len(top.lines) == len(names) + 2
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "values alone", "dense"]


def test_speed_ups_that_noise_decides_are_hollow() -> None:
    rows = []
    for sparsity, gain, noisy in ((0.3, 0.5, False), (0.5, 3.0, True), (0.9, 2.0, False), (0.95, 3.0, False)):
        rows.append(row("dense eager", "dense", 1.0, sparsity=sparsity))
        rows.append(row("csr_linear", "ours", gain, sparsity=sparsity, noisy=noisy))
    fig = bench_figures._speedup(rows, DEVICE)
    assert fig
    (axes,) = fig.axes
    (hollow,) = (line for line in axes.lines if line.get_markerfacecolor() == "white")
    assert list(hollow.get_xdata()) == [50]
    assert not [line for line in axes.lines if line.get_marker() == "x"]  # no break-even across it
    assert "hollow: noise decides" in fig.get_suptitle()


def test_looks_differ() -> None:
    assert len({drawing.look(i) for i in range(64)}) == 64


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a cell that nobody measured, and no figures."""

    def measured(self: measure.Bench, cell: Any) -> list[dict[str, Any]]:
        place = {"shape": cell.layer.text, "batch": cell.batch, "sparsity": cell.sparsity}
        return [row("dense eager", "dense", 1.0, **place), row("CSR", "torch", 2.0, **place)]

    monkeypatch.setattr(measure.Bench, "measure", measured)
    monkeypatch.setattr(bench_figures, "draw", lambda rows, device, folder: [])


@pytest.mark.usefixtures("made_up")
def test_a_folder_for_every_question(cli: Cli, tmp_path: Path) -> None:
    words = ("bench", "--device", "cpu", "--quiet", "--shape", "8x16")
    for more in (("--batch", "1"), ("--batch", "2"), ("--batch", "1", "--sparsity", "0.5")):
        assert cli(*words, *more)[0] == 0
    found = sorted(file.parent.name for file in tmp_path.glob("bench-*/bench.json"))
    assert found == ["bench-cpu-8x16-0.5-batch1", "bench-cpu-8x16-0.9-batch1", "bench-cpu-8x16-0.9-batch2"]
    assert cli(*words, "--batch", "1", "--out", "mine")[0] == 0
    assert (tmp_path / "mine" / "bench.json").exists()
    assert len([*tmp_path.glob("bench-*/bench.json")]) == 3


@pytest.mark.usefixtures("made_up")
def test_what_was_measured_before_an_interrupt_is_kept(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SMALL, "--batch", "1,2,3", "--out", "here")
    assert cli(*words)[0] == 0
    whole = (tmp_path / "here" / "bench.json").read_bytes()
    measure_, cells = measure.Bench.measure, []

    def stopped(self: measure.Bench, cell: Any) -> list[dict[str, Any]]:
        cells.append(cell)
        if len(cells) == 3:
            raise KeyboardInterrupt
        return measure_(self, cell)

    monkeypatch.setattr(measure.Bench, "measure", stopped)
    code, out, err = cli(*words, "--csv", "rows.csv")
    assert code == 130
    assert "bench-partial.json" in one_line(err)
    assert out.startswith("PARTIAL, since it was interrupted: 2 of 3 cells were measured.\n")
    said = " ".join(out.split())
    assert "Not measured when it was interrupted: 32x48, batch 3, fp32, random 90 %." in said
    assert "out of time" not in said
    document = json.loads((tmp_path / "here" / "bench-partial.json").read_text())
    assert document["partial"] is True
    assert {row["batch"] for row in document["rows"]} == {1, 2}
    assert {row["batch"] for row in csv.DictReader((tmp_path / "rows.csv").open())} == {"1", "2"}
    assert (tmp_path / "here" / "bench.json").read_bytes() == whole

    cells.clear()
    code, out, err = cli(*words, "--json")
    assert code == 130
    assert json.loads(out)["partial"] is True
    monkeypatch.setattr(measure.Bench, "measure", measure_)
    assert cli(*words)[0] == 0
    assert not (tmp_path / "here" / "bench-partial.json").exists()


def test_an_interrupt_before_anything_is_measured(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.Bench, "measure", stopped)
    code, out, err = cli(*SMALL, "--batch", "1")
    assert (code, out) == (130, "")
    assert one_line(err) == "sparselth: interrupted before anything was measured; nothing is kept"
    assert not [*tmp_path.glob("bench*")]


def test_a_network_that_is_interrupted_keeps_its_batch_sizes(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"implementation": name, "kind": "", "batch": 1, "median_s": 1e-3, "iqr_s": 9e-4, "speedup": 1.0,
         "dense_best": "dense", "dense_median_s": 1e-3, "noisy": True, "weight_bytes": 8, "peak_bytes": 8,
         "max_rel_error": 0.0, "check": "passed", "conversion_s": 0.1, "pays_after": None, "images": 2,
         "differing_predictions": 0, "ties": 0}
        for name in ("dense", "sparselth")
    ]  # fmt: skip

    def model(*words: Any) -> None:
        keep: Keep = words[-1]
        pair = Memory(8, 0, 8), Memory(4, 4, 8)
        keep(Result("model", "cpu", rows, {"inference, batch 1": pair}, False, {"network": "x", "kept": 0.1}))
        raise KeyboardInterrupt

    monkeypatch.setattr(race_networks, "bench_model", model)
    code, out, err = cli("bench", "--device", "cpu", "--model", "lenet5", "--batch", "1,8")
    assert code == 130
    assert out.startswith("PARTIAL, since it was interrupted: batch 1 was measured.\n")
    assert "too noisy to say who wins" in " ".join(out.split())
    assert "1.00x?" in out
    (file,) = tmp_path.glob("bench-cpu-lenet5-0.9-batch1,8/*")
    assert file.name == "bench-partial.json"
    assert str(file.relative_to(tmp_path)) in err


def test_what_a_network_prints_is_no_result_and_an_error_leaves_no_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn, randn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        print('aloud', len(x))\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    return Net(4, 2)\n"
        "def example(batch):\n"
        "    return randn(batch, 4)\n"
    )

    def module(found: Any, batches: Any, *_: Any) -> Result:
        given = found.given(batches[0])
        if len(given.tensors[0]) > 2:
            raise SparselthError("too many")
        found.module(*given.tensors)
        return Result("module", "cpu", [], {}, False, {"network": "x", "kept": 0.1, "mask": "random mask"})

    monkeypatch.setattr(race_modules, "bench_module", module)
    words = ("bench", "--device", "cpu", "--model", "net.py:make", "--batch")
    code, out, err = cli(*words, "2", "--json")
    assert code == 0
    assert json.loads(out)["schema"] == "sparselth.bench/1"
    assert "aloud 2" in err
    code, out, err = cli(*words, "3")
    assert (code, out, one_line(err)) == (1, "", "sparselth: too many")
    assert not [*tmp_path.glob("bench*")]
