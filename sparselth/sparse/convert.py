"""A pruned network as the fastest one with the same outputs on this machine: `convert`, `explain`.

Compaction first. Then every way to compute a layer is checked against float64 and timed on the example's
activations, once for each layer, device, dtype, library and thread count; the times are kept in the user's
cache folder. The cheapest path through the layers, changes of layout counted, is raced as a whole network
against the original, against the best dense path, and against our kernels everywhere. What torch does not
do densely by itself wins by 3 % or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselth.check import ROUNDING, Checked, check
from sparselth.kernels import _native
from sparselth.sparse.choice import Trial, double, handicap, paths, race, stages, try_all
from sparselth.sparse.compaction import Part, Units, compact_parts, pruned_parts
from sparselth.sparse.device import DTYPES, Device
from sparselth.sparse.forms import FORMS, Formed
from sparselth.sparse.network import network
from sparselth.sparse.times import Cache


@dataclass(frozen=True)
class LayerReport:
    """What is known of one Linear or Conv2d: seconds and errors by candidate."""

    name: str
    shape: tuple[int, ...]
    density: float
    times: dict[str, float]
    checks: dict[str, Checked]
    chosen: str
    bytes: int  # of weights, indices and biases
    dense_bytes: int  # the same of the layer before compaction
    conversion: float  # seconds to make the chosen form
    dense_seconds: float  # of the fastest dense form

    @property
    def pays_after(self) -> float:
        """Calls until the conversion has paid for itself against the best dense candidate; inf: never."""
        gain = self.dense_seconds - self.times[self.chosen]
        return math.ceil(self.conversion / gain) if gain > 0 and self.conversion else math.inf


@dataclass(frozen=True)
class Report:
    batch: int
    device: str  # and what of it matters for times
    layers: list[LayerReport]
    units: list[Units]
    networks: dict[str, float]  # seconds of whole networks
    checks: dict[str, Checked]  # of whole networks
    chosen: str
    seconds: float  # all of `convert`
    left_out: dict[str, str]  # candidates that this device or library cannot do, and why


class Converted(nn.Module):
    """A network that was converted; call it with [B, ...] in its dtype on its device, of any B.

    On CUDA a call can be captured in a CUDA graph, as any other network's after a call of the same shape: it
    never waits for the device and branches on shapes alone. The times it was chosen by are those of graphs;
    without one, launches from Python come on top, which matters for small layers.

    Inference only: no gradients (an input that requires one is a ValueError unless under torch.no_grad()),
    no state_dict, no pickle. On a CPU calls from several threads take turns.
    """

    def __init__(self, plan: list[Formed], report: Report, device: Device) -> None:
        super().__init__()
        self.plan, self.report = plan, report
        self.run, self.before = network(plan), plan[0].place.before
        self.dtype, self.device = device.dtype, device.at
        self.eval()

    def train(self, mode: bool = True) -> Converted:
        if mode:
            raise ValueError("expected inference, got train(): a converted network is not trained")
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        fits = x.dtype is self.dtype and x.shape[1:] == self.before and x.device == self.device
        if fits and not torch.is_grad_enabled() and len(x):
            return self.run(x)
        if not fits:
            raise ValueError(
                f"expected {DTYPES[self.dtype]} [B, {', '.join(map(str, self.before))}] on {self.device}, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "expected an input without gradient, got requires_grad=True: use torch.no_grad()"
            )
        if not len(x):
            return x.new_empty(0, *self.plan[-1].place.after)
        with torch.no_grad():
            return self.run(x)


def convert(
    model: nn.Sequential,
    masks: Mapping[str, Tensor] | None,
    example: Tensor,
    *,
    compact: bool = True,
    kernels: str = "auto",
) -> Converted:
    """The fastest network with the outputs of `model` for batches like `example` [B, ...], where that lies.

    masks: parameter name -> bool of its shape, True = kept; or zeros in the weights. The model stays as it
    is; it and the example are in fp32 on a CPU, or in fp32, bf16 or fp16 on CUDA. Other batch sizes are
    computed right, by what is fastest for the example's. The choice is for torch's number of threads now, or
    on CUDA for its precision of fp32 (TF32 or not). What is pruned is not always multiplied: a NaN there may
    not be seen.

    `kernels`: "auto", or "triton" for what CUDA has, on a CPU in Triton's interpreter.
    ValueError: as `compaction.pruned_parts` and `Device.of`, or an example that is not finite.
    """
    began = time.perf_counter()
    device = Device.of(example, kernels)
    original = pruned_parts(model, masks, example)
    if not original:
        raise ValueError("model: expected at least one layer that computes something, got none")
    if not bool(example.isfinite().all()):
        raise ValueError("example: expected finite numbers, got NaN or infinity")
    units: list[Units] = []
    left_out: dict[str, str] = {}
    parts = original
    with torch.no_grad(), torch.cuda.device_of(example):  # type: ignore[no-untyped-call]
        if compact:
            compacted = compact_parts(original)
            parts, units = _parts(compacted.names, compacted.model, example), compacted.units
        cache = Cache(len(example), device.key)
        trials = try_all(stages(parts), example, device, cache, left_out)
        plain = [FORMS["dense"].of(stage, device, len(example)) for stage in stages(original)]
        plans = paths(trials, device, cache) | {"original": plain}
        networks = {name: network(plan) for name, plan in plans.items()}
        checks = _checks(networks, original, example, device)
        times = race(plans, networks, example, device, cache)
        cache.save()
    right = [name for name in plans if name == "original" or not checks[name].fault]
    chosen = min(right, key=lambda name: times[name] * handicap(plans[name]))
    report = Report(
        len(example),
        str(device),
        _layer_reports(trials, plans[chosen], original),
        units,
        times,
        checks,
        chosen,
        time.perf_counter() - began,
        left_out,
    )
    return Converted(plans[chosen], report, device)


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
                ", ".join(_candidate(name, layer.times[name], layer.checks[name]) for name in layer.times),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    networks = [_candidate(name, report.networks[name], report.checks[name]) for name in report.networks]
    gain = report.networks["original"] / report.networks[report.chosen]
    lines += [
        f"whole network, batch {report.batch}, {report.device}, changes of layout counted: "
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
    lines += [f"no candidate: {name}: {why}" for name, why in report.left_out.items()]
    if converted.device.type == "cpu" and _native.LIB is None:
        lines.append(f"native kernels: {_native.WHY}")
    return "\n".join(lines)


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
                    trial.stage.kept / weight.numel(),
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


def _candidate(name: str, taken: float, found: Checked) -> str:
    wrong = ""
    if found.fault and name not in ("dense", "original"):
        by = found.error if not found.error <= found.allowed else found.largest
        wrong = f" (wrong by {by:.0e}, not taken)"
    return f"{name} {_duration(taken)}{wrong}"


def _duration(taken: float) -> str:
    return (
        f"{1e6 * taken:.3g} us"
        if taken < 1e-3
        else f"{1e3 * taken:.3g} ms"
        if taken < 1
        else f"{taken:.3g} s"
    )
