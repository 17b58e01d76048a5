"""bench/gpu_check.py without a GPU: checks in the interpreter, and what it makes of crashes and timings."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle

BENCH = Path(__file__).resolve().parents[1] / "bench"


def command(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(BENCH / "gpu_check.py"), *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_checks_pass_in_the_interpreter(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = command(environment, "--interpret", "--only", "bitmask", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything ran and passed" in done.stdout
    data = json.loads(out.read_text())
    assert data["checks"]
    assert all(c["ok"] for c in data["checks"])
    assert data["times"] == []


def test_without_cuda_one_line_and_exit_code_1(environment: dict[str, str]) -> None:
    done = command(environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "finds no CUDA device" in done.stderr


FAKE = """
import json, os, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
call, first = json.loads(args["--work"]), int(args["--first"])

def say(**event):
    with open(args["--events"], "a") as file:
        file.write(json.dumps(event) + "\\n")

if call["op"] == "device":
    say(device={"name": "Test GPU", "gpu": "Test GPU, driver 1", "memory_bytes": 2**36,
                "packages": {"torch": "2", "triton": "3"}})
    say(anchors={"copy_bytes_per_s": 4e12, "flops_per_s": {"bf16": 8e14, "ieee": 5e13}})
    say(missing=None)
    sys.exit()
((kind, part), *more) = call["wanted"]
if kind == "benchmarks":
    say(plan=[[part, part] for _, part in call["wanted"]])
    for i, (_, part) in enumerate(call["wanted"]):
        row = {"workload": "w", "rival": "triton", "ours": True, "floor_s": 1e-5, "bytes": 1, "flops": 1}
        time_ = {"median_s": 2e-5, "q1_s": 1e-5, "q3_s": 3e-5, "samples": 9}
        rows = [row | {"ways": {"cold": time_}},
                row | {"rival": "dense", "ours": False, "ways": {"cold": time_}}]
        say(end=i, case=part, part=part, ok=True,
            found={"times": rows, "figures": {"of cuBLAS on w * m": 1.25}})
    sys.exit()
plan = ["good", "bad", "better"]
say(plan=[[case, part] for case in plan])
for i, case in enumerate(plan[first:], first):
    say(begin=i)
    if case == "bad":
        if part == "fp16":
            say(end=i, case=case, part=part, ok=False, message="y: error 1")
            continue
        if part == "tf32":
            print("illegal memory access", file=sys.stderr)
            os.abort()
        if part == "ieee":
            time.sleep(60)
    say(end=i, case=case, part=part, ok=True, found={})
"""


def test_failures_crashes_and_hangs_cost_their_part_its_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_check

    fake, out = tmp_path / "fake.py", tmp_path / "found.json"
    fake.write_text(FAKE)
    monkeypatch.setattr(gpu_check, "__file__", str(fake))
    monkeypatch.setitem(gpu_check.LIMITS, "checks", 4)
    check = gpu_check.Check("full", ["masked_linear"], out)
    assert check.run() == 3
    data = json.loads(out.read_text())
    assert {row["part"] for row in data["times"]} == {"bf16"}
    found = {(c["part"], c["case"]): c.get("message", "") for c in data["checks"]}
    assert found["fp16", "bad"] == "y: error 1"
    assert found["fp16", "better"] == ""
    assert found["tf32", "bad"] == "the process died (SIGABRT): illegal memory access"
    assert found["tf32", "better"] == ""  # a new process went on
    assert found["ieee", "good"] == ""
    assert found["ieee", "bad"] == "no end after 4 s"
    assert "did not run" in found["ieee", "1 more cases"]
    printed = capsys.readouterr().out
    assert "FAILED bad: y: error 1" in printed
    assert "pass          masked_linear: of cuBLAS on w * m 1.25, at most 1.3" in printed
    assert printed.count("x floor") == 1
    assert "4 failed or did not run" in printed


def test_no_time_left_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_check

    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.setattr(gpu_check.Check, "left", lambda self, job: 60 if job.op == "device" else 4)
    check = gpu_check.Check("full", ["bitmask"], tmp_path / "found.json")
    assert check.run() == 3
    assert check.data["times"] == []
    assert {c["message"] for c in check.data["checks"]} == {"no time was left"}
    late = gpu_check.Job("bitmask", [("benchmarks", "bits")], 1)
    check.data["checks"] = []
    check.work([late])  # a benchmark that comes too late is no failed check
    assert check.data["checks"] == []
    assert check.data["unfinished"] == ["bitmask benchmarks bits, all: no time was left"]


def row(op: str, part: str, workload: str, rival: str, **ways: float) -> dict[str, Any]:
    return {
        "op": op,
        "part": part,
        "workload": workload,
        "rival": rival,
        "ours": rival == "triton",
        "floor_s": 20e-6,
        "ways": {way.replace("_", " "): {"median_s": 1e-6 * us} for way, us in ways.items()},
    }


def test_report_of_made_up_timings() -> None:
    import gpu_check

    bad = {"op": "masked_linear", "part": "tf32", "case": "c", "ok": False, "message": "off"}
    skipped = {"op": "bitmask", "part": "bits", "case": "s", "ok": True, "skipped": "needs 12 GiB"}
    data = {
        "size": "full",
        "ops": list(gpu_check.OPS),
        "device": {"name": "NVIDIA H200", "gpu": "driver 1", "packages": {"torch": "2.11", "triton": "3.6"}},
        "anchors": {"copy_bytes_per_s": 4.3e12, "flops_per_s": {"bf16": 7.9e14}},
        "checks": [bad, skipped],
        "times": [
            row("masked_linear", "bf16", "y", "triton", cold=40, warm=35, graph=30, cold_graph=38),
            row("masked_linear", "bf16", "y", "cuBLAS", cold=30, warm=28, graph=24, cold_graph=33),
            row("masked_linear", "bf16", "y", "slow", cold=300, warm=280, graph=240),
            row("magnitude_threshold", "fp32", "1e8", "triton", cold=1500, warm=1400),
            row("magnitude_threshold", "fp32", "1e8", "kthvalue", cold=60000, warm=60000),
        ],
        "targets": [
            {"op": "magnitude_threshold", "part": "fp32", "figure": "times kthvalue", "measured": 40.0},
            {"op": "masked_linear", "part": "bf16", "figure": "of cuBLAS on w * m", "measured": 1.4},
        ],
        "unfinished": [],
    }
    lines = gpu_check.report(data).splitlines()
    assert "copy 4.30 TB/s; TFLOP/s: bf16 790" in lines
    assert "    FAILED c: off" in lines
    assert "    skipped s: needs 12 GiB" in lines
    linear = next(i for i, line in enumerate(lines) if line.split()[:2] == ["bf16", "y"])
    assert lines[linear].split()[2:] == ["40.0", "35.0", "30.0", "20.0", "1.50x", "floor"]
    assert lines[linear + 1].strip() == "1.25x of 24.0, cuBLAS (graph)"
    assert any("0.03x of 60000, kthvalue (cold)" in line for line in lines)
    assert "  pass          magnitude_threshold: times kthvalue 40.00, at least 20" in lines
    assert "  MISS          masked_linear: of cuBLAS on w * m 1.40, at most 1.3" in lines
    measured = {(row["op"], row["figure"]) for row in data["targets"]}
    missing = [t for t in gpu_check.TARGETS if (t.op, t.figure) not in measured]
    assert sum("not measured" in line for line in lines) == len(missing) > 1
    assert lines[-1] == "1 failed or did not run"
    assert max(map(len, lines)) <= 130
    name = gpu_check.default_out({"name": "NVIDIA H200"}, "quick", ["bitmask"])
    assert name.name == "nvidia-h200-quick-bitmask.json"


def test_a_run_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_check

    (tmp_path / "fake.py").write_text(
        FAKE.replace("found={})", "found={'said': case + ' of ' + kind, 'figures': {'minutes': 2.5}})")
    )
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "fake.py"))
    check = gpu_check.Check("run", ["train_step"], tmp_path / "found.json")
    assert check.run() == 0
    assert {c["part"] for c in check.data["checks"]} == {"fc"}
    assert check.data["targets"][0]["measured"] == 2.5
    printed = capsys.readouterr().out
    assert "    better of whole" in printed
    assert "targets" not in printed
    job = check.checking()[0]
    assert json.loads(check.command(job)[-1])["size"] == "full"
    name = gpu_check.default_out({"name": "NVIDIA H200"}, "run", ["train_step"])
    assert name.name == "nvidia-h200-train_step-run.json"


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
    off = {"y": (small["y"] + 1e-7 * right["y"]).float()}
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

        def replay(self) -> None:
            for _ in range(self.calls):
                self.run()

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
    assert set(found["ours"]) == {"cold", "warm", "graph", "cold graph"}
    for ways in found["ours"].values():
        assert ways["median_s"] == pytest.approx(1e-5)
        assert ways["samples"] == 25
    assert found["slow"]["cold"]["samples"] == 3
    assert found["no graph"]["graph"] == {"none": "cannot be captured"}
    assert found["no graph"]["warm"]["median_s"] == pytest.approx(2e-5)
    assert found["broken"] == {"warm": {"none": "not on this device"}}
    with pytest.raises(RuntimeError, match="not on this device"):
        timing.race(Here("cuda", "full"), rivals, "broken")


# train_step


def test_injected_faults_of_training_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import train_step
    from gpu.common import Here

    here = Here("cpu", "tiny")
    reference = partial(train_step.beside_the_reference, here, "fc", "triton")
    company = partial(train_step.alone, here, "fc", "triton", 2)
    idle = partial(train_step.idle, here, "fc", "triton")
    graphs = partial(train_step.beside_single_launches, here, "fc", "triton")
    stop = partial(train_step.stopped, here, "fc")
    timed = partial(train_step.benchmark, here, "fc", 2, "auto")
    for run in (reference, company, idle, graphs, stop, timed):
        assert attempt(run)["ok"]

    right = train_step.fit

    def wrong(model: Any, data: Any, jobs: list[Any], recipe: Any, *, kernels: str, **more: Any) -> None:
        right(model, data, jobs, recipe, kernels=kernels, **more)
        if kernels == "triton":
            for i, job in enumerate(jobs):
                job.state.weights *= 1 + 1e-3 * (i == len(jobs) - 1 > 0)
        else:
            jobs[0].state.weights *= 1 + 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "fit", wrong)
        assert "off by" in attempt(reference)["message"]
        assert "company of 2 gave other bits" in attempt(company)["message"]
        assert "off by" in attempt(timed)["message"]
        assert "a stop gave other bits" in attempt(stop)["message"]

    step = train_step.Replay._step

    def careless(self: Any) -> None:
        step(self)
        self.weights += 1e-9

    with monkeypatch.context() as patch:
        patch.setattr(train_step.Replay, "_step", careless)
        assert "changed: an idle step" in attempt(idle)["message"]
    with monkeypatch.context() as patch:
        advance = train_step.Replay.advance
        patch.setattr(
            train_step.Replay, "advance", lambda self, step, n, stop: advance(self, step, n - 1, stop)
        )
        assert "launches one by one gave other bits" in attempt(graphs)["message"]


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
    from sparselth.config import ImpConfig, Recipe
    from sparselth.experiments.plan import recorded
    from sparselth.models import get_model

    model, times = get_model("lenet-300-100"), []
    here = Here("cuda", "full", {"copy_bytes_per_s": 4e12, "flops_per_s": {"tf32": 4e14, "ieee": 5e13}})
    setup: Any = SimpleNamespace(
        here=here,
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
        times += train_step.rows(setup, kind, kind, 100, took(seconds))
    step = times[0]
    assert step["bytes"] == 100 * (28 * 266_610 + 300 * 98 + 100 * 38 + 10 * 13 + 60 * 784)
    assert step["flops"] == 100 * 60 * 2 * (3 * 266_200 - 235_200)
    assert step["floor_s"] == pytest.approx(step["bytes"] / 4e12)
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
    from sparselth.config import ImpConfig, Recipe
    from sparselth.models import get_model

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
    images = train_step.made_up(get_model("lenet-300-100"), 800, 100)
    found = train_step.imp(config, images, seconds)
    assert (found["networks"], found["of"]) == (finished, 3)
    assert found["predicted_seconds"] > 0
    assert found["images"] == "made-up images"
