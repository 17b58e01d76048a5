"""What a conversion found: seconds and errors of every candidate, what was chosen, and the table of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sparselth.check import Checked
from sparselth.kernels import _native
from sparselth.sparse.compaction import Units


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
    how: str = "layer behind layer"  # or how the model's layers were found
    kept: list[str] = field(default_factory=list)  # layers with weights that stay torch's


def table(report: Report, weight_bytes: int) -> str:
    """The report as lines of text."""
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
        f"chosen: {report.chosen}, {gain:.2f}x the original; weights {weight_bytes:,} bytes, "
        f"dense {sum(layer.dense_bytes for layer in report.layers):,}; convert took "
        f"{_duration(report.seconds)}",
        f"layers found: {report.how}",
    ]
    if report.kept:
        lines.append(f"stay torch's, dense with their zeros: {', '.join(report.kept)}")
    for unit in report.units:
        if unit.inputs[0] != unit.inputs[1] or unit.outputs[0] != unit.outputs[1]:
            lines.append(
                f"compaction: {unit.name} inputs {unit.inputs[0]} -> {unit.inputs[1]}, "
                f"outputs {unit.outputs[0]} -> {unit.outputs[1]}"
            )
    lines += [f"no candidate: {name}: {why}" for name, why in report.left_out.items()]
    if report.device.startswith("threads") and _native.LIB is None:
        lines.append(f"native kernels: {_native.WHY}")
    return "\n".join(lines)


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
