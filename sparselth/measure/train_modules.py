"""A training step of any network in a plain loop of torch: dense at its best, layers of others, `compress`.

All take SGD with momentum, fused, on one batch, in turn. The gradient of the first step is held against
that of the dense masked network in float64; where an activation or a pool nearly ties it may fall either
way, so that bound is loose (GRADIENT_TIES), and our layers are held against float64 one by one as well,
by rounding alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparselth.errors import SparselthError
from sparselth.kernels import _pieces
from sparselth.measure import memory
from sparselth.measure.case import (
    Call,
    Result,
    Row,
    Say,
    best_of,
    check_batches,
    conversion_of,
    race,
    row_of,
)
from sparselth.measure.contenders import OURS, dense_bytes, reason
from sparselth.measure.layer_gradients import check_layers
from sparselth.measure.memory import Memory, held
from sparselth.measure.nets import Net
from sparselth.measure.trainers import Trainee, kind_of, make_trainees
from sparselth.sparse.reference import Given
from sparselth.sparse.trainable import Compressed
from sparselth.streams import stream
from sparselth.user_files import said

RATE, MOMENTUM = 0.01, 0.9
DROPS = (  # kinds of modules that draw what they drop, torchvision's and timm's among them
    ("_DropoutNd", "p"), ("MultiheadAttention", "dropout"), ("RNNBase", "dropout"),
    ("StochasticDepth", "p"), ("DropPath", "drop_prob"),
)  # fmt: skip
GRADIENT_TIES = 1e-2  # of a whole network's gradient, relative in norm
FEW = 8  # samples on which layers are checked one by one


def bench_module_training(net: Net, batch: int, say: Say) -> Result:
    """All trainers on a network's step; checks: gradients, and that pruned weights have none in ours."""
    check_batches([batch])
    net = _without_ties(_without_dropout(net))
    given, loss = net.given(batch), net.objective(batch)
    told = partial(_tell, say, f"{net.name}, batch {batch}")
    told("gradients in float64")
    right = _exact(net, given, loss)
    trainees, notes = make_trainees(net.module, net.masks, given, told)
    fast = trainees[OURS].net
    few, least = net.given(min(batch, FEW)), net.objective(min(batch, FEW))
    layers = check_layers(fast, _train(net.module), net.masks, partial(_double, given=few), least)
    steps: dict[str, Call] = {}
    errors: dict[str, float] = {}
    footprints: dict[str, Memory] = {}
    for label, one in [*trainees.items()]:
        told(label)
        try:
            torch.autograd.backward(loss(one.forward(given)))
        except Exception as error:  # of a compiler, or a package's kernels
            if label in ("torch", OURS):
                raise
            notes.append(f"{label} is not among the rivals: {reason(error)}")
            del trainees[label]
            continue
        errors[label] = _error(one, right, net.masks)
        optimizer = torch.optim.SGD(one.net.parameters(), RATE, MOMENTUM, fused=True)
        steps[label] = _step(one, optimizer, given, loss)
        footprints[label] = _memory(one, optimizer, steps[label])
    told("timing")
    others = {label for label in steps if kind_of(label) == "sparse"}
    times = race(steps, "cpu", others)
    wrong = {label for label, error in errors.items() if not error <= GRADIENT_TIES}
    faults = {name: checked.fault for name, checked in layers.items() if checked.fault}
    if faults:
        wrong.add(OURS)
    best = best_of(times, wrong | others | {OURS})
    rows: list[Row] = []
    for label in trainees:
        footprint = footprints[label]
        sparsity = 1 - net.kept if kind_of(label) != "dense" else 0.0
        row = row_of(net.name, sparsity, label, batch, times, best)
        row |= {
            "weight_bytes": footprint.weights + footprint.indices,
            "dense_weight_bytes": dense_bytes(net.module),
            "gradient_bytes": footprint.gradients,
            "optimizer_bytes": footprint.optimizer,
            "peak_bytes": footprint.peak,
            "max_rel_error": errors[label] if math.isfinite(errors[label]) else None,
            "check": "failed" if label in wrong else "passed",
            "fault": _fault(errors[label], faults if label == OURS else {}),
        }
        if label == OURS:
            worst = max((c.error for c in layers.values()), default=0.0)
            row |= conversion_of(trainees[OURS].seconds, times, best) | {"layer_error": worst}
        rows.append(row)
    pair = {f"training, batch {batch}": (footprints[best], footprints[OURS])}
    facts = {
        "network": net.name,
        "kept": net.kept,
        "mask": net.what,
        "compression": [vars(choice) for choice in _compression(fast)],
    }
    return Result("module-training", "cpu", rows, pair, bool(wrong), facts, [*net.notes, *notes])


def _without_dropout(net: Net) -> Net:
    """Its draws would differ between those who are compared."""
    module, found = copy.deepcopy(net.module), False
    for one in module.modules():
        key = next((key for kind, key in DROPS if kind in {c.__name__ for c in type(one).__mro__}), "")
        if isinstance(getattr(one, key, None), float | int) and getattr(one, key):
            setattr(one, key, 0.0)
            found = True
    note = ["Dropout is off, since draws that differ cannot be compared."] if found else []
    return replace(net, module=module, notes=[*net.notes, *note])


def _without_ties(net: Net) -> Net:
    """A filter without weights gives one number, which a norm before a ReLU makes its bias, give or take
    rounding: where that is 0, as before training, rounding alone would say which gradients there are."""
    module, draw = copy.deepcopy(net.module), stream(0, "bench", 0, "bias")
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._NormBase) and one.bias is not None:
            with torch.no_grad():
                drawn = torch.empty_like(one.bias).uniform_(0.05, 0.15, generator=draw)
                one.bias.copy_(torch.where(one.bias == 0, drawn, one.bias))
    return replace(net, module=module)


def _compression(fast: nn.Module) -> Sequence[Any]:
    found: Any = fast.compression
    return list(found)


def _fault(error: float, faults: Mapping[str, str | None]) -> str | None:
    if faults:
        name, why = next(iter(faults.items()))
        return f"layer {name}: {why}"
    if error <= GRADIENT_TIES:
        return None
    return f"gradient off by {error:.1e} of its norm, {GRADIENT_TIES:.0e} allowed"


def _tell(say: Say, where: str, what: str) -> None:
    say(f"{where}: {what}")


def _train(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).train().requires_grad_(True)


def _double(net: nn.Module, given: Given) -> Any:
    args, kwargs = given.call([t.double() if t.is_floating_point() else t for t in given.tensors])
    return net(*args, **kwargs)


def _exact(net: Net, given: Given, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Gradients of the dense network in float64; SparselthError where it, or its loss, fails."""
    exact, before = _train(net.module).double(), torch.get_rng_state()
    try:
        torch.autograd.backward(loss(_double(exact, given)))
    except Exception as error:
        raise SparselthError(f"`model` {net.name}: a step of training, in float64: {said(error)}") from error
    if not torch.equal(before, torch.get_rng_state()):
        raise SparselthError(
            f"`model` {net.name}: draws random numbers as it trains, and draws that differ cannot be "
            "compared; expected none but those of dropout's modules"
        )
    return {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}


def _error(one: Trainee, right: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """Of the gradients of all that is kept, in norm, relative to that norm."""
    found, off, whole = one.gradients(), 0.0, 0.0
    for name, exact in right.items():
        a, b = found.get(name, torch.zeros((), dtype=torch.float64, device="cpu")), exact
        if name in masks:
            b = b[masks[name]]
            a = a[masks[name]] if a.dim() else a
        off += float((a - b).square().sum())
        whole += float(b.square().sum())
    return math.sqrt(off / whole) if whole else math.inf


def _step(
    one: Trainee, optimizer: torch.optim.Optimizer, given: Given, loss: Callable[[Any], Tensor]
) -> Call:
    forward = one.bind(given)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss(forward()))
        optimizer.step()

    return step


def _memory(one: Trainee, optimizer: torch.optim.Optimizer, step: Call) -> Memory:
    """Behind a step; activations are what another one adds, memory that is used again counted as new."""
    step()
    parameters = [*one.net.parameters()]
    gradients = sum(held([p.grad for p in parameters if p.grad is not None]))
    optimizer.zero_grad()
    _pieces.clear()
    added = memory.peak(step)
    indices = one.indices + sum(m.index_bytes() for m in one.net.modules() if isinstance(m, Compressed))
    moments = sum(held([*optimizer.state.values()]))
    return Memory(sum(held(parameters)), indices, max(0, added - gradients), gradients, moments)
