"""The command of an experiment: its flags to a configuration, and what `run` did, printed."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TextIO, get_type_hints

import click

from sparselth import user_files
from sparselth.cli.options import PATH, argument, as_flags, data_dir, flag, metavar, output
from sparselth.cluster import torchrun
from sparselth.config import Recipe
from sparselth.errors import Interrupted, UsageError
from sparselth.experiments.base import Experiment
from sparselth.experiments.training import Training, configured, settings_of
from sparselth.machine import check_torch
from sparselth.signals import name_of

if TYPE_CHECKING:
    from sparselth.cli.screen import Screen
    from sparselth.experiments.plan import Plan
    from sparselth.experiments.price import Price
    from sparselth.runs import RunRecord

DIVERGED = 3
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 usage, 3 a network diverged, 130 interrupted after saving."
MACHINE = ("device", "kernels")  # flags of these fields come after what is trained


def command(experiment: type[Experiment]) -> click.Command:
    """The command of an experiment, with a flag for every field that has a help."""

    @click.pass_context
    def call(ctx: click.Context, /, **flags: Any) -> int:
        torchrun.join(ctx.obj)
        source = click.core.ParameterSource.COMMANDLINE
        return _main(experiment, flags, {name for name in flags if ctx.get_parameter_source(name) is source})

    text = f"{as_flags(inspect.cleandoc(experiment.__doc__ or ''))}\n\n{EXIT_CODES}"
    return click.Command(experiment.name, callback=call, params=[*parameters(experiment)], help=text)


def parameters(experiment: type[Experiment]) -> Iterator[click.Parameter]:
    """A flag for every setting, then those of the run."""
    kinds, trains = get_type_hints(experiment), issubclass(experiment, Training)
    own_names, settings = {f.name for f in fields(experiment)}, settings_of(experiment)
    named = [f for name, f in settings.items() if name in own_names]
    yield from (argument(f) for f in named if f.metadata["argument"])
    own = [f for f in named if not f.metadata["argument"]]
    for f in own:
        if f.name not in MACHINE:
            yield flag(f, kinds[f.name])
        if f.name == "dataset":
            yield _option(data_dir)
    if "dataset" in kinds and not any(f.name == "dataset" for f in own):  # that of the run it reads
        yield _option(data_dir)
    if issubclass(experiment, Training):
        yield click.Option(
            ["--recipe"],
            type=click.Choice(experiment.recipe_names),
            default=experiment.recipe_names[0],
            show_default=True,
            help=experiment.recipe_help,
        )
        kinds |= get_type_hints(Recipe)
        more = [f for name, f in settings.items() if name not in own_names]
        yield from (flag(f, kinds[f.name], recipes=True) for f in more)
    yield from (flag(f, kinds[f.name]) for f in own if f.name in MACHINE)
    yield click.Option(
        ["--workers"],
        type=int,
        help="Worker processes on a CPU, one thread each; of each rank under torchrun.  "
        "[default: one per core]",
    )
    if trains:
        yield click.Option(
            ["--replicas"],
            type=int,
            help="Networks that a worker trains as one batch, at most.  "
            "[default: on a CPU 1, on CUDA what fits]",
        )
        yield click.Option(
            ["--deterministic"],
            is_flag=True,
            help="The same bits whoever trains beside a network: on CUDA our kernels alone, modules of "
            "torch's one by one; on a CPU so unless --replicas is given.",
        )
    if issubclass(experiment, Training) and experiment.compute is Training.compute:
        yield click.Option(
            ["--split"],
            type=int,
            default=1,
            metavar="N",
            help="Let N workers train each network together, every batch split over them (DDP), where one "
            "network fills more than a device; see docs/clusters.md.",
        )
    words = [] if experiment.name == "imp" else [experiment.name]
    words += [metavar(f) for f in named if f.metadata["argument"]]
    words += ["model", "dataset", "hash"] if trains else ["hash"]
    folder = "-".join(words).upper()
    yield click.Option(["--out"], type=PATH, help=f"Folder of the run.  [default: runs/{folder}]")
    yield click.Option(
        ["--resume"],
        is_flag=True,
        help="Go on with the run in --out, or begin it; flags not given are the run's.",
    )
    yield click.Option(
        ["--dry-run"], is_flag=True, help="Say what would be done and what it costs, then stop."
    )
    if trains:
        yield click.Option(
            ["--price-on"],
            metavar="DEVICE",
            help="With --dry-run: the price on a device with recorded results too, e.g. h200; or of imp by a "
            "model on GPUs that are not here, e.g. 8xh100 (a100, h100 or h200), with all that it assumes.",
        )
    yield from output(click.command()(lambda: None)).params


def _option(decorator: Any) -> click.Parameter:
    (param,) = decorator(click.command()(lambda: None)).params
    assert isinstance(param, click.Parameter)
    return param


def _main(experiment: type[Experiment], flags: dict[str, Any], given: set[str]) -> int:
    try:
        results = sys.stdout
        with redirect_stdout(sys.stderr):  # what a user's network prints is no result
            done = _done(experiment, flags, given, results)
    except KeyboardInterrupt as stop:
        kept = "; a dry run keeps nothing" if flags["dry_run"] else " before anything was computed"
        raise Interrupted(f"stopped by {name_of(stop)}{kept}") from None
    if done is None:
        return 0
    record, screen = done
    from sparselth.cli.show import report
    from sparselth.report.diverged import said
    from sparselth.report.page import fill

    report(record, flags["as_json"], screen.wall)
    if not flags["as_json"]:
        folder = record.path / "figures"
        figures = ", ".join(file.name for file in sorted(folder.glob("*.png")))
        print("\n" + fill(f"{folder}: {figures}", " " * 9, "figures  ") if figures else "")
        if screen.wall:
            print(screen.compared())
        print(f"run      {record.path}")
    if not record.diverged:
        return 0
    _say(f"sparselth: {'; '.join(said(record))}")
    return DIVERGED


def _done(
    experiment: type[Experiment], flags: dict[str, Any], given: set[str], results: TextIO
) -> tuple[RunRecord, Screen] | None:
    """What the run found, and who was told of it; None after --dry-run, printed as `results`."""
    usual(experiment, flags, given)
    _inherit(experiment, flags, given)
    config = configured(experiment, flags, flags.get("recipe", ""))
    check_torch()
    if not flags["quiet"] and user_files.is_file(str(flags.get("dataset"))):
        from sparselth.data import own

        own.progress = lambda name, done, samples: _say(f"reading {name}: {done:,} of {samples:,} samples")
    config.check()  # before torch and data take their seconds
    if flags.get("data_dir"):
        from sparselth import data

        data.data_dir(flags["data_dir"])
    other_device = flags.get("price_on")
    if other_device and not flags["dry_run"]:
        raise UsageError("`price_on`: prices a plan that is not run; add `dry_run`")
    if not flags["quiet"]:
        _say("loading torch and the data ...")

    from sparselth.cli.screen import Screen, cost_json, plan_json, say_cost, say_plan
    from sparselth.experiments.cost import gpus_named, modelled
    from sparselth.experiments.run import plan, priced, run

    gpus = gpus_named(other_device) if other_device else None
    if gpus is not None:
        assert isinstance(config, Training)
        cost = modelled(config, *gpus)
        if flags["as_json"]:
            _print_plan(experiment, cost_json(config, cost), results)
        else:
            say_cost(config, cost)
        return None
    names = ("out", "data_dir", "workers", "replicas", "deterministic", "split")
    arguments = {name: flags[name] for name in names if name in flags}
    if flags["dry_run"]:
        planned = plan(config, **arguments, note=_say)
        there = _there(planned, other_device) if other_device else None
        planned = priced(planned)
        if flags["as_json"]:
            _print_plan(experiment, plan_json(planned, there), results)
        else:
            say_plan(planned, there)
        return None
    screen = Screen(flags["quiet"])
    return run(config, **arguments, resume=flags["resume"], watcher=screen), screen


def _print_plan(experiment: type[Experiment], document: dict[str, Any], results: TextIO) -> None:
    print(json.dumps({"schema": f"sparselth.{experiment.name}-plan/1"} | document, indent=2), file=results)


def usual(experiment: type[Experiment], flags: dict[str, Any], given: set[str]) -> None:
    """Where a data set is named and no model, what is not given is as it is usual for that data set.

    Not where it is as in another run; and a value that is no such thing here, as where levels are listed, is
    not taken.
    """
    from sparselth.experiments.source import FromRun

    name = flags.get("dataset")
    if not issubclass(experiment, Training) or issubclass(experiment, FromRun):
        return
    if not name or "model" in given or user_files.is_file(name):
        return
    from sparselth.data import DATASETS

    usual = DATASETS[name].usual if name in DATASETS else {}
    same = {field: value for field, value in usual.items() if type(flags.get(field)) is type(value)}
    flags.update({field: value for field, value in same.items() if field not in given})


def _inherit(experiment: type[Experiment], flags: dict[str, Any], given: set[str]) -> None:
    """With --resume, flags that were not given are those of the run in --out."""
    out = flags["out"]
    if not flags["resume"] or out is None or not (out / "config.json").exists():
        return
    from sparselth.runs import read_config

    theirs = read_config(out)
    if not isinstance(theirs, experiment):
        return
    values = dict(vars(theirs))
    values = vars(values.pop("recipe")) | values if isinstance(theirs, Training) else values
    for name, value in values.items():
        if name in flags and name not in given:
            flags[name] = value


def _there(plan: Plan, device: str) -> tuple[str, Price]:
    from sparselth.experiments.price import recorded

    assert isinstance(plan.config, Training)
    return recorded(device, plan.config)


def _say(text: str) -> None:
    print(as_flags(text), file=sys.stderr, flush=True)
