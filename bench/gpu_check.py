"""Every Triton kernel on a CUDA device: first right, then fast. One command, no network, no options needed:

    PYTHONPATH=. python bench/gpu_check.py

A visit of eight minutes, in the order of what matters: the device and its rates; every op once at its
target shape beside float64 and in a CUDA graph, and a training of each kind (smoke); the figures that the
targets are about, each with the one rival that it needs (targets); all tests of tests/kernels (checks);
offsets beyond 2^31 (large); every other time and rival (benchmarks). What time runs out for is dropped from
the end, and named.

Writes DEVICE.json (bench/results/README.md) as results come, and DEVICE.txt with the tables of times. Ends
with the targets, what failed and what was cut. Needs pytest and hypothesis beside what sparselth needs. Exit
codes: 0 all ran and passed, 1 nothing to run on, 3 something failed or was cut. A missed target is printed
but fails nothing.

    --out FOLDER     where the files go; default bench/results
    --budget SECONDS for everything, this command's start and end too; default 480
    --stage NAME     this stage alone (the device's rates are always measured); may be repeated. `run` is
                     none of the others: `imp --recipe paper --seeds 0-4 --levels 20` of LeNet-300-100 from
                     its first step to its last, stopped after eight minutes, on MNIST or made-up images
    --only OP        this op alone; may be repeated
    --bundle FILE    kernels compiled before (make gpu-bundle); default build/gpu-bundle.tar.xz, if there
    --interpret      a rehearsal on the CPU: small shapes in Triton's interpreter, no times

This file imports no torch. Processes do the work (bench/gpu/worker.py, bench/gpu/plugin.py), so that a crash
or a hang costs one case. To add an op, add it to OPS and write bench/gpu/NAME.py (bench/gpu/common.py says
how). Prices of `imp --price-on` come from train_step's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu import bundle as archives
from gpu import report
from gpu.report import Target
from gpu.visit import GIB, STAGES, Job, Visit

ROOT = Path(__file__).resolve().parents[1]
BUDGET, RUN_BUDGET = 480.0, 570.0
FEW = 3  # benchmarks of an op that come before others' later ones


@dataclass(frozen=True)
class Op:
    tests: tuple[str, ...]  # in tests/
    gib: int = GIB  # GiB of the device that its large cases need


OPS = {  # in the order of stages that run one after another
    "csr_lanes": Op(("kernels/test_csr_lanes.py",), 24),
    "slot_linear": Op(("kernels/test_slot_linear.py", "kernels/test_two_four_linear.py"), 24),
    "block_linear": Op(("kernels/test_block_linear.py",), 14),
    "masked_linear": Op(("kernels/test_masked_linear.py",), 24),
    "masked_update": Op(("kernels/test_masked_update.py",), 29),
    "magnitude_threshold": Op(("kernels/test_magnitude_threshold.py",), 20),
    "linear_grad_update": Op(("kernels/test_linear_grad_update.py",), 16),
    "train_step": Op(("engine/test_replay.py", "kernels/test_replica_parts.py")),
    "block_conv2d": Op(("kernels/test_block_conv2d.py",), 16),
    "masked_conv2d": Op(("kernels/test_masked_conv2d.py",), 32),
    "bitmask": Op(("kernels/test_bitmask.py",), 12),
    "seed_linear": Op(
        ("kernels/test_hash_weights.py", "kernels/test_seed_linear.py", "kernels/test_seed_conv2d.py"), 8
    ),
    "convert": Op(("sparse/test_device.py",), 8),
}

TARGETS = [  # on an H100 or H200
    # 8192 square, bf16, 90 % pruned
    Target("csr_lanes", "times the best dense, cold, batch 1", least=3.0),
    Target("csr_lanes", "times the best dense, cold, batch 8", least=2.5),
    Target("csr_lanes", "bytes of weights, of dense", most=0.21),
    Target("slot_linear", "times the best dense, cold, batch 32", least=2.0),
    # 8192 square, bf16, half kept, signs out of a hash
    Target("seed_linear", "times the best dense, cold, batch 1", least=3.0),
    Target("seed_linear", "times the best dense, cold, batch 16", least=3.0),
    Target("seed_linear", "bytes of weights, of dense", most=0.0625),
    # 4096 square, bf16, batch 4096, 90 % of the blocks pruned; BSR of blocks of 64
    Target("block_linear", "times the best dense, blocks of 128", least=5.0),
    Target("block_linear", "times the best dense, blocks of 64", least=4.0),
    Target("block_linear", "times torch's tuned BSR", least=1.2),
    # 4096 square, bf16, batch 512, packed masks
    Target("masked_linear", "of cuBLAS on w * m", most=1.3),
    # one of 6.7e7 weights, 20 % kept
    Target("masked_update", "share of copy bandwidth", least=0.85),
    Target("masked_update", "times torch's fused Adam and masks", least=1.8),
    # 1e8 weights
    Target("magnitude_threshold", "reads of the data", most=5.0),
    Target("magnitude_threshold", "times kthvalue", least=20.0),
    # the first layer of 100 LeNet-300-100
    Target("linear_grad_update", "share of copy bandwidth", least=0.6),
    # 100 LeNet-300-100, then 30 Conv-2, Adam, batches of 60
    Target("train_step", "times its floor", most=2.0),
    Target("train_step", "times the sequential eager loop per replica-step", least=500.0),
    Target("train_step", "times the better of FLOP and byte floors", most=2.0),
    # 256 channels, 3 x 3 on 14 x 14, bf16, batch 256, 90 % pruned in blocks of 64
    Target("block_conv2d", "times the best dense", least=3.0),
]


def planned(stages: list[str], ops: list[str], size: str, width: int) -> list[Job]:
    """Jobs of every stage, of the ops that have such cases."""
    jobs = []

    def add(stage: str, op: str, kind: str, title: str, some: tuple[int, int | None] = (0, None)) -> None:
        if f"\ndef {kind}(" not in (ROOT / "bench" / "gpu" / f"{op}.py").read_text():
            return
        call = {"op": op, "kind": kind, "some": some, "size": size}
        jobs.append(Job(stage, op, title, partial(cases, call), OPS[op].gib if stage == "large" else GIB))

    add("device", "device", "anchors", "and its rates")
    for stage in stages:
        if stage == "run":
            add("run", "train_step", "whole", "train_step")
        elif stage == "benchmarks":  # of each op the first, then all others
            for op in ops:
                add(stage, op, stage, op, (0, FEW))
            for op in ops:
                add(stage, op, stage, f"{op}, others", (FEW, None))
        elif stage == "checks":
            jobs += shards(ops, width)
        else:
            for op in ops:
                add(stage, op, stage, op)
    return jobs


def cases(call: dict[str, Any], first: int, events: Path) -> list[str]:
    """The command of a process of bench/gpu/worker.py."""
    call = call | {"first": first, "events": str(events)}
    return [sys.executable, __file__, "--work", json.dumps(call)]


def shards(ops: list[str], width: int) -> list[Job]:
    """The tests of the ops, dealt to as many processes as there are cores."""
    files = {f"tests/{file}": name for name in ops for file in OPS[name].tests}

    def tests(i: int, first: int, events: Path) -> list[str]:
        words = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.plugin", "-p", "no:cacheprovider"]
        words += ["-m", "not host and not science", "--continue-on-collection-errors", "--rootdir", str(ROOT)]
        words += [f"--shard={i}/{width}", f"--first={first}", f"--events={events}"]
        return words + [str(ROOT / file) for file in files]

    if not files:
        return []
    shown = f"of {width}"
    return [
        Job("checks", "tests", f"{i + 1} {shown}", partial(tests, i), waits=False, files=files)
        for i in range(width)
    ]


def unpack(bundle: Path, folder: Path) -> None:
    """The compiled kernels of a bundle, into Triton's cache."""
    try:
        archives.unpack(bundle, folder)
    except Exception as error:  # then they are compiled
        print(f"gpu_check: {bundle}: {error}", file=sys.stderr)


def environment(cache: Path, interprets: bool) -> dict[str, str]:
    """For all processes."""
    paths = [ROOT, ROOT / "bench", ROOT / "tests" / "kernels", os.environ.get("PYTHONPATH", "")]
    found = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": "1" if interprets else "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    return found | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if interprets else {})


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results")
    parser.add_argument("--budget", type=float, help=f"seconds; default {BUDGET:.0f}")
    parser.add_argument(
        "--stage", action="append", choices=[*STAGES][1:], help="this stage alone; repeatable"
    )
    parser.add_argument("--only", action="append", choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--bundle", type=Path, help="compiled kernels; default build/gpu-bundle.tar.xz")
    parser.add_argument("--interpret", action="store_true", help="a rehearsal on the CPU")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        from gpu.worker import work

        work(**json.loads(args.work))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stages = [s for s in STAGES if s != "device" and (s in args.stage if args.stage else s != "run")]
    ops = [op for op in OPS if not args.only or op in args.only]
    size, width = "tiny" if args.interpret else "full", max(os.cpu_count() or 1, 2)
    data: dict[str, Any] = {
        "schema": "sparselth.gpu_check/2",
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "budget_s": args.budget or (RUN_BUDGET if "run" in stages else BUDGET),
        "part": [*(["rehearsal"] if args.interpret else []), *(args.stage or []), *(args.only or [])],
        "ops": ops,
        "device": {},
        "anchors": {},
        "bundle": None,
        "kernels": {},
        "checks": [],
        "times": [],
        "targets": [],
        "clocks": [],
        "unfinished": [],
    }
    bundle = args.bundle or ROOT / "build" / "gpu-bundle.tar.xz"
    cache = ROOT / "build" / "gpu-cache"  # stays for the next command on a machine that does
    os.environ.update(environment(cache, args.interpret))
    jobs = planned(stages, ops, size, width)
    out = args.out or ROOT / "bench" / "results"
    visit = Visit(jobs, data, out, data["budget_s"], width, began=began)
    smi = None
    with tempfile.TemporaryDirectory() as name:
        try:
            if bundle.is_file() and not args.interpret:
                data["bundle"] = bundle.name
                unpacking = threading.Thread(target=unpack, args=(bundle, cache), daemon=True)
                unpacking.start()
                visit.ready = lambda: not unpacking.is_alive()
            if not args.interpret:
                visit.clocks = Path(name) / "clocks"
                smi = clocks(visit.clocks)
            visit.run(Path(name))
        except KeyboardInterrupt:
            data["unfinished"].append(
                {"stage": "all", "op": "", "job": "stopped from outside", "cases": None}
            )
            visit.save()
        finally:
            if smi is not None:
                smi.kill()
    if visit.stop is not None:
        print(f"gpu_check: {visit.stop}", file=sys.stderr)
        return 1
    print(report.screen(data, [] if args.interpret else TARGETS))
    return 3 if report.verdict(data) or data["unfinished"] else 0


def clocks(file: Path) -> subprocess.Popen[bytes] | None:
    """Clocks, temperature and power every ten seconds."""
    fields = "timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv", "-l", "10"]
    try:
        with file.open("w") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
