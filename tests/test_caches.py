"""A cache that cannot be read or written, or holds something else, is a cache that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from sparselth import data
from sparselth.engine import break_even
from sparselth.errors import SparselthError
from sparselth.files import read_cache, write_cache
from sparselth.models import get_model
from sparselth.sparse import times

LENET = get_model("lenet-300-100")
Cli = Callable[..., tuple[int, str, str]]


def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for a user whom the machine does not know."""

    def expanduser(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)


def a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # where not even root makes folders


def relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which the standard says is to be ignored."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "/proc/none")


PLACES = {"no home": no_home, "home is a file": a_file, "read-only": read_only, "relative": relative}


@pytest.mark.parametrize("place", PLACES)
def test_without_a_cache_all_goes_on(
    place: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELTH_DATA", raising=False)
    PLACES[place](monkeypatch, tmp_path)

    def offline() -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("sparselth.data.files._torchvision_datasets", offline)
    monkeypatch.setattr(break_even, "_measure", lambda *_: break_even.Measured(0.25, 1.0))
    write_cache("x", {"a": 1})
    assert read_cache("x") == {}
    assert set(break_even.break_even(LENET, 60, "torch").values()) == {0.25}
    raced = times.Cache(8, "cpu")
    assert raced.times("x", {"a": lambda: None}, times.clock.warm_wall)["a"] > 0
    raced.save()
    notes: list[str] = []
    assert data.resolve(None, None, notes.append).spec.name == "mnist5k"
    assert len(notes) == 1
    with pytest.raises(SparselthError, match="`data_dir`"):
        data.resolve("mnist", None, notes.append)
    code, out, err = cli("ls", "datasets")
    assert (code, err) == (0, "")
    assert "inside the package" in out
    names = {path.name for path in tmp_path.rglob("*")}
    assert names <= {"home", "here"}


BAD = {
    "null": b"null",
    "list": b"[]",
    "empty": b"",
    "torn": b'{"a": ',
    "not UTF-8": b"\xff\xfe{}",
    "deep": b'{"a":' * 100_000,
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
}


VALUES: tuple[Any, ...] = (
    *(None, [], "x", True, float("nan"), float("inf"), -1.0, 1e9, {}, {"density": 9.0, "spread": 1}),
    {"density": 0.25, "spread": 10**400},
    {"density": 0.25, "spread": "wide"},
    {"seconds": {"a": -1.0, "b": 1.0}, "spread": 1.0},
    {"seconds": [], "spread": 1.0},
)


@pytest.mark.parametrize("name", ["break_even", "convert"])
@pytest.mark.parametrize("content", [*BAD, "a folder", "a pipe", "zeros", "values"])
def test_what_is_no_cache_is_not_there(
    name: str, content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[Any] = []
    monkeypatch.setattr(break_even, "_measure", lambda *_: asked.append(1) or break_even.Measured(0.25, 1.0))
    monkeypatch.setattr(times, "seconds", lambda *_: asked.append(1) or times.Times({"a": 1e-3, "b": 2e-3}))

    def use() -> Any:
        if name == "break_even":
            return break_even.break_even(LENET, 60, "torch")
        raced = times.Cache(8, "cpu")
        found = raced.times("x", {"a": lambda: None, "b": lambda: None}, times.clock.warm_wall)
        raced.save()
        return found

    right = use()
    measured = len(asked)
    assert use() == right
    assert len(asked) == measured  # kept
    file = tmp_path / "sparselth" / f"{name}.json"
    if content == "values":
        for value in VALUES:
            file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), value)))
            before = len(asked)
            assert use() == right, value
            assert len(asked) == before + measured, value
        return
    file.unlink()
    if content == "a folder":
        file.mkdir()
    elif content == "a pipe":
        os.mkfifo(file)
    elif content == "zeros":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(BAD[content])
    assert use() == right
    assert len(asked) == 2 * measured


@pytest.mark.parametrize("name", ["break_even", "convert"])
def test_times_among_other_programs_are_kept_with_their_spread_and_measured_again(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spreads, asked = [3.0, 2.0, 2.5, 1.1, 1.0], []

    def measure(*_: Any) -> Any:
        """A round of measurements has one spread."""
        asked.append(1)
        if name == "break_even":
            return break_even.Measured(0.25, spreads[0])
        found = times.Times({"a": 1e-3 * spreads[0], "b": 2e-3})
        found.spread = spreads[0]
        return found

    monkeypatch.setattr(break_even, "_measure", measure)
    monkeypatch.setattr(times, "seconds", measure)
    file = tmp_path / "sparselth" / f"{name}.json"

    def use() -> int:
        before = len(asked)
        if name == "break_even":
            break_even.break_even(LENET, 60, "torch")
        else:
            raced = times.Cache(8, "cpu")
            for _ in range(2):  # once a process
                raced.times("x", {"a": lambda: None, "b": lambda: None}, times.clock.warm_wall)
            raced.save()
        return len(asked) - before

    once, busy = (3, 3) if name == "break_even" else (1, 2)
    kept = []
    for _ in range(4):
        assert use() == (once if spreads[0] <= 1.5 else busy)
        kept.append({entry["spread"] for entry in json.loads(file.read_text()).values()})
        spreads.pop(0)
    assert kept == ([{3.0}, {2.0}, {2.0}, {1.1}] if name == "break_even" else [{3.0}, {2.0}, {2.5}, {1.1}])
    assert use() == 0


def test_a_break_even_that_is_a_number_alone_is_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the version before kept it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(break_even, "_measure", lambda *_: break_even.Measured(0.25, 1.0))
    break_even.break_even(LENET, 60, "torch")
    write_cache("break_even", dict.fromkeys(read_cache("break_even"), 0.5))
    assert set(break_even.break_even(LENET, 60, "torch").values()) == {0.5}


NOWHERE = """
set -e
mount --bind "$1" /mnt
for folder in /tmp /var/tmp /usr/tmp /dev/shm; do
  [ -d $folder ] || continue
  mount -t tmpfs -o size=4k tmpfs $folder
  case "$1" in $folder/*) mkdir -p "$1"; mount --bind /mnt "$1";; esac  # a checkout that lies there stays
  mount -o remount,ro $folder
done
cd "$2"; shift 2
exec "$@"
"""


def test_a_run_needs_neither_shm_nor_a_temporary_folder_nor_a_home(environment: dict[str, str]) -> None:
    """In a name space of its own, where the folders for what is passing are read-only."""
    checkout = Path(__file__).resolve().parents[1]
    home = checkout / "build" / "no-tmp"
    home.mkdir(parents=True, exist_ok=True)
    flags = (
        "imp --model lenet-300-100 --dataset mnist5k --steps 10 --levels 1 --seeds 0 --arms ticket --quiet"
    )
    words = ["unshare", "-m", "bash", "-c", NOWHERE, "bash", str(checkout), str(home)]
    words += [sys.executable, "-m", "sparselth"]
    of_tests = (
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_INTERPRET",
    )  # set in this process, by torch and for kernels
    where = {name: value for name, value in environment.items() if name not in of_tests}
    where |= {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    where["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # whose list of fonts takes half a minute to make
    if subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        done = subprocess.run(
            [*words, *flags.split(), "--out", "run"], env=where, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert (home / "run" / "figures" / "accuracy.png").exists()
    finally:
        subprocess.run(["rm", "-rf", str(home)], check=True)
