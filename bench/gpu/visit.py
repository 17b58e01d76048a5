"""A visit to a device: stages of jobs, each in a process of its own, within a budget of seconds.

The order is that of value, so that what time runs out for is what matters least. A stage begins when the
one before it has ended; processes start, and import, before that: all of `smoke` while the anchors are
measured, and the next that will time while one does. Times are measured one job at a time.

A crash or a hang costs one case: its process is started again behind it. Whatever a process says is written
to the results at once. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gpu import report

STAGES = {  # in this order, and how many jobs go at a time; 0: as many as there are cores
    "device": 1,
    "smoke": 0,
    "targets": 1,
    "checks": 0,
    "large": 0,
    "benchmarks": 1,
    "run": 1,
}
MARGIN = 3.0  # seconds kept for the end
LEAST = 6.0  # seconds without which no job is worth its start
START = 180.0  # seconds for the first imports on a cold disk
LIMIT = 45.0  # seconds of a case, to compile its kernels, beside four times what it is expected to take
RESTARTS = 6  # of a job that died, each behind the case that it died of
BROKEN = 70  # how a process ends whose CUDA context is lost
AHEAD = 3  # processes that wait, imported, for their turn to time
GIB = 4  # GiB of the device that a process takes unless it says more


@dataclass
class Job:
    """Cases in a process of their own. `command` takes the number of the first case and the events' file."""

    stage: str
    op: str
    title: str
    command: Callable[[int, Path], list[str]]
    gib: int = GIB
    waits: bool = True  # for a line on stdin, the anchors, before it touches the device
    files: Mapping[str, str] = field(default_factory=dict)  # whose op the tests of a file are


class Worker(Protocol):
    """A process, or in tests what stands for one."""

    def said(self) -> list[dict[str, Any]]: ...
    def go(self, anchors: Mapping[str, Any]) -> None: ...
    def code(self) -> int | None: ...
    def last_words(self) -> str: ...
    def kill(self) -> None: ...


class Process:
    """A child process that says what it does in a file of JSON lines."""

    def __init__(self, command: list[str], events: Path) -> None:
        events.write_text("")
        self.file = events.open()
        self.rest = ""
        self.stderr = events.with_suffix(".stderr").open("w+", errors="replace")
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.stderr, stderr=self.stderr, text=True
        )

    def said(self) -> list[dict[str, Any]]:
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        return [json.loads(line) for line in lines]

    def go(self, anchors: Mapping[str, Any]) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(OSError):  # it has died already; `code` will say how
            self.child.stdin.write(json.dumps(anchors) + "\n")
            self.child.stdin.close()

    def code(self) -> int | None:
        return self.child.poll()

    def last_words(self) -> str:
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr.read().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def kill(self) -> None:
        self.child.kill()  # not waited for: the driver may hold it


@dataclass
class Running:
    """A job that was launched."""

    job: Job
    worker: Worker
    launched: float
    first: int = 0
    heard: float = 0.0  # when it was launched, let go or last said something
    gone: float | None = None  # when it was first let go
    plan: list[tuple[str, str, float]] | None = None
    ended: set[int] = field(default_factory=set)
    doing: int | None = None  # a case
    bad: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0

    def rest(self) -> list[int]:
        """What has neither ended nor died; all of it where no plan is known."""
        return [i for i in range(len(self.plan or [])) if i >= self.first and i not in self.ended]


class Visit:
    """Jobs in the order of their stages; what they find is in `data`, and on the disk, at any moment."""

    def __init__(
        self,
        jobs: list[Job],
        data: dict[str, Any],
        out: Path,
        budget: float,
        width: int,
        launch: Callable[[list[str], Path], Worker] = Process,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        began: float | None = None,
    ) -> None:
        self.waiting = sorted(jobs, key=lambda job: list(STAGES).index(job.stage))
        self.data, self.out = data, out
        self.budget, self.width = budget, width
        self.launch, self.clock, self.sleep = launch, clock, sleep
        self.began = clock() if began is None else began
        self.running: list[Running] = []
        self.file: Path | None = None
        self.ready: Callable[[], bool] = lambda: True  # whether what all processes need is there
        self.clocks: Path | None = None  # a file that grows
        self.stop: str | None = None  # why nothing can be done here
        self.changed = False

    def now(self) -> float:
        return self.clock() - self.began

    def left(self) -> float:
        return self.budget - MARGIN - self.now()

    def run(self, folder: Path) -> None:
        """Until all is done or the time is over; whatever is left then is named."""
        self.folder = folder
        try:
            while (self.waiting or self.running) and self.left() > 0 and self.stop is None:
                for running in list(self.running):
                    self.look(running)
                if not self.running and self.left() < LEAST:
                    break
                self.schedule()
                if self.changed:
                    self.save()
                self.sleep(0.05)
        finally:
            for running in self.running:
                for event in running.worker.said():
                    self.heard(running, event)
                running.worker.kill()
                self.cut(running.job, running)
            for job in self.waiting:
                self.cut(job, None)
            self.running, self.waiting = [], []
            self.data["seconds"] = round(self.now(), 1)
            self.save()

    # What runs

    def schedule(self) -> None:
        """Let go what may go, then launch what may wait."""
        if not self.waiting and all(r.gone is not None for r in self.running):
            return
        stages = [job.stage for job in self.waiting] + [r.job.stage for r in self.running]
        stage = min(stages, key=list(STAGES).index)
        width = STAGES[stage] or self.width
        memory = self.data["device"].get("memory_bytes", 2**36) / 2**30 - 4
        for running in [r for r in self.running if r.gone is None]:
            if running.job.stage == stage and self.fits(running.job, width, memory):
                self.go(running)
        while self.waiting and self.waiting[0].stage == stage and self.fits(self.waiting[0], width, memory):
            if self.left() < LEAST:
                return
            self.go(self.start(self.waiting.pop(0)))
        idle = [r for r in self.running if r.gone is None]
        while self.waiting and self.waiting[0].waits and len(self.running) <= self.width:
            job = self.waiting[0]
            if job.stage == "large" or (job.stage != "smoke" and len(idle) >= AHEAD):
                return
            if self.left() < LEAST:
                return
            self.waiting.pop(0)
            idle.append(self.start(job))

    def fits(self, job: Job, width: int, memory: float) -> bool:
        gone = [r for r in self.running if r.gone is not None]
        used = sum(r.job.gib for r in gone)
        return self.ready() and len(gone) < width and (not gone or used + job.gib <= memory)

    def start(self, job: Job) -> Running:
        running = Running(job, self.process(job, 0), self.clock(), heard=self.clock())
        self.running.append(running)
        return running

    def process(self, job: Job, first: int) -> Worker:
        name = re.sub(r"[^a-z0-9]+", "-", f"{job.stage} {job.title}")
        events = self.folder / f"{name}-{first}.jsonl"
        return self.launch(job.command(first, events), events)

    def go(self, running: Running) -> None:
        running.heard = self.clock()
        running.gone = running.gone or self.clock()
        if running.job.waits:
            running.worker.go(self.data["anchors"])

    def look(self, running: Running) -> None:
        """Hear what a process says, and whether it has ended, died or hung."""
        code = running.worker.code()
        for event in running.worker.said():
            self.heard(running, event)
        limit = START
        if running.plan is not None and running.doing is not None:
            limit = LIMIT + 4 * running.plan[running.doing][2]
        waits = running.plan is not None and running.gone is None
        hung = not waits and self.clock() - running.heard > limit
        if code is None and not hung:
            return
        if code is None:
            running.worker.kill()
        why = self.why(running, code, limit)
        if running.plan is None:
            self.lost(running, "start", "", why)
        elif running.doing is not None:
            running.ended.add(running.doing)
            self.lost(running, *running.plan[running.doing][:2], why)
        running.doing = None
        rest = running.rest()
        if rest and running.restarts < RESTARTS:
            running.first = rest[0]
            running.restarts += 1
            running.worker, running.heard = self.process(running.job, running.first), self.clock()
            if running.gone is not None:
                self.go(running)
            return
        if rest:
            self.lost(running, f"{len(rest)} more cases did not run", "", why)
        self.running.remove(running)
        self.ended(running)

    def why(self, running: Running, code: int | None, limit: float) -> str:
        if code is None:
            return f"no end after {limit:.0f} s"
        if code == BROKEN:
            return "the CUDA context broke"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ": ".join(word for word in (f"the process died ({how})", running.worker.last_words()) if word)

    # What is found

    def heard(self, running: Running, event: dict[str, Any]) -> None:
        """Take what a process said into the results."""
        self.changed, running.heard = True, self.clock()
        if "plan" in event:
            running.plan = [(name, part, seconds) for name, part, seconds in event["plan"]]
        elif "begin" in event:
            running.doing = event["begin"]
        elif "case" in event:
            if "end" in event:
                running.ended.add(event.pop("end"))
                running.doing = None
            self.take(running, event)

    def take(self, running: Running, event: dict[str, Any]) -> None:
        job = running.job
        for name, count in event.pop("kernels", {}).items():
            self.data["kernels"][name] = self.data["kernels"].get(name, 0) + count
        found = event.pop("found", {})
        if job.stage == "device":
            self.device(event, found)
            return
        timed, figures = found.pop("times", []), found.pop("figures", {})
        wrong = {"wrong": found.pop("wrong")} if "wrong" in found else {}
        if wrong:
            event |= {"ok": False, "message": f"timed all the same: {wrong['wrong']}"}
        op = job.files.get(event["case"].split("::")[0], job.op)
        shared = {"stage": job.stage, "op": op, "part": event["part"]}
        self.data["times"] += [shared | row | wrong for row in timed if row["ways"]]
        self.data["targets"] += [
            shared | {"figure": name, "measured": value} | wrong for name, value in figures.items()
        ]
        check = shared | event | ({"found": found} if found else {})
        self.data["checks"].append(check)
        running.bad += [] if check["ok"] else [check]

    def device(self, event: dict[str, Any], found: dict[str, Any]) -> None:
        """Facts and anchors; one that fails is noted, and no more."""
        self.stop = found.get("missing")
        self.data["device"] |= found.get("device", {})
        for name, value in found.get("anchors", {}).items():
            if isinstance(value, dict):
                self.data["anchors"].setdefault(name, {}).update(value)
            else:
                self.data["anchors"][name] = value
        if not event["ok"]:
            failed = self.data["device"].setdefault("failed", {})
            failed[f"{event['case']} {event['part']}".strip()] = event["message"]

    def lost(self, running: Running, case: str, part: str, why: str) -> None:
        """A case that took its process along."""
        self.changed = True
        self.take(running, {"case": case, "part": part, "ok": False, "message": why})

    def ended(self, running: Running) -> None:
        job = running.job
        if job.stage == "device":
            self.progress(report.device(self.data))
            return
        seconds = self.clock() - (running.gone or running.launched)
        count, bad = len(running.ended), running.bad
        self.progress(f"{job.stage} {job.title}: {count} cases, {len(bad)} failed, {seconds:.0f} s")
        for check in bad[:3]:
            self.progress(f"    {report.shortened(report.named(check), 110)}")

    def cut(self, job: Job, running: Running | None) -> None:
        """Name what time has run out for."""
        row: dict[str, Any] = {"stage": job.stage, "op": job.op, "job": job.title, "cases": None}
        if running is not None and running.plan is not None and running.gone is not None:
            names = [" ".join(running.plan[i][:2]).strip() for i in running.rest()]
            row |= {"cases": names, "of": len(running.plan)}
        if row["cases"] != []:
            self.data["unfinished"].append(row)

    def progress(self, line: str) -> None:
        print(f"{self.now():6.1f} s  {line}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """All results as JSON, and the tables of times as text, in files that are whole at any moment."""
        self.changed = False
        if self.clocks is not None and self.clocks.exists():
            self.data["clocks"] = self.clocks.read_text().splitlines()
        file = self.out / f"{report.file_name(self.data)}.json"
        self.out.mkdir(parents=True, exist_ok=True)
        write(file, as_json(self.data))
        if self.data["times"]:
            write(file.with_suffix(".txt"), report.tables(self.data) + "\n")
        if self.file not in (None, file):  # the device had no name yet
            self.file.unlink()
        self.file = file


def as_json(data: dict[str, Any]) -> str:
    """One row of a list a line, for who reads it or compares two."""
    parts = []
    for key, value in data.items():
        rows = [json.dumps(row) for row in value] if isinstance(value, list) else []
        text = "[\n  " + ",\n  ".join(rows) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(file: Path, text: str) -> None:
    beside = file.with_name(file.name + ".part")
    beside.write_text(text)
    os.replace(beside, file)
