"""A whole training step at rising sparsity, batch 60, Adam, one thread: does sparse training get cheaper?

    dense        the unpruned network's step through the vendor's products: --kernels reference
    best torch   conv nets: torch modules, the faster of NCHW and channels-last, fused Adam, without masks
    masked       dense products, masked optimizer: --kernels reference
    MKL CSR      the compressed domain through torch's sparse products: --kernels torch
    sparselth    --kernels auto: compressed where that is faster here, see the break-even densities

Masks are random, with the output layer at the root of the others' density, which costs more than those of
pruning: they leave hardly a dead unit. Before it is timed every rival must have the reference's gradient:
within 1e-5, in conv4 1e-2, where among a million activations a near-tie in a pool falls either way.
Single layers: bench_csr_linear.py and bench_sparse_conv2d.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselth import pruning
from sparselth.config import Cell, Recipe
from sparselth.data import load
from sparselth.data.batches import Resident
from sparselth.engine.break_even import break_even
from sparselth.engine.choose import prepare
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.engine.state import Job, State
from sparselth.kernels import _native
from sparselth.models import Model, get_model
from sparselth.models.torch import network
from sparselth.streams import stream

WHO = Cell(0, "ticket", 0)
RECIPE = Recipe(steps=10**6, lr=1.2e-3, batch_size=60, eval_every=10**6)


def resident(model: Model) -> Resident:
    """mnist5k, or as many random images where a model takes others: a step's time does not depend on them."""
    data = Resident(load("mnist5k", Path()), "cpu", 100)
    if model.input != (1, 28, 28):
        generator = torch.Generator().manual_seed(0)
        c, h, w = model.input
        size = len(data.labels), c * h * w
        data.images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        data.scale, data.shift = torch.full((c * h * w, 1), 1 / 64), torch.full((c * h * w, 1), -2.0)
    return data


def random_mask(model: Model, density: float) -> Tensor:
    """The mask [M] with exactly that share of every layer."""
    noise = torch.rand(model.params.mask_size, generator=torch.Generator().manual_seed(1))
    keep = {s.name: round(density ** (0.5 if s.output else 1.0) * s.numel) for s in model.weights}
    return pruning.prune(model.params, noise, model.params.full_mask(), keep)


def sparselth_step(
    model: Model, data: Resident, mask: Tensor, kernels: str, share: dict[str, float], batch: int = 60
) -> tuple[Callable[[], None], State]:
    """What `train.fit` does for every step, and the state it works on."""
    recipe = replace(RECIPE, batch_size=batch)
    weights = init_weights(model, stream(0, "ticket", 0, "init"))[None]
    weights[:, : model.params.mask_size] *= mask
    state = State.start(weights, recipe)
    steps = prepare(model, data, [Job(WHO, state, mask)], recipe, kernels, share)

    def step() -> None:
        steps.advance(state.step, 1, lambda: False)
        state.step += 1

    return step, state


def torch_step(model: Model, data: Resident, layout: torch.memory_format) -> Callable[[], None]:
    """Dense torch at its best: images on the device as floats, fused Adam."""
    flat = init_weights(model, stream(0, "ticket", 0, "init"))
    net = network(model, flat).to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), lr=RECIPE.lr, fused=True)
    c, h, w = model.input
    images = (
        (data.images[:1200].float() * data.scale.T + data.shift.T)
        .view(-1, c, h, w)
        .contiguous(memory_format=layout)
    )
    place = 0

    def step() -> None:
        nonlocal place
        span = slice(place % 1200, place % 1200 + 60)
        place += 60
        optimizer.zero_grad()
        F.cross_entropy(net(images[span]), data.labels[span]).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet5", "conv4"])
def test_sparse_train_step(
    name: str, interleaved: Callable[..., dict[str, Any]], show: Callable[[str], None]
) -> None:
    model = get_model(name)
    data = resident(model)
    big = model.params.prunable > 10**6
    sparsities = (0.2, 0.8, 0.9, 0.95) if big else (0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    takes = choose("auto", "cpu").csr_linear.takes
    share = break_even(model, RECIPE.batch_size, takes)
    full = model.params.full_mask()
    calls = 1 if big else 20
    rivals = {"dense": (sparselth_step(model, data, full, "reference", {})[0], calls)}
    if len(model.input) == 3 and model.convolves:
        rivals["torch NCHW"] = torch_step(model, data, torch.contiguous_format), calls
        rivals["torch channels-last"] = torch_step(model, data, torch.channels_last), calls
    rivals["sparselth 0%"] = sparselth_step(model, data, full, "auto", share)[0], calls
    for sparsity in sparsities:
        mask = random_mask(model, 1 - sparsity)
        runs = {"masked": ("reference", {}), "sparselth": ("auto", share)}
        if not big and sparsity >= 0.9:
            runs["MKL CSR"] = "torch", dict.fromkeys(share, 1.0)
        found = {}
        for label, (kernels, limit) in runs.items():
            step, state = sparselth_step(model, data, mask, kernels, limit)
            step()
            found[label] = state.expanded().moments[0]  # a tenth of the gradient
            rivals[f"{label} {sparsity:.0%}"] = step, calls
        for label, slope in found.items():
            error = (slope - found["masked"]).norm() / found["masked"].norm()
            assert error < (1e-2 if big else 1e-5), (
                f"{label} at {sparsity:.0%}: {error:.1e} from the reference"
            )
    times = interleaved(rivals, 3 if big else 15)

    dense = times["dense"]
    vendor = [timing for label, timing in times.items() if label.startswith("torch")]
    best = min([dense, *vendor], key=lambda timing: timing.median)
    lines = [
        f"{name}, one step, batch 60, Adam, one thread; {_native.WHY}",
        "break-even densities: "
        + ", ".join(f"{key.removesuffix('.weight')} {value:g}" for key, value in share.items()),
        f"{'':<22}{'ms':>9}   {'quartiles':<22}{'of dense at its best':>20}",
    ]
    for label, t in times.items():
        quartiles = f"{1e3 * t.low:.3f} to {1e3 * t.high:.3f}"
        lines.append(f"{label:<22}{1e3 * t.median:>9.3f}   {quartiles:<22}{t.median / best.median:>20.2f}")
    show("\n".join(lines))
