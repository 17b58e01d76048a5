"""Why a ticket is faster than its dense network on this machine, or not: each layer beside its break-even.

A layer is computed by every form that fits it, as `convert` tries them, under its own mask and under random
masks of a few densities. Between these the time of the fastest sparse form is a line; break-even is the
largest density at which it meets that of the fastest dense one, which the mask does not change: of its times
the least is taken, and where they vary much, other programs are at work. `convert` keeps its times likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparselth.errors import UsageError
from sparselth.machine import Neighbours
from sparselth.models import Conv, Linear
from sparselth.models.module import ModuleModel
from sparselth.models.torch import PLAIN
from sparselth.sparse.choice import MARGIN, Trial, try_all
from sparselth.sparse.compaction import Part
from sparselth.sparse.device import Device
from sparselth.sparse.forms import Stage
from sparselth.sparse.times import Cache
from sparselth.tickets import RunTicket, Ticket

Layer = tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]  # and what it reads of a sample
PROBES = 0.02, 0.2, 0.6  # densities of random masks
NOISE = 1.5  # times the least that another measurement of the same may be
MOST = 64  # pixels of a stride, a padding or a dilation
LARGEST = 1 << 31  # multiplications of a dense call that is worth its wait


@dataclass(frozen=True)
class Speed:
    """Seconds of a layer for one batch: dense at its best, and the fastest sparse form under its mask."""

    name: str
    dense: float
    sparse: float | None  # None where no sparse form fits
    form: str
    break_even: float  # largest share kept at which a random mask makes it faster, of those tried; 0: at none
    noise: float = 1.0  # by which dense times varied
    others: float = 0.0  # cores that other programs asked for meanwhile
    missing: str = ""  # why it was not measured; then the rest says nothing

    @property
    def faster(self) -> bool:
        """Whether `convert` would take the sparse form."""
        return self.sparse is not None and self.sparse * MARGIN < self.dense

    @property
    def doubtful(self) -> bool:
        """Whether other programs decide these times."""
        return self.noise > NOISE or self.others > 0

    @property
    def best(self) -> float:
        return self.sparse if self.faster and self.sparse is not None else self.dense


def speeds(ticket: Ticket, batch: int, image: tuple[int, int] | None = None) -> Iterator[Speed]:
    """The layers of a ticket, each measured as it is asked for, for `batch` samples.

    image: height and width that every convolution reads, where the ticket does not say; a run's does.
    """
    cache: Cache | None = None
    shown: dict[str, Layer] | None = None
    if isinstance(ticket, RunTicket) and isinstance(ticket.model, ModuleModel):
        shown = _shown(ticket, ticket.model)
    for name, mask in ticket.masks.items():
        layer: Layer | str
        if shown is None:
            layer = _layer(ticket, name, mask, image)
        else:
            layer = shown.get(name, "no layer of the network reads it: stays dense")
        if isinstance(layer, str):
            yield Speed(name, 0.0, None, "", 0.0, missing=layer)
            continue
        module, before = layer
        with torch.no_grad():
            after = tuple(module(torch.zeros(1, *before, dtype=torch.float32, device="cpu")).shape[1:])
            if batch * mask[0].numel() * prod(after) > LARGEST:
                too = f"too large to be measured at a batch of {batch}"
                yield Speed(name, 0.0, None, "", 0.0, missing=too)
                continue
            x = torch.randn(batch, *before, generator=_draw(), dtype=torch.float32, device="cpu")
            device = Device.of(x)
            cache = cache or Cache(batch, device.key)
            neighbours = Neighbours()
            speed = _measured(name, module, mask, x, after, device, cache)
            yield replace(speed, others=neighbours.cores_taken())
            cache.save()


def _measured(
    name: str,
    module: nn.Linear | nn.Conv2d,
    mask: Tensor,
    x: Tensor,
    after: tuple[int, ...],
    device: Device,
    cache: Cache,
) -> Speed:
    weight = torch.randn(mask.shape, generator=_draw(), dtype=torch.float32, device="cpu")

    def tried(under: Tensor) -> Trial:
        module.weight.copy_(weight * under)
        stage = Stage(Part(name, module, tuple(x.shape[1:]), after))
        (trial,) = try_all([stage], x, device, cache, {})
        return trial

    trials = {int(mask.sum()) / mask.numel(): tried(mask)}
    own = _fastest(next(iter(trials.values())))
    for density in PROBES if own else ():
        probe = torch.rand(mask.shape, generator=_draw(), dtype=torch.float32, device="cpu") < density
        trials.setdefault(density, tried(probe))
    dense = [
        min(trial.times[form.name] for form in trial.right() if form.kind == "dense")
        for trial in trials.values()
    ]
    noise = max(dense) / max(min(dense), 1e-9)
    if own is None:
        return Speed(name, min(dense), None, "", 0.0, noise)
    points = [(density, found[0]) for density, trial in trials.items() if (found := _fastest(trial))]
    return Speed(name, min(dense), *own, break_even(points, min(dense) / MARGIN), noise)


def _fastest(trial: Trial) -> tuple[float, str] | None:
    """Seconds and name of the fastest form that is not dense."""
    found = [(trial.times[form.name], form.name) for form in trial.right() if form.kind != "dense"]
    return min(found, default=None)


def break_even(points: list[tuple[float, float]], limit: float) -> float:
    """The largest density with a time below `limit`, on the lines through (density, seconds)."""
    points = sorted(points)
    if points[-1][1] < limit:
        return points[-1][0]
    for (d0, t0), (d1, t1) in reversed([*pairwise(points)]):
        if t0 < limit <= t1:
            return d0 + (limit - t0) * (d1 - d0) / (t1 - t0)
    return 0.0


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _layer(ticket: Ticket, name: str, mask: Tensor, image: tuple[int, int] | None) -> Layer | str:
    """A module with a weight of this mask's shape and what it reads; or why there is none."""
    words: dict[str, Any] = {}
    if isinstance(ticket, RunTicket):
        for spec, op, before, _ in ticket.model.producers:
            if spec.name == name and isinstance(op, Conv):
                conv = nn.Conv2d(before[0], op.out, op.kernel, op.stride, op.padding, bias=False, **PLAIN)
                return conv, before
            if spec.name == name and isinstance(op, Linear):
                return nn.Linear(prod(before), op.out, bias=False, **PLAIN), (prod(before),)
    else:
        stated = ticket.header.get("layers")
        words = stated.get(name, {}) if isinstance(stated, dict) else {}
    words = words if isinstance(words, dict) else {}
    kind = words.get("type")
    if not mask.numel():
        return "has no weights"
    if mask.dim() == 2 and kind in (None, "Linear"):
        return nn.Linear(mask.shape[1], mask.shape[0], bias=False, **PLAIN), (mask.shape[1],)
    if mask.dim() != 4 or kind not in (None, "Conv2d"):
        return f"no sparse form for {kind or f'a tensor of {mask.dim()} dimensions'}: stays dense"
    if image is None:
        return "not measured: the ticket does not say which images it reads"
    return _convolution(mask, words, image)


def _shown(ticket: RunTicket, model: ModuleModel) -> dict[str, Layer]:
    """The layers of a module that a run trained, by weight, with what each of them reads of a sample."""
    net, found = ticket.trained().eval(), dict[str, Layer]()

    def saw(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        before = args[0].shape[1:] if isinstance(module, nn.Conv2d) else args[0].shape[-1:]
        found.setdefault(f"{name}.weight", (copy.deepcopy(module), tuple(before)))  # type: ignore[arg-type]

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(partial(saw, name))
    with torch.no_grad():
        net(model.example())
    for module, _ in found.values():
        module._forward_pre_hooks.clear()
        module.bias = None
    return found


def _convolution(
    mask: Tensor, words: dict[str, Any], image: tuple[int, int]
) -> tuple[nn.Conv2d, tuple[int, ...]] | str:
    """A convolution as the ticket's header says; padded to keep its image's size where it does not."""
    out, channels, *kernel = mask.shape
    usual = {"stride": [1, 1], "padding": [k // 2 for k in kernel], "dilation": [1, 1], "groups": 1}
    said = {key: words.get(key, value) for key, value in usual.items()}
    pairs = [said[key] for key in ("stride", "padding", "dilation")]
    right = all(
        isinstance(p, list) and len(p) == 2 and all(type(n) is int and 0 <= n <= MOST for n in p)
        for p in pairs
    )
    if not right or type(said["groups"]) is not int or not 0 < said["groups"] <= out:
        return f"not measured: its stride, padding, dilation or groups are odd ({said!s:.80})"
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in said.items()}
    groups = said["groups"]
    try:
        conv = nn.Conv2d(channels * groups, out, tuple(kernel), bias=False, **settings, **PLAIN)  # type: ignore[arg-type]
        conv(torch.zeros(1, channels * groups, *image, dtype=torch.float32, device="cpu"))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"`image` {image[0]}x{image[1]}: too small for a convolution of {kernel}") from error
    return conv, (channels * groups, *image)
