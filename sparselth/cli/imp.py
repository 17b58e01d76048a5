"""`sparselth imp`: flags to a configuration, the plan and its price, the run, its report."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparselth.cli.options import PATH, Names, Numbers, data_dir, output
from sparselth.config import KERNELS, OPTIMIZERS, SCOPES, ImpConfig, Recipe
from sparselth.errors import UsageError
from sparselth.models import get_model

if TYPE_CHECKING:
    from sparselth.data import DatasetSpec, Images
    from sparselth.experiments.workers import Price


@click.command()
@click.option("--model", default="lenet5", show_default=True, help="The network; see `sparselth ls models`.")
@click.option("--dataset", help="The data set; see `sparselth ls datasets`.  [default: the model's]")
@data_dir
@click.option(
    "--seeds", type=Numbers(), default="0-1", show_default=True, help="One network each: 3, 0-4 or 0,2,5."
)
@click.option(
    "--arms",
    type=Names(),
    default="ticket,reinit,random-mask",
    show_default=True,
    help="What is trained under a level's mask; see `sparselth ls arms`.",
)
@click.option(
    "--levels",
    type=int,
    default=10,
    show_default=True,
    help="Turns of train and prune after the dense network.",
)
@click.option(
    "--rate",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of the remaining weights that one level prunes.",
)
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="layer",
    show_default=True,
    help="Rank weights within each layer, at the paper's rates; or all together.",
)
@click.option("--one-shot", is_flag=True, help="Prune the dense network straight to every level.")
@click.option(
    "--rewind", type=int, default=0, show_default=True, help="Step whose weights a ticket goes back to."
)
@click.option(
    "--reinits",
    type=int,
    default=1,
    show_default=True,
    help="Fresh draws per ticket in arms with fresh weights.",
)
@click.option(
    "--recipe",
    type=click.Choice(["short", "paper"]),
    default="short",
    show_default=True,
    help="How each network is trained: within minutes, or as in the 2019 paper.",
)
@click.option("--steps", type=int, help="Training steps of every network.  [default: the recipe's]")
@click.option("--batch-size", type=int, help="Images per step.  [default: the recipe's, 60]")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="[default: the recipe's, adam]")
@click.option("--lr", type=float, help="Learning rate.  [default: the recipe's]")
@click.option("--momentum", type=float, help="Of sgd.  [default: 0.9]")
@click.option("--weight-decay", type=float, help="L2 penalty in the gradient.  [default: 0]")
@click.option("--warmup", type=int, help="Steps over which the learning rate rises to --lr.  [default: 0]")
@click.option(
    "--lr-drops", type=Numbers(), help="Steps at which the learning rate is divided by ten, e.g. 20000,25000."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to train.",
)
@click.option(
    "--kernels",
    type=click.Choice(KERNELS),
    default="auto",
    show_default=True,
    help="What the steps run on: the fastest here, our Triton kernels, or dense torch as the reference.",
)
@click.option(
    "--workers", type=int, help="Worker processes on a CPU, one thread each.  [default: one per core]"
)
@click.option("--out", type=PATH, help="Folder of the run.  [default: runs/MODEL-DATASET-HASH]")
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out, or begin it; flags not given are the run's."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it costs, then stop.")
@output
@click.pass_context
def imp(ctx: click.Context, /, **flags: Any) -> None:
    """Find winning tickets by iterative magnitude pruning, beside their controls.

    Trains the dense network, prunes its smallest weights, rewinds the rest and repeats (Frankle & Carbin
    2019). Each level's ticket is compared with the same mask on fresh weights (reinit) and the same
    weights under a shuffled mask (random-mask). Ends with a table, figures and a folder that `sparselth
    show` reads; a run that was stopped goes on with --resume.

    Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted after saving.
    """
    given = {
        name for name in flags if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    _inherit(flags, given)
    default = get_model(flags["model"]).dataset
    config = _configure(flags, dataset=flags["dataset"] or default, device="cpu")
    config.check()  # before torch and data take their seconds
    workers = flags["workers"]
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: expected 1 or more")
    say = _silent if flags["quiet"] else _say

    say("loading torch and the data ...")
    from sparselth import data, dispatch, machine
    from sparselth.experiments.workers import Pool, available_workers
    from sparselth.runs import open_run, read

    _check_shapes(config.model, data.get_dataset(config.dataset))  # before it is downloaded
    images = data.resolve(flags["dataset"], flags["data_dir"], _say, default)
    _check_shapes(config.model, images.spec)
    device, why = machine.choose_device(flags["device"])
    config = _configure(flags, dataset=images.spec.name, device=device)
    paths = dispatch.choose(config.kernels, device)
    path = flags["out"] or Path("runs") / f"{config.model}-{config.dataset}-{config.digest}"
    workers = 1 if device == "cuda" else workers or available_workers(device)
    environment = machine.environment() | {"dataset": config.dataset, "data_sha256": images.digest}
    environment["break_even"] = {}
    if paths.csr_linear.takes != "none":
        from sparselth.break_even import break_even

        model, batch = get_model(config.model), config.recipe.batch_size
        environment["break_even"] = break_even(model, batch, paths.csr_linear.takes)

    if flags["dry_run"]:
        with Pool(config, images, path, 1, environment["break_even"]) as pool:
            price = pool.price()
        if flags["as_json"]:
            seconds = price.run_seconds(config, set(), workers)
            plan = {"cells": len(config.replicas()), "workers": workers, "seconds": seconds}
            _print_json(
                {"schema": "sparselth.imp-plan/1", "run": str(path), "config": config.to_json(), **plan}
            )
        else:
            _plan(config, images, path, device, why, workers, price, set())
        return
    with open_run(path, config, environment, flags["resume"]) as folder:
        if other := folder.begun_elsewhere(environment):
            _say(
                f"note: {path} was begun on another machine ({other}); new cells may differ in the last bits"
            )
        if len(folder.finished) < len(config.replicas()):
            from sparselth.cli.progress import progress

            with Pool(config, images, path, workers, folder.break_even) as pool:
                price = pool.price()
                if not flags["quiet"]:
                    _plan(config, images, path, device, why, workers, price, folder.finished)
                with progress(config, price, folder.finished, flags["quiet"]) as watcher:
                    pool.run(folder, watcher)
        else:
            say(f"{path}: all {len(folder.finished)} cells are finished; nothing to compute")
        record = read(path)
        if not _drawn(path):
            from sparselth.report.figures import draw

            draw(record, path / "figures")
    from sparselth.cli.show import report

    report(record, flags["as_json"])
    if not flags["as_json"]:
        figures = sorted((path / "figures").glob("*.png"))
        print(f"\nfigures  {path / 'figures'}: {', '.join(file.name for file in figures)}")
        print(f"run      {path}")


def _check_shapes(model: str, dataset: DatasetSpec) -> None:
    expected = get_model(model)
    if dataset.shape != expected.input:
        raise UsageError(
            f"--model {model} takes images of {_shape(expected.input)}, {dataset.name} has "
            f"{_shape(dataset.shape)}; use --dataset {expected.dataset}"
        )


def _drawn(path: Path) -> bool:
    """Whether the figures, of which this one is drawn last, are younger than the cells."""
    last = path / "figures" / "pixels.svg"
    return last.exists() and last.stat().st_mtime_ns > (path / "cells.jsonl").stat().st_mtime_ns


def _inherit(flags: dict[str, Any], given: set[str]) -> None:
    """With --resume, flags that were not given are those of the run in --out."""
    out = flags["out"]
    if not flags["resume"] or out is None or not (out / "config.json").exists():
        return
    from sparselth.runs import read_config

    theirs = read_config(out)
    for name, value in {**vars(theirs), **vars(theirs.recipe)}.items():
        if name in flags and name not in given and name != "recipe":
            flags[name] = value


def _configure(flags: dict[str, Any], dataset: str, device: str) -> ImpConfig:
    model = get_model(flags["model"])
    recipe: Recipe = model.recipes[flags["recipe"]]
    names = ("steps", "lr", "batch_size", "optimizer", "momentum", "weight_decay", "warmup", "lr_drops")
    recipe = replace(recipe, **{name: flags[name] for name in names if flags[name] is not None})
    same = ("seeds", "arms", "levels", "rate", "scope", "one_shot", "rewind", "reinits", "kernels")
    return ImpConfig(
        model=model.name,
        dataset=dataset,
        device=device,  # type: ignore[arg-type]
        recipe=recipe,
        **{name: flags[name] for name in same},
    )


def _plan(
    config: ImpConfig,
    images: Images,
    path: Path,
    device: str,
    why: str,
    workers: int,
    price: Price,
    finished: set[Any],
) -> None:
    """The first screen: what will be done and what it costs."""
    from sparselth.cli.progress import duration
    from sparselth.pruning import ladder

    model, recipe = get_model(config.model), config.recipe
    rungs = [
        sum(r.values()) / model.prunable for r in ladder(model, config.levels, config.rate, config.scope)
    ]
    shown = rungs if len(rungs) <= 12 else [*rungs[:4], *rungs[-2:]]
    steps = [f"{100 * rung:.1f}" for rung in shown]
    if len(shown) < len(rungs):
        steps.insert(4, "...")
    how = "one-shot" if config.one_shot else "iterative"
    scales = sorted({s.rate_scale for s in model.weights if not s.output} - {1.0})
    slower = "".join(f", convolutions at {scale:g} of it" for scale in scales)
    scope = f"by layer, the output layer at half the rate{slower}"
    if config.scope == "global":
        scope = "over all layers"
    cells = len(config.replicas())
    first, *_, last = price.step_seconds
    step = f"{1e3 * first:.2f} ms a step" + (f", {1e3 * last:.2f} at the last level" if last < first else "")
    rate = f"lr {recipe.lr:g}" + (f", warm-up {recipe.warmup:,}" if recipe.warmup else "")
    rate += f", a tenth from {', '.join(f'{s:,}' for s in recipe.lr_drops)}" if recipe.lr_drops else ""
    place = f"{workers} workers, one thread each" if device == "cpu" else "one worker"
    seconds = price.run_seconds(config, finished, workers)
    rows = {
        "model": f"{model.name}, {model.prunable:,} prunable weights",
        "data": f"{images.spec.title} from {images.source}",
        "levels": f"{config.levels}, {how} at rate {config.rate:g} {scope}: {' '.join(steps)} % left",
        "arms": f"{', '.join(config.arms)}; seeds {', '.join(map(str, config.seeds))}"
        + (f"; {config.reinits} fresh draws" if config.reinits > 1 else "")
        + f"; {cells} cells"
        + (f", {len(finished)} of them finished" if finished else ""),
        "training": f"{recipe.steps:,} steps of {recipe.batch_size} with {recipe.optimizer}, {rate}"
        + (f"; rewind to step {config.rewind:,}" if config.rewind else ""),
        "device": f"{device} ({why}), {place}",
        "price": f"about {duration(seconds)} ({step}), "
        f"{workers * price.worker_bytes / 1e9 + 0.2:.1f} GB of memory",
        "folder": str(path),
    }
    for name, text in rows.items():
        print(f"{name:<9}{text}", file=sys.stderr)
    sys.stderr.flush()


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))
