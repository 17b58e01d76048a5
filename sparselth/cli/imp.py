"""`sparselth imp`: flags to a configuration, the plan and its price, the run, its report."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparselth.cli.options import PATH, Names, Numbers, data_dir, output
from sparselth.config import KERNELS, OPTIMIZERS, SCOPES, ImpConfig, Recipe, Replica
from sparselth.errors import UsageError
from sparselth.models import get_model

if TYPE_CHECKING:
    from sparselth.data import DatasetSpec, Images
    from sparselth.experiments.price import Price

LONG_SECONDS = 60  # from this predicted time on a run is compared with the usual loop


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
@click.option(
    "--replicas",
    type=int,
    help="Networks that a worker trains as one batch, at most.  [default: on a CPU 1, on CUDA what fits]",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="The same bits whoever trains beside a network: on CUDA our kernels alone; on a CPU always so.",
)
@click.option("--out", type=PATH, help="Folder of the run.  [default: runs/MODEL-DATASET-HASH]")
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out, or begin it; flags not given are the run's."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it costs, then stop.")
@click.option(
    "--price-on",
    metavar="DEVICE",
    help="With --dry-run: the price on a device with recorded results too, e.g. h200.",
)
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
    for flag in ("workers", "replicas"):
        if flags[flag] is not None and flags[flag] < 1:
            raise UsageError(f"--{flag} {flags[flag]}: expected 1 or more")
    if flags["price_on"] and not flags["dry_run"]:
        raise UsageError("--price-on: prices a plan that is not run; add --dry-run")
    say = _silent if flags["quiet"] else _say

    say("loading torch and the data ...")
    import time

    from sparselth import data, machine
    from sparselth.engine.paths import choose
    from sparselth.experiments.pool import Pool, available_workers
    from sparselth.experiments.price import recorded, widest
    from sparselth.runs import open_run, read

    _check_shapes(config.model, data.get_dataset(config.dataset))  # before it is downloaded
    images = data.resolve(flags["dataset"], flags["data_dir"], _say, default)
    _check_shapes(config.model, images.spec)
    device, why = machine.choose_device(flags["device"])
    if flags["deterministic"] and device == "cuda":
        flags["kernels"] = "triton"
    config = _configure(flags, dataset=images.spec.name, device=device)
    paths = choose(config.kernels, device)
    path = flags["out"] or Path("runs") / f"{config.model}-{config.dataset}-{config.digest}"
    workers = 1 if device == "cuda" else workers or available_workers(device)
    environment = machine.environment() | {"dataset": config.dataset, "data_sha256": images.digest}
    environment["break_even"] = {}
    if paths.csr_linear.takes != "none":
        from sparselth.engine.break_even import break_even

        model, batch = get_model(config.model), config.recipe.batch_size
        environment["break_even"] = break_even(model, batch, paths.csr_linear.takes)

    limit = min(flags["replicas"] or (widest(config) if device == "cuda" else 1), widest(config))
    plan = _Plan(config, images, path, device, why, workers, limit)
    if flags["dry_run"]:
        there = recorded(flags["price_on"], config) if flags["price_on"] else None
        with Pool(config, images, path, 1, environment["break_even"]) as pool:
            price, plan.limit = pool.price(limit)
        if flags["as_json"]:
            _print_json({"schema": "sparselth.imp-plan/1"} | plan.to_json(price, there))
        else:
            plan.say(price, set(), there)
        return
    with open_run(path, config, environment, flags["resume"]) as folder:
        if other := folder.begun_elsewhere(environment):
            _say(
                f"note: {path} was begun on another machine ({other}); new cells may differ in the last bits"
            )
        wall: dict[str, Any] | None = None
        if len(folder.finished) < len(config.replicas()):
            from sparselth.cli.progress import progress

            with Pool(config, images, path, workers, folder.break_even) as pool:
                price, plan.limit = pool.price(limit)
                if not flags["quiet"]:
                    plan.say(price, folder.finished)
                seconds = price.run_seconds(config, folder.finished, workers, plan.limit)
                usual = _usual(config, images, folder.finished) if seconds > LONG_SECONDS else None
                began = time.perf_counter()
                with progress(config, price, folder.finished, flags["quiet"]) as watcher:
                    pool.run(folder, watcher, plan.limit)
                if usual:
                    wall = {"seconds": time.perf_counter() - began, "workers": workers} | usual
        else:
            say(f"{path}: all {len(folder.finished)} cells are finished; nothing to compute")
        record = read(path)
        if not _drawn(path):
            from sparselth.report.figures import draw

            draw(record, path / "figures")
    from sparselth.cli.show import report

    report(record, flags["as_json"], wall)
    if not flags["as_json"]:
        figures = sorted((path / "figures").glob("*.png"))
        print(f"\nfigures  {path / 'figures'}: {', '.join(file.name for file in figures)}")
        if wall:
            print(f"wall     {_compared(wall)}")
        print(f"run      {path}")


def _usual(config: ImpConfig, images: Images, finished: set[Replica]) -> dict[str, Any] | None:
    """What the cells that are missing would take the usual way, from a sample of two seconds."""
    try:
        from sparselth.measure import usual

        found = usual.sample(config, images)
    except (ImportError, RuntimeError):  # a torchvision that does not fit this torch
        return None
    cells = [who for who in config.replicas() if who not in finished]
    training, evaluating = found.run_seconds(config, images, cells)
    return {
        "cells": len(cells),
        "usual_training_seconds": training,
        "usual_evaluation_seconds": evaluating,
        "usual_steps_timed": found.steps,
        "usual_threads": found.threads,
    }


def _compared(wall: dict[str, Any]) -> str:
    """The run's wall time beside the usual loop's."""
    from sparselth.cli.progress import duration

    training, evaluating = wall["usual_training_seconds"], wall["usual_evaluation_seconds"]
    times, threads = (training + evaluating) / wall["seconds"], wall["usual_threads"]
    return (
        f"{duration(wall['seconds'])} for {wall['cells']} networks on {wall['workers']} workers. One after "
        f"another by the usual loop\n         (DataLoader, autograd, torch.optim): training "
        f"{duration(training)}, evaluation {duration(evaluating)}, {times:.0f} times as long;\n         "
        f"extrapolated from {wall['usual_steps_timed']} steps on {threads} thread{'s' * (threads > 1)}"
    )


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


@dataclass
class _Plan:
    """The first screen: what will be done and what it costs."""

    config: ImpConfig
    images: Images
    path: Path
    device: str
    why: str
    workers: int
    limit: int  # networks in a batch

    def to_json(self, price: Price, other: tuple[str, Price] | None) -> dict[str, Any]:
        config, workers = self.config, self.workers
        found = {
            "run": str(self.path),
            "config": config.to_json(),
            "cells": len(config.replicas()),
            "workers": workers,
            "replicas": self.limit,
            "seconds": price.run_seconds(config, (), workers, self.limit),
            "bytes": price.run_bytes(config, workers, self.limit),
        }
        if other:
            name, there = other
            seconds, size = there.run_seconds(config, (), 1, 10**9), there.run_bytes(config, 1, 10**9)
            found["price_on"] = {"device": name, "seconds": seconds, "bytes": size}
        return found

    def say(self, price: Price, finished: set[Replica], other: tuple[str, Price] | None = None) -> None:
        from sparselth.cli.progress import duration
        from sparselth.experiments.price import widest

        config, device, workers, limit = self.config, self.device, self.workers, self.limit
        model, recipe = get_model(config.model), config.recipe
        place = f"{workers} workers, one thread each" if device == "cpu" else "one worker"
        together = widest(config)
        batches = f"up to {limit} networks at once, of {together} that could run side by side"
        first, last = (1e3 * price.batches[1] * price.levels[level] for level in (0, -1))
        step = f"{first:.2f} ms a step" + (f", {last:.2f} at the last level" if last < first else "")
        if limit > 1 and limit in price.batches:
            step += f", {1e3 * price.batches[limit]:.2f} of {limit}"
        seconds, size = (
            price.run_seconds(config, finished, workers, limit),
            price.run_bytes(config, workers, limit),
        )
        rate = f"lr {recipe.lr:g}" + (f", warm-up {recipe.warmup:,}" if recipe.warmup else "")
        rate += f", a tenth from {', '.join(f'{s:,}' for s in recipe.lr_drops)}" if recipe.lr_drops else ""
        rows = {
            "model": f"{model.name}, {model.params.prunable:,} prunable weights",
            "data": f"{self.images.spec.title} from {self.images.source}",
            "levels": _levels(config),
            "arms": f"{', '.join(config.arms)}; seeds {', '.join(map(str, config.seeds))}"
            + (f"; {config.reinits} fresh draws" if config.reinits > 1 else "")
            + f"; {len(config.replicas())} cells"
            + (f", {len(finished)} of them finished" if finished else ""),
            "training": f"{recipe.steps:,} steps of {recipe.batch_size} with {recipe.optimizer}, {rate}"
            + (f"; rewind to step {config.rewind:,}" if config.rewind else ""),
            "device": f"{device} ({self.why}), {place}",
            **({"batches": batches} if limit > 1 or device == "cuda" else {}),
            "price": f"about {duration(seconds)} ({step}), {size / 1e9 + 0.2:.1f} GB of memory",
        }
        if other:
            name, there = other
            seconds, size = there.run_seconds(config, finished, 1, 10**9), there.run_bytes(config, 1, 10**9)
            rows["there"] = (
                f"about {duration(seconds)} on {name}, up to {together} networks at once, "
                f"{size / 1e9:.1f} GB; from recorded steps"
            )
        for name, text in (rows | {"folder": str(self.path)}).items():
            print(f"{name:<9}{text}", file=sys.stderr)
        sys.stderr.flush()


def _levels(config: ImpConfig) -> str:
    from sparselth.pruning import ladder

    model = get_model(config.model)
    rungs = [
        sum(r.values()) / model.params.prunable
        for r in ladder(model.params, config.levels, config.rate, config.scope)
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
    return f"{config.levels}, {how} at rate {config.rate:g} {scope}: {' '.join(steps)} % left"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))
