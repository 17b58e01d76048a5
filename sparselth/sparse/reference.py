"""What a model computes as it stands, hooks and parametrizations included: conversion is held against it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.utils import _pytree as pytree

from sparselth.check import Checked, check
from sparselth.errors import one_line


@dataclass(frozen=True)
class Given:
    """The inputs of a call: what is by position also has its name, where the model's signature tells it."""

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def of(model: nn.Module, example: Any) -> Given:
        """`example`: the first argument; a tuple are all by position, a dict all by name."""
        names = []
        for name, parameter in inspect.signature(model.forward).parameters.items():
            if parameter.kind != parameter.POSITIONAL_OR_KEYWORD:
                break
            names.append(name)
        args = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
        kwargs = example if isinstance(example, Mapping) else {}
        return Given._of(tuple(names), args, kwargs)

    @staticmethod
    def _of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        named = {name: named[name] for name in sorted(named)}
        leaves, spec = pytree.tree_flatten((args[len(names) :], named))
        return Given(names, tuple(leaves), spec)

    def again(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        """Those of another call, which must be of this one's kind: ValueError."""
        if self._is_single and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            given = Given(self.names, args, self.spec)  # the same, sooner
        else:
            given = self._same_containers(args, kwargs) or Given._of(self.names, args, kwargs)
        if given.spec != self.spec or len(given.leaves) != len(self.leaves):
            raise ValueError(f"expected inputs like the example's, {self}; got {given}")
        for a, b in zip(self.leaves, given.leaves, strict=True):
            like = (
                isinstance(b, Tensor) and a.dtype is b.dtype and a.dim() == b.dim() and a.device == b.device
            )
            if not (like if isinstance(a, Tensor) else a is b or (type(a) is type(b) and a == b)):
                raise ValueError(f"expected inputs like the example's, {self}; got {given}")
        return given

    @cached_property
    def _is_single(self) -> bool:
        """Whether it is one tensor, the first argument."""
        return len(self.leaves) == 1 and Given._of(self.names, self.leaves, {}).spec == self.spec

    def _same_containers(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given | None:
        """What `_of` gives, in a fraction of its time; None where it may not be of this kind."""
        named = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        leaves = unfolded((args[len(self.names) :], {name: named[name] for name in sorted(named)}), self.like)
        return None if leaves is None else Given(self.names, tuple(leaves), self.spec)

    @cached_property
    def like(self) -> Any:
        """The containers, for `unfolded`."""
        return containers(self.spec)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def call(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by position and by name, with others in the place of the tensors."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        # by position as far as that goes: a forward patched on an instance may have other names
        first = [kwargs.pop(name) for name in self._leading(kwargs)]
        return (*first, *args), kwargs

    def _leading(self, kwargs: Mapping[str, Any]) -> list[str]:
        found = []
        for name in self.names:
            if name not in kwargs:
                break
            found.append(name)
        return found

    def to(self, tensors: list[Tensor]) -> Given:
        left = iter(tensors)
        return replace(self, leaves=tuple(next(left) if isinstance(x, Tensor) else x for x in self.leaves))

    def other(self, seed: int = 0) -> Given:
        """Other inputs of this kind: the last of each batch comes first, and numbers are others."""
        g = torch.Generator().manual_seed(seed)

        def drawn(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=g, dtype=torch.float32, device="cpu")
            return 0.7 * t + 0.1 * noise.to(t)

        others = [drawn(t) if t.is_floating_point() else t for t in self.tensors]
        return self.to([t.flip(0) if t.dim() else t for t in others])

    def bare(self) -> Given:
        """Without numbers, for its kind alone."""
        return self.to([torch.empty((0,) * t.dim(), dtype=t.dtype, device=t.device) for t in self.tensors])

    def __str__(self) -> str:
        def word(leaf: Any) -> str:
            if not isinstance(leaf, Tensor):
                return repr(leaf)[:40]
            return f"{str(leaf.dtype).removeprefix('torch.')} of {leaf.dim()} dimensions on {leaf.device}"

        args, kwargs = pytree.tree_unflatten([word(leaf) for leaf in self.leaves], self.spec)
        words = [*map(str, args), *(f"{name}: {value}" for name, value in kwargs.items())]
        return f"({', '.join(words)})"


def containers(spec: pytree.TreeSpec) -> Any:
    """The containers of a spec, for `unfolded`; None where they are particular about what they contain."""
    try:
        return pytree.tree_unflatten([...] * spec.num_leaves, spec)
    except Exception:
        return None


def unfolded(tree: Any, like: Any) -> list[Any] | None:
    """The leaves of a tree in tuples, lists and dicts as `containers` gave them; None where they are others.

    As torch's pytree has them, without asking for the kind of each leaf.
    """
    if like is ...:
        return [tree]
    kind = type(like)
    if type(tree) is not kind or kind not in (dict, list, tuple) or len(tree) != len(like):
        return None
    if kind is dict:
        if [*tree] != [*like]:
            return None
        tree, like = tree.values(), like.values()
    leaves = list[Any]()
    for one, other in zip(tree, like, strict=True):
        more = [one] if other is ... else unfolded(one, other)
        if more is None:
            return None
        leaves += more
    return leaves


@dataclass(frozen=True)
class Reference:
    """What the model gives for the example: in its own dtype, and in float64 where the model can do that."""

    own: list[Any]
    exact: list[Any]
    spec: pytree.TreeSpec  # of the outputs

    @staticmethod
    def of(model: nn.Module, found: Mapping[Tensor, Tensor], given: Given, double: bool = True) -> Reference:
        """Of the model with zeros for what is pruned; ValueError where it cannot compute the example."""
        args, kwargs = given.call(given.tensors)
        with _as_it_was(model):
            try:
                out = functional_call(
                    model, _state(model, found), args, kwargs, tie_weights=True, strict=False
                )
            except Exception as error:
                raise ValueError(f"example: the model cannot compute it: {one_line(str(error))}") from error
            own, spec = pytree.tree_flatten(out)
            exact = _double(model, found, given, spec) if double else None
        return Reference([_kept(leaf) for leaf in own], own if exact is None else exact, spec)

    @property
    def as_is(self) -> Reference:
        """What the same operations give again, whatever they are in float64."""
        return replace(self, exact=self.own)

    def check(self, out: Any, words: str, terms: int) -> Checked:
        """The worst of the outputs; other structures, integers and constants must be the same."""
        leaves, _ = pytree.tree_flatten(out)
        most: list[Checked] = []
        for found, own, exact in zip(leaves, self.own, self.exact, strict=False):
            if isinstance(own, Tensor) and own.is_floating_point() and isinstance(found, Tensor):
                most.append(check(found, exact, words, terms=terms, own=own))
            elif not (torch.equal(found, own) if isinstance(own, Tensor) else found == own):
                most.append(_wrong("other numbers that are no floats"))
        if len(leaves) != len(self.own):
            most.append(_wrong(f"{len(leaves)} outputs instead of {len(self.own)}"))
        right = Checked(0.0, 1.0, 0.0, 1.0)
        return max(most, key=lambda c: (c.fault is not None, c.error / (c.allowed or 1.0)), default=right)


@dataclass(frozen=True)
class Samples:
    """The example and, where its outputs are few numbers, other inputs: one number is right by luck."""

    calls: list[tuple[Given, Reference]]

    @staticmethod
    def of(model: nn.Module, found: Mapping[Tensor, Tensor], given: Given, reference: Reference) -> Samples:
        calls = [(given, reference)]
        sizes = [leaf.numel() for leaf in reference.own if isinstance(leaf, Tensor)]
        for seed in range(MORE if min(sizes, default=FEW) < FEW else 0):
            other = given.other(seed)
            try:
                calls.append((other, Reference.of(model, found, other)))
            except ValueError:  # the model takes no other inputs of this kind
                break
        return Samples(calls)

    def check(self, call: Callable[[Given], Any], words: str, terms: int) -> Checked:
        """What `call` gives for the inputs, as `Reference.check` has it, over all of them at once."""
        outs = [pytree.tree_leaves(call(given)) for given, _ in self.calls]
        alone = self.calls[0][1].check(outs[0], words, terms)
        if len(outs) == 1 or alone.mismatch or len({len(out) for out in outs}) > 1:
            return alone
        many = Reference(
            [_joined(leaves) for leaves in zip(*(r.own for _, r in self.calls), strict=True)],
            [_joined(leaves) for leaves in zip(*(r.exact for _, r in self.calls), strict=True)],
            self.calls[0][1].spec,
        )
        return many.check([_joined(leaves) for leaves in zip(*outs, strict=True)], words, terms)


FEW, MORE = 256, 7  # numbers of an output; further inputs where it has fewer


def _joined(leaves: tuple[Any, ...]) -> Any:
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return repr(leaves)
    return torch.cat([leaf.flatten() for leaf in leaves])


def masked_copy(model: nn.Module, found: Mapping[Tensor, Tensor], given: Given) -> nn.Module:
    """A copy with zeros for what is pruned, weights that hooks and parametrizations make made once for all.

    ValueError where it cannot be copied.
    """
    twin = copied(model)
    own = dict(twin.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in found:
            own[name].data = torch.where(found[parameter], parameter, torch.zeros_like(parameter))
    twin.requires_grad_(False)
    args, kwargs = given.call(given.tensors)
    twin(*args, **kwargs)  # hooks that make weights make them of what is left
    for module in [*twin.modules()]:
        _bake(module)
    return twin.eval()


def copied(model: nn.Module) -> nn.Module:
    """A copy; ValueError where it cannot be copied."""
    with _as_it_was(model):
        for module in model.modules():  # torch copies no results of a graph
            made = {
                k: v for k, v in module.__dict__.items() if isinstance(v, Tensor) and v.grad_fn is not None
            }
            module.__dict__.update({name: made[name].detach() for name in made})
        try:
            return copy.deepcopy(model)
        except Exception as error:
            raise ValueError(f"model: cannot be copied: {one_line(str(error))}") from error


ENDS = "orig", "mask", "g", "v", "u"  # of what torch's hooks make a weight of


def _bake(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        made: Any = module.parametrizations
        weights = {name: getattr(module, name).detach().clone() for name in made}
        module.__class__ = parametrize.type_before_parametrizations(module)  # that of the copy alone
        del module.parametrizations
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight))
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    for key, hook in [*module._forward_pre_hooks.items()]:
        name = _makes(hook)
        if name is None or not isinstance(module.__dict__.get(name), Tensor):
            continue
        weight = module.__dict__.pop(name).detach().clone()
        del module._forward_pre_hooks[key]
        for end in ENDS:
            module._parameters.pop(f"{name}_{end}", None)
            module._buffers.pop(f"{name}_{end}", None)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _makes(hook: Any) -> str | None:
    """The weight that one of torch's own hooks makes."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name
    ours = type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
    return str(hook.name) if ours else None


def _state(model: nn.Module, found: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.where(found[p], p.detach(), torch.zeros_like(p)) if p in found else p.detach()
        for name, p in model.named_parameters()
    }


def _double(
    model: nn.Module, found: Mapping[Tensor, Tensor], given: Given, spec: pytree.TreeSpec
) -> list[Any] | None:
    """Outputs in float64; None where the model insists on another dtype."""
    state = _state(model, found) | dict(model.named_buffers())
    wide = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
    tensors = [t.double() if t.is_floating_point() else t for t in given.tensors]
    args, kwargs = given.call(tensors)
    try:
        out = functional_call(model, wide, args, kwargs)
    except Exception:
        return None
    leaves, own = pytree.tree_flatten(out)
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return leaves if own == spec and all(leaf.dtype == torch.float64 for leaf in floats) else None


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Weights that hooks make in a call are plain tensors of a module: they are put back behind it."""
    held = [(m, {k: v for k, v in m.__dict__.items() if isinstance(v, Tensor)}) for m in model.modules()]
    try:
        yield
    finally:
        for module, tensors in held:
            module.__dict__.update(tensors)


def _kept(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _wrong(why: str) -> Checked:
    return Checked(float("inf"), 1.0, float("inf"), 1.0, why)
