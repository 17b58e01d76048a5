"""Standard streams that are closed, full or gone; memory that is too small for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LS = f"{sys.executable} -m sparselth ls arms"


def shell(command: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (f"{LS} >/dev/full", 1, "sparselth: cannot write to stdout: No space left on device\n"),
        (f"{LS} >&-", 1, "sparselth: cannot write to stdout: Bad file descriptor\n"),
        (f"{LS} <&-", 0, ""),
        (f"{LS} 2>&- >/dev/null", 0, ""),
        (f"{LS}x 2>/dev/full", 2, ""),
        (f"{LS}x 2>&-", 2, ""),
    ],
)
def test_streams(command: str, code: int, says: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = shell(command, environment, tmp_path)
    assert (done.returncode, done.stderr) == (code, says)
    assert "sparselth:" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["imp --dataset mnist5k --quiet --dry-run", "bench --shape 8x8", "doctor"])
def test_too_little_memory_for_torch_is_one_line(
    words: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """Loaded there it fails in one way or another, or ends the process."""
    done = shell(f"ulimit -v 1500000; {sys.executable} -m sparselth {words}", environment, tmp_path)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ulimit -v" in line]
    assert done.returncode == (3 if words == "doctor" else 1), done.stderr
    assert len(said) == 1
    assert "torch cannot be loaded" in said[0]
    assert "`ulimit -v` allows 1.5 GB" in said[0]
    if words != "doctor":
        assert done.stderr == f"{said[0]}\n"
