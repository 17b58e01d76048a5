"""What each level of a run saves: parameters, FLOPs, measured times of training and inference, bytes.

Parameters, FLOPs and bytes are counted of the files; a training step is what the run measured as it trained;
inference is measured here, of one seed, all levels in turn on the same random inputs, after each converted
network was compared with float64. Dense is at its best of eager torch and what `convert` makes of level 0.
"""

from __future__ import annotations

import copy
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparselth import sparse, tickets
from sparselth.check import LARGEST, check
from sparselth.clock import Race, Timing, rounds, warm_wall
from sparselth.config import Cell
from sparselth.errors import SparselthError
from sparselth.measure.memory import file_bytes
from sparselth.measure.noise import decides
from sparselth.runs import RunRecord, cell_path
from sparselth.tickets import RunTicket

CHECKED = 64  # inputs that are also computed in float64


def savings(record: RunRecord, batch: int = 64) -> list[dict[str, Any]]:
    """A row a level of the first seed whose dense network is finished; SparselthError where none is."""
    there = {Cell.of(p): p for p in record.points}
    seed = next((s for s in record.config.seeds if Cell(s, "ticket", 0) in there), None)
    if seed is None:
        raise SparselthError(
            f"{record.path}: no seed has a dense network yet; go on with the run by `resume`"
        )
    model = record.config.network
    cells = sorted((c for c in there if (c.seed, c.arm) == (seed, "ticket")), key=lambda cell: cell.level)
    found = {cell.level: tickets.load(cell_path(record.path, cell)) for cell in cells}
    x = _inputs(model, batch)
    rows = [_counted(one, x, there[cell]) for cell, one in zip(cells, found.values(), strict=True)]
    calls: dict[str, Any] = {}
    for row, one in zip(rows, found.values(), strict=True):
        row |= _made(one, x, calls)
    with torch.no_grad():
        race = Race({name: warm_wall(call) for name, call in calls.items()}, watch=True)
        rounds(race)
    times = race.timings()
    best = min((times[name] for name in ("eager", "0") if name in times), key=lambda timing: timing.median)
    for row in rows:
        row |= _timed(times.get(str(row["level"])), best, row["level"] == 0) | {"batch": batch}
    return rows


def _inputs(model: Any, batch: int) -> Tensor:
    if getattr(model, "tokens", False):
        return torch.zeros(batch, *model.input, dtype=torch.int64, device="cpu")
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, *model.input, generator=draw, dtype=torch.float32, device="cpu")


def _counted(ticket: RunTicket, x: Tensor, point: dict[str, Any]) -> dict[str, Any]:
    """What a level's file and line say."""
    params, mask = ticket.model.params, ticket.content.mask
    kept = int(mask.sum())
    dense = kept == params.prunable
    content = tickets.Content(mask, ticket.content.weights)
    stored = tickets.arrays(params, content, dense=dense)
    return {
        "level": point["level"],
        "seed": point["seed"],
        "weights_remaining": point["weights_remaining"],
        "parameters": kept + sum(spec.numel for spec in params.trained),
        "flops": flops(ticket, x),
        "step_seconds": point.get("step_seconds"),
        "state_bytes": point.get("state_bytes"),
        "file_bytes": file_bytes(stored, ticket.header),
        "final_accuracy": point["final_accuracy"],
    }


@torch.no_grad()
def flops(ticket: RunTicket, x: Tensor) -> int:
    """Two a kept weight and place of an output, of one input: of fully connected layers and convolutions."""
    net, found = ticket.trained().eval(), [0]
    kept = {name: int(mask.sum()) for name, mask in ticket.masks.items()}

    def count(name: str, module: nn.Module, _: Any, output: Tensor) -> None:
        units = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        found[0] += 2 * kept.get(f"{name}.weight", 0) * (output[0].numel() // units)

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(partial(count, name))
    net(x[:1])
    return found[0]


def _made(ticket: RunTicket, x: Tensor, calls: dict[str, Any]) -> dict[str, Any]:
    """Convert a level, check it, and enter it for the race; level 0 enters eager torch, too."""
    net, level = ticket.trained().eval(), str(_level(ticket))
    with torch.no_grad():
        if level == "0":
            calls["eager"] = partial(net, x)
        try:
            fast = sparse.convert(net, None, x)
        except ValueError as error:
            return {"check": "failed", "why": str(error)}
        exact = copy.deepcopy(net).double()(x[:CHECKED].double() if x.is_floating_point() else x[:CHECKED])
        terms = max(prod(p.shape[1:]) for p in net.parameters() if p.dim() > 1)
        told = check(
            fast(x)[:CHECKED], exact, "fp32", terms=terms, own=net(x[:CHECKED]), largest=LARGEST["fp32"]
        )
    if told.fault:
        return {"check": "failed", "why": str(told.fault)}
    calls[level] = partial(fast, x)
    return {"check": "passed"}


def _level(ticket: RunTicket) -> int:
    return int(str(ticket.header["cell"]).split("-")[-1])


def _timed(time: Timing | None, best: Timing, dense: bool) -> dict[str, Any]:
    """The time of a level's inference beside dense at its best; none where its check failed."""
    time = best if dense else time
    if time is None:
        return {"inference_seconds": None, "inference_of_dense": None, "noisy": True}
    return {
        "inference_seconds": time.median,
        "iqr_seconds": time.spread,
        "inference_of_dense": time.median / best.median,
        "noisy": decides(time, best),
    }
