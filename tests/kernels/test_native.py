"""The library behind the native kernels: its levels, what is said where there is none, workers that fork."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparselth.kernels import _native
from sparselth.kernels._choose import use_native

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


needs_native = pytest.mark.skipif(_native.LIB is None, reason=f"native kernels: {_native.WHY}")


@needs_native
@pytest.mark.parametrize("level", _native.LEVELS)
def test_the_level_can_be_chosen(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELTH_NATIVE", level)
    lib, why, found = _native._load()
    if level in _native.levels():
        assert lib is not None
        assert found == level
        assert why.endswith(f".so, {level}")
    else:
        assert (lib, found) == (None, None)
        assert why == f"SPARSELTH_NATIVE is {level}, but this machine goes up to {_native.levels()[-1]}"
        with pytest.raises(ValueError, match=f"level {level} on a machine that has"):
            _native.choose(level)


@needs_native
def test_the_highest_level_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSELTH_NATIVE", raising=False)
    assert _native._load()[2] == _native.levels()[-1]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("SPARSELTH_NATIVE", "off", "off by SPARSELTH_NATIVE"),
        ("SPARSELTH_NATIVE", "fast", "SPARSELTH_NATIVE is 'fast', not auto, off, plain, avx2 or avx512"),
        (
            "SPARSELTH_NATIVE_LIB",
            "none.so",
            "not built (no none.so); install again where there is a C compiler",
        ),
        ("SPARSELTH_NATIVE_LIB", __file__, "test_native.py cannot be used: "),
    ],
)
def test_without_a_library_it_says_why(
    name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPARSELTH_NATIVE", raising=False)
    monkeypatch.setenv(name, value)
    lib, found, level = _native._load()
    assert (lib, level) == (None, None)
    assert found.startswith(why)


def test_the_entries_are_those_of_the_source() -> None:
    source = (ROOT / "kernels" / "native" / "native.c").read_text()
    assert tuple(re.findall(r"^    X\((\w+)\)", source, re.MULTILINE)) == _native.ENTRIES


@needs_native
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update of a checkout, before it is installed again."""
    monkeypatch.delenv("SPARSELTH_NATIVE", raising=False)
    monkeypatch.setattr(_native, "ENTRIES", (*_native.ENTRIES, "fused_everything"))
    lib, why, level = _native._load()
    assert (lib, level) == (None, None)
    assert why.endswith("was built from other sources, without fused_everything; install again")


def test_torch_works_where_the_library_is_off(environment: dict[str, str]) -> None:
    code = """
import torch
from sparselth.kernels import _native
from sparselth.kernels.csr_linear import CsrIndex, csr_linear
assert _native.LIB is None and _native.levels() == ()
index = CsrIndex.from_dense(torch.ones(2, 3, dtype=torch.bool))
assert csr_linear(index, torch.ones(6), torch.ones(3, 4)).sum() == 24
"""
    run(code, environment | {"SPARSELTH_NATIVE": "off"})


def test_native_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "LIB", None)
    monkeypatch.setattr(_native, "WHY", "not built")
    assert not use_native("auto")
    assert not use_native("torch")
    with pytest.raises(ValueError, match="the native kernels are missing: not built"):
        use_native("native")
    with pytest.raises(ValueError, match="expected auto, native, torch or reference"):
        use_native("fastest")


@needs_native
def test_workers_can_fork_after_threads_ran(environment: dict[str, str]) -> None:
    # the thread pool of OpenMP does not survive a fork; with one thread it must not be entered
    code = """
import os, torch
from sparselth.kernels.csr_linear import *
index = CsrIndex.from_dense(torch.rand(64, 64) < 0.5)
values, x = torch.randn(index.kept), torch.randn(64, 64)
torch.set_num_threads(2)
y = csr_linear(index, values, x)
torch.set_num_threads(1)
out = torch.empty(64, 64)
call = bind_csr_linear(index, values, x, None, out)
child = os.fork()
call()
if child == 0:
    os._exit(0 if out.equal(y) else 3)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    run(code, environment)


def test_every_entry_is_made_at_every_level() -> None:
    text = (ROOT / "kernels" / "native" / "native.c").read_text()
    for file in (ROOT / "kernels" / "native").glob("*.inc"):
        assert text.count(f'#include "{file.name}"') in (0, 3), file.name
