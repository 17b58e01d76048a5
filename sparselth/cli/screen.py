"""What a person sees of a run: its plan and price, what happens to it, and what the usual loop would take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparselth.cli.options import as_flags
from sparselth.cli.progress import duration, progress
from sparselth.experiments.agenda import widest
from sparselth.experiments.cost import Cost
from sparselth.experiments.plan import Plan, Watcher
from sparselth.experiments.price import Price
from sparselth.experiments.training import Training
from sparselth.report.page import fill

LONG_SECONDS = 60  # a run that took longer is compared with the usual loop
There = tuple[str, Price]  # another device, and its prices


class Screen(Watcher):
    """Notes, the plan and the progress of a run on stderr; only notes if `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.prices = quiet, not quiet
        self.wall: dict[str, Any] | None = None  # what a long run took, beside the usual loop

    def note(self, text: str) -> None:
        print(as_flags(text), file=sys.stderr, flush=True)

    def complete(self, plan: Plan) -> None:
        if not self.quiet:
            count = f"all {len(plan.finished)} cells are finished"
            if plan.lost:
                count = f"{len(plan.finished)} cells are finished, {len(plan.lost)} have no result"
            self.note(f"{plan.path}: {count}; nothing to compute")

    @contextmanager
    def begin(self, plan: Plan) -> Iterator[Watcher]:
        if not self.quiet:
            say_plan(plan)
        began = time.perf_counter()
        with progress(plan, self.quiet) as watcher:
            yield watcher
        seconds = time.perf_counter() - began
        if seconds > LONG_SECONDS and (usual := _usual(plan)):
            self.wall = {"seconds": seconds, "workers": plan.workers} | usual

    def compared(self) -> str:
        """The run's wall time beside the usual loop's."""
        wall = self.wall
        assert wall is not None
        training, evaluating = wall["usual_training_seconds"], wall["usual_evaluation_seconds"]
        times, threads = (training + evaluating) / wall["seconds"], wall["usual_threads"]
        return fill(
            f"{duration(wall['seconds'])} for {wall['cells']} networks on {wall['workers']} workers. "
            "One after another by the usual loop (DataLoader, autograd, torch.optim): training "
            f"{duration(training)}, evaluation {duration(evaluating)}, {times:.0f} times as long; "
            f"extrapolated from {wall['usual_steps_timed']} steps on {threads} thread{'s' * (threads > 1)}",
            *(" " * 9, "wall     "),
        )


def _usual(plan: Plan) -> dict[str, Any] | None:
    """What the cells that were missing would have taken the usual way, from a sample of two seconds."""
    config, images = plan.config, plan.images
    if images is None or not isinstance(config, Training):
        return None
    try:
        from sparselth.measure import usual

        if not usual.fits(config, images):
            return None
        found = usual.sample(config, images)
    except (ImportError, RuntimeError):  # a torchvision that does not fit this torch
        return None
    cells = [cell for cell in config.cells() if cell not in plan.finished | plan.lost]
    training, evaluating = found.run_seconds(config, images, cells)
    return {
        "cells": len(cells),
        "usual_training_seconds": training,
        "usual_evaluation_seconds": evaluating,
        "usual_steps_timed": found.steps,
        "usual_threads": found.threads,
    }


def plan_json(plan: Plan, there: There | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "run": str(plan.path),
        "config": plan.config.to_json(),
        "cells": len(plan.config.cells()),
        "workers": plan.workers,
        "ranks": plan.ranks,
        "replicas": plan.limit,
        "split": plan.split,
        "seconds": plan.seconds,
        "bytes": plan.bytes,
    }
    if plan.price and isinstance(plan.config, Training):
        found["evaluation_share"] = plan.price.evaluation_share(plan.config, plan.finished)
        found["busy_cores"] = plan.price.busy
    if there:
        name, seconds, size = _there(plan, there)
        found["price_on"] = {"device": name, "seconds": seconds, "bytes": size}
    return found


def _there(plan: Plan, there: There) -> tuple[str, float, int]:
    """Another device's name, seconds and bytes, where everything that can runs at once."""
    (name, price), config, all_at_once = there, plan.config, 10**9
    assert isinstance(config, Training)
    seconds = price.run_seconds(config, plan.finished, 1, all_at_once)
    return name, seconds, price.run_bytes(config, 1, all_at_once)


def say_plan(plan: Plan, there: There | None = None) -> None:
    """The first screen: what will be done and what it costs."""
    config, limit, price = plan.config, plan.limit, plan.price
    together = widest(config)
    place = "one worker" if config.device == "cuda" else f"{plan.workers} workers, one thread each"
    if plan.ranks > 1:
        used = f"{plan.workers} of " * (plan.workers < plan.ranks)  # no more can run side by side
        each = "a GPU each" if config.device == "cuda" else "one thread each"
        place = f"{plan.workers} workers on {used}{plan.ranks} ranks, {each}"
    if plan.split > 1:
        place += f"; each network over {plan.split} workers"
    rows = config.plan(plan.images, len(plan.finished)) | {"device": f"{config.device} ({plan.why}), {place}"}
    if limit > 1 or config.device == "cuda":
        rows["batches"] = f"up to {limit} networks at once, of {together} that could run side by side"
    if price and plan.seconds is not None and plan.bytes is not None:
        first, last = (1e3 * price.batches[1] * price.levels[level] for level in (0, -1))
        step = f"{first:.2f} ms a step" + ", without sending" * (plan.split > 1)
        step += f", {last:.2f} at the last level" if last < first else ""
        if limit > 1 and limit in price.batches:
            step += f", {1e3 * price.batches[limit]:.2f} of {limit}"
        size = f"{plan.bytes / 1e9 + 0.2:.1f} GB of memory"
        rows["price"] = f"about {duration(plan.seconds)} ({step}), {size}"
        if isinstance(config, Training):
            rows["price"] += f"; {100 * price.evaluation_share(config, plan.finished):.0f} % of it evaluation"
        if price.busy:
            alone = plan.seconds / price.slowdown(plan.workers)
            rows["busy"] = (
                f"others ask for {price.busy:.1f} of {price.cores} cores now; without them {duration(alone)}"
            )
    elif plan.seconds is not None:
        rows["price"] = f"about {duration(plan.seconds)}"
    if there:
        name, seconds, bytes_ = _there(plan, there)
        rows["there"] = (
            f"about {duration(seconds)} on {name}, up to {together} networks at once, "
            f"{bytes_ / 1e9:.1f} GB; from recorded steps"
        )
    for name, text in (rows | {"folder": str(plan.path)}).items():
        print(fill(text, " " * 9, f"{name:<9}"), file=sys.stderr)
    sys.stderr.flush()


def cost_json(config: Training, cost: Cost) -> dict[str, Any]:
    found = {"gpus": cost.gpus, "seconds": cost.seconds, "gpu_hours": cost.gpu_hours, "busy": cost.busy}
    found |= {"gpus_of_a_network": cost.each, "measured": False, "assumptions": cost.assumptions}
    return {"config": config.to_json(), "cells": len(config.cells()), "price_on": found}


def say_cost(config: Training, cost: Cost) -> None:
    """What a run would cost on GPUs that are not here, and every assumption on a line of its own."""
    price = f"about {duration(cost.seconds)} ({cost.seconds / 86400:,.1f} days) on {cost.gpus}"
    rows = config.plan(None, 0) | {
        "price": f"{price}, {cost.gpu_hours:,.0f} GPU-hours, of which GPUs train {100 * cost.busy:.0f} %",
        "measured": "nothing of it on such GPUs: this is a model, which assumes",
    }
    for name, text in (rows | {f"  {name}": said for name, said in cost.assumptions.items()}).items():
        print(fill(as_flags(text), " " * 14, f"{name:<14}"), file=sys.stderr)
    sys.stderr.flush()
