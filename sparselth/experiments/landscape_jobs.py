"""What a cell of `landscape` computes: a slice, a line and a spectrum of one trained network."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparselth.config import Cell
from sparselth.engine.curvature import Hessian, lanczos
from sparselth.engine.many import Many, barrier, direction, line, square
from sparselth.engine.planes import measure_plane
from sparselth.engine.state import Stopped
from sparselth.experiments.base import Finished, Place
from sparselth.files import Arrays, save_arrays
from sparselth.models import Model
from sparselth.runs import cell_path
from sparselth.streams import stream
from sparselth.tickets import Content

SCHEMA = "sparselth.landscape/1"
LINE = 30  # points of a line
SHOWN = 5  # eigenvalues that are told
DIGITS = 6  # of a loss in a line; the file has all of them


class Landscape(Protocol):
    """Of `landscape.LandscapeConfig`, what is needed here."""

    @property
    def network(self) -> Model: ...
    @property
    def kernels(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def grid(self) -> int: ...
    @property
    def radius(self) -> float: ...
    @property
    def images(self) -> int: ...
    @property
    def batches(self) -> int: ...
    def ticket(self, cell: Cell) -> Content: ...
    def end(self, cell: Cell) -> Cell | None: ...


def compute(config: Landscape, cell: Cell, place: Place) -> Finished | None:
    """A cell, its file written; None when stopped."""
    assert place.data is not None
    began, model, data = time.process_time(), config.network, place.data
    many = Many(model, data, cell.seed, config.kernels, config.batches)
    train, test = many.training(config.images), many.test(config.images)

    def trained(one: Cell) -> tuple[Tensor, Tensor]:
        """Weights [P] and mask [M] of a network of the source, its statistics those of these images."""
        content = config.ticket(one)
        weights = torch.from_numpy(content.weights).to(data.device)[None]
        many.settled(weights, place.should_stop)
        return weights[0], torch.from_numpy(content.mask).to(data.device)

    try:
        weights, mask = trained(cell)
        arrays, said = _centre(many, weights, [train, test], place)
        said["weights_remaining"] = sum(model.params.kept(mask).values()) / model.params.prunable
        grid, more = _slice(config, cell, many, weights, mask, train, place)
        arrays |= grid
        said |= more
        spectrum = _spectrum(config, cell, weights, mask, place)
        if (end := config.end(cell)) is not None:
            found, more = _line(many, weights, trained(end)[0], [train, test], place)
            arrays |= found
            said |= {"to": end.arm if end.level else "dense"} | more
    except Stopped:
        return None
    said = spectrum | said
    header = {"schema": SCHEMA, "config": config.digest, "cell": cell.key}
    save_arrays(cell_path(place.run, cell), arrays, header)
    seconds = time.process_time() - began
    return Finished(cell, said, [], {"train_seconds": seconds, "step_seconds": 0.0, "clock": "processor"})


def _centre(many: Many, weights: Tensor, looked: list[Any], place: Place) -> tuple[Arrays, dict[str, Any]]:
    train, test = many.measure(1, lambda i, j: weights[None].clone(), looked, place.should_stop)
    return {}, {
        "loss": _finite(train[0][0]),
        "train_accuracy": train[1][0],
        "test_accuracy": test[1][0],
    }


def _slice(
    config: Landscape, cell: Cell, many: Many, weights: Tensor, mask: Tensor, train: Any, place: Place
) -> tuple[Arrays, dict[str, Any]]:
    """Losses of a square around the network; the draws of a seed are the same for every arm and level."""
    params, n = config.network.params, config.grid
    one, other = (
        direction(params, weights, mask, stream(cell.seed, "landscape", 0, f"direction/{i}")) for i in (0, 1)
    )
    places = square(n, config.radius)
    basis = torch.stack([weights, one, other])
    losses, accuracies = measure_plane(many, basis, places.to(weights.device), train, place.should_stop)
    surface = np.array(losses).reshape(n, n)
    near = places.norm(dim=1) <= config.radius / 2
    rise = float(np.mean(np.array(losses)[near.numpy()]) - surface[n // 2, n // 2])
    arrays: Arrays = {"grid": surface, "accuracy": np.array(accuracies).reshape(n, n)}
    arrays["side"] = places[::n, 0].numpy()
    told = [[_finite(loss) for loss in row] for row in surface.tolist()]
    return arrays, {"rise": _finite(rise), "grid": told}


def _spectrum(config: Landscape, cell: Cell, weights: Tensor, mask: Tensor, place: Place) -> dict[str, Any]:
    data = place.data
    assert data is not None
    chunks = data.held(data.training_first(cell.seed, config.images))
    hessian = Hessian(config.network, cell.seed, weights, mask, chunks, place.should_stop)
    generator = stream(cell.seed, "landscape", 0, "lanczos")
    start = torch.randn(len(hessian.live), generator=generator, dtype=torch.float32, device="cpu")
    found = lanczos(hessian, start.to(weights.device) * hessian.live)
    return {
        "largest_eigenvalue": found.values[0],
        "eigenvalues": found.values[:SHOWN],
        "smallest_eigenvalue": found.values[-1],
        "bound": found.bound,
        "products": found.steps,
    }


def _line(
    many: Many, weights: Tensor, end: Tensor, looked: list[Any], place: Place
) -> tuple[Arrays, dict[str, Any]]:
    """Loss and error along the line from the network to another."""
    places = torch.linspace(0, 1, LINE, dtype=torch.float64, device="cpu").float()
    make = line(weights, end, places.to(weights.device))
    arrays: Arrays = {"places": places.numpy()}
    said: dict[str, Any] = {}
    found = many.measure(LINE, make, looked, place.should_stop)
    for lot, (losses, accuracies) in zip(("train_", ""), found, strict=True):
        errors = [1 - accuracy for accuracy in accuracies]
        said |= {f"{lot}error": errors, f"{lot}barrier": barrier(errors)}
        arrays |= {f"{lot}line_loss": np.array(losses), f"{lot}line_error": np.array(errors)}
    return arrays, said


def _finite(loss: float) -> float | None:
    """A loss as a line of JSON has it."""
    return float(f"{loss:.{DIGITS}g}") if math.isfinite(loss) else None
