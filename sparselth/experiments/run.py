"""Run an experiment: what `sparselth NAME` does between its flags and what it prints.

>>> config = ImpConfig(model="lenet-300-100", dataset="mnist5k", seeds=(0,), levels=3)
>>> record = run(config, out="runs/mine", resume=True)
>>> print(config.table(record))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sparselth import data, machine, runs
from sparselth.cluster import torchrun
from sparselth.data import DatasetSpec
from sparselth.data.sets import check_batch, check_model
from sparselth.engine.autograd import takes_autograd
from sparselth.engine.paths import choose
from sparselth.errors import SparselthError, UsageError, check_number
from sparselth.experiments.agenda import widest
from sparselth.experiments.base import Experiment
from sparselth.experiments.plan import Plan, Watcher
from sparselth.experiments.pool import Pool, available_workers, stopped
from sparselth.experiments.price import replica_bytes
from sparselth.experiments.ranks import Ranks
from sparselth.experiments.training import Training, evaluated_images
from sparselth.models import get_model
from sparselth.models.module import EXAMPLES, ModuleModel
from sparselth.models.remembered import words
from sparselth.registry import plugins
from sparselth.signals import name_of

MOST_REPLICAS = 100_000


def plan(
    config: Experiment,
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    workers: int | None = None,
    replicas: int | None = None,
    deterministic: bool = False,
    split: int = 1,
    note: Callable[[str], None] = warnings.warn,
) -> Plan:
    """What `run` would do, not priced yet; nothing is written. Arguments are as there."""
    config.check()
    check_number("workers", workers, 1, most_workers(), "four a core")
    check_number("replicas", replicas, 1, MOST_REPLICAS)
    _check_split(config, split, replicas)
    environment = machine.environment()
    images, why, even = None, "nothing in it is for a GPU", dict[str, float]()
    if isinstance(config, Training):
        model = get_model(config.model)
        named = config.dataset or None
        device, why = machine.choose_device(config.device)
        found: dict[str, Any] = {"device": device}
        config = replace(config, **found)
        if not (spec := data.get_dataset(named or model.dataset)).pictures:  # whose folder tells their number
            _check_fit(config, spec)  # before it is downloaded
        images = data.resolve(named, Path(data_dir) if data_dir else None, note, model.dataset)
        check_images(config, images)
        model = model.on(images.spec)
        if isinstance(model, ModuleModel):
            environment["network"] = words(model)
        kernels = config.kernels
        if images.root is not None:
            kernels = _of_files(config, images.spec.name)
        elif split > 1:
            kernels = "autograd"
        elif deterministic and device == "cuda" and not config.autograd:
            kernels = "triton"
        most = config.eval_images
        if most is None:
            most = evaluated_images(config.recipe, images.spec)
        elif most >= max(images.spec.n_validation, images.spec.n_test):
            most = 0
        found = {"dataset": images.spec.name, "kernels": kernels}
        config = replace(config, **found, eval_images=most)
        environment |= {"dataset": config.dataset, "data_sha256": images.digest}
        environment["test_images"] = images.spec.n_test
        paths = choose(kernels, device)
        if paths.csr_linear.takes != "none" and not takes_autograd(model, paths):
            from sparselth.engine.break_even import break_even

            even = break_even(model, config.recipe.batch_size, paths.csr_linear.takes)
    elif config.reads:
        named = getattr(config, "dataset", None) or None
        images = data.resolve(named, Path(data_dir) if data_dir else None, note, config.reads)
        found = {"dataset": images.spec.name}
        config = replace(config, **found)
        environment |= found | {"data_sha256": images.digest}
    environment["break_even"] = even
    if plugins():
        environment["plugins"] = [str(file) for file in plugins()]
    together, cuda = widest(config), config.device == "cuda"
    group = torchrun.joined()
    ranks = group.size if group else 1
    own = 1 if cuda else workers or available_workers(config.device)
    if split > own * ranks:
        raise UsageError(
            f"`split` {split}: expected at most {own * ranks}, the workers that there are; start more ranks"
            + ("" if cuda else ", or more `workers`")
        )
    total = min(own * ranks // split, together) * split
    share = -(-together // total) if cuda else together  # GPUs share what is ready evenly
    limit = replicas or (share if cuda else 1)
    if images is not None and isinstance(config, Training) and takes_autograd(config.widest, paths):
        limit = _side_by_side(config, images, replicas, deterministic or split > 1, note)
    return Plan(
        config,
        images,
        Path(out) if out else _place(config),
        why,
        total,
        min(limit, share),
        environment,
        ranks=ranks,
        split=split,
    )


def most_workers() -> int:
    """More processes than that only wait for each other."""
    return max(16, 4 * machine.cores())


def run(
    config: Experiment,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    data_dir: str | Path | None = None,
    workers: int | None = None,
    replicas: int | None = None,
    deterministic: bool = False,
    split: int = 1,
    watcher: Watcher | None = None,
) -> runs.RunRecord:
    """Compute what is missing of an experiment in the folder `out`, draw its figures and read it.

    `out` is runs/ and the experiment's own name unless given; with `resume` an unfinished run there goes
    on, and so does one that asked for fewer levels, seeds, arms, draws or points. The data set lies in
    `data_dir`, $SPARSELTH_DATA or the user's cache, and is downloaded into it if need be. A CPU has
    `workers` processes, one a core unless given, that train up to `replicas` networks as one batch; under
    torchrun every rank has as many. A run of this configuration goes on where torchrun has restarted all;
    `deterministic` chooses the kernels whose bits do not depend on the batch. With `split` so many workers
    train a network together, each on its share of every batch, through autograd. A network that diverges is
    in the record's `diverged`, and cells that need it are not computed. Raises UsageError for what makes no
    experiment, Interrupted after a signal (KeyboardInterrupt before the folder is there), SparselthError
    for all else that a user can mend; what is finished is kept.
    """
    watcher = watcher or Watcher()
    planned = plan(
        config,
        out=out,
        data_dir=data_dir,
        workers=workers,
        replicas=replicas,
        deterministic=deterministic,
        split=split,
        note=watcher.note,
    )
    if (group := torchrun.joined()) is None:
        return go(planned, resume, watcher)
    ranks = Ranks(group, Path(data_dir) if data_dir else None)
    return go(planned, resume or _restarted(planned, group), watcher, partial(Pool, ranks=ranks))


def go(planned: Plan, resume: bool, watcher: Watcher, pool_of: Callable[..., Pool] = Pool) -> runs.RunRecord:
    """Do what is planned, as `run` says; the cells are computed by workers of a pool."""
    config, path = planned.config, planned.path
    if (path / "config.json").is_file():
        config = config.going_on(runs.read_config(path))
        planned = replace(planned, config=config)
    with runs.open_run(path, config, planned.environment, resume) as folder:
        if folder.damage:
            again = "; what is missing is computed again" * bool(folder.missing)
            watcher.note(f"note: {path}: {folder.damage}{again}")
        if other := folder.begun_elsewhere(planned.environment):
            watcher.note(
                f"note: {path} was begun on another machine ({other}); new cells may differ in the last bits"
            )
        planned = replace(planned, finished=frozenset(folder.finished), lost=frozenset(folder.lost))
        try:
            if folder.missing:
                even, split = folder.break_even, planned.split
                with pool_of(config, planned.images, path, planned.workers, even, split=split) as pool:
                    if watcher.prices or planned.limit > 1:  # or how many networks fit into memory
                        planned = _priced(planned, pool)
                    with watcher.begin(planned) as told:
                        pool.run(folder, told, planned.limit)
            else:
                watcher.complete(planned)
            record = runs.read(path)
            try:
                with runs.reporting(record):
                    config.draw(record, path / "figures")
            except (OSError, SparselthError):
                if not folder.read_only:
                    raise
                watcher.note(f"note: {path} cannot be written, so its figures are not drawn")
        except KeyboardInterrupt as stop:
            raise stopped(folder, name_of(stop)) from None
    return record


def _restarted(planned: Plan, group: torchrun.Group) -> bool:
    """Whether this is a run of just this configuration that torchrun has started again."""
    if not group.restarts or not (planned.path / "config.json").is_file():
        return False
    theirs = runs.read_config(planned.path)
    return bool(planned.config.going_on(theirs) == theirs)


def priced(plan: Plan) -> Plan:
    """A plan with what a worker of its own has measured."""
    even, split = plan.environment["break_even"], plan.split
    with Pool(plan.config, plan.images, plan.path, 1, even, split=split) as pool:
        return _priced(plan, pool)


def _priced(plan: Plan, pool: Pool) -> Plan:
    if not isinstance(plan.config, Training):
        return plan
    price, limit = pool.price(plan.limit)
    return replace(plan, price=price, limit=limit)


def _check_split(config: Experiment, split: int, replicas: int | None) -> None:
    """Raise UsageError where the batches of an experiment's networks cannot be split over workers."""
    check_number("split", split, 1, MOST_REPLICAS)
    if split == 1:
        return
    if not isinstance(config, Training) or type(config).compute is not Training.compute:
        raise UsageError(f"`split` {split}: {config.name} splits no batches; imp does")
    if config.kernels not in ("auto", "autograd"):
        raise UsageError(
            f"`kernels` {config.kernels}: with `split` networks train through autograd; use `kernels` auto"
        )
    if (replicas or 1) > 1:
        raise UsageError(f"`replicas` {replicas}: with `split` networks train one by one; expected 1")
    if split > config.recipe.batch_size:
        raise UsageError(
            f"`split` {split}: expected at most the {config.recipe.batch_size} samples of a batch"
        )


def _side_by_side(
    config: Training,
    images: data.Images,
    replicas: int | None,
    deterministic: bool,
    note: Callable[[str], None],
) -> int:
    """How many networks train at once through autograd, at most; says so where they should and cannot."""
    model, asked = config.network, replicas or (MOST_REPLICAS if config.device == "cuda" else 1)
    if deterministic or not isinstance(model, ModuleModel):
        return 1 if deterministic else replicas or 1
    if not config.side_by_side or images.root is not None:
        return 1
    if asked > 1:
        import torch

        from sparselth.engine.side_by_side import refusal

        labels = torch.from_numpy(images.train_labels[:EXAMPLES])
        if why := refusal(model, labels, config.seeds[:2]):
            note(f"note: networks of {model.name} train one after another: {why}")
            return 1
    return asked


def _place(config: Experiment) -> Path:
    """runs/ and the experiment's own name, or the one that an older version gave it where that is there."""
    path = Path("runs") / config.folder
    before = path.with_name(path.name.replace(config.digest, config.digest_before()))
    return before if before.is_dir() and not path.exists() else path


def check_images(config: Training, images: data.Images) -> None:
    """Raise UsageError for what of a configuration does not fit its images, once these are read."""
    _check_fit(config, images.spec)
    model = get_model(config.model).on(images.spec)
    if isinstance(model, ModuleModel):
        model.check_labels(images.train_labels, images.test_labels)
    data.check_inputs(config.shown_as, images)


def _of_files(config: Training, dataset: str) -> str:
    """The kernels for images that stay in files; UsageError where the experiment goes another way."""
    if config.kernels not in ("auto", "autograd"):
        raise config.wrong("kernels", f"expected auto; images of {dataset} stay in files, for autograd alone")
    try:
        replace(config, kernels="autograd").check()
    except UsageError as error:
        raise UsageError(
            f"`dataset` {dataset}: its images stay in files, which autograd alone trains on ({error})"
        ) from error
    return "autograd"


def _check_fit(config: Training, dataset: DatasetSpec) -> None:
    """Raise UsageError where network, data set, batch and memory do not fit each other."""
    name, recipe = config.model, config.recipe
    model = config.widest.on(dataset)
    check_batch(recipe.batch_size, dataset.n_train)
    needed, there = replica_bytes(model, recipe), machine.memory_bytes()
    if config.device != "cuda" and needed > there:
        raise UsageError(
            f"`batch_size` {recipe.batch_size}: one network of {name} takes about {needed / 1e9:,.0f} GB, "
            f"there are {there / 1e9:.0f}"
        )
    if not isinstance(model, ModuleModel):  # which has been shown samples to know its size
        check_model(dataset, model)
