"""Trials of every form of every stage; from their times the networks to be raced, paths through layouts."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparselth.check import ROUNDING, Checked, check
from sparselth.kernels._graphs import capture, warm_up
from sparselth.kernels.step_parts import Call
from sparselth.sparse.compaction import Part, Select, Units, compact_parts
from sparselth.sparse.device import Device
from sparselth.sparse.forms import FORMS, Formed, Stage, fitting
from sparselth.sparse.forms.conv import is_square
from sparselth.sparse.forms.dense import halves
from sparselth.sparse.forms.stage import activation_of
from sparselth.sparse.network import Chain, bound, network, turn
from sparselth.sparse.report import LayerReport
from sparselth.sparse.times import Cache

MARGIN = 1.03
APART = 2.0  # times the seconds of a chain by itself that its layers may take where what is joined is raced


@dataclass(frozen=True)
class Trial:
    """All ways to compute one stage, with their times and what was found of their errors."""

    stage: Stage
    forms: list[Formed]
    times: dict[str, float]
    checks: dict[str, Checked]

    def right(self) -> list[Formed]:
        return [form for form in self.forms if form.name == "dense" or not self.checks[form.name].fault]


@dataclass(frozen=True)
class Choice:
    """The fastest plan of a chain of layers that is right, and what was found on the way to it."""

    plan: list[Formed]
    chosen: str
    layers: list[LayerReport]
    units: list[Units]
    networks: dict[str, float]
    checks: dict[str, Checked]
    joinable: list[Joinable]


@dataclass(frozen=True)
class Joinable:
    """A plan in one layout from end to end, to be joined with those of other chains; its `layers`."""

    name: str  # of a network of such plans
    plan: list[Formed]
    layers: list[LayerReport]


def choose(
    original: list[Part], x: Tensor, device: Device, left_out: dict[str, str], compact: bool
) -> Choice:
    """Of layers one behind the other, on activations like x [B, ...]; `left_out` gets what cannot be."""
    parts, units = original, []
    if compact and all(stage.groups == 1 for stage in stages(original)):
        compacted = compact_parts(original)
        parts, units = _parts(compacted.names, compacted.model, x), compacted.units
    cache = Cache(len(x), device.key)
    trials = try_all(stages(parts), x, device, cache, left_out)
    plain = [FORMS["dense"].of(stage, device, len(x)) for stage in stages(original)]
    plans = paths(trials, device, cache) | {"original": plain}
    networks = {name: network(plan) for name, plan in plans.items()}
    checks = _checks(networks, original, x, device)
    times = race(plans, networks, x, device, cache)
    cache.save()
    right = [name for name in plans if name == "original" or not checks[name].fault]
    chosen = min(right, key=lambda name: times[name] * handicap(plans[name]))
    layers = _layer_reports(trials, plans[chosen], original)
    limit = times[chosen]
    found = {
        "joined": _cheapest_of(trials, APART * limit, lambda form: form.in_columns),
        "joined rows": _cheapest_of(trials, APART * limit, lambda form: form.in_planes),
    }
    if len(trials[0].stage.before) == len(trials[-1].stage.after) == 1:
        found["joined tokens"] = _cheapest_of(trials, APART * limit, lambda form: form.in_columns)
    joinable = [
        Joinable(name, plan, _layer_reports(trials, plan, original)) for name, plan in found.items() if plan
    ]
    return Choice(plans[chosen], chosen, layers, units, times, checks, joinable)


def _cheapest_of(trials: list[Trial], limit: float, takes: Callable[[Formed], bool]) -> list[Formed]:
    """The fastest forms of a kind, [] where one is missing or they take more than `limit` seconds."""
    plan, cost = list[Formed](), 0.0
    for trial in trials:
        forms = [form for form in trial.right() if takes(form)]
        if not forms:
            return []
        plan.append(min(forms, key=lambda form: trial.times[form.name]))
        cost += trial.times[plan[-1].name]
    return plan if cost <= limit else []


def _parts(names: list[str], model: nn.Sequential, example: Tensor) -> list[Part]:
    found, x = [], example[:1]
    for name, module in zip(names, model, strict=True):
        y = module(x)
        found.append(Part(name, module, tuple(x.shape[1:]), tuple(y.shape[1:])))
        x = y
    return found


def _checks(
    networks: Mapping[str, Callable[[Tensor], Tensor]], original: list[Part], example: Tensor, device: Device
) -> dict[str, Checked]:
    """Of whole networks, by the layer that is multiplied least precisely and the longest of their sums."""
    reference, own = double(original, example), networks["original"](example)
    words = max((device.precision(part.module) for part in original), key=lambda name: ROUNDING[name])
    terms = max(stage.terms for stage in stages(original))
    return {
        name: check(run(example), reference, words, terms=terms, own=own) for name, run in networks.items()
    }


def _layer_reports(trials: list[Trial], plan: list[Formed], original: list[Part]) -> list[LayerReport]:
    forms = {form.place.name: form for form in plan}
    dense = {stage.part.name: stage.dense_bytes for stage in stages(original)}
    found = []
    for trial in trials:
        if trial.stage.product:
            name, weight = trial.stage.part.name, trial.stage.part.module.weight
            assert isinstance(weight, Tensor)
            form = forms[name]
            found.append(
                LayerReport(
                    name,
                    tuple(weight.shape),
                    trial.stage.kept / max(1, weight.numel()),
                    trial.times,
                    trial.checks,
                    form.name,
                    form.bytes,
                    dense[name],
                    form.seconds,
                    min(trial.times[form.name] for form in trial.forms if form.kind == "dense"),
                )
            )
    return found


def stages(parts: list[Part]) -> list[Stage]:
    """The parts, each activation joined to what stands before it, and pools of 2 x 2 to a convolution."""
    found: list[Stage] = []
    select: Part | None = None
    for part in parts:
        if isinstance(part.module, Select):
            select = part
        elif found and _takes(found[-1], activation := activation_of(part.module)):
            found[-1] = replace(found[-1], activation=activation)
        elif found and found[-1].pool is None and _takes_pool(found[-1], part.module):
            found[-1] = replace(found[-1], pool=part)
        else:
            found.append(Stage(part, select=select))
            select = None
    return found


def _takes(stage: Stage, activation: str) -> bool:
    """A ReLU and a pool may change places; of other activations only convolutions know."""
    if activation == "none" or stage.activation != "none":
        return False
    pool = isinstance(stage.part.module, nn.MaxPool2d | nn.AvgPool2d)
    return (stage.product or pool) if activation == "relu" else stage.conv and stage.pool is None


def _takes_pool(stage: Stage, pool: nn.Module) -> bool:
    return (
        not stage.apart and is_square(stage.part.module) and isinstance(pool, nn.MaxPool2d) and halves(pool)
    )


def try_all(
    stages: list[Stage], example: Tensor, device: Device, cache: Cache, left_out: dict[str, str]
) -> list[Trial]:
    """Check and time every form of every stage on the activations that the example makes.

    What this machine, this library or the form itself cannot do is `left_out`, and why: form -> reason.
    """
    trials, x, sample = [], example, device.layer_clock()
    for stage in stages:
        forms: list[Formed] = []
        calls: dict[str, Call] = {}
        checks: dict[str, Checked] = {}
        dense, (reference, exact) = x, stage.double(x)
        for entry in fitting(stage, device, len(x)):
            try:
                form = entry.of(stage, device, len(x))
                call, result = bound(form, x)
                y = result()
                free = device.is_free(y, x)
                if device.cuda and not free:
                    warm_up(result)
                    capture(result)
            except Exception as error:  # no such library, too little shared memory, a compiler's error
                if entry.name == "dense":
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                left_out[f"{stage.place.name} {entry.name}"] = reason
                continue
            if entry.name == "dense":
                dense = y
            words = device.precision(stage.part.module)
            checks[form.name] = check(y, reference, words, terms=stage.terms, own=dense, scale=exact)
            forms.append(form)
            if not free:
                calls[form.name] = call
        times = {form.name: 0.0 for form in forms}
        if calls:
            times |= cache.times(stage.place.key, calls, sample)
        trials.append(Trial(stage, forms, times, checks))
        x = dense
    return trials


def double(parts: list[Part], example: Tensor) -> Tensor:
    """What the layers compute in float64."""
    x = example.double()
    for part in parts:
        x = copy.deepcopy(part.module).double()(x)
    return x


def paths(trials: list[Trial], device: Device, cache: Cache) -> dict[str, list[Formed]]:
    """The cheapest path of dense forms, of all, and of ours wherever we have one."""
    every = [trial.right() for trial in trials]
    dense = [[form for form in forms if form.kind == "dense" and not form.in_columns] for forms in every]
    ours = [[form for form in forms if form.kind == "ours"] or forms for forms in every]
    sample = device.layer_clock()

    def moves(shape: tuple[int, ...]) -> dict[tuple[str, str], float]:
        return _moves(shape, device, cache, sample)

    layouts = [moves(trial.stage.before) for trial in trials] + [moves(trials[-1].stage.after)]
    kinds = {"dense": dense, "mixed": every, device.ours: ours}
    return {name: _cheapest(trials, forms, layouts) for name, forms in kinds.items()}


def _cheapest(
    trials: list[Trial], allowed: list[list[Formed]], moves: list[dict[tuple[str, str], float]]
) -> list[Formed]:
    """Of the forms allowed for each stage; `moves` are the seconds of changes of layout before it."""
    best: dict[str, tuple[float, list[Formed]]] = {"rows": (0.0, [])}
    for trial, forms, move in zip(trials, allowed, moves[:-1], strict=True):
        found: dict[str, tuple[float, list[Formed]]] = {}
        for form in forms:
            cost = trial.times[form.name] * (1 if form.kind == "dense" else MARGIN)
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
    plans: dict[str, list[Formed]],
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


def _fingerprint(plan: list[Formed]) -> str:
    text = "; ".join(f"{form.name}: {form.place.key}" for form in plan)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def handicap(plan: list[Formed]) -> float:
    """What torch does not do densely by itself wins by 3 % or not at all."""
    return MARGIN if any(form.in_columns or form.kind != "dense" for form in plan) else 1.0
