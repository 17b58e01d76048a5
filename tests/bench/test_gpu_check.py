"""bench/gpu_check.py without a GPU: what it compares with, and rehearsals of a visit."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import oracle

BENCH = Path(__file__).resolve().parents[2] / "bench"


def command(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(BENCH / "gpu_check.py"), *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_a_rehearsal_in_the_interpreter(environment: dict[str, str], tmp_path: Path) -> None:
    """All that is real but the device: processes, the wait for the anchors, cases, files, the last screen."""
    flags = ["--interpret", "--only", "bitmask", "--out", str(tmp_path)]
    flags += [word for stage in ("smoke", "targets", "large") for word in ("--stage", stage)]
    done = command(environment, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\n\d+ passed, \d+ skipped, 0 failed, in ", done.stdout)
    (file,) = tmp_path.glob("*-rehearsal-smoke-targets-large-bitmask.json")
    data = json.loads(file.read_text())
    assert {c["stage"] for c in data["checks"]} <= {"smoke", "targets", "large"}
    assert len(data["checks"]) > 0
    assert all(c["ok"] for c in data["checks"])
    assert data["times"] == data["unfinished"] == []
    assert data["device"]["packages"]["torch"] == torch.__version__.split("+")[0]


def test_without_cuda_one_line_and_exit_code_1(environment: dict[str, str], tmp_path: Path) -> None:
    flags = ["--stage", "smoke", "--only", "bitmask", "--out", str(tmp_path)]
    done = command(environment | {"CUDA_VISIBLE_DEVICES": ""}, *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "finds no CUDA device" in done.stderr.splitlines()[-1]


# A visit of made-up processes by a made-up clock

Timed = tuple[float, dict[str, Any]]  # an event, and how many seconds after the process was let go
H200 = {"name": "NVIDIA H200", "memory_bytes": 2**37, "packages": {"torch": "2.11.0", "triton": "3.6.0"}}


class Fake:
    """A process: a plan after `imports` seconds, then `cases` of (name, seconds, what its end says)."""

    def __init__(self, world: World, title: str, imports: float, cases: list[tuple[str, float, Any]]) -> None:
        self.world, self.title, self.launched = world, title, world.now
        self.events: list[Timed] = [(self.launched + imports, {"plan": [[n, "", 1.0] for n, _, _ in cases]})]
        self.cases, self.imports, self.gone = cases, imports, False
        self.exit: tuple[float, int] | None = None
        self.killed = False
        world.log.append(("launch", title, world.now))

    def go(self, anchors: Any) -> None:
        self.start(0)
        self.anchors = dict(anchors)

    def start(self, first: int) -> None:
        self.gone = True
        now = max(self.world.now, self.launched + self.imports)
        self.world.log.append(("go", self.title, now))
        for i, (name, seconds, end) in list(enumerate(self.cases))[first:]:
            self.events.append((now, {"begin": i}))
            now += seconds
            if end in ("crash", "hang"):
                self.exit = (now, -6) if end == "crash" else None
                return
            done = {"end": i, "case": name, "part": "", "ok": True, "kernels": {"loaded": 2}} | end
            self.events.append((now, done))
        self.exit = now, 0
        self.world.log.append(("end", self.title, now))

    def said(self) -> list[dict[str, Any]]:
        due = [event for when, event in self.events if when <= self.world.now]
        self.events = [(when, event) for when, event in self.events if when > self.world.now]
        return due

    def code(self) -> int | None:
        return self.exit[1] if self.exit and self.exit[0] <= self.world.now else None

    def last_words(self) -> str:
        return "illegal memory access"

    def kill(self) -> None:
        self.killed = True


class World:
    """A clock, and what each process would do."""

    def __init__(self, scripts: dict[str, tuple[float, list[tuple[str, float, Any]]]]) -> None:
        self.scripts, self.now = scripts, 0.0
        self.log: list[tuple[str, str, float]] = []
        self.workers: list[Fake] = []
        self.tick: Any = lambda: None

    def clock(self) -> float:
        return self.now

    def launch(self, command: list[str], events: Path) -> Fake:
        title, first = command
        worker = Fake(self, title, *self.scripts[title])
        if int(first):
            worker.start, start = lambda _: start(int(first)), worker.start  # type: ignore[method-assign]
        if title.startswith("checks"):
            worker.start(0)
        self.workers.append(worker)
        return worker

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.tick()

    def times(self, word: str, stage: str) -> list[float]:
        return [when for what, title, when in self.log if what == word and title.startswith(stage)]


ANCHORS = [
    ("facts", 1.0, {"found": {"device": H200}}),
    ("copy", 1.0, {"found": {"anchors": {"copy_bytes_per_s": 4.3e12}}}),
    ("product", 1.0, {"found": {"anchors": {"flops_per_s": {"bf16": 7.9e14}}}}),
    ("product", 1.0, {"found": {"anchors": {"flops_per_s": {"ieee": 5e13}}}}),
]


def row(rival: str, **ways: float) -> dict[str, Any]:
    timed = {way: {"median_s": 1e-6 * us, "samples": 9} for way, us in ways.items()}
    return {"workload": "w", "rival": rival, "ours": rival == "triton", "floor_s": 20e-6, "ways": timed}


def timed(figure: str, value: float, **more: Any) -> dict[str, Any]:
    rows = [row("triton", cold=40, graph=30, warm=35), row("cuBLAS", cold=30), row("lost")]
    return {"found": {"times": rows, "figures": {figure: value}} | more}


def an_h200(width: int = 4) -> World:
    """Two ops, `width` shards of tests, of which one breaks the context and one hangs."""
    bad = {"ok": False, "message": "y: error 1 " + 200 * "x"}
    scripts: dict[str, tuple[float, list[tuple[str, float, Any]]]] = {"device and its rates": (20, ANCHORS)}
    for op, figure in (("csr_lanes", "times the best dense, cold, batch 8"), ("masked_linear", "y")):
        scripts[f"smoke {op}"] = 25, [("once", 3, {}), ("in a graph", 2, {})]
        scripts[f"targets {op}"] = 12, [("a", 9, timed(figure, 2.75)), ("b", 3, {})]
        scripts[f"large {op}"] = 12, [("far", 9, {"skipped": "needs 24 GiB, 9 are free"})]
        scripts[f"benchmarks {op}"] = 12, [(f"more {i}", 20, timed(f"more {i}", 1.0)) for i in range(9)]
    for i in range(width):
        tests: list[tuple[str, float, Any]] = [
            (f"tests/kernels/test_csr_lanes.py::test_{i}[{j}]", 0.5, bad if j < 15 else {}) for j in range(60)
        ]
        tests[20] = (tests[20][0], 0.5, ["crash", "hang", {}, {}][i])
        scripts[f"checks {i + 1} of {width}"] = 8, tests
    return World(scripts)


def a_visit(world: World, out: Path, budget: float = 480.0, width: int = 4) -> Any:
    from gpu.visit import STAGES, Job, Visit

    def job(title: str) -> Job:
        stage, _, op = title.partition(" ")
        waits, files = stage != "checks", {"tests/kernels/test_csr_lanes.py": "csr_lanes"}
        command = lambda first, events: [title, str(first)]  # noqa: E731
        return Job(stage, op, op, command, gib=24 if stage == "large" else 4, waits=waits, files=files)

    assert {title.split()[0] for title in world.scripts} <= set(STAGES)
    data: dict[str, Any] = {
        "budget_s": budget,
        "part": [],
        "ops": ["csr_lanes", "masked_linear"],
        "bundle": None,
        "device": {},
        "anchors": {},
        "kernels": {},
        "checks": [],
        "times": [],
        "targets": [],
        "unfinished": [],
    }
    jobs = [job(title) for title in reversed(world.scripts)][::-1]
    return Visit(jobs, data, out, budget, width, world.launch, world.clock, world.sleep)


def test_the_order_of_a_visit(tmp_path: Path) -> None:
    import gpu_check
    from gpu import report

    world = an_h200()
    visit = a_visit(world, tmp_path)
    visit.run(tmp_path)
    stages = ("device", "smoke", "targets", "checks", "large", "benchmarks")
    go, end = ({stage: world.times(word, stage) for stage in stages} for word in ("go", "end"))
    assert go["smoke"][0] >= end["device"][0] == 24
    assert go["smoke"][1] - go["smoke"][0] < 1  # side by side, imported before
    assert min(go["targets"]) >= max(end["smoke"])
    assert go["targets"][1] >= end["targets"][0]  # one times at a time
    assert go["targets"][1] - end["targets"][0] < 0.2  # the next one was imported
    assert min(go["checks"]) >= max(end["targets"])
    assert max(go["checks"][:4]) - min(go["checks"]) < 1
    assert min(go["large"]) >= max(end["checks"])
    assert min(go["benchmarks"]) >= max(end["large"])
    assert go["benchmarks"][1] >= end["benchmarks"][0] > go["benchmarks"][0]
    assert all(w.anchors["copy_bytes_per_s"] == 4.3e12 for w in world.workers if w.title[:5] == "smoke")

    # the budget ends within the benchmarks, and what is left is named
    data = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert 476 < world.now < 480
    assert all(w.killed or w.code() is not None for w in world.workers)
    assert [(row["job"], row["stage"]) for row in data["unfinished"]] == [("masked_linear", "benchmarks")]
    left = data["unfinished"][0]["cases"]
    assert left == [f"more {i}" for i in range(9)][-len(left) :]
    assert data == visit.data

    # a crash and a hang cost a test each, and are told apart
    lost = {c["case"]: c["message"] for c in data["checks"] if not c["ok"] and "error 1" not in c["message"]}
    assert lost == {
        "tests/kernels/test_csr_lanes.py::test_0[20]": "the process died (SIGABRT): illegal memory access",
        "tests/kernels/test_csr_lanes.py::test_1[20]": "no end after 49 s",
    }
    checks = [c for c in data["checks"] if c["stage"] == "checks"]
    assert len(checks) == 240
    assert {c["op"] for c in checks} == {"csr_lanes"}

    screen = report.screen(data, gpu_check.TARGETS)
    assert sum(not c["ok"] for c in checks) == 62
    assert len(screen) < 6000
    lines = screen.splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11.0, triton 3.6.0"
    assert lines[1].startswith("copy 4.30 TB/s; TFLOP/s bf16 790, ieee 50; kernels: ")
    assert "  pass    csr_lanes: times the best dense, cold, batch 8 2.75, at least 2.5" in lines
    assert "  none    masked_linear: of cuBLAS on w * m, at most 1.3" in lines
    assert "  and " in screen
    assert re.search(r"  benchmarks: masked_linear \(\d of 9\)", screen)
    assert max(map(len, lines)) <= 130
    assert re.fullmatch(r"\d+ passed, 2 skipped, 62 failed, in 47\d s of 480", lines[-1])
    tables = (tmp_path / "nvidia-h200.txt").read_text()
    assert re.search(r"  +w +40\.0 +30\.0 +35\.0 +20\.0 +2\.00x floor", tables)
    assert not list(tmp_path.glob("*.part"))


def test_what_was_done_is_on_the_disk_at_any_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A look at the files after each step of the visit, and an end at some of its writes."""
    world = an_h200()
    visit = a_visit(world, tmp_path, 200)
    seen, stamps = [], [0]

    def look() -> None:
        files = list(tmp_path.glob("*.json"))
        assert len(files) <= 1
        if files and files[0].stat().st_mtime_ns != stamps[-1]:
            stamps.append(files[0].stat().st_mtime_ns)
            found = json.loads(files[0].read_text())
            seen.append(len(found["checks"]))
            assert len(found["checks"]) == len(visit.data["checks"])
            assert len(found["times"]) == len(visit.data["times"])

    world.tick = look
    visit.run(tmp_path)
    assert seen == sorted(seen)
    assert seen[-1] > 100

    class Killed(BaseException):
        pass

    replace = os.replace
    for nth in range(1, 60, 9):
        folder = tmp_path / str(nth)
        folder.mkdir()
        visit, count, before = a_visit(an_h200(), folder, 200), [nth], [0]

        def dying(a: Any, b: Any, count: Any = count, before: Any = before) -> None:
            count[0] -= 1
            if count[0] <= 0:
                raise Killed
            replace(a, b)
            if Path(b).suffix == ".json":
                before[0] = len(json.loads(Path(b).read_text())["checks"])

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(Killed):
                visit.run(folder)
        left = [json.loads(file.read_text()) for file in folder.glob("*.json")]
        assert len(left) == (nth > 1)
        assert all(len(data["checks"]) == before[0] for data in left)


@pytest.mark.parametrize("fault", ["facts crash", "copy hangs", "product fails", "no device"])
def test_anchors_that_fail_end_nothing(tmp_path: Path, fault: str) -> None:
    from gpu import report

    world = an_h200()
    (facts, copy, *products), imports = ANCHORS, 20.0
    if fault == "facts crash":
        facts = "facts", 1.0, "crash"
    if fault == "copy hangs":
        copy = "copy", 1.0, "hang"
    if fault == "product fails":
        products[0] = "product", 1.0, {"ok": False, "message": "CUBLAS_STATUS_NOT_INITIALIZED"}
    if fault == "no device":
        imports = 1e9
    world.scripts["device and its rates"] = imports, [facts, copy, *products]
    visit = a_visit(world, tmp_path)
    visit.run(tmp_path)
    data = visit.data
    assert len([c for c in data["checks"] if c["stage"] == "smoke" and c["ok"]]) == 4
    assert [t["figure"] for t in data["targets"]][:2] == ["times the best dense, cold, batch 8", "y"]
    assert len(data["device"]["failed"]) == 1
    assert "FAILED" in report.device(data)
    name = "unknown-device" if fault in ("facts crash", "no device") else "nvidia-h200"
    assert [file.stem for file in tmp_path.glob("*.json")] == [name]
    assert ("copy_bytes_per_s" in data["anchors"]) == (fault in ("facts crash", "product fails"))


def test_no_cuda_ends_a_visit(tmp_path: Path) -> None:
    world = an_h200()
    missing = {"found": {"missing": "torch finds no CUDA device"}}
    world.scripts["device and its rates"] = 5, [("facts", 1, missing), *ANCHORS[1:]]
    visit = a_visit(world, tmp_path)
    visit.run(tmp_path)
    assert visit.stop == "torch finds no CUDA device"
    assert world.now < 7
    assert not world.times("go", "smoke")


@pytest.mark.parametrize("budget", [20.0, 60.0, 90.0, 150.0])
def test_what_comes_late_is_dropped_from_the_end(tmp_path: Path, budget: float) -> None:
    from gpu.visit import STAGES

    world = an_h200()
    visit = a_visit(world, tmp_path, budget)
    visit.run(tmp_path)
    assert budget - 9 < world.now <= budget
    done = {c["stage"] for c in visit.data["checks"]}
    cut = {row["stage"] for row in visit.data["unfinished"]}
    order = list(STAGES).index
    assert cut
    assert max(map(order, done), default=0) <= min(map(order, cut))
    assert {row["job"] for row in visit.data["unfinished"] if row["stage"] == "benchmarks"} == {
        "csr_lanes",
        "masked_linear",
    }


def test_memory_bounds_how_many_large_cases_run(tmp_path: Path) -> None:
    world = an_h200()
    world.scripts["device and its rates"] = (
        20,
        [
            ("facts", 1.0, {"found": {"device": H200 | {"memory_bytes": 40 * 2**30}}}),
            *ANCHORS[1:],
        ],
    )
    a_visit(world, tmp_path).run(tmp_path)
    assert world.times("go", "large")[1] >= world.times("end", "large")[0]


def test_a_figure_whose_check_fails_is_marked(tmp_path: Path) -> None:
    from gpu import report

    world, figure = an_h200(), "times the best dense, cold, batch 8"
    world.scripts["targets csr_lanes"] = 12, [("a", 9, timed(figure, 5.0, wrong="y: error 1"))]
    visit = a_visit(world, tmp_path)
    visit.run(tmp_path)
    goals = [report.Target("csr_lanes", figure, least=3.0), report.Target("csr_lanes", "lost", most=1)]
    screen = report.screen(visit.data, goals)
    assert f"  marked  csr_lanes: {figure} 5.00, at least 3; y: error 1" in screen
    assert "  none    csr_lanes: lost, at most 1" in screen
    assert "targets csr_lanes a: timed all the same: y: error 1" in screen
    assert "WRONG" in report.tables(visit.data)
    met = report.Target("op", "figure", most=1.3)
    assert met.met(1.3)
    assert not met.met(1.4)


# Real processes

FAKE = """
import json, os, sys, time
first, file = int(sys.argv[1]), open(sys.argv[2], "a")

def say(**event):
    print(json.dumps(event), file=file, flush=True)

say(plan=[[name, "", 0] for name in "abcde"])
assert json.loads(sys.stdin.readline()) == {"rate": 1}
for i, case in list(enumerate("abcde"))[first:]:
    say(begin=i)
    if case == "b":
        print("illegal memory access", file=sys.stderr)
        os.abort()
    if case == "c":
        time.sleep(60)
    say(end=i, case=case, part="", ok=True)
    if case == "d":
        os._exit(70)
"""


def test_crashes_and_hangs_of_real_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu import visit

    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(visit, "LIMIT", 1.0)

    def command(first: int, events: Path) -> list[str]:
        return [sys.executable, str(tmp_path / "fake.py"), str(first), str(events)]

    data: dict[str, Any] = {
        "budget_s": 60,
        "part": [],
        "ops": ["op"],
        "bundle": None,
        "device": {},
        "anchors": {"rate": 1},
        "kernels": {},
        "checks": [],
        "times": [],
        "targets": [],
        "unfinished": [],
    }
    visit.Visit([visit.Job("smoke", "op", "op", command)], data, tmp_path, 60, 2).run(tmp_path)
    assert {c["case"]: c.get("message") for c in data["checks"]} == {
        "a": None,
        "b": "the process died (SIGABRT): illegal memory access",
        "c": "no end after 1 s",
        "d": None,
        "e": None,
    }
    assert data["unfinished"] == []


def test_commands_of_a_visit() -> None:
    import gpu_check
    from gpu.visit import STAGES

    stages = [s for s in STAGES if s not in ("device", "run")]
    jobs = gpu_check.planned(stages, list(gpu_check.OPS), "full", 16)
    assert jobs[0].stage == "device"
    assert {job.stage for job in jobs} == {"device", *stages}
    tests = [job.command(7, Path("e")) for job in jobs if not job.waits]
    assert len(tests) == 16
    assert "--shard=3/16" in tests[3]
    assert "--first=7" in tests[3]
    files = {word for word in tests[0] if word.endswith(".py")}
    assert all(Path(file).is_file() for file in files)
    assert {job.gib for job in jobs if job.stage == "large"} > {14, 24}
    slices = [json.loads(j.command(0, Path("e"))[-1])["some"] for j in jobs if j.stage == "benchmarks"]
    assert slices == [[0, 3]] * len(gpu_check.OPS) + [[3, None]] * len(gpu_check.OPS)
    for goal in gpu_check.TARGETS:  # by the same name there
        stem = re.split(r"\d", goal.figure)[0]
        assert stem in (BENCH / "gpu" / f"{goal.op}.py").read_text(), goal
    assert gpu_check.planned(["run"], [], "full", 16)[1].op == "train_step"
    bare = gpu_check.environment(Path("cache"), False)
    assert bare["TRITON_INTERPRET"] == "0"
    assert bare["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


def test_a_bundle_is_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_check

    (tmp_path / "cache" / "KEY").mkdir(parents=True)
    (tmp_path / "cache" / "KEY" / "kernel.cubin").write_bytes(b"code")
    with tarfile.open(tmp_path / "b.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "cache", ".")
    gpu_check.unpack(tmp_path / "b.tar.xz", tmp_path / "other")
    assert (tmp_path / "other" / "KEY" / "kernel.cubin").read_bytes() == b"code"
    (tmp_path / "broken.tar.xz").write_bytes(b"no archive")
    gpu_check.unpack(tmp_path / "broken.tar.xz", tmp_path / "third")
    assert "broken.tar.xz" in capsys.readouterr().err


TESTS = """
import pytest

@pytest.mark.parametrize("i", range(4))
def test_some(i):
    assert i != 2, "two"

@pytest.mark.host
def test_host():
    raise RuntimeError

def test_skipped():
    pytest.skip("why")
"""


def test_tests_say_how_they_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import plugin

    file, events = tmp_path / "test_some.py", tmp_path / "events.jsonl"
    file.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = host\n")
    monkeypatch.setattr(plugin, "count_kernels", lambda: {"loaded": 0, "compiled": 0})

    def run(*flags: str) -> list[dict[str, Any]]:
        events.write_text("")
        words = ["-p", "gpu.plugin", "-p", "no:cacheprovider", "-q", "-m", "not host", f"--events={events}"]
        words += ["--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini"), *flags]
        pytest.main([*words, str(tmp_path)])
        return [json.loads(line) for line in events.read_text().splitlines()]

    plan, *said = run("--shard=0/2")
    assert [name.split("::")[1] for name, _, _ in plan["plan"]] == [
        "test_some[0]",
        "test_some[2]",
        "test_skipped",
    ]
    assert [next(iter(event.items())) for event in said] == [
        *(("begin", 0), ("end", 0), ("begin", 1), ("end", 1), ("begin", 2), ("end", 2)),
    ]
    assert said[3]["ok"] is False
    assert said[3]["message"].startswith("AssertionError: two")
    assert "assert 2 != 2" in said[3]["trace"]
    assert said[5]["ok"]
    assert said[5]["skipped"] == "why"
    (plan, begin, end) = run("--shard=1/2", "--first=1")
    assert len(plan["plan"]) == 2
    assert (begin["begin"], end["end"]) == (1, 1)
    assert end["case"].endswith("test_some[3]")

    def leave(code: int) -> None:
        raise KeyboardInterrupt(code)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(plugin, "broken", lambda: True)
        patch.setattr(os, "_exit", leave)
        *_, last = run("--shard=0/2")
        assert (last["end"], last["ok"], last["message"]) == (0, False, "the CUDA context broke")
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    said = run("--continue-on-collection-errors")
    assert said[0]["message"].endswith("No module named 'no_such_module'")
    assert sum("end" in event for event in said) == 5


def test_a_worker_waits_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import worker
    from gpu.common import Case

    monkeypatch.setattr(worker, "count_kernels", lambda: {"loaded": 0, "compiled": 0})
    events = tmp_path / "events.jsonl"
    op, rates = ModuleType("gpu.made_up"), []

    def smoke(here: Any) -> Any:
        def skip() -> None:
            raise oracle.Skip("needs 12 GiB")

        def wrong() -> None:
            rates.append(here.copying(8.0))
            raise oracle.Wrong("off by one")

        yield Case("skipped", "bf16", skip)
        yield Case("wrong", "bf16", wrong, 7.0)
        yield Case("broken", "bf16", lambda: torch.zeros(1).no_such_method())
        yield Case("found", "bf16", lambda: {"figures": {"x": 1.5}})

    op.smoke = smoke  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gpu.made_up", op)

    def said(stdin: str, first: int = 0, some: Any = (0, None)) -> list[dict[str, Any]]:
        events.write_text("")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        worker.work("made_up", "smoke", some, "tiny", first, str(events))
        return [json.loads(line) for line in events.read_text().splitlines()]

    assert said("") == [
        {"plan": [["skipped", "bf16", 1], ["wrong", "bf16", 7], ["broken", "bf16", 1], ["found", "bf16", 1]]}
    ]
    ends = [event for event in said('{"copy_bytes_per_s": 4}\n') if "end" in event]
    assert rates == [2.0]
    assert [end["ok"] for end in ends] == [True, False, False, True]
    assert ends[0]["skipped"] == "needs 12 GiB"
    assert ends[1]["message"] == "off by one"
    assert ends[2]["message"].startswith("AttributeError: ")
    assert ends[3]["found"] == {"figures": {"x": 1.5}}
    assert [e["end"] for e in said("{}\n", first=3) if "end" in e] == [3]
    assert [e["case"] for e in said("{}\n", first=1, some=(1, 3)) if "end" in e] == ["broken"]


def test_floors_are_of_measured_rates() -> None:
    from gpu.common import Here

    here = Here("cuda", "full", {"copy_bytes_per_s": 4, "l2_bytes_per_s": 10, "flops_per_s": {"ieee": 2}})
    assert here.floor({"bytes": 8, "flops": 1}, "bf16") == 2.0
    assert here.floor({"bytes": 8, "flops": 8}, "bf16") == 4.0
    assert here.floor({"bytes": 8, "flops": 0, "l2_bytes": 50}, "ieee") == 5.0
    assert here.copying(2) == 0.5
    bare = Here("cuda", "full", {"copy_bytes_per_s": 4})
    assert bare.floor({"bytes": 8, "flops": 0}, "bf16") == 2.0
    assert bare.floor({"bytes": 8, "flops": 1}, "bf16") is None
    assert bare.floor({"bytes": 8, "flops": 0, "l2_bytes": 1}, "bf16") is None
    assert Here("cuda", "full").copying(1) is None


def attempt(run: Any) -> dict[str, Any]:
    from gpu.common import Case
    from gpu.worker import attempt

    return attempt(Case("case", "part", run), "cpu")


def test_what_tests_compare_with_finds_faults() -> None:
    """Errors beyond three of torch's own, other bits, stray writes, and what should be 0."""
    right = {"y": torch.randn(20, 30, dtype=torch.double, generator=torch.Generator().manual_seed(0))}
    for part, dtype in oracle.DTYPES.items():
        torchs = {"y": right["y"].to(dtype)}
        size = oracle.UNIT[part]

        def held(off: float, t: torch.Tensor = torchs["y"], part: str = part) -> None:
            found = {"y": (t.double() * (1 + off)).to(t.dtype)}
            oracle.compare(found, right, {"y": t}, part, {"y": 30})

        held(0)
        with pytest.raises(oracle.Wrong, match="y: error "):
            held(4 * size if part != "ieee" else 1e-6)
        if part in ("bf16", "fp16"):
            with pytest.raises(oracle.Wrong, match="y: error nan"):
                held(oracle.NAN)
    y = {"y": torchs["y"]}
    with pytest.raises(oracle.Wrong, match="shape"):
        oracle.compare({"y": y["y"].t()}, right, y, "ieee", {"y": 30})
    # of results that cancel, the size that they could have had counts
    small = {"y": 1e-3 * right["y"]}
    off = {"y": (small["y"] + 5e-8 * right["y"]).float()}
    oracle.compare(off, small, {"y": small["y"].float()}, "ieee", {"y": 1}, right)
    with pytest.raises(oracle.Wrong):
        oracle.compare(off, small, {"y": small["y"].float()}, "ieee", {"y": 1})

    zeros = torch.zeros(4)
    oracle.must_repeat({"z": zeros}, {"z": torch.zeros(4)})
    with pytest.raises(oracle.Wrong, match="z: a second run gave other bits"):
        oracle.must_repeat({"z": zeros}, {"z": -zeros})
    oracle.must_be_zero(zeros, zeros == 0, "zeros")
    with pytest.raises(oracle.Wrong, match="2 of 2 are not 0"):
        oracle.must_be_zero(torch.tensor([1, oracle.NAN, 0]), torch.tensor([True, True, False]), "pruned")

    def write(place: int) -> None:
        with oracle.poisoned():
            t = torch.empty(5)
            assert t.isnan().all()
            t.as_strided((1,), (1,), t.storage_offset() + place).zero_()

    write(4)
    for outside in (-1, 5):
        with pytest.raises(oracle.Wrong, match="wrote outside a tensor of 5"):
            write(outside)
    around = oracle.surrounded(torch.ones(3), shift=1)
    assert around.as_strided((5,), (1,), around.storage_offset() - 1).isnan().tolist() == [1, 0, 0, 0, 1]
    for layout in ("transposed", "sliced", "off the grid"):
        assert torch.equal(oracle.layed(right["y"], layout), right["y"])


def test_a_failed_check_marks_what_was_timed() -> None:
    from gpu.common import judged

    assert judged(oracle.must_repeat, {}, {}) == {}
    assert judged(oracle.must_repeat, {"y": torch.ones(1)}, {"y": torch.zeros(1)}) == {
        "wrong": "y: a second run gave other bits"
    }


def test_a_race_counts_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: 10 us a call, 200 ms for the slow one, which leaves early."""
    from gpu import timing
    from gpu.common import Here
    from sparselth import clock

    class Graph:
        def __init__(self, run: Any, calls: int) -> None:
            if run is rivals["no graph"]:
                raise RuntimeError("cannot be captured\nmore")
            self.run, self.calls = run, calls
            graphs.append(self)
            run()  # as a warm-up does

        def replay(self) -> None:
            for _ in range(self.calls):
                self.run()

    graphs: list[Graph] = []
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    def once(before: Any, run: Any) -> float:
        began = now[0]
        run()
        return now[0] - began

    def broken() -> None:
        raise RuntimeError("not on this device")

    rivals = {
        "ours": lambda: spend(1e-5),
        "slow": lambda: spend(0.2),
        "no graph": lambda: spend(2e-5),
        "broken": broken,
    }
    monkeypatch.setattr(timing, "graphed", Graph)
    monkeypatch.setattr(timing, "once", once)
    monkeypatch.setattr(clock, "scratch", lambda: torch.zeros(4))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = timing.race(Here("cuda", "full"), rivals, "ours")
    assert set(found["ours"]) == {"cold", "warm", "graph"}
    for ways in found["ours"].values():
        assert ways["median_s"] == pytest.approx(1e-5)
        assert ways["samples"] == 25
    assert "captured" not in found["ours"]["cold"]
    assert found["slow"]["cold"]["samples"] == 3
    assert found["no graph"]["graph"] == {"none": "cannot be captured"}
    assert found["no graph"]["warm"]["median_s"] == pytest.approx(2e-5)
    assert found["no graph"]["cold"]["median_s"] == pytest.approx(2e-5)
    assert found["no graph"]["cold"]["captured"] is False
    assert found["broken"] == {"warm": {"none": "not on this device"}}
    with pytest.raises(RuntimeError, match="not on this device"):
        timing.race(Here("cuda", "full"), rivals, "broken")

    # copies: as many as leave nothing of the first in the cache when it comes again, each as often
    made: list[int] = []
    called: list[int] = []

    def make() -> Any:
        number = len(made)
        made.append(number)
        return lambda: (called.append(number), spend(1e-5))

    monkeypatch.setattr(timing, "l2_bytes", lambda: 50)
    some = {"ours": timing.Copies(make, 27), "few": timing.Copies(lambda: lambda: spend(1e-5), 1)}
    found = timing.race(Here("cuda", "full"), some, "ours")
    assert len(made) == 6
    assert 6 * 27 > 3 * 50 >= 5 * 27
    assert found["ours"]["cold"]["median_s"] == pytest.approx(1e-5)
    (in_turn,) = [graph for graph in graphs if graph.calls == 24]
    called.clear()
    in_turn.replay()
    assert sorted(called) == sorted([*range(6)] * 4)
    assert len({(b - a) % 6 for a, b in itertools.pairwise(called)}) == 1
    assert found["few"]["cold"]["median_s"] == pytest.approx(1e-5)


# train_step


def test_injected_faults_of_training_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainings
    from gpu import train_step
    from gpu.common import Here
    from sparselth.data.batches import Orders
    from sparselth.engine.replay import Replay

    reference = partial(trainings.beside_the_reference, "fc", "triton")
    company = partial(trainings.alone, "fc", "triton", 2)
    idle = partial(trainings.idle, "fc", "triton")
    graphs = partial(trainings.beside_single_launches, "fc", "triton")
    stop = partial(trainings.stopped, "fc")
    short = partial(trainings.short_epochs, "fc")
    timed = partial(train_step.benchmark, Here("cpu", "tiny"), "fc", 2, "auto", True)
    for run in (reference, company, idle, graphs, stop, short, timed):
        assert attempt(run)["ok"]
    assert "wrong" not in attempt(timed)["found"]

    right = trainings.fit

    def wrong(model: Any, data: Any, jobs: list[Any], recipe: Any, *, kernels: str, **more: Any) -> None:
        right(model, data, jobs, recipe, kernels=kernels, **more)
        if kernels == "triton":
            for i, job in enumerate(jobs):
                job.state.weights *= 1 + 1e-3 * (i == len(jobs) - 1 > 0)
        else:
            jobs[0].state.weights *= 1 + 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "fit", wrong)
        patch.setattr(train_step, "fit", wrong)
        assert "off by" in attempt(reference)["message"]
        assert "company of 2 gave other bits" in attempt(company)["message"]
        assert "off by" in attempt(timed)["message"]  # of a rival, and the reference is wrong
        assert "a stop gave other bits" in attempt(stop)["message"]

    step = Replay._step

    def careless(self: Any, by: float = 1e-9) -> None:
        step(self)
        self.weights += by

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "_step", careless)
        assert "changed: an idle step" in attempt(idle)["message"]
        patch.setattr(Replay, "_step", lambda self: careless(self, 1e-3))
        assert "off by" in attempt(timed)["found"]["wrong"]  # what was timed is marked
    with monkeypatch.context() as patch:
        advance = Replay.advance
        patch.setattr(Replay, "advance", lambda self, step, n, stop: advance(self, step, n - 1, stop))
        assert "launches one by one gave other bits" in attempt(graphs)["message"]
    with monkeypatch.context() as patch:
        enter = Orders.enter
        patch.setattr(Orders, "enter", lambda self, epoch: enter(self, 0))  # the next epoch's never comes
        assert "off by" in attempt(short)["message"]


def test_a_graph_that_writes_nothing_or_other_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1.0, 1.0, 1.0]

    def run() -> dict[str, torch.Tensor]:
        return {"y": torch.full((3,), values.pop())}

    def graphed(take: Callable[[], object], calls: int) -> SimpleNamespace:
        take()
        return SimpleNamespace(replay=take if len(values) == 1 else lambda: None)

    monkeypatch.setattr(oracle, "graphed", graphed)
    oracle.must_replay(run)
    for left in ([1.0, 1.0], [2.0, 1.0, 1.0]):  # the last call is the replay's: none, or other bits
        values[:] = left
        with pytest.raises(oracle.Wrong, match="a CUDA graph gave other bits"):
            oracle.must_replay(run)


def test_a_training_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: 100 us a step, in graphs of 20; 400 us for one network by eager torch."""
    from gpu import train_step
    from gpu.common import Here
    from gpu.train_step import EAGER, OURS, VMAP, Rival

    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    def once(before: Any, run: Any) -> float:
        if before is not None:
            before()
        began = now[0]
        run()
        return now[0] - began

    def broken() -> Rival:
        raise RuntimeError("no rule for vmap\nmore")

    resets = []
    monkeypatch.setattr(train_step, "once", once)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rivals: dict[tuple[str, str], Any] = {
        (OURS, "graph"): lambda: Rival(
            lambda: spend(2e-3), 20, before=lambda: resets.append(1), repeats=False
        ),
        (EAGER, "warm"): lambda: Rival(lambda: spend(4e-4), times=100),
        (VMAP, "graph"): broken,
    }
    found = train_step.race(Here("cuda", "full"), rivals)
    assert found[OURS]["graph"]["median_s"] == pytest.approx(1e-4)
    assert found[OURS]["graph"]["samples"] == len(resets) == train_step.ROUNDS
    assert found[EAGER]["warm"]["median_s"] == pytest.approx(0.04)
    assert found[VMAP] == {"graph": {"none": "no rule for vmap"}}
    with pytest.raises(RuntimeError, match="no rule"):
        train_step.race(Here("cuda", "full"), {(OURS, "graph"): broken})


def test_training_rows_price_a_run(tmp_path: Path) -> None:
    """What the rows say is what `imp --price-on` reads; the floors are those of the formulas."""
    from types import SimpleNamespace

    from gpu import train_step
    from gpu.common import Here
    from sparselth.config import Recipe
    from sparselth.experiments.imp import ImpConfig
    from sparselth.experiments.price import recorded
    from sparselth.models import get_model

    model, times = get_model("lenet-300-100"), []
    here = Here("cuda", "full", {"copy_bytes_per_s": 4e12, "flops_per_s": {"tf32": 4e14, "ieee": 5e13}})
    setup: Any = SimpleNamespace(
        part="fc",
        model=model,
        recipe=Recipe(steps=1, lr=1e-3),
        data=SimpleNamespace(n_validation=5000),
    )

    def took(seconds: float) -> dict[str, Any]:
        return {
            train_step.OURS: {"graph": {"median_s": seconds}},
            train_step.VMAP: {"graph": {"none": "why"}},
        }

    for kind, seconds in (("step", 2e-4), ("evaluation", 1e-3), ("step, --deterministic", 9.0)):
        times += train_step.rows(here, setup, kind, kind, 100, took(seconds))
    step = times[0]
    assert step["bytes"] == 100 * (28 * 266_610 + 300 * 98 + 100 * 38 + 10 * 13 + 60 * 784)
    assert step["flops"] == 100 * 60 * 2 * (3 * 266_200 - 235_200)
    assert step["floor_s"] == pytest.approx(step["bytes"] / 4e12)
    assert times[0]["ways"]["graph"]["median_s"] == 2e-4
    times.append(times[0] | {"wrong": "off by 1", "ways": {"graph": {"median_s": 1e-6}}})  # prices nothing
    file = tmp_path / "nvidia-h200.json"
    data = {
        "device": {"name": "NVIDIA H200"},
        "times": [{"op": "train_step", "part": "fc"} | t for t in times],
    }
    file.write_text(json.dumps(data))
    config = ImpConfig(
        model="lenet-300-100",
        dataset="mnist",
        seeds=(0,),
        arms=("ticket",),
        levels=1,
        rate=0.2,
        scope="layer",
        one_shot=False,
        rewind=0,
        reinits=1,
        device="cpu",
        kernels="auto",
        recipe=Recipe(steps=1000, lr=1e-3),
    )
    name, price = recorded(str(file), config)
    assert name == "NVIDIA H200"
    assert price.batches == {100: 2e-4}
    assert price.validation == {100: 1e-3}

    conv = train_step.floor(get_model("conv2"), 1, 60, training=True)
    # 15.8 GFLOP a step; the first of two convolutions needs no dx
    assert conv["conv_flops"] == 60 * 1024 * 2 * 9 * (2 * 3 * 64 + 3 * 64 * 64)
    assert conv["flops"] == pytest.approx(15.8e9, rel=0.02)


@pytest.mark.parametrize(("seconds", "finished"), [(60.0, 3), (0.0, 0)])
def test_a_whole_run_and_one_for_which_time_is_short(
    monkeypatch: pytest.MonkeyPatch, seconds: float, finished: int
) -> None:
    from gpu import train_step
    from sparselth.config import Recipe
    from sparselth.experiments.imp import ImpConfig
    from sparselth.models import get_model
    from trainings import made_up

    steps = 20 if finished else 100_000
    config = ImpConfig(
        model="lenet-300-100",
        dataset="mnist",
        seeds=(0,),
        arms=("ticket", "reinit"),
        levels=1,
        rate=0.2,
        scope="layer",
        one_shot=False,
        rewind=0,
        reinits=1,
        device="cpu",
        kernels="auto",
        recipe=Recipe(steps=steps, lr=1e-3, eval_every=10),
    )
    images = made_up(get_model("lenet-300-100"), 800, 100)
    found = train_step.imp(config, images, seconds)
    assert (found["networks"], found["of"]) == (finished, 3)
    assert found["predicted_seconds"] > 0
    assert found["images"] == "made-up images"


def test_a_run_for_which_time_is_up_is_stopped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal ends the process, whatever it does: the workers may take longer than a tick to save."""
    from gpu import train_step

    sent: list[int] = []
    monkeypatch.setattr(train_step.signal, "raise_signal", sent.append)
    watch = train_step.Watch(-1.0)
    for _ in range(3):
        watch.tick()
    assert sent == [train_step.signal.SIGTERM]
