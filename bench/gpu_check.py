"""Every Triton kernel on a CUDA device: first right, then fast. One command, no network, no options needed:

    python bench/gpu_check.py

Checks every kernel against float64 (random shapes, odd sizes, NaN, offsets beyond 2^31), then times those
that passed, cold and warm, eager and as CUDA graphs, beside torch's dense rivals and the floor that the
measured copy bandwidth and matrix rate leave. Ends with a short table and writes everything as JSON.
Needs torch, Triton and numpy; convert safetensors, too. Exit codes: 0 all ran and passed, 1 nothing to run
on, 3 a check failed or something did not run to its end. A missed speed target is printed but fails nothing.

    --quick         fewer shapes, one benchmark an op, no huge tensors: two minutes instead of eight
    --only NAME     this op alone, may be repeated
    --interpret     checks alone, tiny shapes, in Triton's interpreter on the CPU
    --run           nothing of this but `imp --recipe paper --seeds 0-4 --levels 20` of LeNet-300-100 from its
                    first step to its last, on MNIST or on made-up images of its size, stopped after eight
                    minutes; needs safetensors, too

This file imports no torch. It starts processes (bench/gpu/worker.py) that do the work, so that a crash or a
hang costs one case: the process is started again behind it. To add an op, add it to OPS and write
bench/gpu/NAME.py with checks, large and benchmarks. Prices of `imp --price-on` come from train_step's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Op:
    parts: tuple[str, ...]  # each is checked in a process of its own and loses its times alone
    large: dict[str, int]  # which parts meet offsets beyond 2^31, and the GiB they need
    tiny: tuple[str, ...]  # which parts the interpreter sees


FLOATS = ("bf16", "fp16", "tf32", "ieee")
OPS = {  # the order of benchmarks, should time run out
    "train_step": Op(("fc", "conv2", "cnn", "alone"), {}, ("fc", "cnn", "alone")),
    "masked_linear": Op(FLOATS, {"bf16": 24, "far rows": 8}, ("bf16", "ieee")),
    "masked_update": Op(("adam", "sgd"), {"sgd": 29}, ("adam", "sgd")),
    "magnitude_threshold": Op(("fp32", "fp16", "bf16"), {"fp32": 20, "fp16": 16}, ("fp32", "bf16")),
    "bitmask": Op(("bits",), {"bits": 12}, ("bits",)),
    "masked_conv2d": Op(FLOATS, {"bf16": 32}, ("bf16", "ieee")),
    "linear_grad_update": Op(("adam", "sgd", "tf32"), {"sgd": 16}, ("adam", "sgd")),
    "csr_infer": Op(("bf16", "fp16", "ieee"), {"bf16": 24}, ("bf16", "ieee")),
    "slot_linear": Op(("bf16", "fp16"), {"bf16": 24}, ("bf16", "fp16")),
    "block_linear": Op(FLOATS, {"bf16": 14}, ("bf16", "ieee")),
    "block_conv2d": Op(FLOATS, {"bf16": 16}, ("bf16", "ieee")),
    "convert": Op(FLOATS, {}, ("bf16", "ieee")),
}


@dataclass(frozen=True)
class Target:
    op: str
    figure: str
    least: float | None = None
    most: float | None = None


TARGETS = [  # on an H100 or H200
    # 100 LeNet-300-100, then 30 Conv-2, Adam, batches of 60
    Target("train_step", "times its floor", most=2.0),
    Target("train_step", "times the sequential eager loop per replica-step", least=500.0),
    Target("train_step", "times the better of FLOP and byte floors", most=2.0),
    Target("masked_update", "share of copy bandwidth", least=0.85),
    Target("masked_update", "times torch's fused Adam and masks", least=1.8),
    Target("magnitude_threshold", "reads of the data", most=5.0),
    Target("magnitude_threshold", "times kthvalue", least=20.0),
    Target("masked_linear", "of cuBLAS on w * m", most=1.3),
    Target("linear_grad_update", "share of copy bandwidth", least=0.6),
    # 8192 square, bf16, 90 % pruned
    Target("csr_infer", "times the best dense, cold, batch 1", least=3.0),
    Target("csr_infer", "times the best dense, cold, batch 8", least=2.5),
    Target("csr_infer", "bytes of weights, of dense", most=0.21),
    Target("slot_linear", "times the best dense, cold, batch 32", least=2.0),
    # 4096 square, bf16, batch 4096, 90 % of the blocks pruned; BSR of blocks of 64
    Target("block_linear", "times the best dense, blocks of 128", least=5.0),
    Target("block_linear", "times the best dense, blocks of 64", least=4.0),
    Target("block_linear", "times torch's tuned BSR", least=1.2),
    # 256 channels, 3 x 3 on 14 x 14, bf16, batch 256, 90 % pruned in blocks of 64
    Target("block_conv2d", "times the best dense", least=3.0),
]

WIDTH = os.cpu_count() or 1  # processes that check (and compile) at a time; benchmarks run alone
SMALL = 4  # GiB that a process without huge tensors may take
RESTARTS = 4  # of a process that died, each behind the case that it died of
SECONDS = {"tiny": 600, "quick": 115, "full": 465, "run": 570}  # for everything
CHECKS_END = 0.55  # of them, and then come the benchmarks
LIMITS = {"device": 60, "checks": 200, "large": 150, "benchmarks": 150, "whole": 545}  # seconds a process


@dataclass
class Job:
    """Cases of an op in a process of their own."""

    op: str
    cases: list[tuple[str, str]]  # (kind, part)
    limit: float  # seconds
    gib: int = SMALL
    events: list[dict[str, Any]] = field(default_factory=list)  # how its cases went

    def benchmarks(self) -> bool:
        return self.cases[0][0] == "benchmarks"

    def __str__(self) -> str:
        return " ".join([self.op, *dict.fromkeys(word for case in self.cases for word in case)])


class Process:
    """A job at work."""

    def __init__(self, job: Job, command: list[str], folder: Path, limit: float) -> None:
        self.job, self.command, self.limit = job, command, limit
        self.file = folder / f"{re.sub(r'[^a-z0-9]+', '-', str(job))}.jsonl"
        self.restarts = 0
        self.began = time.monotonic()
        self.start(0)

    def start(self, first: int) -> None:
        self.first = first
        self.file.write_text("")
        self.stderr = self.file.with_suffix(".stderr").open("w+", errors="replace")
        command = [*self.command, "--first", str(first), "--events", str(self.file)]
        self.child = subprocess.Popen(command, stdout=self.stderr, stderr=self.stderr)

    def done(self) -> bool:
        """Whether the job has ended; starts it again if it died of a case."""
        code = self.child.poll()
        late = time.monotonic() - self.began > self.limit
        if code is None and not late:
            return False
        if code is None:
            self.stop()
        said = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]
        plan = next((event["plan"] for event in said if "plan" in event), None)
        ended = {event["end"] for event in said if "end" in event}
        begun = [event["begin"] for event in said if "begin" in event]
        self.job.events += [event for event in said if not {"plan", "begin"} & set(event)]
        if plan is None:
            if code != 0:
                parts = dict.fromkeys(part for _, part in self.job.cases)
                self.lost("start", [*parts], code)
            return True
        if code == 0:
            return True
        dying = [i for i in begun if i not in ended]
        for i in dying:
            self.lost(plan[i][0], [plan[i][1]], code)
        rest = range(max([self.first - 1, *ended, *dying]) + 1, len(plan))
        if rest and not late and self.restarts < RESTARTS:
            self.restarts += 1
            self.start(rest[0])
            return False
        for part in dict.fromkeys(plan[i][1] for i in rest):
            count = sum(plan[i][1] == part for i in rest)
            self.lost(f"{count} more cases", [part], code, "did not run: ")
        return True

    def lost(self, case: str, parts: list[str], code: int | None, words: str = "") -> None:
        event = {"case": case, "ok": False, "late": code is None, "message": words + self.why(code)}
        self.job.events += [event | {"part": part} for part in parts]

    def why(self, code: int | None) -> str:
        self.stderr.seek(0)
        last = [line.strip() for line in self.stderr.read().splitlines() if line.strip()][-1:]
        if code is None:
            return f"no end after {self.limit:.0f} s"
        if code == 70:
            return "the CUDA context broke"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ": ".join([f"the process died ({how})", *last])

    def stop(self) -> None:
        self.child.kill()
        self.child.wait()


class Check:
    """One run of this script."""

    def __init__(self, size: str, ops: list[str], out: Path | None) -> None:
        self.size, self.ops, self.out = size, ops, out
        self.began = time.monotonic()
        self.data: dict[str, Any] = {
            "schema": "sparselth.gpu_check/1",
            "size": size,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "ops": ops,
            "device": {},
            "anchors": {},
            "checks": [],
            "times": [],
            "targets": [],
            "clocks": [],
            "unfinished": [],
        }

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as name:
            self.folder = Path(name)
            device = Job("device", [("device", "")], LIMITS["device"])
            self.work([device])
            found = {key: value for event in device.events for key, value in event.items()}
            if found.get("missing", "") is not None:
                why = found.get("missing") or found.get("message") or "no answer from torch"
                print(f"gpu_check: {why}", file=sys.stderr)
                return 1
            self.data |= {"device": found["device"], "anchors": found["anchors"]}
            self.out = self.out or default_out(self.data["device"], self.size, self.ops)
            self.save()
            self.work(self.checking(), WIDTH)
            for op in self.ops:
                good = [part for part in OPS[op].parts if part not in self.failed(op)]
                self.data["clocks"].append(clocks(f"before {op}"))
                if good and self.size in ("quick", "full"):
                    cases = [("benchmarks", part) for part in good]
                    self.work([Job(op, cases, LIMITS["benchmarks"])])
            self.data["clocks"].append(clocks("at the end"))
        self.data["seconds"] = round(time.monotonic() - self.began, 1)
        self.save()
        print(report(self.data))
        return 3 if verdict(self.data) else 0

    def checking(self) -> list[Job]:
        """The checks, slow ones first; in the interpreter a process for each op, benchmarks untimed."""
        if self.size == "run":
            return [Job("train_step", [("whole", "fc")], LIMITS["whole"])]
        checks, large = [], []
        for name in reversed(self.ops):
            op = OPS[name]
            if self.size == "tiny":
                kinds = {"smoke": op.tiny, "checks": op.tiny, "large": op.large}
                kinds |= {"targets": op.tiny, "benchmarks": op.tiny}
                cases = [(kind, part) for kind, parts in kinds.items() for part in parts]
                checks.append(Job(name, cases, SECONDS["tiny"]))
                continue
            checks += [Job(name, [("checks", part)], LIMITS["checks"]) for part in op.parts]
            if self.size == "full":
                large += [Job(name, [("large", part)], LIMITS["large"], g) for part, g in op.large.items()]
        return checks + large

    def failed(self, op: str) -> set[str]:
        """The parts of an op that show no time; at least one check must have passed."""
        mine = [check for check in self.data["checks"] if check["op"] == op]
        passed = {check["part"] for check in mine if check["ok"]}
        return {c["part"] for c in mine if not c["ok"]} | (set(OPS[op].parts) - passed)

    def work(self, jobs: list[Job], width: int = 1) -> None:
        """Run jobs, as many side by side as the device's memory holds."""
        memory = self.data["device"].get("memory_bytes", 2**60) / 2**30 - 4
        waiting = list(jobs)
        running: list[Process] = []
        try:
            while waiting or running:
                for process in [p for p in running if p.done()]:
                    running.remove(process)
                    self.take(process.job, time.monotonic() - process.began)
                for job in list(waiting):
                    used = sum(p.job.gib for p in running)
                    if len(running) >= width or (running and used + job.gib > memory):
                        continue
                    waiting.remove(job)
                    left = self.left(job)
                    if left < 5:
                        event = {"case": "all", "ok": False, "late": True, "message": "no time was left"}
                        job.events += [event | {"part": part} for _, part in job.cases]
                        self.take(job, 0)
                        continue
                    running.append(Process(job, self.command(job), self.folder, min(left, job.limit)))
                time.sleep(0.02)
        finally:
            for process in running:
                process.stop()

    def left(self, job: Job) -> float:
        """Seconds until a job must have ended."""
        share = 1 if job.benchmarks() or self.size in ("tiny", "run") else CHECKS_END
        return share * SECONDS[self.size] - (time.monotonic() - self.began)

    def command(self, job: Job) -> list[str]:
        call = {"op": job.op, "wanted": job.cases, "size": "full" if self.size == "run" else self.size}
        call["anchors"] = self.data["anchors"]
        return [sys.executable, __file__, "--work", json.dumps(call)]

    def take(self, job: Job, seconds: float) -> None:
        """What a job found goes into the results, and they to the disk."""
        for event in job.events:
            if "case" not in event:
                continue
            found = event.pop("found", {})
            event.pop("end", None)
            if event.pop("late", False) and job.benchmarks():  # what was measured stands
                self.data["unfinished"].append(f"{job}, {event['case']}: {event['message']}")
                continue
            timed = found.pop("times", [])
            figures = found.pop("figures", {})
            shared = {"op": job.op, "part": event["part"]}
            self.data["times"] += [shared | row for row in timed if row["ways"]]
            self.data["targets"] += [
                shared | {"figure": name, "measured": value} for name, value in figures.items()
            ]
            if not timed:
                self.data["checks"].append({"op": job.op, **event, "found": found})
        failed = {(c["op"], c["part"]) for c in self.data["checks"] if not c["ok"]}
        for name in ("times", "targets"):
            self.data[name] = [row for row in self.data[name] if (row["op"], row["part"]) not in failed]
        if job.op == "device":
            return
        bad = [event for event in job.events if not event["ok"]]
        self.progress(f"{job}: {len(job.events)} cases, {len(bad)} failed, {seconds:.0f} s")
        for event in bad:
            self.progress(f"    {event['part']} {event['case']}: {event['message']}")
        self.save()

    def progress(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", file=sys.stderr, flush=True)

    def save(self) -> None:
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        beside = self.out.with_name(self.out.name + ".part")
        beside.write_text(json.dumps(self.data, indent=1))
        os.replace(beside, self.out)


def default_out(device: dict[str, Any], size: str, ops: list[str]) -> Path | None:
    """bench/results/nvidia-h200.json, a longer name where less was run; none for the interpreter."""
    if size == "tiny":
        return None
    less = [] if len(ops) == len(OPS) else ops
    words = [device["name"], *(["quick"] * (size == "quick")), *less, *(["run"] * (size == "run"))]
    return ROOT / "bench" / "results" / (re.sub(r"[^a-z0-9_]+", "-", " ".join(words).lower()) + ".json")


def clocks(when: str) -> dict[str, str]:
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return {"when": when, fields: (done.stdout.splitlines() or [done.stderr.strip()])[0]}
    except (OSError, subprocess.SubprocessError) as error:
        return {"when": when, fields: str(error)}


# The report, from the data alone


def verdict(data: dict[str, Any]) -> list[str]:
    """What keeps the exit code from being 0."""
    failed = [f"{c['op']} {c['part']}, {c['case']}: {c['message']}" for c in data["checks"] if not c["ok"]]
    return failed + list(data["unfinished"])


def report(data: dict[str, Any]) -> str:
    parts = [head(data), checks_table(data), times_table(data), targets_table(data)]
    wrong = verdict(data)
    last = f"{len(wrong)} failed or did not run" if wrong else "everything ran and passed"
    return "\n\n".join(part for part in [*parts, last] if part)


def head(data: dict[str, Any]) -> str:
    d, a = data["device"], data["anchors"]
    versions = d["packages"]
    line = f"{d.get('name') or d['cpu']}, torch {versions['torch']}, Triton {versions['triton']}"
    if data["size"] == "tiny":
        return line + "\nTriton's interpreter: checks of tiny shapes, no times"
    rates = ", ".join(f"{part} {rate / 1e12:.0f}" for part, rate in a["flops_per_s"].items())
    return f"{line}, {d['gpu']}\ncopy {a['copy_bytes_per_s'] / 1e12:.2f} TB/s; TFLOP/s: {rates}"


def checks_table(data: dict[str, Any]) -> str:
    lines = []
    for op, part in dict.fromkeys((c["op"], c["part"]) for c in data["checks"]):
        mine = [c for c in data["checks"] if (c["op"], c["part"]) == (op, part)]
        bad = [c for c in mine if not c["ok"]]
        skipped = [c for c in mine if "skipped" in c]
        line = f"{op:<20} {part:<9} {len(mine) - len(bad) - len(skipped):4} passed"
        lines.append(
            line + (f", {len(skipped)} skipped" if skipped else "") + (f", {len(bad)} FAILED" * bool(bad))
        )
        lines += [f"    FAILED {c['case']}: {c['message']}" for c in bad]
        lines += [f"    skipped {c['case']}: {c['skipped']}" for c in skipped]
        lines += [f"    {c['found']['said']}" for c in mine if "said" in c.get("found", {})]
    return "\n".join(lines)


def times_table(data: dict[str, Any]) -> str:
    """Ours in microseconds, three ways; the fastest rival as ours is best taken, and the floor."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in data["times"]:
        groups.setdefault((row["op"], row["part"], row["workload"]), []).append(row)
    lines, last = [], ""
    for (op, part, workload), rows in groups.items():
        ours = next(row for row in rows if row["ours"])
        way = "graph" if microseconds(ours, "graph") else "cold"
        rivals = {row["rival"]: t for row in rows if not row["ours"] and (t := microseconds(row, way))}
        name, best = min(rivals.items(), key=lambda item: item[1], default=("", 0.0))
        mine, floor = microseconds(ours, way), 1e6 * ours["floor_s"]
        figures = "".join(f"{shown(microseconds(ours, w)):>9}" for w in ("cold", "warm", "graph"))
        compared = f"{mine / best:5.2f}x of {shown(best)}, {name} ({way})" if best else ""
        if op != last:
            header = f"{op}, microseconds"
            lines.append(f"{header:<62}     cold     warm    graph    floor")
        lines.append(f"  {part:<5}{workload[:55]:<55}{figures}{shown(floor):>9}  {mine / floor:5.2f}x floor")
        lines += [f"{'':62}{compared}"] if compared else []
        last = op
    return "\n".join(lines)


def microseconds(row: dict[str, Any], way: str) -> float:
    """0 where a rival was not timed that way."""
    return 1e6 * float(row["ways"].get(way, {}).get("median_s", 0))


def shown(us: float) -> str:
    return "-" if not us else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def targets_table(data: dict[str, Any]) -> str:
    if data["size"] in ("tiny", "run"):
        return ""
    lines = ["targets, set for an H200"]
    for t in TARGETS:
        if t.op not in data["ops"]:
            continue
        found = [f["measured"] for f in data["targets"] if (f["op"], f["figure"]) == (t.op, t.figure)]
        wanted = f"at least {t.least:g}" if t.least is not None else f"at most {t.most:g}"
        if not found or found[0] is None:
            lines.append(f"  not measured  {t.op}: {t.figure} {wanted}")
            continue
        good = found[0] >= t.least if t.least is not None else found[0] <= (t.most or 0)
        lines.append(f"  {'pass' if good else 'MISS':<13} {t.op}: {t.figure} {found[0]:.2f}, {wanted}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two minutes instead of eight")
    parser.add_argument("--only", action="append", choices=OPS, metavar="NAME", help=", ".join(OPS))
    parser.add_argument("--out", type=Path, help="default bench/results/DEVICE.json")
    parser.add_argument("--interpret", action="store_true", help="checks alone, on the CPU")
    parser.add_argument("--run", action="store_true", help="a whole run of imp instead, within ten minutes")
    for hidden in ("--work", "--first", "--events"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        from gpu.worker import work

        work(**json.loads(args.work), first=int(args.first), events=Path(args.events))
        return 0
    paths = [str(ROOT), str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["TRITON_INTERPRET"] = "1" if args.interpret else "0"
    if args.interpret:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    size = "tiny" if args.interpret else "run" if args.run else "quick" if args.quick else "full"
    wanted = ["train_step"] if args.run else args.only or OPS
    try:
        return Check(size, [op for op in OPS if op in wanted], args.out).run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
