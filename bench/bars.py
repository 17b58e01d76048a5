"""The bars of "any network runs fast", each beside its goal: one line a network, batch and number of threads.

    python bench/bars.py                            # all of them, each in a process of its own
    python bench/bars.py --only "ResNet-50" --threads 2
    python bench/bars.py --show                     # what there is, measuring nothing

Dense at its best is the fastest right one of torch eager, channels-last, compiled, ONNX Runtime and OpenVINO.
Masks are random, of equal density. LeNet's lines set a plain loop of torch beside our engine, where less is
better; "the loop alone" is that loop over layers that take no time, the least that any layers come to. What
is measured is kept (`build/bars`), so that what was stopped goes on, and measured again with `--again`. Lines
that were measured beside other programs say so: repeat them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "sparse")]


@dataclass(frozen=True)
class Bar:
    name: str
    goal: float
    batch: int
    sparsity: float = 0.9
    threads: tuple[int, ...] = (2,)
    kind: str = "inference"  # "training", or "engine": times that of our engine, where less is better

    def key(self, threads: int) -> str:
        return f"{self.name}, batch {self.batch}, {threads} thread{'s' * (threads > 1)}, {self.sparsity:.0%}"


BARS = (
    *(
        Bar("LeNet-300-100, a step through compress", 1.3, batch, sparsity, kind="engine", threads=(1,))
        for batch in (60, 240, 960, 1920)
        for sparsity in (0.8, 0.9, 0.95)
    ),
    Bar("MobileNet-v3 small, 224 pixels", 0.97, 1),
    Bar("MobileNet-v3 large, 224 pixels", 0.97, 1),
    Bar("ResNet-18, CIFAR stem", 4.0, 64),
    Bar("ResNet-50, 224 pixels", 3.0, 1, threads=(1, 2)),
    Bar("ResNet-50, 224 pixels", 2.5, 16),
    Bar("ViT-B/16, 224 pixels", 2.0, 1),
    Bar("ViT-B/16, 224 pixels", 2.0, 8),
    Bar("GPT-2 small's size, one token", 3.0, 1, threads=(1, 2)),
    Bar("Llama's form of that size, one token", 3.0, 1, threads=(1, 2)),
    Bar("Llama's form of that size, 128 tokens", 2.0, 1),
    Bar("ResNet-18, CIFAR stem, a step through compress", 2.5, 128, 0.95, kind="training"),
)


def network(bar: Bar) -> Any:
    """The network of a bar under a random mask: of a ViT its linear layers and attention alone."""
    import torch
    import torchvision
    from torch import nn

    from decoders import Decoder, Llama, past
    from sparselth.measure import nets

    torch.manual_seed(0)
    zoo, exclude = torchvision.models, tuple[str, ...]()
    draw: Callable[[int], Any] = lambda batch: torch.randn(batch, 3, 224, 224)  # noqa: E731
    if bar.name.startswith("ResNet-18"):
        module = zoo.resnet18(num_classes=10)
        module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        draw = lambda batch: torch.randn(batch, 3, 32, 32)  # noqa: E731
    elif bar.name.startswith("ResNet-50"):
        module = zoo.resnet50()
    elif bar.name.startswith("ViT"):
        module, exclude = zoo.vit_b_16(), ("conv_proj", "encoder.pos_embedding")
        nn.init.normal_(module.heads.head.weight, std=0.02)  # torchvision begins with 0, which says nothing
    elif bar.name.startswith("GPT"):
        module = Decoder(50257, 768, 12, 12)
        draw = lambda batch: (torch.randint(50257, (batch, 1)), past(12, 12, 64, 768, batch))  # noqa: E731
    elif bar.name.startswith("Llama"):  # three heads of queries share keys
        module = Llama(32000, 768, 12, 12, 4, 2048)
        behind = lambda batch: (torch.randint(32000, (batch, 1)), past(12, 4, 64, 256, batch))  # noqa: E731
        draw = behind if "one token" in bar.name else lambda batch: torch.randint(32000, (batch, 128))
    else:
        module = zoo.mobilenet_v3_large() if "large" in bar.name else zoo.mobilenet_v3_small()
    return nets.of_module(bar.name, module, bar.sparsity, draw, exclude)


def measure(bar: Bar, threads: int) -> dict[str, Any]:
    """One line of the table, its rows with it."""
    import torch

    from sparselth import machine
    from sparselth.measure.memory import keep_freed

    keep_freed()
    torch.set_num_threads(threads)
    others, began = _others(), time.perf_counter()
    if bar.kind == "engine":
        from bench_compress import lenet

        times = lenet(bar.sparsity, bar.batch)
        rows = [
            {
                "implementation": "sparselth" if who == "compressed" else who,
                "median_s": t.median,
                "check": "passed",
            }
            for who, t in times.items()
        ]
        gain, best = times["compressed"].median / times["engine"].median, "engine"
        notes: list[str] = []
    else:
        from sparselth.measure.race_modules import bench_module
        from sparselth.measure.train_modules import bench_module_training

        net = network(bar)
        if bar.kind == "training":
            result = bench_module_training(net, bar.batch, _say)
        else:
            result = bench_module(net, (bar.batch,), _say)
        rows, notes = result.rows, result.notes
        ours = next(row for row in rows if row["implementation"] == "sparselth")
        gain, best = ours["speedup"], ours["dense_best"]
    return {
        "name": bar.name, "batch": bar.batch, "threads": threads, "sparsity": bar.sparsity, "kind": bar.kind,
        "goal": bar.goal, "gain": gain, "best": best, "rows": rows, "notes": notes, "others": others,
        "seconds": time.perf_counter() - began, "machine": machine.environment(),
    }  # fmt: skip


def _others() -> float:
    """Cores that other programs use, over a second in which this one sleeps."""
    from sparselth import machine

    before = machine.busy_seconds()
    time.sleep(1)
    after = machine.busy_seconds()
    return 0.0 if before is None or after is None else after - before


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def line(bar: Bar, threads: int, found: dict[str, Any] | None) -> str:
    """Of the table; lines of one width."""
    head = f"{bar.name:<48}{bar.batch:>5}{threads:>8}{bar.sparsity:>7.0%}"
    if found is None:
        return f"{head}   not measured"
    from sparselth import machine

    less = bar.kind == "engine"
    met = found["gain"] <= bar.goal if less else found["gain"] >= bar.goal
    failed = [row["implementation"] for row in found["rows"] if row["check"] == "failed"]
    words = ["met" if met and not {"sparselth", found["best"]} & {*failed} else "MISSED"]
    words += [f"CHECK FAILED: {', '.join(failed)}"] * bool(failed)
    commit = found["machine"].get("commit")
    words += [f"of {commit[:7]}"] if commit not in (None, machine.commit()) else []
    busy = found["others"] if "others" in found else found["load"]  # of rows that were kept earlier
    words += ["busy machine"] * (busy > 0.2)
    by = {row["implementation"]: row["median_s"] for row in found["rows"]}
    if "floor" in by:
        words += [f"the loop alone {by['floor'] / by['engine']:.2f}x"]
    dense, ours = (f"{1e3 * by[name]:.2f} ms" for name in (found["best"], "sparselth"))
    goal = f"{'<' if less else '>'}= {bar.goal:g}"
    gain = f"{found['gain']:.2f}x"
    return f"{head}  {dense:>11} {found['best']:<20}{ours:>11}{gain:>8} {goal:>7}  {', '.join(words)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="bars whose name, batch or threads contain this")
    parser.add_argument("--threads", type=int, help="bars with so many threads alone")
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    parser.add_argument("--show", action="store_true", help="print the table and measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bars", help="where rows are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of a bar
    given = parser.parse_args()
    every = [(bar, threads) for bar in BARS for threads in bar.threads]
    if given.one:
        bar, threads = next(pair for pair in every if pair[0].key(pair[1]) == given.one)
        found = measure(bar, threads)
        from sparselth.files import write_atomically

        given.out.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(given.out, bar, threads), (json.dumps(found, indent=1) + "\n").encode())
        return 0
    chosen = [
        (bar, threads)
        for bar, threads in every
        if given.only in bar.key(threads) and given.threads in (None, threads)
    ]
    if not chosen:
        names = "; ".join(bar.key(threads) for bar, threads in every)
        parser.error(f"--only {given.only}: expected a part of one of: {names}")
    failed = False
    for bar, threads in chosen:
        if given.show or (_file(given.out, bar, threads).exists() and not given.again):
            continue
        print(bar.key(threads), file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--out", str(given.out), "--one", bar.key(threads)]
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        failed |= subprocess.run(command, env=environment, check=False).returncode != 0
    head = f"{'network':<48}{'batch':>5}{'threads':>8}{'zeros':>7}"
    print(f"{head}  {'dense best':<32}{'ours':>11}{'gain':>8}    goal")
    for bar, threads in chosen:
        file = _file(given.out, bar, threads)
        print(line(bar, threads, json.loads(file.read_text()) if file.exists() else None))
    return int(failed)


def _file(folder: Path, bar: Bar, threads: int) -> Path:
    safe = "".join(c if c.isalnum() else "-" for c in bar.key(threads))
    return folder / f"{safe}.json"


if __name__ == "__main__":
    sys.exit(main())
