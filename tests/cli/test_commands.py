"""What the commands print when all is well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparselth.runs import RunRecord

Cli = Callable[..., tuple[int, str, str]]
TINY = "imp --model lenet-300-100 --dataset mnist5k --steps 100 --seeds 0 --arms ticket,reinit --levels 1"


def test_ls_models(cli: Cli, document: Callable[..., dict[str, Any]]) -> None:
    code, out, err = cli("ls", "models")
    assert (code, err) == (0, "")
    assert "lenet-300-100      266,200 prunable weights" in out
    assert "  fc1.weight       235,200  300 x 784" in out
    models = {row["name"]: row for row in document("ls", "models")["models"]}
    assert models["lenet5"]["weights"]["conv2.weight"] == 2400


def test_ls_arms_and_datasets(cli: Cli, document: Callable[..., dict[str, Any]]) -> None:
    names = [row["name"] for row in document("ls", "arms")["arms"]]
    assert names[:4] == ["ticket", "reinit", "random-mask", "random-reinit"]
    goes_on = ["lr-rewind", "finetune", "last-rate", "continue"]
    assert names[4:] == [*goes_on, "signed-reinit", "constant-signs"]
    found = {row["name"]: row for row in document("ls", "datasets")["datasets"]}
    assert found["mnist5k"]["found"] is True
    assert cli("ls", "datasets")[0] == 0


def test_imp_prints_plan_lines_table_and_places(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*TINY.split())
    assert code == 0
    for word in ("model ", "levels ", "arms ", "training ", "device ", "price ", "folder "):
        assert f"\n{word}" in err
    assert "] seed 0 reinit level 1, 80.0 %: test " in err
    assert "\n[3/3] seed 0 " in err
    assert "to go" in err
    assert "iterative pruning by magnitude, 20 % a level by layer, rewound to step 0" in " ".join(err.split())
    assert max(map(len, (out + err).splitlines())) <= 80
    (folder,) = (tmp_path / "runs").iterdir()
    assert out.rstrip().endswith(f"run      runs/{folder.name}")
    assert "Verdict" in out
    assert cli("show", f"runs/{folder.name}")[1] in out
    listed = cli("ls", "runs")[1]
    assert f"runs/{folder.name}" in listed
    assert "finished" in listed
    code, again, err = cli(*TINY.split())  # at once
    assert (code, again) == (0, out)
    assert "all 3 cells are finished; nothing to compute" in err


def test_json_is_alone_on_stdout_and_quiet_is_quiet(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli(*TINY.split(), "--json", "--quiet", "--out", str(tmp_path / "run"))
    assert (code, err) == (0, "")
    assert len(json.loads(out)["points"]) == 3


def test_dry_run_writes_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*TINY.split(), "--dry-run")
    assert (code, out) == (0, "")
    assert "price    about" in err
    assert not list(tmp_path.iterdir())
    plan = json.loads(cli(*TINY.split(), "--dry-run", "--json")[1])
    assert plan["schema"] == "sparselth.imp-plan/1"
    assert plan["cells"] == 3
    assert plan["seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_show_of_an_unfinished_run(cli: Cli, imp: Callable[..., RunRecord]) -> None:
    record = imp("--levels", "2", "--seeds", "0", "--arms", "ticket")
    lines = (record.path / "cells.jsonl").read_text().splitlines(keepends=True)
    (record.path / "cells.jsonl").write_text("".join(lines[:2]))
    code, out, _ = cli("show", str(record.path))
    assert code == 0
    assert "2 of 3 cells" in out
    listed = cli("ls", "runs", "--out", str(record.path.parent))[1]
    assert "2 of 3 cells, --resume goes on" in " ".join(listed.split())


def test_doctor(cli: Cli, document: Callable[..., dict[str, Any]]) -> None:
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    for word in ("sparselth", "python", "packages", "processor", "gpu", "torch", "training", "mnist5k"):
        assert f"\n{word}" in "\n" + out
    assert document("doctor")["ok"] is True


def test_bars_on_a_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    words = [sys.executable, "-c", code, sys.executable, "-m", "sparselth", *TINY.split(), "--out", "run"]
    done = subprocess.run(
        words,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "120"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout
    assert "all cells" in done.stdout
    assert "seed 0 ticket level 0 (100.0 %)" in done.stdout
    assert "3/3" in done.stdout or "2/3 cells" in done.stdout
