"""Prune, snapshot, rewind: lottery tickets in a loop of one's own, on any module.

>>> import torch, sparselth
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
>>> start = sparselth.snapshot(model)                     # the weights that a ticket goes back to
>>> # ... train the model ...
>>> masks = sparselth.prune(model, sparsity=0.8, scope="global", score="magnitude")
>>> masks
<Masks of 2 layers: 32 of 160 weights kept, 20.0 %>
>>> sparselth.rewind(model, masks, start)                 # the ticket: its original weights, the others 0
>>> optimizer = sparselth.MaskedAdamW(model.parameters(), lr=1e-3, masks=masks)
>>> model(torch.randn(4, 8)).square().mean().backward()
>>> optimizer.step()                                      # pruned weights stay exactly 0
>>> bool(model[0].weight[~masks["0.weight"]].any())
False
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparselth import pruning
from sparselth.errors import UsageError
from sparselth.masks import Masks, by_parameter, refuse_shards, unwrapped
from sparselth.params import Params, TensorSpec, aligned
from sparselth.scores import SCORES, ranked

if TYPE_CHECKING:
    from sparselth.masks import AnyMasks

SCOPES = ("global", "layer", "unit")
Scope = Literal["global", "layer", "unit"]
Score = str | Callable[[str, nn.Parameter], Tensor]
Exclude = Sequence[str | type] | str | type
Rule = Callable[[str, int, int], int]  # of a layer or of "all": how many stay, of how many, of those alive


def prune(
    model: nn.Module,
    sparsity: float,
    scope: Scope = "global",
    score: Score = "magnitude",
    exclude: Exclude = (),
    masks: AnyMasks | None = None,
) -> Masks:
    """Set the weights of least score to 0, in place, until `sparsity` of all are pruned; their masks.

    model: any module; its weights are those of `sparselth.params.Params.of`: of fully connected layers,
    convolutions, embeddings, attention, recurrent layers; no biases and no norms. Tied weights have one mask.
    sparsity: share of the weights that is pruned after the call, from 0 to below 1: exactly
    round(sparsity * n) of n, equal scores by lowest index.
    scope: "global" ranks all weights together; "layer" takes the share of each layer, "unit" of its units:
    neurons, filters, rows of an embedding, by the sum of their scores. Then leave out the output layer.
    score: "magnitude", "random" (by torch's own generator), the name of a registered score that needs no
    gradient, or a function (name, parameter) -> numbers of its shape: lambda name, w: (w * w.grad).abs().
    exclude: names, of parameters or modules, globs of them ("*.head.*"), and types of modules.
    masks: what was pruned before and stays pruned, as `by_parameter` takes it.

    UsageError for what cannot be; SparselthError where a score is NaN. The model's optimizers go on only if
    they know the masks: make a new one, as `MaskedAdamW(model.parameters(), masks=masks)`.
    """
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise UsageError(f"`sparsity` {sparsity!s:.40}: expected a share from 0 to below 1, such as 0.8")

    def rule(name: str, n: int, alive: int) -> int:
        keep = n - pruning.rounded(sparsity * n)
        if keep > alive:
            raise UsageError(
                f"`sparsity` {sparsity:g}: keeps {keep:,} of {n:,} ({name}), the masks only {alive:,}; "
                f"expected {1 - alive / n:.4f} or more"
            )
        return keep

    return prune_by(model, rule, scope, score, exclude, masks)


def prune_by(
    model: nn.Module, rule: Rule, scope: Scope, score: Score, exclude: Exclude, masks: AnyMasks | None
) -> Masks:
    """As `prune`; `rule` says how many stay, of how many there are and how many are left."""
    if scope not in SCOPES:
        raise UsageError(f"`scope` {scope!s:.40}: expected one of {', '.join(SCOPES)}")
    module = unwrapped(model)
    weights = prunable(module, exclude)
    kept = {} if masks is None else by_parameter(module, masks)
    params = laid_out(weights)
    mask = flat(params, {name: kept[p] for name, p in weights.items() if p in kept})
    mask = mask.to(next(iter(weights.values())).device)
    with torch.no_grad():
        scores = _scores(module, params, weights, mask, score)
        label = score if isinstance(score, str) else getattr(score, "__name__", "function")
        if scope == "unit":
            found = _by_unit(module, params, scores, mask, rule, label)
        else:
            found = _by_weight(params, scores, mask, rule, scope, label)
    kept |= {weights[name]: part.to(weights[name].device) for name, part in by_name(params, found).items()}
    zero(kept)
    return Masks(kept, module)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """A copy of the model's `state_dict` on the CPU: parameters and saved buffers, to go back to."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for name, value in unwrapped(model).state_dict().items()
    }


def rewind(model: nn.Module, masks: AnyMasks, snapshot: Mapping[str, Any]) -> None:
    """Put parameters and buffers back to a snapshot, in place, and pruned weights to 0.

    snapshot: what `snapshot` gave, or any `state_dict` of this model. An optimizer knows nothing of it and
    keeps its moments: make a new one for the next training. UsageError where names or shapes differ.
    """
    module = unwrapped(model)
    kept = by_parameter(module, masks)
    here = module.state_dict()
    for name in [*here, *snapshot]:
        found, wanted = (_said(name, side) for side in (snapshot, here))
        if found != wanted:
            raise UsageError(f"snapshot: {name} is {found}, of the {type(module).__name__} it is {wanted}")
    module.load_state_dict(snapshot)
    zero(kept)


def prunable(module: nn.Module, exclude: Exclude = ()) -> dict[str, nn.Parameter]:
    """The weights that pruning ranks, by name, in the model's order."""
    refuse_shards(module.parameters())
    return {spec.name: module.get_parameter(spec.name) for spec in Params.of(module, exclude).weights}


def laid_out(weights: Mapping[str, Tensor]) -> Params:
    """Where weights lie in a flat mask [M]; of any dtype, since nothing else is there."""
    specs, offset = list[TensorSpec](), 0
    for name, weight in weights.items():
        specs.append(TensorSpec(name, tuple(weight.shape), offset))
        offset += aligned(weight.numel())
    return Params(tuple(specs))


def flat(params: Params, masks: Mapping[str, Tensor]) -> Tensor:
    """Masks by name as one vector [M], on the CPU; of a weight without one all is kept."""
    found = params.full_mask()
    for spec in params.weights:
        if spec.name in masks:
            found[spec.span] = masks[spec.name].reshape(-1).cpu()
    return found


def by_name(params: Params, mask: Tensor) -> dict[str, Tensor]:
    """The inverse of `flat`."""
    return {spec.name: mask[spec.span].view(spec.shape) for spec in params.weights}


def zero(masks: Mapping[Tensor, Tensor]) -> None:
    """Set pruned weights to 0."""
    with torch.no_grad():
        for param, mask in masks.items():
            param.masked_fill_(~mask, 0)


def check_score(score: Score) -> None:
    """Raise UsageError for the name of a score that takes more than there is behind a user's training."""
    if not isinstance(score, str):
        return
    known = SCORES[score]
    if known.autograd:
        raise UsageError(
            f"`score` {score!r}: takes gradients of a batch, and has none here; give a function "
            "(name, parameter) -> numbers of its shape, such as lambda name, w: (w * w.grad).abs()"
        )
    if known.start:
        raise UsageError(
            f"`score` {score!r}: compares with the weights that training began with, and has none here; "
            "give a function (name, parameter) -> numbers of its shape, such as "
            "lambda name, w: (w - start[name]).abs()"
        )


def _scores(
    module: nn.Module, params: Params, weights: Mapping[str, nn.Parameter], mask: Tensor, score: Score
) -> Tensor:
    """One number a weight, [M], in fp32 or better."""
    if isinstance(score, str):
        check_score(score)
        numbers = _joined(params, weights, mask.device)
        return SCORES[score].score(cast(Any, module), numbers, mask, cast(Any, None), torch.default_generator)
    found = {}
    for name, weight in weights.items():
        part = score(name, weight)
        if not isinstance(part, Tensor) or part.shape != weight.shape or part.is_complex():
            said = _said(name, {name: part})
            raise UsageError(f"`score`: expected numbers {[*weight.shape]} for {name}, got {said}")
        found[name] = part
    return _joined(params, found, mask.device)


def _joined(params: Params, parts: Mapping[str, Tensor], device: torch.device) -> Tensor:
    dtype = torch.float32
    for part in parts.values():
        dtype = torch.promote_types(dtype, part.dtype)
    found = torch.zeros(params.mask_size, dtype=dtype, device=device)
    for spec in params.weights:
        found[spec.span] = parts[spec.name].detach().reshape(-1).to(device, dtype)
    return found


def _by_weight(params: Params, scores: Tensor, mask: Tensor, rule: Rule, scope: Scope, label: str) -> Tensor:
    alive = params.kept(mask)
    if scope == "global":
        keep = {"all": rule("all", params.prunable, sum(alive.values()))}
    else:
        keep = {s.name: rule(s.name, s.numel, alive[s.name]) for s in params.weights}
    return pruning.prune(params, ranked(label, scores, mask), mask, keep)


def _by_unit(
    module: nn.Module, params: Params, scores: Tensor, mask: Tensor, rule: Rule, label: str
) -> Tensor:
    """Whole units, a layer at a time; the sum of its scores is the score of a unit."""
    units = {s.name: _units(module, s).to(mask.device) for s in params.weights}
    sizes = {name: int(unit.max()) + 1 for name, unit in units.items()}
    layers = laid_out(
        {name: torch.empty(n, 1, dtype=torch.float32, device="meta") for name, n in sizes.items()}
    )
    sums = torch.zeros(layers.mask_size, dtype=torch.float64, device=mask.device)
    alive = torch.zeros(layers.mask_size, dtype=torch.bool, device=mask.device)
    for layer, spec in zip(layers.weights, params.weights, strict=True):
        kept, unit = mask[spec.span], units[spec.name]
        sums[layer.span].index_add_(0, unit, scores[spec.span].double().where(kept, 0))
        alive[layer.span][unit[kept]] = True
    left = layers.kept(alive)
    keep = {name: rule(f"units of {name}", n, left[name]) for name, n in sizes.items()}
    staying = pruning.prune(layers, ranked(label, sums, alive), alive, keep)
    found = mask.clone()
    for layer, spec in zip(layers.weights, params.weights, strict=True):
        found[spec.span] &= staying[layer.span][units[spec.name]]
    return found


def _units(module: nn.Module, spec: TensorSpec) -> Tensor:
    """The number of the unit, neuron or filter, that each weight feeds, [numel]."""
    owner, shape = module.get_submodule(spec.name.rpartition(".")[0]), spec.shape
    if isinstance(owner, _ConvTransposeNd):  # [inputs, outputs of a group, ...]
        groups = owner.groups
        shape = (groups, shape[0] // groups, *shape[1:])
        numbers = torch.arange(groups * shape[2], device="cpu").view(
            groups, 1, shape[2], *(1 for _ in shape[3:])
        )
    else:
        at = 0  # what is no layer's, a table of places [1, T, K], has its units behind axes of one
        if not isinstance(owner, nn.Linear | nn.Bilinear | _ConvNd):
            at = next((i for i, n in enumerate(shape) if n > 1), 0)
        numbers = torch.arange(shape[at], device="cpu").view(-1, *(1 for _ in shape[at + 1 :]))
    return numbers.expand(shape).reshape(-1)


def _said(name: str, state: Mapping[str, Any]) -> str:
    value = state.get(name)
    if isinstance(value, Tensor):
        return f"{[*value.shape]}"
    return "missing" if name not in state else f"a {type(value).__name__}"
