"""A pruned network as the fastest one with the same outputs on this machine: `convert`, `explain`.

Compaction first. Then every way to compute a layer is checked against float64 and timed on the example's
activations, once for each layer, processor, library and thread count; the times are kept in the user's cache
folder. The cheapest path through the layers, changes of layout counted, is raced as a whole network against
the original, against the best dense path, and against our kernels everywhere. What torch does not do densely
by itself wins by 3 % or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod

import torch
from torch import Tensor, nn

from sparselth.kernels import _native
from sparselth.kernels.sparse_conv2d import Slices
from sparselth.kernels.step_parts import Call, bind_columns, bind_rows, sequence
from sparselth.sparse.compaction import Part, Units, compact_parts, pruned_parts
from sparselth.sparse.formats import (
    SPARSE,
    Columns,
    Format,
    Rows,
    Stage,
    columns,
    formats,
    halves,
    has_native,
    image,
    plain,
)
from sparselth.sparse.times import Cache

MARGIN = 1.03
TOLERANCE = 1e-5  # relative RMS against float64
BATCHES = 4  # sizes for which buffers are kept


@dataclass(frozen=True)
class LayerReport:
    """What is known of one Linear or Conv2d: seconds and relative RMS errors by candidate."""

    name: str
    shape: tuple[int, ...]
    density: float
    times: dict[str, float]
    errors: dict[str, float]
    chosen: str
    bytes: int  # of weights, indices and biases
    dense_bytes: int  # the same of the layer before compaction
    conversion: float  # seconds to make the chosen form

    @property
    def pays_after(self) -> float:
        """Calls until the conversion has paid for itself against the best dense candidate; inf: never."""
        gain = min(t for name, t in self.times.items() if name not in SPARSE) - self.times[self.chosen]
        return math.ceil(self.conversion / gain) if gain > 0 and self.conversion else math.inf


@dataclass(frozen=True)
class Report:
    batch: int
    threads: int
    layers: list[LayerReport]
    units: list[Units]
    networks: dict[str, float]  # seconds of whole networks
    errors: dict[str, float]  # of whole networks
    chosen: str
    seconds: float  # all of `convert`


class Converted(nn.Module):
    """A network that was converted; call it with [B, ...] in fp32 on a CPU, of any B.

    Inference only: no gradients (an input that requires one is a ValueError unless under torch.no_grad()),
    no state_dict, no pickle. Calls from several threads take turns.
    """

    def __init__(self, plan: list[Format], report: Report) -> None:
        super().__init__()
        self.plan, self.report = plan, report
        self.run, self.before = _network(plan), plan[0].place.before
        self.eval()

    def train(self, mode: bool = True) -> Converted:
        if mode:
            raise ValueError("expected inference, got train(): a converted network is not trained")
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.dtype is torch.float32
            and x.shape[1:] == self.before
            and not torch.is_grad_enabled()
            and x.is_cpu
            and len(x)
        ):
            return self.run(x)
        before, after = self.before, self.plan[-1].place.after
        if x.dtype != torch.float32 or not x.is_cpu or x.shape[1:] != before:
            raise ValueError(
                f"expected fp32 [B, {', '.join(map(str, before))}] on a CPU, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "expected an input without gradient, got requires_grad=True: use torch.no_grad()"
            )
        if not len(x):
            return x.new_empty(0, *after)
        with torch.no_grad():
            return self.run(x)


def convert(
    model: nn.Sequential, masks: Mapping[str, Tensor] | None, example: Tensor, *, compact: bool = True
) -> Converted:
    """The fastest network with the outputs of `model` for batches like `example` [B, ...], on this CPU.

    masks: parameter name -> bool of its shape, True = kept; or zeros in the weights. The model stays as it
    is. Other batch sizes are computed right, by what is fastest for the example's. The choice is for torch's
    number of threads now. What is pruned is not always multiplied: a NaN there may not be seen.

    ValueError: as `compaction.pruned_parts`, or an example that is not finite.
    """
    began = time.perf_counter()
    original = pruned_parts(model, masks, example)
    if not original:
        raise ValueError("model: expected at least one layer that computes something, got none")
    if not bool(example.isfinite().all()):
        raise ValueError("example: expected finite numbers, got NaN or infinity")
    units: list[Units] = []
    parts = original
    if compact:
        compacted = compact_parts(original)
        parts, units = _parts(compacted.names, compacted.model, example), compacted.units
    with torch.no_grad():
        cache = Cache(len(example))
        trials = _try_all(_stages(parts), example, cache)
        plans = _plans(trials, cache) | {"original": [plain(stage) for stage in _stages(original)]}
        networks = {name: _network(plan) for name, plan in plans.items()}
        reference = _double(original, example)
        errors = {name: _error(run(example), reference, reference) for name, run in networks.items()}
        times = _race(plans, networks, example, cache)
        cache.save()
    right = [name for name in plans if name == "original" or errors[name] <= TOLERANCE]
    chosen = min(right, key=lambda name: times[name] * _handicap(plans[name]))
    report = Report(
        len(example),
        torch.get_num_threads(),
        _layer_reports(trials, plans[chosen], original),
        units,
        times,
        errors,
        chosen,
        time.perf_counter() - began,
    )
    return Converted(plans[chosen], report)


def weight_bytes(converted: Converted) -> int:
    """Bytes of all weights, indices and biases that the network holds."""
    return sum(form.bytes for form in converted.plan)


def explain(converted: Converted) -> str:
    """What was measured for every layer and for whole networks, and what was chosen, as a table."""
    report = converted.report
    rows = [["layer", "weight", "kept", "chosen", "bytes", "dense", "convert", "pays after", "candidates"]]
    for layer in report.layers:
        pays = "–" if math.isinf(layer.pays_after) else f"{layer.pays_after:,} calls"
        rows.append(
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{100 * layer.density:.3g} %",
                layer.chosen,
                f"{layer.bytes:,}",
                f"{layer.dense_bytes:,}",
                _duration(layer.conversion),
                pays,
                ", ".join(_candidate(name, layer.times[name], layer.errors[name]) for name in layer.times),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    networks = [_candidate(name, report.networks[name], report.errors[name]) for name in report.networks]
    gain = report.networks["original"] / report.networks[report.chosen]
    lines += [
        f"whole network, batch {report.batch}, threads {report.threads}, changes of layout counted: "
        + ", ".join(networks),
        f"chosen: {report.chosen}, {gain:.2f}x the original; weights {weight_bytes(converted):,} bytes, "
        f"dense {sum(layer.dense_bytes for layer in report.layers):,}; convert took "
        f"{_duration(report.seconds)}",
    ]
    for unit in report.units:
        if unit.inputs[0] != unit.inputs[1] or unit.outputs[0] != unit.outputs[1]:
            lines.append(
                f"compaction: {unit.name} inputs {unit.inputs[0]} -> {unit.inputs[1]}, "
                f"outputs {unit.outputs[0]} -> {unit.outputs[1]}"
            )
    if _native.LIB is None:
        lines.append(f"native kernels: {_native.WHY}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Trial:
    """All ways to compute one stage, with their times and errors."""

    stage: Stage
    forms: list[Format]
    times: dict[str, float]
    errors: dict[str, float]

    def right(self) -> list[Format]:
        return [form for form in self.forms if form.name == "dense" or self.errors[form.name] <= TOLERANCE]


def _stages(parts: list[Part]) -> list[Stage]:
    """The parts, each ReLU joined to the product or pool before it, and pools of 2 x 2 to a convolution."""
    found: list[Stage] = []
    for part in parts:
        if isinstance(part.module, nn.ReLU) and found and not found[-1].relu and _takes_relu(found[-1]):
            found[-1] = replace(found[-1], relu=True)
        elif found and found[-1].pool is None and _takes_pool(found[-1], part.module):
            found[-1] = replace(found[-1], pool=part)
        else:
            found.append(Stage(part, False))
    return found


def _takes_relu(stage: Stage) -> bool:
    return stage.product or isinstance(stage.part.module, nn.MaxPool2d | nn.AvgPool2d)


def _takes_pool(stage: Stage, pool: nn.Module) -> bool:
    module = stage.part.module
    takes = isinstance(module, nn.Conv2d) and has_native(module)
    return takes and isinstance(pool, nn.MaxPool2d) and halves(pool)


def _parts(names: list[str], model: nn.Sequential, example: Tensor) -> list[Part]:
    found, x = [], example[:1]
    for name, module in zip(names, model, strict=True):
        y = module(x)
        found.append(Part(name, module, tuple(x.shape[1:]), tuple(y.shape[1:])))
        x = y
    return found


def _try_all(stages: list[Stage], example: Tensor, cache: Cache) -> list[_Trial]:
    """Check and time every form of every stage on the activations that the example makes."""
    trials, x = [], example
    for stage in stages:
        forms = formats(stage, len(example))
        bound = {form.name: _bound(form, x) for form in forms}
        exact = copy.deepcopy(stage.part.module).double()(x.double())
        exact = stage.pool.module(exact) if stage.pool else exact
        reference = exact.relu() if stage.relu else exact
        errors = {name: _error(result(), reference, exact) for name, (_, result) in bound.items()}
        trial = _Trial(stage, forms, {}, errors)
        trial.times.update(cache.times(stage.place.key, {name: call for name, (call, _) in bound.items()}))
        trials.append(trial)
        x = forms[0].run(x) if isinstance(forms[0], Rows) else x
    return trials


def _bound(form: Format, x: Tensor) -> tuple[Call, Callable[[], Tensor]]:
    """A call that computes this form on x, and a function that does and gives the result."""
    if isinstance(form, Rows):
        run, turned = form.run, _turn(x, form.layout)
        return (lambda: run(turned)), (lambda: run(turned))
    chain = _Chain([form], len(x))

    def result() -> Tensor:
        chain.fill(x)
        chain.run()
        return chain.result()

    return chain.run, result


def _double(parts: list[Part], example: Tensor) -> Tensor:
    x = example.double()
    for part in parts:
        x = copy.deepcopy(part.module).double()(x)
    return x


def _error(y: Tensor, reference: Tensor, scale: Tensor) -> float:
    """RMS of the difference relative to that of `scale`."""
    off, size = (y.double() - reference).square().mean().sqrt(), scale.square().mean().sqrt()
    return float(off / size) if size > 0 else float(off)


def _plans(trials: list[_Trial], cache: Cache) -> dict[str, list[Format]]:
    """The cheapest path of dense forms, of all, and of ours wherever we have one."""
    every = [trial.right() for trial in trials]
    dense: list[list[Format]] = [
        [form for form in forms if isinstance(form, Rows) and form.name not in SPARSE] for forms in every
    ]
    native = [[form for form in forms if form.name == "native"] or forms for forms in every]
    allowed = {"dense": dense, "mixed": every, "native": native}
    return {name: _cheapest(trials, forms, cache) for name, forms in allowed.items()}


def _cheapest(trials: list[_Trial], allowed: list[list[Format]], cache: Cache) -> list[Format]:
    best: dict[str, tuple[float, list[Format]]] = {"rows": (0.0, [])}
    for trial, forms in zip(trials, allowed, strict=True):
        moves = _moves(trial.stage.part.before, cache)
        found: dict[str, tuple[float, list[Format]]] = {}
        for form in forms:
            cost = trial.times[form.name] * (MARGIN if form.name in SPARSE else 1)
            for layout, (before, path) in best.items():
                total = before + moves[layout, form.layout] + cost
                if total < found.get(form.gives, (math.inf,))[0]:
                    found[form.gives] = total, [*path, form]
        best = found
    moves = _moves(trials[-1].stage.after, cache)
    return min(
        (cost + moves[layout, "rows"], i, path) for i, (layout, (cost, path)) in enumerate(best.items())
    )[2]


def _moves(shape: tuple[int, ...], cache: Cache) -> dict[tuple[str, str], float]:
    """Seconds from one layout to another for activations of this shape."""
    x = torch.zeros(cache.batch, *shape)
    chain = _Chain([], len(x), shape)
    calls: dict[str, Call] = {"to columns": lambda: chain.fill(x), "from columns": chain.result}
    if len(shape) == 3:
        turned = _turn(x, "channels-last")
        calls["to channels-last"] = lambda: _turn(x, "channels-last")
        calls["from channels-last"] = lambda: turned.contiguous()
    times = cache.times(f"layout of {list(shape)}", calls)
    layouts = ("rows", "columns", "channels-last")
    return {
        (a, b): 0.0 if a == b else times.get(f"from {a}", 0.0) + times.get(f"to {b}", 0.0)
        for a in layouts
        for b in layouts
    }


def _race(
    plans: dict[str, list[Format]],
    networks: dict[str, Callable[[Tensor], Tensor]],
    example: Tensor,
    cache: Cache,
) -> dict[str, float]:
    """Seconds of whole networks; what is one and the same is timed once."""
    labels: dict[str, str] = {}
    found = {
        name: labels.setdefault(_fingerprint(plan), f"{name} {_fingerprint(plan)}")
        for name, plan in plans.items()
    }
    calls = {label: partial(networks[label.split()[0]], example) for label in labels.values()}
    times = cache.times(f"networks {' '.join(sorted(labels))}", calls)
    return {name: times[label] for name, label in found.items()}


def _fingerprint(plan: list[Format]) -> str:
    text = "; ".join(f"{form.name}: {form.place.key}" for form in plan)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _handicap(plan: list[Format]) -> float:
    ours = any(isinstance(form, Columns) or form.name in SPARSE for form in plan)
    return MARGIN if ours else 1.0


def _layer_reports(trials: list[_Trial], plan: list[Format], original: list[Part]) -> list[LayerReport]:
    forms = {form.place.name: form for form in plan}
    dense = {stage.part.name: stage.dense_bytes for stage in _stages(original)}
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
                    trial.stage.kept / weight.numel(),
                    trial.times,
                    trial.errors,
                    form.name,
                    form.bytes,
                    dense[name],
                    form.seconds,
                )
            )
    return found


def _network(plan: list[Format]) -> Callable[[Tensor], Tensor]:
    """Batch first to batch first; forms in columns that follow each other are one chain."""
    steps: list[Callable[[Tensor], Tensor]] = []
    layout = "rows"
    for in_columns, group in groupby(plan, key=lambda form: isinstance(form, Columns)):
        forms = list(group)
        if in_columns:
            steps.append(_Segment([form for form in forms if isinstance(form, Columns)]))
            layout = "rows"
            continue
        for form in forms:
            assert isinstance(form, Rows)
            if form.layout != layout:
                steps.append(partial(_turn, layout=form.layout))
            steps.append(form.run)
            layout = form.gives
    if layout != "rows":
        steps.append(partial(_turn, layout="rows"))

    if len(steps) == 1:
        return steps[0]

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def _turn(x: Tensor, layout: str) -> Tensor:
    """The same numbers in the order in memory that rows or channels-last have."""
    if layout == "channels-last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


class _Segment:
    """Forms in columns on batches of any size; buffers are kept for the last few sizes."""

    def __init__(self, forms: list[Columns]) -> None:
        self.forms, self.lock = forms, threading.Lock()
        self.chains: dict[tuple[int, int], _Chain] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = len(x), torch.get_num_threads()
        with self.lock:
            chain = self.chains.get(key)
            if chain is None:
                if len(self.chains) == BATCHES:
                    del self.chains[next(iter(self.chains))]
                chain = self.chains[key] = _Chain(self.forms, len(x))
            chain.fill(x)
            chain.run()
            return chain.result()


class _Chain:
    """Forms in columns, bound to two buffers that take turns; without forms, room for `shape`.

    What goes from one sparse convolution to the next has a place of its own, where it can be read as it is.
    """

    def __init__(self, forms: Sequence[Columns], batch: int, shape: tuple[int, ...] = ()) -> None:
        places = [form.place for form in forms]
        before, after = (places[0].before, places[-1].after) if places else (shape, shape)
        features = max(prod(shape) for shape in (before, *(place.after for place in places)))
        here, there = columns(features, batch), columns(features if places else 0, batch)
        self.x = here[: prod(before), :batch]
        calls: list[Call] = []
        slices: Slices | None = None  # where convolution follows convolution
        for i, (form, place) in enumerate(zip(forms, places, strict=True)):
            x = slices or _view(here, place.before, batch)
            room = forms[i + 1].slices if form.slices and i + 1 < len(forms) else None
            slices = room(batch) if room else None
            if slices:
                calls += form.bind(x, slices)
            elif form.in_place:
                calls += form.bind(x, x)
            else:
                calls += form.bind(x, _view(there, place.after, batch))
                here, there = there, here
        self.y = here[: prod(after), :batch]
        self.shape = batch, *after
        self.turn_in, self.turn_out = bind_columns(self.x), bind_rows(self.y)
        self.run = sequence(calls) if calls else _nothing

    def fill(self, x: Tensor) -> None:
        self.turn_in(x if x.is_contiguous() else x.contiguous())

    def result(self) -> Tensor:
        """Batch first, in memory of its own."""
        y = torch.empty(self.shape)
        self.turn_out(y)
        return y


def _view(memory: Tensor, shape: tuple[int, ...], batch: int) -> Tensor:
    return image(memory[: prod(shape)], shape, batch)


def _nothing() -> None:
    pass


def _candidate(name: str, taken: float, error: float) -> str:
    wrong = "" if error <= TOLERANCE else f" (wrong by {error:.0e}, not taken)"
    return f"{name} {_duration(taken)}{wrong}"


def _duration(taken: float) -> str:
    return (
        f"{1e6 * taken:.3g} us"
        if taken < 1e-3
        else f"{1e3 * taken:.3g} ms"
        if taken < 1
        else f"{taken:.3g} s"
    )
