"""Trials of every form of every stage; from their times the networks to be raced, paths through layouts."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparselth.kernels.step_parts import Call
from sparselth.sparse.compaction import Part, Select
from sparselth.sparse.device import Device
from sparselth.sparse.formats import SPARSE, Columns, Format, Rows, Stage, halves, has_native
from sparselth.sparse.network import Chain, bound, turn
from sparselth.sparse.times import Cache

MARGIN = 1.03
TOLERANCE = 1e-5  # relative RMS against float64
ROUNDINGS = 3  # times the error of torch's own in the same dtype


@dataclass(frozen=True)
class Trial:
    """All ways to compute one stage, with their times and errors."""

    stage: Stage
    forms: list[Format]
    times: dict[str, float]
    errors: dict[str, float]
    allowed: float  # error

    def right(self) -> list[Format]:
        return [form for form in self.forms if form.name == "dense" or self.errors[form.name] <= self.allowed]


def allowed(own: float, rounding: float) -> float:
    """The largest error beside torch's own; torch may be lucky, so one rounding counts at least."""
    own = max(own, rounding) if math.isfinite(own) else 0.0
    return max(TOLERANCE, ROUNDINGS * own)


def stages(parts: list[Part]) -> list[Stage]:
    """The parts, each ReLU joined to the product or pool before it, and pools of 2 x 2 to a convolution."""
    found: list[Stage] = []
    select: Part | None = None
    for part in parts:
        if isinstance(part.module, Select):
            select = part
        elif isinstance(part.module, nn.ReLU) and found and not found[-1].relu and _takes_relu(found[-1]):
            found[-1] = replace(found[-1], relu=True)
        elif found and found[-1].pool is None and _takes_pool(found[-1], part.module):
            found[-1] = replace(found[-1], pool=part)
        else:
            found.append(Stage(part, False, select=select))
            select = None
    return found


def _takes_relu(stage: Stage) -> bool:
    return stage.product or isinstance(stage.part.module, nn.MaxPool2d | nn.AvgPool2d)


def _takes_pool(stage: Stage, pool: nn.Module) -> bool:
    module = stage.part.module
    takes = isinstance(module, nn.Conv2d) and has_native(module)
    return takes and isinstance(pool, nn.MaxPool2d) and halves(pool)


def try_all(
    stages: list[Stage], example: Tensor, device: Device, cache: Cache, left_out: dict[str, str]
) -> list[Trial]:
    """Check and time every form of every stage on the activations that the example makes."""
    trials, x, sample = [], example, device.layer_clock()
    for stage in stages:
        forms = device.formats(stage, x, left_out)
        calls = {form.name: bound(form, x) for form in forms}
        reference, exact = stage.double(x)
        errors, timed = {}, {}
        for name, (call, result) in calls.items():
            y = result()
            errors[name] = error(y, reference, exact)
            if not device.is_free(y, x):
                timed[name] = call
        times = dict.fromkeys(calls, 0.0)
        if timed:
            times |= cache.times(stage.place.key, timed, sample)
        most = allowed(errors["dense"], device.rounding(stage.part.module))
        trials.append(Trial(stage, forms, times, errors, most))
        x = calls["dense"][1]()
    return trials


def double(parts: list[Part], example: Tensor) -> Tensor:
    """What the layers compute in float64."""
    x = example.double()
    for part in parts:
        x = copy.deepcopy(part.module).double()(x)
    return x


def error(y: Tensor, reference: Tensor, scale: Tensor) -> float:
    """RMS of the difference relative to that of `scale`."""
    off, size = (y.double() - reference).square().mean().sqrt(), scale.square().mean().sqrt()
    return float(off / size) if size > 0 else float(off)


def paths(trials: list[Trial], device: Device, cache: Cache) -> dict[str, list[Format]]:
    """The cheapest path of dense forms, of all, and of ours wherever we have one."""
    every = [trial.right() for trial in trials]
    dense: list[list[Format]] = [
        [form for form in forms if isinstance(form, Rows) and form.name not in SPARSE] for forms in every
    ]
    label, names = device.ours
    ours = [[form for form in forms if form.name in names] or forms for forms in every]
    sample = device.layer_clock()

    def moves(shape: tuple[int, ...]) -> dict[tuple[str, str], float]:
        return _moves(shape, device, cache, sample)

    layouts = [moves(trial.stage.before) for trial in trials] + [moves(trials[-1].stage.after)]
    allowed = {"dense": dense, "mixed": every, label: ours}
    return {name: _cheapest(trials, forms, layouts) for name, forms in allowed.items()}


def _cheapest(
    trials: list[Trial], allowed: list[list[Format]], moves: list[dict[tuple[str, str], float]]
) -> list[Format]:
    """Of the forms allowed for each stage; `moves` are the seconds of changes of layout before it."""
    best: dict[str, tuple[float, list[Format]]] = {"rows": (0.0, [])}
    for trial, forms, move in zip(trials, allowed, moves[:-1], strict=True):
        found: dict[str, tuple[float, list[Format]]] = {}
        for form in forms:
            cost = trial.times[form.name] * (MARGIN if form.name in SPARSE else 1)
            for layout, (before, path) in best.items():
                total = before + move[layout, form.layout] + cost
                if total < found.get(form.gives, (math.inf,))[0]:
                    found[form.gives] = total, [*path, form]
        best = found
    return min(
        (cost + moves[-1][layout, "rows"], i, path) for i, (layout, (cost, path)) in enumerate(best.items())
    )[2]


def _moves(
    shape: tuple[int, ...], device: Device, cache: Cache, sample: Callable[[Call], Callable[[], float]]
) -> dict[tuple[str, str], float]:
    """Seconds from one layout to another for activations of this shape."""
    x = torch.zeros(cache.batch, *shape, dtype=device.dtype, device=device.at)
    calls: dict[str, Call] = {}
    others = ["channels-last"] if len(shape) == 3 else []
    if device.on_gpus:
        others += ["turned"] if len(shape) == 1 else []
    else:
        chain = Chain([], len(x), shape)
        calls = {"to columns": lambda: chain.fill(x), "from columns": chain.result}
    for layout in others:
        y = turn(x, layout)
        if not device.is_free(y, x):
            calls[f"to {layout}"] = partial(turn, x, layout)
            calls[f"from {layout}"] = partial(turn, y, "rows")
    times = cache.times(f"layout of {list(shape)}", calls, sample) if calls else {}
    layouts = ("rows", "columns", "channels-last", "turned")
    return {
        (a, b): 0.0 if a == b else times.get(f"from {a}", 0.0) + times.get(f"to {b}", 0.0)
        for a in layouts
        for b in layouts
    }


def race(
    plans: dict[str, list[Format]],
    networks: dict[str, Callable[[Tensor], Tensor]],
    example: Tensor,
    device: Device,
    cache: Cache,
) -> dict[str, float]:
    """Seconds of whole networks; what is one and the same is timed once."""
    labels: dict[str, str] = {}
    found = {
        name: labels.setdefault(_fingerprint(plan), f"{name} {_fingerprint(plan)}")
        for name, plan in plans.items()
    }
    calls = {label: partial(networks[label.split()[0]], example) for label in labels.values()}
    times = cache.times(f"networks {' '.join(sorted(labels))}", calls, device.network_clock())
    return {name: times[label] for name, label in found.items()}


def _fingerprint(plan: list[Format]) -> str:
    text = "; ".join(f"{form.name}: {form.place.key}" for form in plan)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def handicap(plan: list[Format]) -> float:
    """What torch does not do densely by itself wins by 3 % or not at all."""
    ours = any(isinstance(form, Columns) or form.name in SPARSE for form in plan)
    return MARGIN if ours else 1.0
