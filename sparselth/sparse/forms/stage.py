"""What a form is chosen for at once: a layer with what stands right behind it; memory for activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth import masks
from sparselth.kernels._tiles import BLOCKS
from sparselth.kernels.plane_parts import bind_activate
from sparselth.kernels.sparse_conv2d_rows import LINE, Planes
from sparselth.kernels.step_parts import Call, bind_bias_relu
from sparselth.sparse.compaction import Part, rebuilt

COLUMNS = 16  # a batch above 1 gets room for a multiple: one cache line
FULL = 0.5  # share of the weights in live blocks that must be kept for blocks to be tried
# Layers of the activations that kernels know, and how torch computes them in place.
LAYERS: dict[str, tuple[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU, torch.relu_),
    "relu6": (nn.ReLU6, partial(F.relu6, inplace=True)),
    "hardswish": (nn.Hardswish, partial(F.hardswish, inplace=True)),
    "hardsigmoid": (nn.Hardsigmoid, partial(F.hardsigmoid, inplace=True)),
    "sigmoid": (nn.Sigmoid, torch.sigmoid_),
    "silu": (nn.SiLU, partial(F.silu, inplace=True)),
}


@dataclass(frozen=True)
class Place:
    """Where a stage stands, without its weights."""

    name: str
    key: str  # what its time depends on
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """What is chosen at once: a layer, and the activation and the maximum of 2 x 2 pixels behind it.

    Where inputs of it are dead, `select` picks out the others for its dense forms; those of sparse weights
    have no use for that and take `whole`, `weight` and `bias`. `blocks` is the side of the blocks that the
    weight was pruned in where that is known; else `block` looks for it.
    """

    part: Part
    activation: str = "none"
    pool: Part | None = None
    select: Part | None = None
    blocks: int | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(with_activation(state))

    @property
    def relu(self) -> bool:
        return self.activation == "relu"

    @property
    def apart(self) -> bool:
        """Whether there is an activation that kernels with a ReLU have not; then there is no pool."""
        return self.activation not in ("none", "relu")

    @property
    def linear(self) -> bool:
        return isinstance(self.part.module, nn.Linear)

    @property
    def conv(self) -> bool:
        return isinstance(self.part.module, nn.Conv2d)

    @property
    def product(self) -> bool:
        return self.linear or self.conv

    @property
    def groups(self) -> int:
        return self.part.module.groups if isinstance(self.part.module, nn.Conv2d) else 1

    @property
    def kept(self) -> int:
        return int((self.own_weight != 0).sum()) if self.product else 0

    @cached_property
    def place(self) -> Place:
        part, before, after = self.part, self.before, self.after
        more = "" if self.activation == "none" else f" and {LAYERS[self.activation][0].__name__}"
        more += " and MaxPool2d" if self.pool else ""
        key = f"{part.module}{more} on {list(before)} -> {list(after)}, kept {self.kept}"
        return Place(part.name, key, before, after)

    @property
    def before(self) -> tuple[int, ...]:
        return self.select.before if self.select else self.part.before

    @property
    def after(self) -> tuple[int, ...]:
        return self.pool.after if self.pool else self.part.after

    @cached_property
    def whole(self) -> nn.Module:
        """The layer with its dead inputs."""
        module = self.part.module
        if self.select is None or not isinstance(module, nn.Linear | nn.Conv2d):
            return module
        index, weight = self.select.module.index, module.weight
        assert isinstance(index, Tensor)
        wide = weight.new_zeros(len(weight), self.before[0], *weight.shape[2:])
        wide[:, index] = weight
        return rebuilt(module, wide, module.bias)

    @property
    def weight(self) -> Tensor:
        """[N, K] or [N, C, k, k], pruned ones 0, with the dead inputs; of a layer that has one."""
        weight = self.whole.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def own_weight(self) -> Tensor:
        """Without the dead inputs."""
        weight = self.part.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def bare(self) -> Stage:
        """Without its weight."""
        module = self.part.module
        if not isinstance(module, nn.Linear | nn.Conv2d):
            return self
        return replace(self, part=replace(self.part, module=without_weight(module)))

    def dressed(self, weight: Tensor, bias: Tensor | None = None) -> Stage:
        """With a weight, which may have the dead inputs; and with a bias, else its own."""
        module, select = self.part.module, self.select
        assert isinstance(module, nn.Linear | nn.Conv2d)
        if select is not None and weight.shape[1] == select.before[0]:
            index = select.module.index
            assert isinstance(index, Tensor)
            weight = weight[:, index].contiguous()
        new = rebuilt(module, weight, module.bias if bias is None else bias)
        return replace(self, part=replace(self.part, module=new))

    @property
    def bias(self) -> Tensor | None:
        """[N], or None."""
        bias = self.part.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else bias.detach()

    @property
    def terms(self) -> int:
        """How many numbers are added for one of the results."""
        return self.own_weight[0].numel() if self.product else 1

    @cached_property
    def block(self) -> int | None:
        """The largest block in which the weight was pruned, if it was; of a convolution at every tap."""
        if self.blocks or not self.product or self.groups > 1:
            return self.blocks
        weight = self.weight
        there = (weight != 0).view(*weight.shape[:2], -1).permute(2, 0, 1)
        kept = int(there.sum())
        for block in reversed(BLOCKS):
            if not kept or min(weight.shape[:2]) < block:
                continue
            live = float(F.max_pool2d(there.float(), block, ceil_mode=True).sum()) * block * block
            if live < FULL * weight.numel() and kept >= FULL * live:
                return block
        return None

    def behind(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`run`, batch first and into memory of its own, then the activation and the pool of this stage."""
        act = None if self.activation == "none" else LAYERS[self.activation][1]
        pool = self.pool.module if self.pool else None
        if act is None and pool is None:
            return run

        def more(x: Tensor) -> Tensor:
            y = run(x)
            y = y if act is None else act(y)
            return y if pool is None else pool(y)

        return more

    def double(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In float64: what it computes, and that before the activation."""
        y = x.double()
        for part in (self.select, self.part, self.pool):
            y = copy.deepcopy(part.module).double()(y) if part else y
        return (y if self.activation == "none" else LAYERS[self.activation][1](y.clone())), y

    @property
    def dense_bytes(self) -> int:
        return tensor_bytes([*self.part.module.parameters(), *self.part.module.buffers()])


def with_activation(state: dict[str, Any]) -> dict[str, Any]:
    """What pickle reads; networks that were saved while a ReLU was the one activation say `relu`."""
    others = {name: value for name, value in state.items() if name != "relu"}
    return {"activation": "relu"} | others if state.get("relu") else others


def without_weight(module: nn.Module) -> nn.Module:
    """A copy of a product for its settings and its bias."""
    assert isinstance(module, nn.Linear | nn.Conv2d)
    empty = rebuilt(module, module.weight.detach(), None)
    if module.bias is not None:  # not a second time in memory
        empty.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    empty.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    return empty


@dataclass(frozen=True)
class Packed:
    """A weight in its survivors: bits along the last axis, and the numbers of those that are 1."""

    shape: tuple[int, ...]
    bits: Tensor
    values: Tensor


def pack(weight: Tensor) -> Packed:
    there = weight != 0
    bits = torch.from_numpy(masks.pack(there.reshape(1, -1).cpu().numpy()))
    return Packed(tuple(weight.shape), bits, weight[there])


def unpack(packed: Packed) -> Tensor:
    weight = packed.values.new_zeros(packed.shape)
    bits = masks.unpack(np.asarray(packed.bits), weight.numel())
    weight.view(-1)[torch.from_numpy(bits)[0].to(weight.device)] = packed.values
    return weight


def columns(features: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for the activations of a batch, [features, batch or more]."""
    return torch.zeros(
        features, batch if batch == 1 else -(-batch // COLUMNS) * COLUMNS, dtype=dtype, device="cpu"
    )


def image(memory: Tensor, shape: tuple[int, ...], batch: int) -> Tensor:
    """[K, B] or [C, H, W, B] of the memory that `columns` gave."""
    return memory.view(*shape, -1)[..., :batch]


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def activation_of(module: nn.Module | None) -> str:
    """Its name among LAYERS; "none" of what is no such layer."""
    return next((name for name, (kind, _) in LAYERS.items() if isinstance(module, kind)), "none")


def activated(y: Tensor, activation: str) -> list[Call]:
    """What lets an activation act in place on [K, B] or [C, H, W, B] in memory that `columns` gave."""
    if activation == "none":
        return []
    if activation == "relu":
        return [bind_bias_relu(y)]
    channels, floats = len(y), y.stride(0)  # with what lies beside the batch
    shape = (1, channels, floats) if floats >= LINE else (1, 1, channels * floats)
    lines = y.as_strided(shape, (y.numel(), floats, 1))
    return [bind_activate(Planes(lines, (1, shape[2]), shape[2], 0), activation)]
