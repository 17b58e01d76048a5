"""What tests of conversion share: networks, random masks, and clocks that prefer what a test names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselth.kernels.step_parts import Call

timing = importlib.import_module("sparselth.sparse.times")
csr, slots = (importlib.import_module(f"sparselth.sparse.forms.{name}") for name in ("csr", "slots"))
Timer = Callable[[Mapping[str, Call], Any], Any]
NATIVE = "csr_tiled", "sparse_conv2d", "native"  # the last is a network of ours


def times(found: Mapping[str, float], steady: bool = True) -> Any:
    result = timing.Times(found)
    result.spread = 1.0 if steady else 2 * timing.SPREAD
    return result


def prefer(*names: str) -> Timer:
    """A clock by which candidates and networks of these names are fast, and all others slow."""

    def timer(calls: Mapping[str, Call], sample: Any) -> Any:
        for call in calls.values():
            call()
        plain = {name: re.sub(" [0-9a-f]{16}$", "", name) for name in calls}  # networks have fingerprints
        return times({name: 1e-6 if plain[name] in names else 1e-2 for name in calls})

    return timer


def joins(calls: Mapping[str, Call], sample: Any) -> Any:
    """A clock by which forms in columns are fast, and what joins them too."""
    for call in calls.values():
        call()
    fast = {"csr_tiled": 1e-7, "dense columns": 2e-7, "columns": 1e-7}
    fast |= {"joined tokens": 1e-5, "joined blocks": 1e-6}
    return times({name: fast.get(name, 1e-3) for name in calls})


def leaves(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def double(given: Any) -> Any:
    return pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, given)


def lenet_300_100() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(nn.Flatten(), *layers).eval(), (1, 28, 28)


def lenet_5() -> tuple[nn.Sequential, tuple[int, ...]]:
    features = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.AvgPool2d(2)),
    )
    head = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Dropout(), nn.Linear(120, 84), nn.ReLU())
    return nn.Sequential(features, nn.Flatten(), head, nn.Linear(84, 10)).eval(), (1, 28, 28)


def conv_2() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = (nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 8 * 8, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*layers, *head).eval(), (3, 16, 16)


def pools() -> tuple[nn.Sequential, tuple[int, ...]]:
    """Convolutions with a ReLU before a pool, behind it, and none; odd sizes; a pool that none takes."""
    layers = (nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 33, 3, padding=2))
    more = (nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(33, 7, 2), nn.MaxPool2d(2), nn.MaxPool2d(2))
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(7, 4)).eval(), (2, 19, 23)


NETWORKS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5, "conv-2": conv_2, "pools": pools}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def random_masks(model: nn.Module, density: float, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=g) < density for name, p in weights(model).items()}


@torch.no_grad()
def dense(model: nn.Sequential, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The masked network's outputs in float64."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, mask in masks.items():
        state[name] *= mask
    outputs: Tensor = torch.func.functional_call(
        model.double(), {k: v.double() for k, v in state.items()}, x.double()
    )
    model.float()
    return outputs


def close(y: Tensor, reference: Tensor) -> None:
    scale = reference.square().mean().sqrt().clamp_min(1e-6)
    assert y.dtype == torch.float32
    assert y.shape == reference.shape
    assert float((y - reference).abs().max() / scale) < 2e-5
