"""Bad input: one line on stderr that names the thing and what to do, the right exit code, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparselth import files, runs
from sparselth.runs import RunRecord

Cli = Callable[..., tuple[int, str, str]]
Imp = Callable[..., RunRecord]

USAGE = {
    "--model lenet6": "unknown model 'lenet6': did you mean 'lenet5'?",
    "--model vgg": "unknown model 'vgg': did you mean 'vgg19'?",
    "--levels 0": "--levels 0: expected 1 or more",
    "--rate 1.5": "--rate 1.5: expected a number between 0 and 1",
    "--rate 0": "--rate 0: expected a number between 0 and 1",
    "--rate nan": "--rate nan: expected a number between 0 and 1",
    "--steps 1000 --rewind 1000": "--rewind 1000: expected a step from 0 to 999, because training ends",
    "--steps 1000 --rewind -1": "--rewind -1: expected a step from 0 to 999",
    "--seeds a-b": "'a-b': expected numbers such as 3, 0-4 or 0,2,5",
    "--seeds 4-0": "'4-0': 4-0 counts down",
    "--seeds 1,1": "--seeds 1,1: expected different numbers from 0 on",
    "--arms ticket,reinitt": "unknown arm 'reinitt': did you mean 'reinit'?",
    "--arms reinit": "'ticket' is missing",
    "--lr 0": "--lr 0: expected a positive number",
    "--lr nan": "--lr nan: expected a positive number",
    "--steps 0": "--steps 0: expected 1 or more",
    "--batch-size 0": "--batch-size 0: expected 1 or more",
    "--momentum 1": "--momentum 1: expected a number from 0 to below 1",
    "--workers 0": "--workers 0: expected 1 or more",
    "--optimizer rmsprop": "'rmsprop' is not one of 'adam', 'sgd'",
    "--dataset mnost": "unknown dataset 'mnost': did you mean 'mnist'?",
    "--frobnicate": "No such option",
    "--levels many": "'many' is not a valid integer",
}


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("sparselth: ")
    return lines[0]


@pytest.mark.parametrize("flags", USAGE)
def test_usage(flags: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("imp", "--quiet", *flags.split())
    assert code == 2
    assert USAGE[flags] in one_line(err)
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("inp", "unknown command 'inp': did you mean 'imp'?"),
        ("report RUN", "unknown command 'report': did you mean 'show'?"),
        ("ls modells", "unknown list 'modells': did you mean 'models'?"),
        ("show", "Missing argument 'RUN'"),
    ],
)
def test_unknown_words(words: str, expected: str, cli: Cli) -> None:
    code, _, err = cli(*words.split())
    assert code == 2
    assert expected in one_line(err)


def test_batch_larger_than_the_data(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, _, err = cli(*f"imp --quiet --dataset mnist5k --batch-size 3501 --out {out}".split())
    assert code == 2
    assert "--batch-size 3501: expected at most the 3500 training images" in one_line(err)


def test_a_cut_data_file_is_named(cli: Cli, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(500))
    code, _, err = cli("imp", "--quiet", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    assert code == 1
    assert str(raw) in one_line(err)
    assert not (tmp_path / "run").exists()


def test_show_of_no_run(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("show", str(tmp_path))
    assert code == 1
    assert f"{tmp_path}: not a run folder" in one_line(err)


def test_a_damaged_config_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": ')
    assert cli("show", str(tmp_path))[0] == 1
    (tmp_path / "config.json").write_text('{"model": "lenet5", "speed": 9}')
    code, _, err = cli("show", str(tmp_path))
    assert code in (1, 2)
    assert "speed" in one_line(err)


def test_a_run_of_another_configuration_is_refused(cli: Cli, finished: Imp) -> None:
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    before = {file: file.read_bytes() for file in record.path.rglob("*") if file.is_file()}
    flags = "--model lenet-300-100 --dataset mnist5k --steps 100 --seeds 0 --arms ticket --levels"
    for rest, says in (
        ("2 --rate 0.3", "a run with another rate (0.2 there, 0.3 here); choose another --out"),
        ("2 --rate 0.3 --resume", "a run with another rate (0.2 there, 0.3 here); choose another --out"),
        ("2", "holds a run with fewer levels (1 there, 2 here); add --resume to extend it"),
        ("2 --seeds 1 --resume", "holds a run with other seeds, and keeps its cells ([0] there, [1] here)"),
    ):
        code, _, err = cli("imp", "--quiet", *flags.split(), *rest.split(), "--out", str(record.path))
        assert code == 1
        assert says in one_line(err)
    assert {file: file.read_bytes() for file in record.path.rglob("*") if file.is_file()} == before


def test_an_unfinished_run_wants_resume(cli: Cli, finished: Imp) -> None:
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    (record.path / "cells" / "seed0-ticket-01.safetensors").unlink()
    flags = "--model lenet-300-100 --dataset mnist5k --steps 100 --seeds 0 --arms ticket --levels 1"
    code, _, err = cli("imp", "--quiet", *flags.split(), "--out", str(record.path))
    assert code == 1
    missing = (
        "unfinished, 1 of 2 cells are missing (cells/seed0-ticket-01.safetensors is missing); add --resume"
    )
    assert missing in one_line(err)


def test_damaged_cells_are_named_and_computed_again(
    cli: Cli, finished: Imp, run_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    record = finished("--levels", "2", "--seeds", "0", "--arms", "ticket")
    before, cells = run_contents(record.path), [*sorted((record.path / "cells").iterdir())]
    content = bytearray(cells[0].read_bytes())
    content[len(content) // 2] ^= 1
    cells[0].write_bytes(content)
    shutil.copy(cells[2], cells[1])
    last = cells[2].stat().st_mtime_ns
    code, _, err = cli("imp", "--quiet", "--out", str(record.path), "--resume")
    assert code == 0
    assert err == (
        f"note: {record.path}: cells/{cells[0].name} is damaged; cells/{cells[1].name} is the file of "
        "seed0-ticket-02; what is missing is computed again\n"
    )
    assert run_contents(record.path) == before
    assert cells[2].stat().st_mtime_ns == last


@pytest.mark.parametrize("out", ["/proc/sparselth-run", "file/run", "file"])
def test_a_place_that_cannot_be_written(
    out: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, _, err = cli("imp", "--quiet", "--dataset", "mnist5k", "--out", out)
    assert code == 1
    assert out.split("/")[-2 if out == "file/run" else -1] in one_line(err)
    assert "--out" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(cli: Cli, tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(mounted)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        flags = (
            "--model lenet-300-100 --dataset mnist5k --steps 100 --seeds 0 --arms ticket --levels 2 --quiet"
        )
        code, _, err = cli("imp", *flags.split(), "--out", str(mounted / "run"))
        assert code == 1
        assert "No space left on device" in one_line(err)
        assert "--resume" in err
        assert not list((mounted / "run").rglob("*.tmp"))
        for name in runs.LINES:
            content = (mounted / "run" / name).read_bytes() if (mounted / "run" / name).exists() else b""
            assert all(json.loads(line) for line in content.splitlines())
        # room again: the run goes on
        subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
        assert cli("imp", *flags.split(), "--resume", "--out", str(mounted / "run"))[0] == 0
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_finished_run_on_a_read_only_disk_reports(cli: Cli, finished: Imp, figures: bool) -> None:
    run = finished("--levels", "1", "--seeds", "0", "--arms", "ticket").path
    shutil.rmtree(run / "figures")
    for words in (["--bind", str(run), str(run)], ["-o", "remount,ro,bind", str(run)]):
        if subprocess.run(["mount", *words], capture_output=True).returncode:
            pytest.skip("needs the right to mount a folder")
    try:
        table = cli("show", str(run))
        assert table[0] == 0
        assert "finished" in cli("ls", "runs", "--out", str(run.parent))[1]
        code, out, err = cli("imp", "--resume", "--quiet", "--out", str(run))
        assert (code, err) == (0, f"note: {run} cannot be written, so its figures are not drawn\n")
        assert out.startswith(table[1])
        code, _, err = cli("imp", "--resume", "--quiet", "--levels", "2", "--out", str(run))
        assert code == 1
        assert "Read-only file system" in one_line(err)
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lines.jsonl"
    files.append_lines(file, [b'{"a": 1}'])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.SparselthError, match="No space left on device"):
        files.append_lines(file, [b'{"b": 2}'] * 1000)
    assert file.read_text() == '{"a": 1}\n'
    with pytest.raises(files.SparselthError, match="No space left on device"):
        files.write_atomically(file, b"other")
    assert file.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_debug_shows_the_traceback(cli: Cli) -> None:
    with pytest.raises(Exception, match="unknown model"):
        cli("imp", "--model", "lenet6", "--debug")


def test_a_closed_pipe_is_no_traceback(environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m sparselth ls models | true"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_torchvision_of_another_release_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("other", "data"):
        (tmp_path / name).mkdir()
    said = "operator torchvision::nms does not exist"
    (tmp_path / "other" / "torchvision.py").write_text(f"raise RuntimeError({said!r})\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.setenv("SPARSELTH_DATA", "data")
    code, out, err = cli("doctor")
    assert (code, err) == (3, "")
    (line,) = [line for line in out.splitlines() if line.startswith("torchvision")]
    assert said in line
    assert "install torch and torchvision of one release" in line
    code, _, err = cli("imp", "--dataset", "mnist", "--quiet")
    assert code == 1
    assert f"torchvision does not work with the torch that is installed ({said})" in one_line(err)
    assert not (tmp_path / "runs").exists()


def test_resuming_on_another_machine_is_said(cli: Cli, finished: Imp) -> None:
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    file = record.path / "environment.json"
    facts = json.loads(file.read_text())
    facts["packages"]["torch"] = "1.0.0"
    file.write_text(json.dumps(files.sealed(facts)))
    code, _, err = cli("imp", "--quiet", "--resume", "--out", str(record.path))
    assert code == 0
    assert "begun on another machine (torch 1.0.0 there, " in err
