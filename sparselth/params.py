"""Which tensor of a network lies where in its flat buffer, and which of them pruning ranks.

All parameters of a network lie in one buffer [P]: first the prunable weights, then what is trained but never
pruned, last what no optimizer sees. A mask is a bool vector [M] over the front. Imports neither torch nor
numpy before it is given a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from sparselth.errors import SparselthError, UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

ALIGN = 16  # floats; every tensor starts on a 64-byte boundary of the flat buffer


@dataclass(frozen=True)
class TensorSpec:
    """One parameter tensor and its place in the flat buffer.

    A weight is a matrix [N, K]: N outputs, K = all that feeds one of them (C * k * k for a filter).
    `shape` is the shape a user knows it by, [C_out, C_in, k, k] for a convolution.
    """

    name: str
    shape: tuple[int, ...]
    offset: int  # in floats, within one replica's flat buffer
    fan_in: int = 0
    fan_out: int = 0
    output: bool = False  # the last layer, pruned at half the rate
    rate_scale: float = 1.0  # share of the pruning rate that a level takes of this tensor

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of a weight."""
        return self.shape[0], self.numel // self.shape[0]

    @property
    def span(self) -> slice:
        """Where it lies in a buffer [P] or, a weight, in a mask [M]."""
        return slice(self.offset, self.offset + self.numel)

    @property
    def end(self) -> int:
        """Where what is behind it may start."""
        return self.offset + aligned(self.numel)


@dataclass(frozen=True)
class Params:
    """The tensors of one network, in the order of its buffer; each part may be empty but the first."""

    weights: tuple[TensorSpec, ...]  # prunable
    trained: tuple[TensorSpec, ...] = ()  # and never pruned: biases, batch norms
    statistics: tuple[TensorSpec, ...] = ()  # that no optimizer sees
    of_module: bool = False  # of a user's, of whose other tensors nothing is known but what they are

    @staticmethod
    def of(module: nn.Module, exclude: Sequence[str | type] | str | type = (), output: str = "") -> Params:
        """Where the tensors of any module lie; a tied one lies once, under its first name.

        Prunable are the weights of fully connected layers, convolutions, transposed ones too, embeddings,
        attention and recurrent layers, and whatever else has two or more dimensions and is no norm's and no
        bias. `exclude` names weights to be left alone: "head.weight", a module "head", globs "head.*", or
        types of modules, nn.Embedding. `output` is the weight of the last layer, pruned at half the rate
        under scope "layer". Parameters that need no gradient are never pruned. Whatever else `state_dict`
        saves is among the statistics: numbers that floats cannot hold as digits of 16 bits along a last axis.

        UsageError where nothing is prunable, or what is excluded is not there; SparselthError for parameters
        without a shape yet, and for complex ones.
        """
        excluded, named = _excluded(module, exclude), [*_named(module)]
        weights, trained, fixed = list[str](), list[str](), list[str]()
        for name, tensor, owner in named:
            if owner is None or not tensor.requires_grad:
                fixed.append(name)
            else:
                (weights if _is_weight(name, tensor, owner) and name not in excluded else trained).append(
                    name
                )
        if not weights:
            raise UsageError(
                f"{type(module).__name__}: has no prunable weights; expected a parameter that needs a "
                "gradient, of two or more dimensions, no norm's and not excluded"
            )
        found, offset = dict[str, TensorSpec](), 0
        tensors = {name: tensor for name, tensor, _ in named}
        for name in (*weights, *trained, *fixed):
            shape, fans = tuple(floats(tensors[name], empty=True).shape), (0, 0)
            if name in weights:
                field = prod(shape[2:])
                fans = shape[1] * field, shape[0] * field
            last = name == output and name in weights
            found[name] = TensorSpec(name, shape, offset, *fans, last, 0.5 if last else 1.0)
            offset = found[name].end
        ranked, unranked, rest = (tuple(found[name] for name in part) for part in (weights, trained, fixed))
        return Params(ranked, unranked, rest, of_module=True)

    def gather(self, module: nn.Module) -> Tensor:
        """The tensors of a module of this shape, copied into a flat buffer [1, P] on their device, fp32."""
        import torch

        tensors = self.tensors(module)
        flat = torch.zeros(1, self.size, dtype=torch.float32, device=tensors[self.weights[0].name].device)
        for spec in self.all:
            flat[0, spec.span].view(spec.shape).copy_(floats(tensors[spec.name]))
        return flat

    def scatter(self, flat: Tensor, module: nn.Module) -> None:
        """Copy a flat buffer [1, P] or [P] into the tensors of a module of this shape."""
        tensors = self.tensors(module)
        for spec in self.all:
            copy_floats(tensors[spec.name], flat.view(-1)[spec.span].view(spec.shape))

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of a module by name, without their gradients; SparselthError where one does not fit."""
        found = {name: tensor.detach() for name, tensor, _ in _named(module)}
        for spec in self.all:
            if spec.name not in found:
                raise SparselthError(
                    f"{type(module).__name__}: has no {spec.name}; expected the network it had"
                )
            shape = tuple(floats(found[spec.name], empty=True).shape)
            if shape != spec.shape:
                raise SparselthError(
                    f"{type(module).__name__}: {spec.name} has shape {list(shape)}, "
                    f"expected {list(spec.shape)}"
                )
        return found

    @property
    def unpruned(self) -> tuple[TensorSpec, ...]:
        """All that is behind the weights."""
        return self.trained + self.statistics

    @property
    def all(self) -> tuple[TensorSpec, ...]:
        return self.weights + self.unpruned

    @cached_property
    def mask_size(self) -> int:
        """M: floats of the buffer that weights take, alignment included."""
        return self.weights[-1].end

    @cached_property
    def trained_size(self) -> int:
        """Floats of the buffer that the optimizer sees."""
        return (self.weights + self.trained)[-1].end

    @cached_property
    def size(self) -> int:
        """P: floats of the whole buffer, alignment included."""
        return self.all[-1].end

    @cached_property
    def prunable(self) -> int:
        """Number of weights that pruning ranks."""
        return sum(spec.numel for spec in self.weights)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a flat buffer [R, P]: weights as matrices [R, N, K], all others as [R, N, 1]."""
        shapes = [(s, s.matrix) for s in self.weights] + [(s, (s.numel, 1)) for s in self.unpruned]
        return {s.name: flat[:, s.span].view(-1, *shape) for s, shape in shapes}

    def full_mask(self) -> Tensor:
        """The mask of the dense network, bool [M]; the alignment gaps between tensors are False."""
        import torch

        mask = torch.zeros(self.mask_size, dtype=torch.bool, device="cpu")
        for spec in self.weights:
            mask[spec.span] = True
        return mask

    def packed(self, masks: Tensor) -> dict[str, Tensor]:
        """The bits of masks [R, M] by weight tensor, uint8 [R, N, ceil(K / 8)]."""
        from sparselth.kernels import bitmask

        return {s.name: bitmask.pack(masks[:, s.span].view(-1, *s.matrix)) for s in self.weights}

    def kept(self, mask: Tensor) -> dict[str, int]:
        """Surviving weights of every weight tensor, from a mask [M]."""
        return {s.name: int(mask[s.span].sum()) for s in self.weights}


def matrix(spec: TensorSpec, flat: Tensor) -> Tensor:
    """A weight's part of a vector [P] or [M] as [N, K]."""
    return flat[spec.span].view(spec.matrix)


def aligned(n: int) -> int:
    """Floats that n of them take in a buffer."""
    return -(-n // ALIGN) * ALIGN


_NORM = re.compile(r"Norm(\d[dD])?$")  # BatchNorm2d, LayerNorm, LlamaRMSNorm: by the names of their types


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Every parameter with its owner, then every saved buffer with None; none of them twice, none empty.

    Names are those of `named_parameters` and `named_buffers`.
    """
    import torch

    owners = dict(module.named_modules())
    for name, tensor in module.named_parameters():
        if isinstance(tensor, torch.nn.parameter.UninitializedParameter):
            raise SparselthError(
                f"{type(module).__name__}: {name} has no shape yet; give the network an example first"
            )
        if tensor.is_complex():
            raise SparselthError(f"{type(module).__name__}: {name} is complex; expected real parameters")
        if tensor.numel():
            yield name, tensor, owners[name.rpartition(".")[0]]
    saved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for name in owner._buffers.keys() - owner._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers():
        if name in saved and buffer.numel():
            yield name, buffer, None


def _is_weight(name: str, tensor: Tensor, owner: nn.Module) -> bool:
    """Whether pruning ranks a parameter; a class token [1, 1, K] is as little a matrix as a bias is."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    last = name.rpartition(".")[2]
    if _NORM.search(type(owner).__name__) or last == "bias" or last.startswith("bias_"):
        return False
    if last == "weight" and isinstance(
        owner, nn.Linear | nn.Bilinear | _ConvNd | nn.Embedding | nn.EmbeddingBag
    ):
        return True
    return tensor.dim() > 1 and sum(n > 1 for n in tensor.shape) > 1


def _excluded(module: nn.Module, exclude: Sequence[str | type] | str | type) -> set[str]:
    """The names of all parameters that some entry means; UsageError for an entry that means none."""
    entries = (exclude,) if isinstance(exclude, str | type) else tuple(exclude)
    first = {id(tensor): name for name, tensor in module.named_parameters()}
    names = {name: first[id(tensor)] for name, tensor in module.named_parameters(remove_duplicate=False)}
    found = set[str]()
    for entry in entries:
        if isinstance(entry, type):
            below = [
                f"{path}." if path else "" for path, one in module.named_modules() if isinstance(one, entry)
            ]
            meant = {own for name, own in names.items() if name.startswith(tuple(below))}
        else:
            meant = {
                own for name, own in names.items() if fnmatchcase(name, entry) or name.startswith(f"{entry}.")
            }
        if not meant:
            known = (*names, *(path for path, _ in module.named_modules() if path))
            raise unknown(
                "parameter or module to exclude", entry if isinstance(entry, str) else entry.__name__, known
            )
        found |= meant
    return found


def floats(tensor: Tensor, empty: bool = False) -> Tensor:
    """A tensor as fp32 numbers that say all of it; where one cannot, several do along a last axis.

    `empty`: their shape is all that is wanted.
    """
    import torch

    if empty:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    tensor = tensor.detach()
    if tensor.dtype == torch.complex64:
        return torch.view_as_real(tensor.resolve_conj())
    if _in_digits(tensor):
        return tensor.contiguous().unsqueeze(-1).view(torch.int16).to(torch.float32)
    return tensor.to(torch.float32)


def copy_floats(tensor: Tensor, said: Tensor) -> None:
    """Set a tensor to what its `floats` say."""
    import torch

    if tensor.dtype == torch.complex64:
        torch.view_as_real(tensor).copy_(said)
    elif _in_digits(tensor):
        tensor.copy_(said.to(torch.int16).contiguous().view(tensor.dtype).view(tensor.shape))
    else:
        tensor.copy_(said)


def _in_digits(tensor: Tensor) -> bool:
    """Whether a dtype holds numbers that fp32 does not."""
    import torch

    return tensor.dtype.itemsize > (4 if tensor.dtype == torch.float32 else 2)
