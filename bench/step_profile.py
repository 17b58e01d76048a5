"""Where the time of one training step goes, on this CPU and on a GPU where there is one:

    python bench/step_profile.py [--model lenet-300-100] [--threads 1]

On a CPU every call of a step is timed alone, warm, thousands of times in turn with the others; "between
them" is what the whole step takes beyond their sum. Masks are random at the densities of the levels of
`sparselth imp`. Of a network that goes through the vendor's layers, as resnet20, torch's profiler counts the
operators of dense steps by the recipe of the paper. On CUDA it counts the kernels of the
replayed step of many replicas.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch

from sparselth import machine, pruning
from sparselth.config import Cell, Recipe
from sparselth.data import Images, get_dataset, load
from sparselth.data.batches import Resident
from sparselth.engine.break_even import break_even
from sparselth.engine.choose import prepare
from sparselth.engine.compressed import CompressedSteps
from sparselth.engine.dense import init_weights
from sparselth.engine.layout import compressible
from sparselth.engine.paths import choose
from sparselth.engine.state import Batch, Job, State
from sparselth.models import Model, get_model
from sparselth.streams import stream

LEVELS = (0, 5, 10, 15)
WHO = Cell(0, "ticket", 0)
ROUNDS, SECONDS = 20, 4.0


def job(model: Model, recipe: Recipe, level: int, device: str, draw: int = 0) -> Job:
    """A network under the mask of magnitude pruning of its initial weights to a level's density."""
    weights = init_weights(model, stream(0, "ticket", 0, "init", draw))
    rung = pruning.ladder(model.params, level, 0.2, "layer")[level]
    mask = pruning.prune(model.params, weights[: model.params.mask_size], model.params.full_mask(), rung)
    weights[: model.params.mask_size] *= mask
    who = Cell(0, "ticket", level, draw)
    return Job(who, State.start(weights[None].to(device), recipe), mask.to(device))


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(next(iter(taken.values()))) < ROUNDS or time.perf_counter() - began < SECONDS:
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(times) for name, times in taken.items()}


def on_cpu(model: Model, data: Resident, recipe: Recipe) -> None:
    share = break_even(model, recipe.batch_size, choose("auto", "cpu").csr_linear.takes)
    columns: list[dict[str, float]] = []
    for level in LEVELS:
        steps = prepare(model, data, [job(model, recipe, level, "cpu")], recipe, "auto", share)
        if not isinstance(steps, CompressedSteps):
            raise SystemExit(
                f"{model.name} at level {level} goes through the vendor's layers here; nothing of it is ours"
            )
        index = steps.batches.index(0)
        calls: dict[str, Callable[[], object]] = {
            "gather": lambda steps=steps, index=index: steps.gather(index)
        }
        for i, (name, call) in enumerate(steps.chain.calls):
            calls[f"{i}|{name}"] = call
        calls["update"] = lambda steps=steps: steps.update(1, recipe.lr)
        calls["whole"] = lambda steps=steps: steps.advance(0, 1, lambda: False)
        found: dict[str, float] = {}
        for name, us in microseconds(calls).items():
            label = name.split("|")[-1]
            found[label] = found.get(label, 0.0) + us
        found["between them"] = found["whole"] - sum(us for name, us in found.items() if name != "whole")
        columns.append(found)
    rungs = pruning.ladder(model.params, max(LEVELS), 0.2, "layer")
    left = [f"{100 * sum(rungs[level].values()) / model.params.prunable:.1f} %" for level in LEVELS]
    print(f"{machine.cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} thread")
    print(
        f"{model.name}, batch {recipe.batch_size}, {recipe.optimizer}; microseconds, and share of the step\n"
    )
    print(f"{'weights left':<20}" + "".join(f"{text:>16}" for text in left))
    order = sorted(columns[0], key=lambda name: (name == "whole", -columns[0][name]))
    for name in order:
        cells = [f"{c.get(name, 0.0):9.1f} {100 * c.get(name, 0.0) / c['whole']:4.0f} %" for c in columns]
        print(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells))


KINDS = {  # operators of torch by what they are for; the rest is our update, Python and small change
    "convolutions": ("mkldnn_convolution", "convolution_backward"),
    "batch norms": ("native_batch_norm", "native_batch_norm_backward"),
    "ReLU": ("clamp_min", "clamp_min_", "threshold_backward"),
    "sums of shortcuts": ("add",),
    "images": ("index_select", "gather", "addcmul", "constant_pad_nd", "copy_", "clone"),
}


def by_vendor(model: Model, recipe: Recipe, steps_taken: int = 12) -> None:
    """Self times of torch's operators over dense steps."""
    draw, spec = np.random.default_rng(0), get_dataset(model.dataset)
    pixels = draw.integers(256, size=(10_000, prod(model.input)), dtype=np.uint8)
    labels = draw.integers(model.classes, size=10_000)
    resident = Resident(Images(spec, pixels, labels, pixels[:100], labels[:100], "", ""), "cpu", 100)
    steps = prepare(model, resident, [job(model, recipe, 0, "cpu")], recipe)
    steps.advance(0, 2, lambda: False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        steps.advance(2, steps_taken, lambda: False)
        whole = 1e6 * (time.perf_counter() - began)
    found = {row.key.removeprefix("aten::"): row.self_cpu_time_total for row in profile.key_averages()}
    told = 0.0
    print(f"{machine.cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} thread")
    print(f"{model.name}, batch {recipe.batch_size}, {recipe.optimizer}, {recipe.augment}; ms a step\n")
    for kind, names in KINDS.items():
        told += (taken := sum(found.get(name, 0.0) for name in names))
        print(f"{kind:<20}{taken / steps_taken / 1e3:10.2f} {100 * taken / whole:6.1f} %")
    print(f"{'else':<20}{(whole - told) / steps_taken / 1e3:10.2f} {100 * (1 - told / whole):6.1f} %")
    print(f"{'whole':<20}{whole / steps_taken / 1e3:10.2f}")


def on_cuda(model: Model, data: Resident, recipe: Recipe, replicas: int = 100) -> None:
    from sparselth.engine.replay import Replay

    jobs = [job(model, recipe, 5, "cuda", draw) for draw in range(replicas)]
    replay = Replay(Batch(model, data, jobs, recipe, choose("auto", "cuda")))
    replay.advance(0, 100, lambda: False)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay.advance(100, 100, lambda: False)
        torch.cuda.synchronize()
    print(f"\n{torch.cuda.get_device_name()}: {replicas} replicas, 100 replayed steps")
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet-300-100")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = get_model(args.model)
    if model.convolves and not compressible(model):
        by_vendor(model, model.recipes["paper"])
        return
    recipe = Recipe(steps=10**5, lr=1.2e-3, batch_size=60, eval_every=10**5)
    images = load("mnist5k", Path())
    on_cpu(model, Resident(images, "cpu", 500), recipe)
    if torch.cuda.is_available():
        on_cuda(model, Resident(images, "cuda", 500), recipe)


if __name__ == "__main__":
    main()
