"""The tests of the kernels on a device, as a plugin of pytest: `python -m pytest FILES -p gpu.plugin`.

    --shard I/N    every Nth test from the Ith on, so that N processes take them all
    --first K      those of the shard from number K on: behind a test that broke the process before
    --events FILE  what is said there, in lines of JSON: `plan`, then `begin` and `end` of every test

After each test the device is waited for, so that what a kernel broke counts where it broke. A lost CUDA
context ends the process (exit code 70).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.worker import BROKEN, broken, count_kernels, taken, teller

SECONDS = 10.0  # about what the slowest tests take


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_check")
    group.addoption("--shard", default="0/1")
    group.addoption("--first", type=int, default=0)
    group.addoption("--events", required=True, type=Path)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Teller(config), "gpu-teller")


class Teller:
    def __init__(self, config: pytest.Config) -> None:
        self.shard, self.shards = map(int, config.getoption("shard").split("/"))
        self.first: int = config.getoption("first")
        self.say: Callable[..., None] = teller(config.getoption("events"))
        self.numbers: dict[str, int] = {}
        self.kernels = count_kernels()
        self.result: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)  # behind what -m leaves out
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        mine = items[self.shard :: self.shards]
        self.numbers = {item.nodeid: i for i, item in enumerate(mine)}
        items[:] = mine[self.first :]
        self.say(plan=[[nodeid, "", SECONDS] for nodeid in self.numbers])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported: said once, by the first shard."""
        if report.failed and self.shard == self.first == 0:
            last = report.longreprtext.strip().splitlines()[-1]
            self.say(case=report.nodeid, part="", ok=False, message=last, trace=report.longreprtext[-2000:])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        number = self.numbers[item.nodeid]
        self.result = {"ok": True, "seconds": 0.0}
        self.say(begin=number)
        done = yield
        lost = torch.cuda.is_initialized() and broken()
        if lost and self.result["ok"]:
            self.result |= {"ok": False, "message": "the CUDA context broke"}
        elif torch.cuda.is_initialized() and not lost:
            torch.cuda.empty_cache()  # other processes need room too
        self.result["seconds"] = round(self.result["seconds"], 3)
        self.say(end=number, case=item.nodeid, part="", **self.result, kernels=taken(self.kernels))
        if lost:
            os._exit(BROKEN)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.result["seconds"] += report.duration
        if report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.result["skipped"] = why.removeprefix("Skipped: ")
        if report.failed and self.result["ok"]:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = (crash.message if crash else report.longreprtext).strip() or "failed"
            trace = report.longreprtext[-2000:]
            self.result |= {"ok": False, "message": said.splitlines()[0], "trace": trace}
