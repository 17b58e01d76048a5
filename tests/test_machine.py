"""What is said of this machine and of the devices on which something has run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sparselth import machine
from sparselth.machine import ran_on_gpus

NONE = "no Triton kernel and no CUDA graph of this version has run on a GPU yet"
ROOT = Path(__file__).resolve().parents[1]


def check(op: str, ok: bool = True, **more: str) -> dict[str, Any]:
    return {"op": op, "part": "bf16", "case": "c", "ok": ok, **more}


def write(folder: Path, name: str, *checks: dict[str, Any], ops: tuple[str, ...]) -> None:
    data = {"schema": "sparselth.gpu_check/2", "device": {"name": name}, "ops": ops, "checks": checks}
    (folder / f"{name.lower()}.json").write_text(json.dumps(data))


def test_what_ran_on_which_gpu(tmp_path: Path) -> None:
    assert ran_on_gpus(tmp_path) == NONE
    (tmp_path / "rotten.json").write_text("{")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "cpu.json").write_text('{"schema": "other/1", "device": {"name": "EPYC"}}')
    assert ran_on_gpus(tmp_path) == NONE
    write(tmp_path, "H100", check("bitmask"), check("csr_lanes"), ops=("bitmask", "csr_lanes"))
    assert ran_on_gpus(tmp_path) == "H100: 2 of 2 ops right"
    some = (
        check("bitmask"),
        check("csr_lanes"),
        check("csr_lanes", ok=False),
        check("convert", skipped="late"),
    )
    write(tmp_path, "H200", *some, ops=("bitmask", "csr_lanes", "convert"))
    assert ran_on_gpus(tmp_path).split(". ")[1] == (
        "H200: 1 of 3 ops right; wrong: csr_lanes; not run: convert"
    )
    assert ran_on_gpus(tmp_path / "nowhere").startswith("not known here")


@pytest.mark.parametrize("file", ["README.md", "docs/kernels.md"])
def test_the_pages_say_what_doctor_says(file: str) -> None:
    assert f"Ran on GPUs: {ran_on_gpus()}." in " ".join((ROOT / file).read_text().split())


def test_the_page_of_the_kernels_has_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu_check

    table = (ROOT / "docs" / "kernels.md").read_text()
    for target in gpu_check.TARGETS:
        assert target.op == "train_step" or f"| `{target.op}`" in table, target.op


def test_neighbours_are_who_takes_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, ten seconds: what others used, or what this process lacked, whichever is more."""

    def taken(own: float, everybody: float | None) -> float:
        clocks = {"monotonic": iter((0.0, 10.0)), "process_time": iter((0.0, own))}
        everybodys = iter((100.0, None if everybody is None else 100 + everybody))
        for name, values in clocks.items():
            monkeypatch.setattr(machine.time, name, lambda values=values: next(values))
        monkeypatch.setattr(machine, "busy_seconds", lambda: next(everybodys))
        monkeypatch.setattr(machine, "cores", lambda: 2)
        return machine.Neighbours().cores_taken()

    assert taken(own=10, everybody=10) == 0  # alone
    assert taken(own=10, everybody=11) == 0  # a little is always going on
    assert taken(own=10, everybody=20) == pytest.approx(1)
    assert taken(own=5, everybody=20) == pytest.approx(
        3
    )  # a quarter of both cores: three others and this one
    assert taken(own=10, everybody=None) == 0  # nothing can be known


def test_time_that_our_cores_spent_is_read_from_proc() -> None:
    before, began = machine.busy_seconds(), time.process_time()
    while time.process_time() - began < 0.1:
        pass
    after = machine.busy_seconds()
    assert before is not None
    assert after is not None
    assert after - before > 0.05
