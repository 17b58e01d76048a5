"""Any network from end to end at inference: dense at its best beside runtimes of others and `convert`.

All contenders get one network, whose pruned weights are 0, take turns under one clock with torch's number
of threads, and are held against float64 on the example and on inputs that nothing was measured on. One that
is off is nobody's best, and sets `failed`. Dense networks in bf16, on a CPU with tiles for that, are nobody's
best either: how far off they are stands in their row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sparselth import sparse
from sparselth.check import Checked
from sparselth.errors import SparselthError
from sparselth.measure.case import (
    Call,
    Keep,
    Result,
    Row,
    Say,
    best_of,
    check_batches,
    conversion_of,
    no_keep,
    race,
    row_of,
)
from sparselth.measure.contenders import OURS, Field, Ready, dense_bytes, files, kind_of, make_ready, outputs
from sparselth.measure.floors import fp32
from sparselth.measure.memory import Memory
from sparselth.measure.nets import Net
from sparselth.sparse.forms import FORMS
from sparselth.sparse.reference import Given, Reference

NO_DOUBLE = (
    "The network cannot compute in float64, so all are held against torch's own fp32: errors are "
    "differences from that."
)
FRESH = 1  # the seed of inputs that nothing was measured on


def bench_module(
    net: Net, batches: Sequence[int], say: Say, device: str = "cpu", keep: Keep = no_keep
) -> Result:
    """All contenders on a network, for every batch size; `keep` gets what there is behind each."""
    check_batches(batches)
    with torch.no_grad(), fp32(device):
        return _bench(net, batches, say, device, keep)


def _bench(net: Net, batches: Sequence[int], say: Say, device: str, keep: Keep) -> Result:
    module = net.module.to(device)
    masks = {name: mask.to(device) for name, mask in net.masks.items()}
    terms = max(p[0].numel() for p in module.parameters() if p.dim() > 1)
    dense_file, ticket_file = files(module, masks)
    whole = dense_bytes(module)
    facts: dict[str, Any] = {"network": net.name, "kept": net.kept, "mask": net.what, "layers": []}
    result = Result("module", device, [], {}, False, facts, [*net.notes])
    failed = False
    for batch in batches:
        givens = [_at(net.given(batch, seed), device) for seed in (0, FRESH)]
        try:
            references = [Reference.of(module, {}, given) for given in givens]
        except ValueError as error:
            raise SparselthError(f"`model` {net.name}: {error}") from None
        if not outputs(references[0].own):
            raise SparselthError(
                f"`model` {net.name}: gives no tensor for the example; expected one, or several"
            )
        field = Field(module, givens[0], masks)
        told = partial(_tell, say, f"{net.name}, batch {batch}")
        try:
            ready, why_not = make_ready(field, say=told)
        except SparselthError as error:
            raise SparselthError(f"`model` {net.name}: {error}") from None
        why_not += [NO_DOUBLE] * any(_no_double(one) for one in references)
        result.notes.extend(note for note in why_not if note not in result.notes)
        checks = {
            label: _worst(one, givens, references, terms, _dtype(label)) for label, one in ready.items()
        }
        told("memory")
        footprints = {
            label: one.memory(givens[0], device, ticket_file if label == OURS else dense_file)
            for label, one in ready.items()
        }
        told("timing")
        calls: dict[str, Call] = {label: one.bind(givens[0]) for label, one in ready.items()}
        others = {label for label in calls if kind_of(label) in ("sparse", "bf16")}
        times = race(calls, device, others)
        wrong = {label for label, checked in checks.items() if checked.fault}
        best = best_of(times, wrong | others | {OURS})
        for label, one in ready.items():
            footprint = footprints[label]
            sparsity = 1 - net.kept if kind_of(label) in ("sparse", "ours") else 0.0
            row: Row = row_of(net.name, sparsity, label, batch, times, best)
            row |= {
                "dtype": _dtype(label),
                "weight_bytes": _weights(one, footprint),
                "dense_weight_bytes": whole,
                "peak_bytes": footprint.peak if footprint else None,
                "file_bytes": one.file_bytes or (ticket_file if label == OURS else dense_file),
                "max_rel_error": checks[label].largest if checks[label].finite else None,
                "check": "failed" if label in wrong else "passed",
                "fault": checks[label].fault,
            }
            row |= conversion_of(one.seconds, times, best) if label == OURS else {"conversion_s": one.seconds}
            result.rows.append(row)
        failed |= any(_dtype(label) == "fp32" for label in wrong)  # bf16 may choose another class
        result = replace(result, failed=failed)
        before, after = footprints[best] or footprints["dense"], footprints[OURS]
        if ready[best].outside is not None:  # one number, which compares with no other
            before = footprints["dense"]
        assert before is not None
        assert after is not None
        result.memory[f"inference, batch {batch}"] = before, after
        report = ready[OURS].converted.report
        facts["layers"] = [{"batch": batch, **layer} for layer in _layers(report)]
        facts["whole"] = report.chosen
        facts["explained"] = sparse.explain(ready[OURS].converted)
        keep(_copy(result))
    return result


def _no_double(reference: Reference) -> bool:
    """Whether float64 could not be had."""
    floats = [t for t in outputs(reference.exact) if t.is_floating_point()]
    return bool(floats) and all(t.dtype != torch.float64 for t in floats)


def _copy(result: Result) -> Result:
    """As it is now."""
    return replace(
        result, rows=[*result.rows], memory={**result.memory}, notes=[*result.notes], facts={**result.facts}
    )


def _tell(say: Say, where: str, what: str) -> None:
    say(f"{where}: {what}")


def _at(given: Given, device: str) -> Given:
    return given.to([t.to(device) for t in given.tensors])


def _dtype(label: str) -> str:
    return "bf16" if kind_of(label) == "bf16" else "fp32"


def _worst(ready: Ready, givens: list[Given], references: list[Reference], terms: int, dtype: str) -> Checked:
    """Against float64, of the example and of fresh inputs; in bf16 what is computed need only be numbers."""
    found = []
    for given, right in zip(givens, references, strict=True):
        out = outputs(ready.bind(given)())
        if dtype == "bf16":
            out = [t.float() if t.is_floating_point() else t for t in out]
        one = Reference(outputs(right.own), outputs(right.exact), right.spec).check(out, "fp32", terms)
        if dtype == "bf16" and one.finite:
            one = replace(one, allowed=max(one.allowed, one.error), allowed_largest=one.largest)
        found.append(one)
    return max(found, key=lambda one: (one.fault is not None, one.error / one.allowed))


def _weights(ready: Ready, footprint: Memory | None) -> int | None:
    """Bytes of weights with indices; None where a runtime of others holds them."""
    return footprint.weights + footprint.indices if footprint and ready.outside is None else None


def _layers(report: Any) -> list[dict[str, Any]]:
    """What was chosen for each layer, its seconds, and those of the best dense and the best sparse way."""
    found = []
    for layer in report.layers:
        sparse_ways = {
            name: taken
            for name, taken in layer.times.items()
            if FORMS[name].kind != "dense" and not layer.checks[name].fault
        }
        best = min(sparse_ways, key=sparse_ways.__getitem__, default=None)
        found.append(
            {
                "layer": layer.name,
                "shape": "x".join(map(str, layer.shape)),
                "kept": layer.density,
                "chosen": layer.chosen,
                "dense": FORMS[layer.chosen].kind == "dense",
                "dense_s": layer.dense_seconds,
                "best_sparse": best,
                "best_sparse_s": None if best is None else sparse_ways[best],
            }
        )
    return found
