"""Every command on terminals whose encoding lacks what tables and bars are drawn with."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparselth.cli.main import run
from sparselth.cli.plain import PLAIN
from sparselth.runs import RunRecord

TINY = "imp --model lenet-300-100 --dataset mnist5k --steps 100 --seeds 0 --levels 1 --arms ticket"
COMMANDS = {
    "help": "--help",
    "imp help": "imp --help",
    "imp": f"{TINY} --out new",
    "again": f"{TINY.replace('ticket', 'ticket,reinit')} --seeds 0-2 --out run --resume",
    "show": "show run",
    "json": "show run --json",
    "arms": "ls arms",
    "models": "ls models",
    "runs": "ls runs --out .",
    "doctor": "doctor",
    "bench": "bench --device cpu --quick --shape 32x48 --batch 1 --out bench",
    "umlaut": "show rün",
    "no letter": "show run\udcff",
    "usage": "imp --levels ±",
}


class Terminal(io.TextIOWrapper):
    """A stream of some encoding that says it is a terminal, or that it is not."""

    def __init__(self, encoding: str, tty: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def said(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`on("ascii", False, "ls arms")`: exit code, stdout and stderr on terminals of an encoding."""

    def call(encoding: str, tty: bool, command: str) -> tuple[int, str, str]:
        out, err = Terminal(encoding, tty), Terminal(encoding, tty)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            return run(command.split()), out.said(), err.said()

    return call


CASES = [(name, "ascii", tty) for name in COMMANDS for tty in (False, True)]
CASES += [(name, "latin-1", False) for name in ("help", "show", "runs", "no letter", "usage")]


@pytest.mark.parametrize(("name", "encoding", "tty"), CASES)
def test_every_command_speaks_plainly(
    name: str,
    encoding: str,
    tty: bool,
    on: Callable[..., tuple[int, str, str]],
    finished: Callable[..., RunRecord],
) -> None:
    finished("--seeds", "0-2", "--levels", "1", "--arms", "ticket,reinit")
    code, out, err = on(encoding, tty, COMMANDS[name])
    assert "fault of sparselth" not in err
    assert "UnicodeEncodeError" not in err
    assert code == {"umlaut": 1, "no letter": 1, "usage": 2}.get(name, 0), err
    assert out or err
    if name in ("show", "again"):
        plus = "±" if encoding == "latin-1" else "+-"
        assert f" {plus}" in out


def test_the_table_keeps_its_columns(
    on: Callable[..., tuple[int, str, str]], finished: Callable[..., RunRecord]
) -> None:
    finished("--seeds", "0-2", "--levels", "1", "--arms", "ticket,reinit")
    fine, plain = (on(encoding, False, "show run")[1].splitlines() for encoding in ("utf-8", "ascii"))
    assert any("±" in line and "─" not in line for line in fine)
    for line, other in zip(fine, plain, strict=True):
        rich = line
        for sign in ("–", "─"):
            rich = rich.replace(sign, "-")
        assert other == rich.replace("± ", "+-")


def test_signs_that_no_table_knows_are_escaped(on: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = on("ascii", False, "show r\u03b1n\udcff")
    assert code == 1
    assert "r\\u03b1n\\udcff" in err
    assert "\\udcff" in on("utf-8", False, "show r\u03b1n\udcff")[2]
    assert all(sign.isascii() for sign in PLAIN.values())


@pytest.mark.parametrize(
    "words",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["PYTHONIOENCODING", "LC_ALL"],
)
def test_a_process_of_its_own(
    words: dict[str, str],
    environment: dict[str, str],
    tmp_path: Path,
    finished: Callable[..., RunRecord],
) -> None:
    shutil.copytree(finished("--levels", "1", "--arms", "ticket").path, tmp_path / "ran")
    done = subprocess.run(
        [sys.executable, "-m", "sparselth", "show", "ran"],
        env={k: v for k, v in environment.items() if k != "LC_ALL"} | words,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"Verdict" in done.stdout
