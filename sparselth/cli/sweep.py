"""`sparselth sweep NAME`: an experiment at every point of a grid."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import click

from sparselth.cli.experiment import DIVERGED, EXIT_CODES, parameters, usual
from sparselth.cli.options import PATH, as_flags, flag
from sparselth.config import EXPERIMENTS, Recipe
from sparselth.errors import Interrupted, SparselthError, UsageError
from sparselth.experiments.base import Experiment, get_experiment
from sparselth.experiments.training import Training, settings_of
from sparselth.machine import check_torch
from sparselth.signals import name_of

if TYPE_CHECKING:
    from sparselth.cluster.executor import Executor
    from sparselth.cluster.grid import Grid
    from sparselth.cluster.price import Cost
    from sparselth.cluster.sweep import Planned

# of a run that are no flags of a sweep, or other ones
OTHERS = ("workers", "split", "out", "resume", "dry_run", "price_on", "grid")


class SweepGroup(click.Group):
    """A command for every experiment, made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*EXPERIMENTS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        return command(get_experiment(cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        helps = {name: (found.__doc__ or "").partition("\n")[0] for name, found in EXPERIMENTS.items()}
        with formatter.section("Experiments"):
            formatter.write_dl(list(helps.items()))


@click.group(cls=SweepGroup, subcommand_metavar="NAME --grid SETTING=VALUE,VALUE [FLAGS OF NAME]")
def sweep() -> None:
    """Run an experiment at every point of a grid of its settings, on this machine or a Ray cluster.

    Each --grid is an axis; every combination of values is a point, a run folder with all seeds. The folders
    tell what is done: whoever computes them may be stopped or killed, and --resume goes on. Ends with a
    table, a figure and the best point by a test over the seeds.
    """


def command(experiment: type[Experiment]) -> click.Command:
    """`sweep NAME`: the flags of the experiment, and those of the sweep."""

    @click.pass_context
    def call(ctx: click.Context, /, **flags: Any) -> int:
        source = click.core.ParameterSource.COMMANDLINE
        return _main(experiment, flags, {name for name in flags if ctx.get_parameter_source(name) is source})

    theirs = [param for param in parameters(experiment) if param.name not in OTHERS]
    text = f"`{experiment.name}` at every point of a grid.\n\n{EXIT_CODES}"
    return click.Command(experiment.name, callback=call, params=[*_own(), *theirs], help=text)


def _own() -> Iterator[click.Option]:
    yield click.Option(
        ["--grid", "axes"],
        multiple=True,
        metavar="SETTING=VALUES",
        help="An axis: any setting of the experiment and its values, rate=0.1,0.2; of a setting that takes "
        "several, with semicolons: arms='ticket;ticket,reinit'.",
    )
    yield click.Option(
        ["--executor"],
        type=click.Choice(("local", "ray")),
        default="local",
        show_default=True,
        help="Who computes the runs: processes of this machine, one a core or a GPU; or actors of Ray.",
    )
    yield click.Option(
        ["--address"],
        default="",
        help="Of --executor ray: auto, the cluster of this machine, or HOST:PORT.  [default: $RAY_ADDRESS, "
        "or Ray is started here]",
    )
    yield click.Option(
        ["--workers"], type=int, help="Runs that are computed at once.  [default: one a core or a GPU]"
    )
    yield click.Option(
        ["--out"], type=PATH, help="Folder of the sweep.  [default: runs/sweep-NAME-AXES-HASH]"
    )
    yield click.Option(
        ["--resume"],
        is_flag=True,
        help="Go on with the sweep in --out, or begin it, and try again what failed; flags not given are the "
        "sweep's.",
    )
    yield click.Option(
        ["--dry-run"], is_flag=True, help="Say what would be done and what all runs cost together, then stop."
    )


def _main(experiment: type[Experiment], flags: dict[str, Any], given: set[str]) -> int:
    from sparselth.cli.show import show_sweep
    from sparselth.report.page import fill

    try:
        with redirect_stdout(sys.stderr):  # what a user's network prints is no result
            grid = _grid(experiment, flags, given)
            check_torch()
            grid.points()  # before torch and data take their seconds
            if not flags["quiet"]:
                _say("loading torch and the data ...")
            from sparselth.cluster import price
            from sparselth.cluster.executor import How
            from sparselth.cluster.sweep import plan_sweep
            from sparselth.cluster.sweep import sweep as run

            folder = flags.get("data_dir")
            how = How(
                str(folder.absolute()) if folder else None,
                flags.get("replicas"),
                bool(flags.get("deterministic")),
            )
            common: dict[str, Any] = {"out": flags["out"], "resume": flags["resume"], "how": how}
            common["executor"] = _executor(flags)
            if flags["dry_run"]:
                planned = plan_sweep(grid, **common, told=_say)
                cost = price.cost(planned, how)
            else:
                told = (lambda text: None) if flags["quiet"] else _say
                done = run(grid, **common, told=told, note=_say)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped by {name_of(stop)} before anything was computed") from None
    if flags["dry_run"]:
        _plan(planned, common["executor"], cost, flags["as_json"])
        return 0
    record, wall = done.record, done.wall
    show_sweep(record.path, flags["as_json"], vars(wall) if wall else None)
    if not flags["as_json"]:
        if wall:
            print(fill(str(wall), " " * 9, "wall     "))
        print(f"sweep    {record.path}")
    if record.failed:
        first, why = next(iter(record.failed.items()))
        raise SparselthError(
            f"{len(record.failed)} of {len(record.layout.runs)} runs failed ({first}: {why}); `resume` tries "
            "them again"
        )
    return DIVERGED if record.diverged else 0


def _grid(experiment: type[Experiment], flags: dict[str, Any], given: set[str]) -> Grid:
    """What is swept: what was given, with --resume over what the sweep in --out was begun with.

    Of `flags` that were not given, those of `How` become that sweep's.
    """
    from sparselth.cluster.grid import Grid
    from sparselth.cluster.store import Layout, is_sweep

    axes = {name: values for text in flags["axes"] for name, values in [axis(experiment, text)]}
    if len(axes) < len(flags["axes"]):
        raise UsageError("`grid`: an axis is given twice; expected its values in one")
    out, theirs, before = flags["out"], None, dict(flags)
    if flags["resume"] and out is not None and is_sweep(out):
        theirs = Layout.read(out)
    if theirs is None:
        usual(experiment, flags, given | {*axes})
    settings = {
        name: flags[name]
        for name in settings_of(experiment)
        if name in flags and (name in given or flags[name] != before[name])
    }
    recipe = flags["recipe"] if "recipe" in given else ""
    if theirs is not None and theirs.experiment == experiment.name:
        flags.update({name: theirs.how[name] for name in theirs.how.keys() & flags.keys() - given})
        axes = theirs.axes | axes
        settings = theirs.settings | settings
        recipe = recipe or theirs.recipe
    return Grid(experiment.name, axes, settings, recipe)


def axis(experiment: type[Experiment], text: str) -> tuple[str, list[Any]]:
    """`rate=0.1,0.2` as a setting and its values, each as its flag takes it."""
    from sparselth.cluster.grid import axis as named

    word, equals, values = text.partition("=")
    if not equals or not word or not values:
        raise UsageError(f"`grid` {text!s:.60}: expected a setting and its values, such as rate=0.1,0.2")
    name = named(experiment, word.strip())
    kinds = get_type_hints(experiment)
    if issubclass(experiment, Training):
        kinds = get_type_hints(Recipe) | kinds
    of, kind = settings_of(experiment)[name], kinds[name]
    option = flag(of, kind, recipes=name not in {f.name for f in fields(experiment)})
    several = any(get_origin(one) is tuple for one in (kind, *get_args(kind)))
    taken = click.BOOL if option.is_flag else option.type
    try:
        return name, [taken.convert(one.strip(), None, None) for one in values.split(";" if several else ",")]
    except click.UsageError as error:
        raise UsageError(f"`grid` {word}: {error.message}") from None


def _executor(flags: dict[str, Any]) -> Executor:
    if flags["executor"] == "ray":
        from sparselth.cluster.ray_core import Ray

        return Ray(flags["workers"], flags["address"])
    from sparselth.cluster.local import Local

    if flags["address"]:
        raise UsageError("`address`: has no effect with `executor` local; add `executor` ray")
    return Local(flags["workers"])


def _plan(planned: Planned, executor: Executor, cost: Cost | None, as_json: bool) -> None:
    """What would be done and what it takes; on stdout as JSON, else on stderr."""
    from sparselth.cli.progress import duration
    from sparselth.report.page import fill

    layout, runs = planned.layout, planned.missing
    cells = sum(len(run.config.cells()) for run in layout.runs)
    document = {
        "schema": "sparselth.sweep-plan/1",
        "sweep": str(planned.path),
        "experiment": layout.experiment,
        "axes": layout.axes,
        "runs": [
            {"run": run.name, "point": run.point, "config": run.config.to_json()} for run in layout.runs
        ],
        "missing": [run.name for run in runs],
        "cells": cells,
        "executor": executor.name,
        "device": planned.device,
        "workers": planned.workers,
        "price": cost and vars(cost) | {"together": cost.together},
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return
    points = {run.point: None for run in layout.runs}
    rows = {
        "sweep": f"{layout.experiment} over {', '.join(layout.axes)}: {len(points)} points",
        "points": "; ".join([*points][:8]) + ("; ..." if len(points) > 8 else ""),
        "runs": f"{len(layout.runs)}, {cells:,} cells; {len(runs)} runs are missing",
        "executor": f"{executor.name}, {planned.workers} at once, each on {planned.device}",
    }
    if runs:
        rows["price"] = "not known: nothing of it was timed on such a device, or the experiment has no price"
    if runs and cost:
        rows["price"] = f"about {duration(cost.wall)} on {planned.workers} workers"
        if cost.slowdown > 1:
            rows["price"] += f", {duration(cost.wall / cost.slowdown)} without others here"
        longest = duration(max(cost.runs.values()))
        rows["price"] += f"; all runs together {duration(cost.together)}, the longest {longest}"
    for name, text in (rows | {"folder": str(planned.path)}).items():
        print(fill(text, " " * 9, f"{name:<9}"), file=sys.stderr)


def _say(text: str) -> None:
    print(as_flags(text), file=sys.stderr, flush=True)
