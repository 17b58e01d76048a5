"""Masks: which weights of a model are kept, by name; and as bits, 8 weights a byte, little-endian.

Everything here that takes masks takes them in any of three ways, and `by_parameter` makes one of them: a
`Masks`, as `sparselth.prune` returns it; a dict by parameter name; a dict by parameter. A mask is bool of its
parameter's shape, True = kept, or holds 0s and 1s of any dtype.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> masks = Masks({"0.weight": torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]])}, model)
    >>> masks
    <Masks of 1 layer: 2 of 8 weights kept, 25.0 %>
    >>> masks.sparsity
    0.75
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sparselth.errors import UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    Named = Iterable[tuple[str, Tensor]]
    AnyMasks = Mapping[str, Tensor] | Mapping[Tensor, Tensor]


class MaskError(UsageError, ValueError):
    """Masks that do not fit the model: which one, what was expected, what to do."""


class Masks(Mapping[str, "Tensor"]):
    """Parameter name -> bool mask of its shape, True = kept; of tied weights the first name.

    `model` is remembered weakly, so that `MaskedAdamW(model.parameters(), masks=masks)` finds each parameter.
    Copied or unpickled alone, masks keep the model or forget it; `Masks(masks, model)` are the same masks of
    another. `dict(masks)` is what safetensors or `torch.save` writes. Two of them are equal where their names
    and masks are.
    """

    def __init__(self, masks: AnyMasks, model: nn.Module | None = None) -> None:
        if model is None:
            found = {_name(key): checked(_name(key), mask) for key, mask in masks.items()}
        else:
            first = {id(p): name for name, p in unwrapped(model).named_parameters()}
            of = {first[id(p)]: mask for p, mask in by_parameter(model, masks).items()}
            found = {name: of[name] for name in first.values() if name in of}
        self._masks: dict[str, Tensor] = found
        self._model = None if model is None else weakref.ref(unwrapped(model))

    @property
    def model(self) -> nn.Module | None:
        """The model they were made for, or None where it is gone or was not given."""
        return None if self._model is None else self._model()

    @property
    def kept(self) -> int:
        """Weights kept."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    @property
    def size(self) -> int:
        """Weights in all, kept and pruned."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def sparsity(self) -> float:
        """Pruned share of the weights, from 0 to 1."""
        return 1 - self.kept / self.size if self.size else 0.0

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._masks.keys() == other._masks.keys() and all(
            mask.shape == other[name].shape and bool((mask == other[name].to(mask.device)).all())
            for name, mask in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        layers = f"{len(self)} layer{'' if len(self) == 1 else 's'}"
        return f"<Masks of {layers}: {self.kept:,} of {self.size:,} weights kept, {self._percent()}>"

    def __str__(self) -> str:
        """A line a layer: its name, shape, kept weights and their share."""
        rows = [
            (name, str([*mask.shape]), f"{int(mask.sum()):,}", f"{_percent(int(mask.sum()), mask.numel())}")
            for name, mask in self.items()
        ]
        rows.append(("all", f"{self.size:,}", f"{self.kept:,}", self._percent()))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}} kept  {d:>{wide[3]}}" for a, b, c, d in rows
        ]
        return "\n".join(lines)

    def _percent(self) -> str:
        return _percent(self.kept, self.size)

    def __getstate__(self) -> dict[str, Any]:
        return {"_masks": self._masks, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        from copy import deepcopy

        twin = Masks(deepcopy(self._masks, memo))
        model = self.model
        # copied along with its model, or as an attribute of it, the copy belongs to the copy
        model = None if model is None else memo.get(id(model), model)
        twin._model = None if model is None else weakref.ref(model)
        memo[id(self)] = twin
        return twin


def by_parameter(params: nn.Module | Named | Iterable[Tensor], masks: AnyMasks) -> dict[Tensor, Tensor]:
    """Masks of any kind as {parameter: bool mask on its device}; of tied weights either name will do.

    `params` is a model, what its `named_parameters()` gives, or, for a `Masks` or a dict by parameter, bare
    parameters. A `Masks` may hold more than those: an optimizer of a part of the model takes its part.
    MaskError, a ValueError, for a name or parameter that is not there, another shape, numbers but 0 and 1,
    and two masks of one tensor.
    """
    members, where = _members(params, masks)
    mine = {id(p): p for p in members}
    partial = isinstance(masks, Masks) and masks.model is not None and not _is_module(params)
    found: dict[Tensor, Tensor] = {}
    said: dict[int, str] = {}
    for key, mask in masks.items():
        if isinstance(key, str):
            if key not in where:
                raise _unknown(key, where)
            param, name = where[key], key
        elif id(key) in mine:
            param, name = key, next((n for n, p in where.items() if p is key), f"a parameter {[*key.shape]}")
        else:
            raise MaskError(
                f"mask {[*getattr(mask, 'shape', ())]}: expected as its key a name or a parameter of this "
                f"optimizer or model, got a {type(key).__name__}"
            )
        if partial and id(param) not in mine:
            continue
        mask = checked(name, mask, tuple(param.shape)).to(param.device)
        if param in found and not bool((found[param] == mask).all()):
            raise MaskError(
                f"masks of {said[id(param)]} and {name}: one tensor under two names (tied weights) "
                "has two masks; give one of them"
            )
        found.setdefault(param, mask)
        said.setdefault(id(param), name)
    return found


def checked(name: str, mask: object, shape: tuple[int, ...] | None = None) -> Tensor:
    """A mask as bool; MaskError where it is none, or not of `shape`."""
    import torch

    wanted = f"mask of {name}: expected a mask bool{'' if shape is None else f' {[*shape]}'}"
    if not isinstance(mask, torch.Tensor):
        raise MaskError(f"{wanted}, got a {type(mask).__name__}; torch.as_tensor makes a tensor of it")
    if (shape is not None and tuple(mask.shape) != shape) or mask.layout != torch.strided:
        raise MaskError(
            f"{wanted}, got {mask.dtype} {[*mask.shape]} {mask.layout}".replace(" torch.strided", "")
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise MaskError(f"{wanted} or 0s and 1s, got {mask.dtype} {[*mask.shape]} with other numbers")
    return mask.detach().bool()


def refuse_shards(params: Iterable[Tensor]) -> None:
    """Raise MaskError where a parameter is a shard: which weights go is said of whole ones."""
    for param in params:
        if type(param).__name__ == "DTensor" or "_local_tensor" in vars(param):
            raise MaskError(
                f"a parameter {[*param.shape]}: is a shard (DTensor), expected a whole one; prune before "
                "fully_shard, train by DistributedDataParallel"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast("nn.Module", model._modules["_orig_mod"])
        else:
            return model


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bool [..., K] to bytes [..., ceil(K / 8)]; the bits behind K are 0."""
    return np.packbits(mask, axis=-1, bitorder="little")


def unpack(bits: NDArray[np.uint8], k: int) -> NDArray[np.bool_]:
    """Bytes [..., ceil(k / 8)] to bool [..., k]; another width raises ValueError."""
    if bits.shape[-1] != -(-k // 8):
        raise ValueError(f"expected {-(-k // 8)} bytes a row for {k} weights, got {bits.shape[-1]}")
    return np.unpackbits(bits, axis=-1, count=k, bitorder="little").astype(bool)


def _members(params: Any, masks: AnyMasks) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The parameters in question, and every name that means a parameter."""
    where: dict[str, Tensor] = {}
    own = masks.model if isinstance(masks, Masks) else None
    if _is_module(params):
        where = _names(params)
        return [*where.values()], where
    items = [*params]
    if items and isinstance(items[0], tuple):
        where = dict(items)
        items = [*where.values()]
    mine = {*map(id, items)}
    if own is not None:
        theirs = _names(own)
        if any(id(p) in mine for p in theirs.values()):
            return items, where | theirs
        if not where:
            raise MaskError(
                f"masks: made for a {type(own).__name__} none of whose parameters is given here; "
                "Masks(masks, model) are the same masks of the model that is trained"
            )
    if not where and (name := next((key for key in masks if isinstance(key, str)), None)) is not None:
        raise MaskError(
            f"mask {name!r}: parameters without names; give model.named_parameters(), or Masks(masks, model)"
        )
    return items, where


def _names(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p for m in (unwrapped(model), model) for name, p in m.named_parameters(remove_duplicate=False)
    }


def _is_module(params: object) -> bool:
    from torch import nn

    return isinstance(params, nn.Module)


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise MaskError(f"masks: expected names, got a {type(key).__name__}; give the model, too")
    return key


def _unknown(name: str, where: Mapping[str, Tensor]) -> MaskError:
    return MaskError(f"mask {name!r}: {unknown('parameter', name, where)}")


def _percent(kept: int, size: int) -> str:
    return f"{100 * kept / size:.1f} %" if size else "no weights"
