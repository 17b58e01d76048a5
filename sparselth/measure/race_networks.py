"""Whole networks from end to end: dense at its best beside the pruned one, in time, memory and answers.

`bench_run` takes the ticket of a finished run and its test images, `bench_model` a model with a random mask,
both on a CPU or on CUDA. All in fp32; on CUDA without TF32, and timed in CUDA graphs where a rival can be
captured.

Every time stands beside a check against float64 of the same run, and a row whose check fails is marked, is
nobody's best and sets `failed`. All rivals see the same images and take turns under one clock, with torch's
number of threads. The dense rivals may have the images in the order of memory they like best, for nothing;
the pruned network gets them as they come.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselth import data, runs, sparse, tickets
from sparselth.check import LARGEST, Checked, check
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.errors import SparselthError, UsageError
from sparselth.measure import energy, memory
from sparselth.measure.case import (
    Case,
    Keep,
    Result,
    Row,
    Say,
    best_of,
    check_batches,
    conversion_of,
    no_keep,
    race,
    random_case,
    row_of,
)
from sparselth.measure.contenders import Field, Ready, make_ready, outputs
from sparselth.measure.floors import fp32
from sparselth.measure.memory import Memory, held
from sparselth.measure.sessions import RUNTIMES
from sparselth.measure.training import memory_of_training
from sparselth.models import Model, get_model
from sparselth.models.torch import sequential
from sparselth.sparse.reference import Given
from sparselth.streams import stream

TOLERANCE = {"cpu": LARGEST["fp32"], "cuda": 1e-4}  # cuDNN may convolve by transforms that lose some digits
CHECKED = 256  # images of a batch that are also computed in float64


def bench_run(
    path: Path,
    level: int | None,
    seed: int | None,
    batches: Sequence[int],
    data_dir: Path | None,
    say: Say,
    device: str = "cpu",
    keep: Keep = no_keep,
) -> Result:
    """The ticket of a level of a run beside the run's dense network, on the test images of its data set.

    `level` is the last finished one unless given, `seed` the first. Checks: the ticket's predictions are
    those of the dense network with its zeros, and its accuracy is the one that the run recorded. `keep` gets
    what there is behind every batch size, without accuracies.
    """
    check_batches(batches)
    record = runs.read(path)
    who, point = _cell(record, level, seed)
    model, config = get_model(record.config.model), record.config
    images = data.resolve(config.dataset, data_dir, say)
    resident = Resident(images, "cpu", images.spec.n_test, inputs=config.recipe.inputs)
    (chunk, labels), *_ = resident.test()
    x, labels = chunk[0].T.reshape(-1, *model.input).contiguous(), labels.flatten()
    first = Cell(who.seed, "ticket", 0)
    dense, _, dense_file = _load(path, model, first)
    pruned, mask, file = _load(path, model, who)
    case = Case(model, dense, pruned, mask)

    facts: dict[str, Any] = {
        "run": str(path),
        "network": config.model,
        "level": who.level,
        "seed": who.seed,
        "kept": 1 - case.sparsity,
        "images": len(x),
        "data": images.spec.title,
    }
    with fp32(device):
        inference = _inference(
            case, x, batches, (dense_file, file), say, device, _so_far("ticket", facts, keep)
        )
    pairs = inference.memory
    if device == "cpu":
        say("memory of a training step")
        pairs |= memory_of_training(case, config.recipe, resident)
    right = inference.pruned_logits.argmax(1) == labels
    accuracy = float(right.double().mean())
    with torch.no_grad():
        before = float((_logits(sequential(model, dense), x, 500).argmax(1) == labels).double().mean())
    recorded = point["final_accuracy"]
    as_recorded = abs(accuracy - recorded) <= 1e-3
    facts |= {
        "accuracy": accuracy,
        "dense_accuracy": before,
        "recorded_accuracy": None if as_recorded else recorded,
        "file_bytes": file,
        "dense_file_bytes": dense_file,
    }
    for row in inference.rows:
        row |= {
            "level": who.level,
            "seed": who.seed,
            "test_accuracy": accuracy,
            "dense_test_accuracy": before,
        }
    failed = inference.failed or not as_recorded
    return Result("ticket", device, inference.rows, pairs, failed, facts, inference.notes)


def bench_model(
    name: str,
    sparsity: float,
    batches: Sequence[int],
    say: Say,
    device: str = "cpu",
    keep: Keep = no_keep,
) -> Result:
    """A model with fresh weights, of which every layer keeps the same share, chosen at random, on noise.

    `keep` gets what there is behind every batch size.
    """
    check_batches(batches)
    case = random_case(get_model(name), sparsity)
    images = torch.randn(
        max(*batches, CHECKED),
        *case.model.input,
        generator=stream(0, "bench", 0, "images"),
        dtype=torch.float32,
        device="cpu",
    )
    files = _stored(case, dense=True), _stored(case, dense=False)
    facts = {"network": name, "kept": 1 - case.sparsity}
    with fp32(device):
        found = _inference(case, images, batches, files, say, device, _so_far("model", facts, keep))
    return Result("model", device, found.rows, found.memory, found.failed, facts, found.notes)


@dataclass
class _Inference:
    rows: list[Row]
    notes: list[str]
    memory: dict[str, tuple[Memory, Memory]]
    pruned_logits: Tensor  # of the last batch size, on all images, on the CPU
    failed: bool
    device: str


def _so_far(what: str, facts: dict[str, Any], keep: Keep) -> Callable[[_Inference], None]:
    def kept(found: _Inference) -> None:
        rows, pairs, notes = [*found.rows], {**found.memory}, [*found.notes]
        keep(Result(what, found.device, rows, pairs, found.failed, {**facts}, notes))

    return kept


@torch.no_grad()
def _inference(
    case: Case,
    images: Tensor,
    batches: Sequence[int],
    files: tuple[int, int],
    say: Say,
    device: str,
    keep: Callable[[_Inference], None],
) -> _Inference:
    dense, pruned = (sequential(case.model, flat).to(device) for flat in (case.dense, case.pruned))
    images, most = images.to(device), TOLERANCE[device]
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    dense_bytes = sum(held([*dense.parameters()]))
    expected = _logits(pruned, images, 500)
    meter = energy.meter(device)
    found = _Inference([], [meter.why], {}, expected, False, device)
    for batch in batches:
        x = images[torch.arange(batch, device="cpu") % len(images)]
        say(f"{case.model.name}, batch {batch}: converting")
        began = time.perf_counter()
        try:
            converted = sparse.convert(pruned, None, x)
        except ValueError as error:
            raise SparselthError(f"{case.model.name} cannot be converted: {error}") from None
        conversion = time.perf_counter() - began
        parts = [*converted.forms, *converted.parameters(), *converted.buffers()]
        footprints: dict[str, Memory | None] = {
            "sparselth": memory.running(parts, partial(converted, x), device, files[1])
        }
        say(f"{case.model.name}, batch {batch}: dense at its best")
        ready, why_not = _dense_rivals(dense, x)
        found.notes += [note for note in why_not if note not in found.notes]
        given, checks = Given.of(dense, x), {}
        calls = {label: one.bind(given) for label, one in ready.items()}
        for label, one in ready.items():
            (logits,) = outputs(calls[label]())
            checks[label] = _check(logits, dense, x)
            footprints[label] = one.memory(given, device, files[0])
        calls["sparselth"] = partial(converted, x)
        checks["sparselth"] = _check(converted(x), pruned, x)
        say(f"{case.model.name}, batch {batch}: timing")
        times = race(calls, device)
        wrong = {label for label, checked in checks.items() if checked.fault}
        logits = _logits(converted, images, batch)
        found.pruned_logits = logits.cpu()
        differing, ties = _differing(logits, expected, most)
        if differing > ties:
            wrong.add("sparselth")
        best = best_of(times, wrong | {"sparselth"})
        rows = []
        for label in calls:
            footprint = footprints[label]
            row = row_of(
                case.model.name, case.sparsity if label == "sparselth" else 0.0, label, batch, times, best
            )
            row |= {
                "weight_bytes": footprint.weights + footprint.indices
                if footprint and label not in RUNTIMES
                else None,
                "dense_weight_bytes": dense_bytes,
                "peak_bytes": footprint.peak if footprint else None,
                "file_bytes": (label in ready and ready[label].file_bytes) or files[label == "sparselth"],
                "max_rel_error": checks[label].largest if checks[label].finite else None,
                "joules": energy.per_call(meter, calls[label], wait)
                if label in (best, "sparselth")
                else None,
                "check": "failed" if label in wrong else "passed",
            }
            if label == "sparselth":
                row |= conversion_of(conversion, times, best)
                row |= {"images": len(images), "differing_predictions": differing, "ties": ties}
            rows.append(row)
        found.rows += rows
        found.failed |= bool(wrong)
        before, after = footprints["dense" if best in RUNTIMES else best], footprints["sparselth"]
        assert before is not None
        assert after is not None
        found.memory[f"inference, batch {batch}"] = before, after
        keep(found)
    return found


def _dense_rivals(net: nn.Module, x: Tensor) -> tuple[dict[str, Ready], list[str]]:
    """The dense network in every way this machine has, and why not in others."""
    return make_ready(Field(net, Given.of(net, x)), kinds=("dense",))


def _logits(run: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    return torch.cat([run(chunk) for chunk in torch.split(images, batch)])


def _check(y: object, net: nn.Module, x: Tensor) -> Checked:
    """The logits against float64, by torch's own and by the longest sum in the network."""
    assert isinstance(y, Tensor)
    exact: Tensor = copy.deepcopy(net).double()(x[:CHECKED].double())
    terms = max(p[0].numel() for p in net.parameters() if p.dim() > 1)
    bound = TOLERANCE[x.device.type]
    return check(y[:CHECKED], exact, "fp32", terms=terms, own=net(x[:CHECKED]), largest=bound)


def _differing(logits: Tensor, expected: Tensor, most: float) -> tuple[int, int]:
    """Images whose predicted class differs, and those of them whose two classes tie within rounding."""
    ours, theirs = logits.argmax(1, keepdim=True), expected.argmax(1, keepdim=True)
    gap = expected.gather(1, theirs) - expected.gather(1, ours)
    tie = (gap <= most * expected.abs().amax(1, keepdim=True)) & logits.isfinite().all(1, keepdim=True)
    return int((ours != theirs).sum()), int(((ours != theirs) & tie).sum())


def _cell(record: runs.RunRecord, level: int | None, seed: int | None) -> tuple[Cell, dict[str, Any]]:
    """The ticket that is asked for and its line."""
    path, config = record.path, record.config
    if not isinstance(getattr(config, "levels", None), int):
        raise SparselthError(f"{path}: is a run of {config.name}; expected one of imp, by levels")
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise UsageError(
            f"`seed` {seed}: expected one of {', '.join(map(str, config.seeds))}, the seeds of {path}"
        )
    done = {p["level"]: p for p in record.points if p["arm"] == "ticket" and p["seed"] == seed}
    level = max([1, *done]) if level is None else level
    if not 1 <= level <= config.levels:
        raise UsageError(
            f"`level` {level}: expected 1 to {config.levels}, the levels of {path} (0 is the dense network)"
        )
    if level not in done:
        raise SparselthError(
            f"{path}: the ticket of seed {seed}, level {level} is not finished; "
            "go on with the run by `resume`"
        )
    return Cell(seed, "ticket", level), done[level]


def _load(run: Path, model: Model, who: Cell) -> tuple[Tensor, Tensor, int]:
    """Trained weights [P] and mask [M] of a finished cell, and bytes of its file without rewind weights.

    A dense network needs no mask: its file is counted without one.
    """
    file = runs.cell_path(run, who)
    content, header = tickets.read(file, model.params)
    flat, mask = torch.from_numpy(content.weights), torch.from_numpy(content.mask)
    if who.level:
        return flat, mask, file.stat().st_size
    content = tickets.Content(content.mask, content.weights)
    return flat, mask, memory.file_bytes(tickets.arrays(model.params, content, dense=True), header)


def _stored(case: Case, dense: bool) -> int:
    """Bytes of a file as a run writes it."""
    params, full = case.model.params, case.model.params.full_mask()
    mask, weights = (full, case.dense) if dense else (case.mask, case.pruned)
    content = tickets.Content(mask.numpy(), weights.numpy())
    head = tickets.header(params, model=case.model.name)
    return memory.file_bytes(tickets.arrays(params, content, dense), head)


def _nothing() -> None:
    pass
