"""An experiment at every point of a grid, computed by an executor.

>>> grid = Grid("imp", {"rate": [0.1, 0.2]}, {"model": "lenet-300-100", "seeds": (0, 1, 2)})
>>> done = sweep(grid, out="runs/rates", executor=Local(2))
>>> print(table(done.record))

Each point is a run folder, its seeds are the replicas of that run. Where there are more workers than points,
the seeds of a point are split into groups, a run each. The folders tell what is done: an executor that was
killed loses what its workers had not yet written, and `resume` goes on with any other.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparselth import signals
from sparselth.cluster.executor import Executor, How, Task
from sparselth.cluster.grid import REPLICAS, Grid, Point, folder_of, groups, of_seeds, spelled
from sparselth.cluster.local import Local
from sparselth.cluster.store import (
    Layout,
    Run,
    SweepRecord,
    complete,
    fail,
    failed,
    forget,
    is_sweep,
    read,
    seal,
)
from sparselth.config import Config
from sparselth.data import Images, resolve
from sparselth.errors import Interrupted, SparselthError
from sparselth.experiments.base import Experiment
from sparselth.experiments.run import check_images, plan
from sparselth.experiments.training import Training
from sparselth.files import checksum, errors_named
from sparselth.lock import locked
from sparselth.machine import choose_device
from sparselth.models import get_model
from sparselth.registry import plugins

GRACE = 15.0  # seconds that runs under way have to save
HEARTBEAT = 20.0  # seconds between words about runs that take long
TRIES = 2  # of a run whose worker died


@dataclass
class Wall:
    """What computing took just now, in seconds."""

    workers: int
    seconds: float = 0.0
    runs: float = 0.0  # of all runs together
    around: float = 0.0  # starting workers, handing out runs, hearing of their ends
    computed: int = 0

    def __str__(self) -> str:
        share = self.around / self.computed if self.computed else 0.0
        return (
            f"{self.seconds:.1f} s for {self.computed} runs of {self.runs:.1f} s together on {self.workers} "
            f"workers; {self.around:.1f} s around them: starting workers, handing out ({share:.2f} s a run)"
        )


@dataclass(frozen=True)
class Swept:
    """What a sweep has come to, and what computing took just now; None where nothing was missing."""

    record: SweepRecord
    wall: Wall | None


@dataclass(frozen=True)
class Planned:
    """What a sweep will do."""

    path: Path
    layout: Layout
    device: str
    workers: int
    missing: list[Run]
    there: list[Run]  # before


def sweep(
    grid: Grid,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    how: How | None = None,
    told: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = warnings.warn,
) -> Swept:
    """Compute what is missing of the runs of a grid in the folder `out`, and read them.

    `out` is runs/ and the sweep's own name unless given; with `resume` an unfinished sweep goes on, one with
    errors tries these again, and one of fewer points, seeds or levels is extended. The executor is this
    machine's unless given; `told` hears a line of each run that ends, `note` what a user must know, such as
    that another data set is taken. A run whose worker died is tried once more. Raises UsageError, before
    anything is written, for what makes no sweep; Interrupted after a signal. Runs with errors and networks
    that diverged are in the record.
    """
    executor, how = executor or Local(), how or How()
    asked: dict[str, Any] = {"out": out, "resume": resume, "executor": executor, "how": how, "told": note}
    planned = plan_sweep(grid, **asked)
    path = planned.path
    with errors_named(path):
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if _there(path) != planned.there:  # another process has had the folder meanwhile
                planned = plan_sweep(grid, **asked)
            planned.layout.write(path)
            wall = Wall(planned.workers)
            if planned.missing:
                _compute(planned, executor, how, wall, told)
            return Swept(read(path), wall if planned.missing else None)


def plan_sweep(
    grid: Grid,
    *,
    out: str | Path | None,
    resume: bool,
    executor: Executor,
    how: How,
    told: Callable[[str], None],
) -> Planned:
    """What `sweep` would do; nothing is written."""
    points = grid.points()
    first = points[0].config
    device = executor.device(first.device)
    workers = executor.workers(device)
    points, even = _pinned(points, device, how, told)
    path = Path(out) if out else _place(grid, points)
    there = _there(path)
    new = _runs(points, even, there, workers)
    axes = {name: [*dict.fromkeys(run.values[name] for run in new)] for name in new[0].values}
    layout = Layout(
        grid.experiment,
        axes,
        dict(grid.settings),
        grid.recipe,
        new,
        [str(file) for file in plugins()],
        {"replicas": how.replicas, "deterministic": how.deterministic},
    )
    missing = [run for run in new if failed(path, run.name) or not complete(path, run)]
    if there and not resume and missing:
        raise SparselthError(
            f"{path}: {len(missing)} of {len(new)} runs are unfinished; add `resume` to go on, or choose "
            "another `out`"
        )
    return Planned(path, layout, device, min(workers, len(missing)) or workers, missing, there)


def _pinned(
    points: Sequence[Point], device: str, how: How, told: Callable[[str], None]
) -> tuple[list[Point], dict[str, dict[str, float]]]:
    """The points with the device and the data set that are taken, and the break-even densities of each.

    What is asked here is the same on all machines; data sets are downloaded before anybody wants them, and
    every point is held against its images.
    """
    found, even = list[Point](), dict[str, dict[str, float]]()
    known, read = dict[Any, tuple[str, dict[str, float]]](), dict[str, Images]()
    for point in points:
        config = point.config
        if isinstance(config, Training):
            config = replace(config, device=device)  # type: ignore[arg-type]
            key: Any = (config.model, config.dataset, config.kernels, config.recipe.batch_size)
        else:
            key = getattr(config, "dataset", ""), config.reads
        if key not in known:
            images, densities = _asked(config, device, how, told)
            if images:
                read.setdefault(images.spec.name, images)
            known[key] = images.spec.name if images else "", densities
        dataset, even[point.name] = known[key]
        if dataset and isinstance(config, Training):
            check_images(config, read[dataset])
        if dataset and hasattr(config, "dataset"):
            named: dict[str, Any] = {"dataset": dataset}
            config = replace(config, **named)
        found.append(replace(point, config=config))
    return found, even


def _asked(
    config: Experiment, device: str, how: How, told: Callable[[str], None]
) -> tuple[Images | None, dict[str, float]]:
    """The data set that is taken, if any, and break-even densities; the plan of a run says them."""
    if isinstance(config, Training) and device == "cuda" and choose_device("auto")[0] != "cuda":
        named = config.dataset or None  # only the workers have GPUs, and no layer is compressed on these
        folder = Path(how.data_dir) if how.data_dir else None
        return resolve(named, folder, told, get_model(config.model).dataset), {}
    planned = plan(config, data_dir=how.data_dir, workers=1, replicas=how.replicas, note=told)
    return planned.images, planned.environment["break_even"]


def _place(grid: Grid, points: Sequence[Point]) -> Path:
    """runs/ and a name of the sweep: its experiment, its axes and what it began with."""
    digest = checksum("\n".join(f"{point.name} {point.config.digest}" for point in points).encode())[:8]
    return Path("runs") / f"sweep-{grid.experiment}-{'-'.join(points[0].values)}-{digest}"


def _there(path: Path) -> list[Run]:
    """The runs of a sweep that was begun; SparselthError where the folder holds something else."""
    if is_sweep(path):
        return Layout.read(path).runs
    if path.exists() and (not path.is_dir() or any(file.name != ".lock" for file in path.iterdir())):
        raise SparselthError(
            f"{path}: expected a sweep or nothing, found something else; choose another `out`"
        )
    return []


def _runs(
    points: Sequence[Point], even: Mapping[str, dict[str, float]], there: Sequence[Run], workers: int
) -> list[Run]:
    """The runs of a sweep: those that are there, and what is new of its points and seeds."""
    before, found = {point.name: list[Run]() for point in points}, list[Run]()
    for run in there:
        if run.point not in before:
            raise SparselthError(
                f"the sweep has the point {run.point} and keeps it; ask for it, too, or choose another `out`"
            )
        before[run.point].append(run)
    each = max(1, workers // len(points))
    for point in points:
        kept, rest = list[Run](), point
        if before[point.name]:
            kept, rest = _going_on(point, before[point.name])
        found += kept
        if rest is None:
            continue
        split = groups(rest, each)
        for one in split:
            name = point.name
            if kept or len(split) > 1:
                name += f",{REPLICAS}={spelled(one.config.seeds)}"  # type: ignore[attr-defined]
            found.append(Run(folder_of(name), point.name, point.values, one.config, even[point.name]))
    return found


def _going_on(point: Point, there: Sequence[Run]) -> tuple[list[Run], Any]:
    """The runs of a point as they go on, and the point with the seeds that these lack, None without any."""
    config, kept = point.config, list[Run]()
    if not isinstance(config, Training):
        (run,) = there
        return [replace(run, config=_extended(run, config))], None
    lacks = dict.fromkeys(config.seeds)
    for run in there:
        if not set(run.config.seeds) <= set(config.seeds):
            raise SparselthError(
                f"{run.name}: has the seeds {spelled(run.config.seeds)} and keeps them; ask for them, too"
            )
        kept.append(replace(run, config=_extended(run, replace(config, seeds=run.config.seeds))))
        for seed in run.config.seeds:
            lacks.pop(seed)
    return kept, of_seeds(point, tuple(lacks)) if lacks else None


def _extended(run: Run, config: Config) -> Config:
    """The configuration of a run as it goes on; SparselthError where that would be another one."""
    config = config.going_on(run.config)
    for name, ours, theirs in config.difference(run.config):
        if name not in config.extends() or not config.keeps(run.config, name):
            raise SparselthError(
                f"{run.name}: was begun with another {name} ({theirs} there, {ours} here); choose another "
                "`out`"
            )
    return config


def _compute(planned: Planned, executor: Executor, how: How, wall: Wall, told: Callable[[str], None]) -> None:
    """Have every run computed that is missing; Interrupted after a signal."""
    path, todo, busy = planned.path, [*planned.missing], dict[str, Run]()
    tries, done, caught = Counter[str](), len(planned.layout.runs) - len(planned.missing), list[str]()
    number, common = len(planned.layout.runs), _common(path, how)
    began = spoke = time.perf_counter()
    for run in todo:
        forget(path, run.name)
    with signals.asked_to_stop(caught.append), executor.crew(planned.device) as crew:
        until = 0.0
        while busy or (todo and not caught):
            while todo and len(busy) < planned.workers and not caught:
                run = todo.pop(0)
                busy[run.name] = run
                tries[run.name] += 1
                crew.start(
                    replace(common, name=run.name, config=run.config.to_json(), break_even=run.break_even)
                )
            for ended in crew.wait(0.25):
                run = busy.pop(ended.name)
                wall.runs, wall.around = wall.runs + ended.seconds, wall.around + ended.around
                wall.computed += 1
                if ended.stopped:
                    continue
                if ended.died and tries[run.name] < TRIES:
                    todo.insert(0, run)
                    told(f"{run.name}: {ended.error}; it is tried once more")
                    continue
                done += 1
                there = _cells(path, run)
                said = f"{there} cell{'s' * (there != 1)} in {ended.seconds:.1f} s on {ended.where}"
                if ended.error:
                    fail(path, ended)
                    said = f"failed: {ended.error}"
                told(f"[{done}/{number}] {run.name}: {said}")
                spoke = time.perf_counter()
            if busy and time.perf_counter() - spoke > HEARTBEAT:
                far = (
                    f"{one.name} {_cells(path, one)} of {len(one.config.cells())}" for one in busy.values()
                )
                told(f"cells: {'; '.join(far)}")
                spoke = time.perf_counter()
            if caught and not until:
                crew.stop()
                until = time.perf_counter() + GRACE
            if until and time.perf_counter() > until:
                break
        wall.seconds = time.perf_counter() - began
    if caught:
        finished = sum(complete(path, run) for run in planned.layout.runs)
        raise Interrupted(
            f"stopped by {caught[0]}; {finished} of {number} runs are finished in {path}, what is under way "
            "is saved; continue with `resume`"
        )


def _common(path: Path, how: How) -> Task:
    """What all tasks have in common."""
    return Task(
        "", str(path.absolute()), seal(path), {}, {}, how, tuple(map(str, plugins())), str(Path.cwd())
    )


def _cells(path: Path, run: Run) -> int:
    """Finished cells of a run, by its lines."""
    try:
        return (path / run.name / "cells.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
