"""`sparselth ls WHAT`: the names that flags take, and the runs on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from sparselth.cli.options import PATH, as_flags, data_dir, metavar, output
from sparselth.config import EXPERIMENTS, INPUTS
from sparselth.errors import SparselthError, unknown
from sparselth.experiments.arms import ARMS
from sparselth.models import MODELS

Listing = tuple[list[dict[str, Any]], list[str]]  # rows for JSON, lines for people


@click.command()
@click.argument("what", metavar="models|datasets|arms|scores|methods|forms|formats|experiments|runs")
@data_dir
@click.option(
    "--out", type=PATH, default=Path("runs"), show_default=True, help="Folder whose runs are listed."
)
@output
def ls(what: str, data_dir: Path | None, out: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """List models (by layer), datasets, arms, scores, methods, forms, formats, experiments or runs."""
    listings: dict[str, Callable[[], Listing]] = {
        "models": _models,
        "datasets": lambda: _datasets(data_dir),
        "arms": _arms,
        "scores": _scores,
        "methods": _methods,
        "forms": _forms,
        "formats": _formats,
        "experiments": _experiments,
        "runs": lambda: _runs(out),
    }
    if what not in listings:
        raise unknown("list", what, listings)
    rows, lines = listings[what]()
    if as_json:
        print(json.dumps({"schema": f"sparselth.ls-{what}/1", what: rows}, indent=2))
    else:
        print("\n".join(lines))


def _models() -> Listing:
    rows, lines = [], []
    for model in MODELS.values():
        weights = {spec.name: spec.numel for spec in model.weights}
        biases, norms = (sum(spec.numel for spec in specs) for specs in (model.biases, model.norms))
        rows.append(
            {
                "name": model.name,
                "input": model.input,
                "dataset": model.dataset,
                "prunable": model.params.prunable,
                "biases": biases,
                "batch_norms": norms,
                "weights": weights,
                "exempt": model.exempt,
            }
        )
        others = f"{biases:,} biases" + (f", {norms:,} of batch norms" if norms else "")
        lines.append(
            f"{model.name:<16}{model.params.prunable:>10,} prunable weights, {others}; {model.source}"
        )
        lines.append(f"  images of {' x '.join(map(str, model.input))}, as in {model.dataset}")
        for spec in model.weights:
            shape = " x ".join(map(str, spec.shape))
            lines.append(f"  {spec.name:<14}{spec.numel:>10,}  {shape}")
        if model.exempt:
            layers = ", ".join(name.removesuffix(".weight") for name in model.exempt)
            lines.append(f"  scope global leaves out {layers}")
        for name, recipe in model.recipes.items():
            how = f"{recipe.optimizer} {recipe.lr:g}, {recipe.steps:,} steps of {recipe.batch_size}"
            how += "" if recipe.augment == "none" else f", {recipe.augment}"
            how += "" if recipe.inputs == "standard" else f", {INPUTS[recipe.inputs]}"
            lines.append(f"  --recipe {name:<8}{how}")
    lines.append("my_net.py:make, torchvision:NAME, timm:NAME: any network, see docs/any-network.md")
    return rows, lines


def _datasets(folder: Path | None) -> Listing:
    from sparselth import data

    if folder:
        data.data_dir(folder)  # is there
    rows, lines = [], []
    for spec in data.DATASETS.values():
        try:
            source, there = data.where(spec.name, folder), True
        except data.MissingData as error:
            source, there = as_flags(data.when(spec, folder, error)), False
        except SparselthError as error:
            source, there = as_flags(str(error)), False
        shape = " x ".join(map(str, spec.shape))
        rows.append(
            {
                "name": spec.name,
                "train": spec.n_train,
                "test": spec.n_test,
                "found": there,
                "source": source,
            }
        )
        lines.append(f"{spec.name:<14}{spec.n_train:>9,} + {spec.n_test:>6,} images of {shape}; {source}")
    return rows, lines


def _arms() -> Listing:
    return _meanings({name: arm.meaning for name, arm in ARMS.items()})


def _scores() -> Listing:
    from sparselth.scores import SCORES

    return _meanings({name: scored.meaning for name, scored in SCORES.items()})


def _methods() -> Listing:
    from sparselth.frozen import METHODS

    return _meanings({name: method.meaning for name, method in METHODS.items()})


def _forms() -> Listing:
    from sparselth.sparse.forms import FORMS

    return _meanings({name: f"{form.kind}, activations as {form.layout}" for name, form in FORMS.items()})


def _formats() -> Listing:
    from sparselth.exchange import FORMATS

    ways = {
        name: " and ".join(["export"] * bool(form.write) + ["import"] * bool(form.read))
        for name, form in FORMATS.items()
    }
    return _meanings({name: f"{ways[name]}: {form.meaning}" for name, form in FORMATS.items()})


def _meanings(found: dict[str, str]) -> Listing:
    """Names, and a line about each."""
    rows = [{"name": name, "meaning": text} for name, text in found.items()]
    width = max(map(len, found), default=0) + 2
    return rows, [f"{name:<{max(16, width)}}{text}" for name, text in found.items()]


def _experiments() -> Listing:
    """Every experiment with the options of its configuration."""
    rows, lines = [], []
    for name, experiment in EXPERIMENTS.items():
        meaning = (experiment.__doc__ or "").partition("\n")[0]
        options = [f for f in fields(experiment) if f.metadata.get("help")]
        lines.append(f"{name:<16}{meaning}")
        row: dict[str, Any] = {"name": name, "meaning": meaning, "options": []}
        for f in options:
            row["options"].append({"name": f.name, "default": f.default, "help": f.metadata["help"]})
            name = f.metadata["also"] or f.name
            shown = metavar(f) if f.metadata["argument"] else f"--{name.replace('_', '-')}"
            lines.append(f"  {shown:<16}{as_flags(f.metadata['help'])}")
        rows.append(row)
    return rows, lines


def _runs(out: Path) -> Listing:
    """Runs, and sweeps, whose own runs `ls runs --out SWEEP` lists."""
    from sparselth.cluster.store import SWEEP, is_sweep
    from sparselth.report.page import fill

    rows, lines = [], []
    for folder in sorted({file.parent for name in ("config.json", SWEEP) for file in out.glob(f"*/{name}")}):
        try:
            row, said = _sweep(folder) if is_sweep(folder) else _run(folder)
        except SparselthError as error:
            lines.append(fill(as_flags(f"{folder}: {error}")))
            continue
        rows.append({"run": str(folder)} | row)
        lines.append(fill(f"{folder}  {said}"))
    return rows, lines or [f"no runs in {out}; `sparselth imp` makes one"]


def _run(folder: Path) -> tuple[dict[str, Any], str]:
    """A run as JSON, and in words."""
    from sparselth.runs import read, reporting

    record = read(folder)
    with reporting(record):
        title = record.config.title
    config, total = record.config, len(record.config.cells())
    state = "finished" if record.complete else f"{len(record.points)} of {total} cells, --resume goes on"
    state += f"; {len(record.diverged)} diverged" if record.diverged else ""
    state += f"; damaged: {record.damage}" * bool(record.damage)
    of = {name: getattr(config, name) for name in ("model", "dataset") if hasattr(config, name)}
    counts = {"cells": total, "finished": len(record.points), "diverged": len(record.diverged)}
    return {"experiment": config.name} | of | counts, f"{title}: {state}"


def _sweep(folder: Path) -> tuple[dict[str, Any], str]:
    """A sweep as JSON, its cells being those of all its runs, and in words."""
    from sparselth.cluster.store import read, recalled_all

    with recalled_all(folder):
        record = read(folder)
        cells = sum(len(run.config.cells()) for run in record.layout.runs)
        points, finished = len(record.points), record.finished
    layout, there = record.layout, record.records.values()
    state = "finished" if record.complete else f"{len(finished)} of {len(layout.runs)} runs finished"
    state += f"; {len(record.failed)} failed" * bool(record.failed)
    state += ", --resume goes on" * bool(record.failed or not record.complete)
    diverged = sum(len(run.diverged) for run in there)
    state += f"; {diverged} diverged" * bool(diverged)
    row = {"experiment": layout.experiment, "axes": layout.axes, "cells": cells}
    row |= {"finished": sum(len(run.points) for run in there), "diverged": diverged}
    over = f"sweep of {layout.experiment} over {', '.join(layout.axes)}, {points} point{'s' * (points != 1)}"
    return row | {"failed": len(record.failed)}, f"{over}: {state}"
