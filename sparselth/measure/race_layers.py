"""Rows of `bench`: one layer, batch, dtype and mask computed by every rival, checked, timed, weighed.

No row has a time without a comparison with float64 on the same weights. Where float64 on the whole batch
would take long, some samples of the batch are compared with it and all others with the dense product of the
same dtype, which has passed the same check. A time below its floor is no time either: the floors are then
measured again, and if it still is, the row fails.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparselth import clock
from sparselth.check import DTYPES, LARGEST, check
from sparselth.kernels.seed_linear import SeedWeight
from sparselth.measure import memory, noise
from sparselth.measure.asked import Asked, Cell
from sparselth.measure.floors import SLACK, Anchors, precision
from sparselth.measure.layers import facts, mask_of
from sparselth.measure.rivals import Bound, Case, Ready, Rival, product, rivals

Row = dict[str, Any]
EXACT = 2e9  # FLOPs that float64 is given for one check
WINOGRAD = 4  # how much less than the plain sum a 3x3 convolution of the vendor's may multiply on CUDA
AGAIN = 6  # times that the floors are measured again

LARGEST_CPU = 1.5e10  # FLOPs of one dense call in the default table on a CPU
CELL, CALLS = 0.3, 60  # seconds that a cell takes about, and dense calls
COMPILING = 0.12  # share of the time for torch.compile


@dataclass
class Bench:
    """Where rows are measured, and what they have in common."""

    device: str
    anchors: Anchors
    rivals: Sequence[Rival]
    notes: dict[str, str] = field(default_factory=dict)  # what was left out, and why
    again: int = AGAIN
    compile_seconds: float = math.inf  # left for torch.compile, which then takes every shape once
    compiled: set[str] = field(default_factory=set)
    rounds: Callable[[clock.Race], object] = clock.rounds  # runs a race

    def measure(self, cell: Cell) -> list[Row]:
        """The rows of a cell, dense ones first."""
        with precision(cell.dtype), torch.no_grad():
            case, mask = self.case(cell)
            fitting = [r for r in self.rivals if r.fits(case) and self._wanted(r, cell)]
            right = _Reference(case)
            entries: list[_Entry] = []
            for rival in fitting:
                entry = self._entry(rival, case, right)
                if entry is not None:
                    entries.append(entry)
            self._peaks(entries, case)
            cold, warm = self._race(entries)
            self._floors(entries, case, mask, cold)
            return self._rows(cell, case, mask, entries, cold, warm)

    def case(self, cell: Cell) -> tuple[Case, Tensor]:
        """Weights and a batch, the same ones in every run."""
        draw = torch.Generator().manual_seed(0)
        layer, dtype = cell.layer, DTYPES[cell.dtype]
        block = None
        if cell.mask is not None:
            mask = cell.mask
        else:
            mask, block = mask_of(layer, cell.kind, cell.sparsity, draw)
        seeded = SeedWeight.of(mask, 0, 0) if cell.kind == "strong" else None
        scale = (int(mask.sum()) / len(mask)) ** -0.5
        weight = (torch.randn(layer.shape, generator=draw, dtype=torch.float32, device="cpu") * scale).mul_(
            mask
        )
        if seeded:
            weight = seeded.to_dense()
            seeded = replace(seeded, bits=seeded.bits.to(self.device))
        x = torch.randn(cell.batch, *layer.inputs, generator=draw, dtype=torch.float32, device="cpu")
        dead = 1 - float(mask.transpose(0, 1).flatten(1).any(1).float().mean())
        weight, x = weight.to(self.device, dtype), x.to(self.device, dtype)
        return Case(layer, cell.dtype, self.device, weight, x, block, dead, seeded), mask

    def _entry(self, rival: Rival, case: Case, right: _Reference) -> _Entry | None:
        """A rival made ready and checked; None, with a note, where torch cannot do it here."""
        try:
            began = self._now()
            form = rival.make(case)
            conversion = self._now() - began
            if rival.name == "dense compiled":
                self.compile_seconds -= conversion
            bound = form.bind(case.x)
            y = bound[1]()
            error, fault = right.check(y)
        except (RuntimeError, ValueError, ImportError) as problem:
            text = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            if rival.kind == "ours":
                return _Entry(rival, None, None, 0.0, None, f"{type(problem).__name__}: {text}")
            self.notes.setdefault(f"{rival.name} ({case.dtype})", text)
            return None
        return _Entry(rival, form, bound, conversion, error, fault)

    def _peaks(self, entries: list[_Entry], case: Case) -> None:
        """Bytes of each: weights, what it keeps to work on, and what a call adds with its activations."""
        forms = {e.rival.name: e.form for e in entries if e.form}
        kept = {name: memory.scratch(form) for name, form in forms.items()}
        calls = {name: partial(_once, form, case.x) for name, form in forms.items()}
        added = memory.peaks(calls, self.device)
        for entry in entries:
            if entry.form:
                entry.peak = entry.form.bytes + kept[entry.rival.name] + added[entry.rival.name]

    def _wanted(self, rival: Rival, cell: Cell) -> bool:
        if cell.only:
            return rival.name in cell.only
        if rival.name != "dense compiled" or math.isinf(self.compile_seconds):
            return True
        if self.compile_seconds <= 0 or cell.layer.text in self.compiled:
            return False
        self.compiled.add(cell.layer.text)
        return True

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _race(self, entries: list[_Entry]) -> tuple[Timings, Timings]:
        """The times that count, warm on a CPU and cold on CUDA; and warm ones on CUDA.

        Those whose ratios count go on for longer, and again while noise decides them.
        """
        calls = {e.rival.name: e.bound[0] for e in entries if e.bound and not e.fault}
        samples: dict[str, clock.Sample] = {}
        if self.device == "cpu":
            samples = {f"first {name}": clock.warm_wall(call) for name, call in calls.items()}
        else:
            scratch = clock.scratch()
            for name, call in calls.items():
                samples[f"first {name}"], samples[f"warm {name}"] = (
                    clock.cold(call, scratch),
                    clock.warm(call),
                )
        race = clock.Race(samples, watch=self.device == "cpu")
        if samples:
            self.rounds(race)
            for turn in range(1, noise.AGAIN + 2):
                self.rounds(race.only(_finalists(entries, race.timings()), turn * clock.SHARE))
                if not _undecided(entries, race.timings()):
                    break
        found = race.timings() if samples else {}
        cold, warm = (
            {name: found[f"{way} {name}"] for name in calls if f"{way} {name}" in found}
            for way in ("first", "warm")
        )
        return cold, warm

    def _floors(self, entries: list[_Entry], case: Case, mask: Tensor, cold: Timings) -> None:
        """The floor of each; what is faster than that gets the floors measured again, then a fault."""
        moved = _moved(case, mask)
        dense, kept = (case.layer.flops(m) * len(case.x) for m in (None, mask))
        fast = case.device == "cuda" and case.layer.shape[2:] == (3, 3) and case.layer.stride == 1
        while True:
            below = []
            for entry in entries:
                if entry.form is None:
                    continue
                is_dense = entry.rival.kind == "dense"
                flops = dense / (WINOGRAD if fast else 1) if is_dense else kept
                x = (case.x.numel() if is_dense else moved) * case.x.element_size()
                y = len(case.x) * math.prod(case.layer.outputs) * case.x.element_size()
                entry.bytes, entry.flops = entry.form.bytes + x + y, int(flops)
                entry.floor = self.anchors.floor(entry.bytes, flops, case.dtype)
                timing = cold.get(entry.rival.name)
                if timing and timing.median * SLACK < entry.floor:
                    below.append(entry)
            if not below or not self.again:
                break
            self.again -= 1
            self.anchors.measure()
        if below and self.anchors.disturbed:
            why = "this machine was busy while its bandwidth and rate were measured, so floors are too high"
            self.notes.setdefault("whether times are possible", why)
            return
        for entry in below:
            entry.fault = (
                f"{1e6 * cold[entry.rival.name].median:.3g} us is above the floor of "
                f"{1e6 * entry.floor:.3g} us"
            )

    def _rows(
        self, cell: Cell, case: Case, mask: Tensor, entries: list[_Entry], cold: Timings, warm: Timings
    ) -> list[Row]:
        dense = {e.rival.name: e.rival for e in entries if e.rival.kind == "dense" and not e.fault}
        best = min(dense, key=lambda name: cold[name].median, default=None)
        like = min((n for n in dense if dense[n].rows), key=lambda name: cold[name].median, default=None)
        shared = {
            "shape": cell.layer.text,
            "origin": cell.layer.origin,
            "batch": cell.batch,
            "dtype": cell.dtype,
            "sparsity": cell.sparsity,
            "mask": cell.kind,
            "block": case.block,
            **facts(mask),
            "dense_weight_bytes": case.weight.numel() * case.weight.element_size(),
            "state": "cold" if self.device == "cuda" else "warm",
        }
        found = []
        for entry in entries:
            name = entry.rival.name
            timing = None if entry.fault else cold.get(name)
            taken, dense_taken = (t.median if t else None for t in (timing, cold.get(best or "")))
            gain = dense_taken - taken if dense_taken is not None and taken is not None else 0.0
            found.append(
                {"implementation": name, "kind": entry.rival.kind, **shared}
                | {
                    "median_s": taken,
                    "iqr_s": timing.spread if timing else None,
                    "samples": timing.samples if timing else None,
                    "disturbed": timing.disturbed if timing else None,
                    "warm_s": warm[name].median if timing and name in warm else None,
                    "dense_best": best,
                    "dense_median_s": dense_taken,
                    "speedup": dense_taken / taken if dense_taken is not None and taken else None,
                    "noisy": noise.decides(timing, cold[best]) if timing and best else None,
                    "bytes": entry.bytes,
                    "flops": entry.flops,
                    "floor_s": entry.floor,
                    "floor_fraction": entry.floor / taken if taken else None,
                    "weight_bytes": entry.form.bytes if entry.form else None,
                    "peak_bytes": entry.peak or None,
                    "max_rel_error": entry.error,
                    "conversion_s": entry.conversion,
                    "pays_after": math.ceil(entry.conversion / gain) if gain > 0 else None,
                    "takes": entry.form.takes or None if entry.form else None,
                    "check": entry.fault or "passed",
                }
            )
            if entry.rival.kind == "auto" and timing and like:
                found[-1] |= {
                    "like": like,
                    "like_speedup": cold[like].median / timing.median,
                    "like_noisy": noise.decides(timing, cold[like]),
                }
        return found


Timings = dict[str, clock.Timing]


def _finalists(entries: list[_Entry], found: Timings) -> set[str]:
    """The fastest dense of all and of those on rows, the fastest of ours, and `auto`."""
    times = {e: found[f"first {e.rival.name}"].median for e in entries if f"first {e.rival.name}" in found}
    groups = (
        [e for e in times if e.rival.kind == "dense"],
        [e for e in times if e.rival.kind == "dense" and e.rival.rows],
        [e for e in times if e.rival.kind == "ours"],
        [e for e in times if e.rival.kind == "auto"],
    )
    return {f"first {min(group, key=lambda e: times[e]).rival.name}" for group in groups if group}


def _undecided(entries: list[_Entry], found: Timings) -> bool:
    """Whether noise decides between dense and the fastest of ours, or between dense and `auto`."""
    times = {e: found[f"first {e.rival.name}"] for e in entries if f"first {e.rival.name}" in found}

    def fastest(kind: str, rows: bool = False) -> clock.Timing | None:
        own = [t for e, t in times.items() if e.rival.kind == kind and (e.rival.rows or not rows)]
        return min(own, key=lambda timing: timing.median, default=None)

    pairs = (fastest("ours"), fastest("dense")), (fastest("auto"), fastest("dense", rows=True))
    return any(one and bar and noise.decides(one, bar) for one, bar in pairs)


def _once(form: Ready, x: Tensor) -> None:
    form.bind(x)[0]()


@dataclass(eq=False)
class _Entry:
    rival: Rival
    form: Ready | None
    bound: Bound | None
    conversion: float
    error: float | None
    fault: str | None
    peak: int = 0
    floor: float = 0.0
    bytes: int = 0
    flops: int = 0


class _Reference:
    """float64 on samples of the batch, and torch's product in the case's own dtype on all of it."""

    def __init__(self, case: Case) -> None:
        self.case, batch = case, len(case.x)
        most = max(8, int(EXACT / max(1, case.layer.flops())))
        spread = (
            torch.linspace(0, batch - 1, min(batch, most), dtype=torch.float64, device="cpu").round().long()
        )
        self.samples = torch.unique_consecutive(spread).to(case.x.device)
        run = product(case)
        self.exact = run(case.x[self.samples].double(), case.weight.double())
        self.dense = run(case.x, case.weight)

    def check(self, y: Tensor) -> tuple[float | None, str | None]:
        """The largest error relative to the largest |y|, None where that is no number, and what is wrong."""
        dtype, terms = self.case.dtype, math.prod(self.case.layer.shape[1:])
        if y.shape != self.dense.shape:
            return None, f"shape {list(y.shape)} instead of {list(self.dense.shape)}"
        own, bound = self.dense[self.samples], LARGEST[dtype]
        found = check(y[self.samples], self.exact, dtype, terms=terms, own=own, largest=bound)
        fault = found.fault
        if not fault and len(self.samples) < len(y):
            rest = check(y, self.dense, dtype, terms=terms, own=self.dense, largest=2 * bound)
            near = rest.error <= 2 * found.allowed and rest.largest <= rest.allowed_largest
            fault = None if near else f"{rest.fault}, where the dense product stands for it"
        return (found.largest if math.isfinite(found.largest) else None), fault


def _moved(case: Case, mask: Tensor) -> int:
    """Numbers of x that a kept weight reads."""
    live = int(mask.transpose(0, 1).flatten(1).any(1).sum())
    return case.x.numel() // case.layer.shape[1] * live


@dataclass(frozen=True)
class Outcome:
    rows: list[Row]
    left_out: list[str]
    notes: dict[str, str]
    anchors: dict[str, Any]
    cells: int = 0  # that were asked for

    @property
    def failed(self) -> bool:
        return any(row["check"] != "passed" for row in self.rows)


def bench_layers(
    asked: Asked,
    seconds: float,
    say: Callable[[str], None],
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """All that was asked for; of default layers what fits into `seconds` and, on a CPU, LARGEST_CPU.

    Every sparsity, batch size, dtype and kind of mask that was named is measured at least once, however long
    that takes. `keep` gets what there is behind every cell, for a caller who may be stopped.
    """
    began = time.perf_counter()
    wanted = asked.cells()
    must = range(len(wanted)) if asked.exact else asked.named(wanted)
    say("floors: bandwidth and matrix rate")
    anchors = Anchors(asked.device, tuple(dict.fromkeys(["fp32", *(cell.dtype for cell in wanted)])))
    anchors.measure()
    bench = Bench(asked.device, anchors, rivals())
    if not asked.exact and asked.device == "cpu":
        bench.compile_seconds = COMPILING * seconds
    rows: list[Row] = []
    left_out: list[str] = []
    for i, cell in enumerate(wanted):
        if i not in must:
            cost = CELL + CALLS * cell.flops / anchors.rate[cell.dtype]
            large = asked.device == "cpu" and cell.flops > LARGEST_CPU
            if large or time.perf_counter() - began + cost > seconds:
                left_out.append(cell.text)
                continue
        say(f"{i + 1} of {len(wanted)}: {cell.text}")
        rows += bench.measure(cell)
        rest = [other.text for other in wanted[i + 1 :]]
        keep(Outcome([*rows], left_out + rest, {**bench.notes}, anchors.facts(), len(wanted)))
    return Outcome(rows, left_out, bench.notes, anchors.facts(), len(wanted))
