"""The file of a strong ticket: a seed, a mask, and nothing that the seed says already.

    mask/NAME       which weights of a tensor are kept, row-major: 0, 1, and 2 where a mask turns the sign; by
                    `sparselth.entropy`
    redraws/NAME/B  byte B of how often, or from where, each kept weight was drawn again, 0 where it was not;
                    left out where that byte is 0 throughout
    statistics      running means and variances of batch norms, fp32, in the order of Params; of a module
                    whatever is no weight

The weights themselves are drawn again, as a function of (seed, layer, index, redraws); what a dropped weight
was changes nothing. Safetensors with a header and a checksum, as other tickets; `tickets.load` reads both
as weights, and `load` a strong one as a network that holds none. Imports no torch before it draws weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselth import entropy
from sparselth.errors import SparselthError, UsageError
from sparselth.files import Arrays, load_arrays, load_header, save_arrays
from sparselth.frozen import METHODS, Frozen, weights_of
from sparselth.models import Model, get_model
from sparselth.models.module import is_module
from sparselth.params import Params, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "sparselth.strong-ticket/1"
PLANES = 4  # bytes of a number of redraws
Whole = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Content:
    """What a file holds: how weights were drawn, and buffers in the order of Params."""

    frozen: Frozen
    mask: NDArray[np.int8]  # [M]: 0, 1, or -1 where a kept weight's sign is turned
    redraws: Whole | None  # [M], `State.generations` of the kept weights; None where a method has none
    statistics: NDArray[np.float32]  # what `said` names, one behind the other

    @staticmethod
    def of(params: Params, frozen: Frozen, mask: Tensor, redraws: Tensor | None, flat: Tensor) -> Content:
        """What a file keeps of a mask [M], redraws [M] and a buffer [P] that ends in running statistics."""
        symbols = mask.cpu().numpy().astype(np.int8)
        statistics = [flat[spec.span].cpu().numpy() for spec in said(params)]
        return Content(
            frozen,
            symbols,
            None if redraws is None else np.where(symbols, redraws.cpu().numpy(), 0).astype(np.int32),
            np.concatenate([np.zeros(0, np.float32), *statistics]),
        )

    def weights(self, params: Params) -> Tensor:
        """The network [P] that it is."""
        import torch

        method = METHODS[self.frozen.method]
        flat = method.start(self.frozen, params, torch.Generator())
        redraws = None if self.redraws is None else torch.from_numpy(self.redraws)
        drawn = weights_of(self.frozen, params, redraws, "cpu")
        flat[: params.mask_size] = method.network(params, torch.from_numpy(self.mask), drawn)
        at = 0
        for spec in said(params):
            flat[spec.span] = torch.from_numpy(self.statistics[at : at + spec.numel])
            at += spec.numel
        return flat

    def kept(self, params: Params) -> dict[str, int]:
        """Kept weights of every tensor."""
        return {spec.name: int(np.count_nonzero(self.mask[spec.span])) for spec in params.weights}


@dataclass(frozen=True, eq=False)
class StrongTicket:
    """A strong ticket that was found, with its network."""

    model: Model
    header: dict[str, Any]
    content: Content

    def network(self) -> nn.Module:
        """The network, in evaluation mode, of layers that hold a seed and masks and draw their weights.

        Weights that are not of one magnitude (`law` normal or uniform, but for biprop) are decoded, in fp32;
        printed, the network says what each layer holds. See `sparselth.seeded`. Decoding takes the memory of
        the dense network for as long as the call.
        """
        from sparselth.seeded import seeded

        return seeded(self.model, self.content.weights(self.model.params), self.content.frozen.seed)


def load(file: str | Path) -> StrongTicket:
    """The strong ticket in a file of a run, cells/seed0-ticket-00.safetensors.

    SparselthError when the file is none or cannot be read, UsageError when nobody knows its model.
    """
    file = Path(file)
    if not file.is_file():
        raise SparselthError(f"{file}: no such file; tickets lie in the folder cells of a run")
    head = load_header(file)
    if head.get("schema") != SCHEMA or not isinstance(head.get("model"), str):
        raise SparselthError(f"{file}: expected a strong ticket, {SCHEMA}, found {head.get('schema')!r}")
    if is_module(head["model"]):
        raise UsageError(
            f"{file}: is of {head['model']}, a module of torch's, for which no layers draw their weights; "
            "sparselth.tickets.load gives it with its weights"
        )
    model = get_model(head["model"])
    found, head = load_arrays(file, most=most(model.params))
    return StrongTicket(model, head, content_of(file, model.params, found, head))


def said(params: Params) -> tuple[TensorSpec, ...]:
    """The tensors that a file has as numbers: a seed says the rest, or it is 0 or 1."""
    return (params.trained if params.of_module else ()) + params.statistics


def arrays(params: Params, content: Content) -> Arrays:
    """The arrays of a file."""
    found: Arrays = {}
    for layer, spec in enumerate(params.weights):
        mask = content.mask[spec.span]
        found[f"mask/{spec.name}"] = entropy.encode_matrix(np.where(mask < 0, 2, mask).reshape(spec.matrix))
        if content.redraws is not None:
            kept = _few(content.frozen, layer, spec, content.redraws[spec.span])[mask != 0]
            for plane in range(PLANES):
                if (byte := kept >> 8 * plane & 255).any():
                    found[f"redraws/{spec.name}/{plane}"] = entropy.encode(byte)
    if content.statistics.size:
        found["statistics"] = content.statistics
    return found


def save(file: Path, params: Params, content: Content, **where: Any) -> Arrays:
    """Write a file, atomically, and give its arrays; equal content gives equal bytes."""
    found, how = arrays(params, content), asdict(content.frozen)
    if how["spread"] == "even":  # as it was before there was another one
        del how["spread"]
    save_arrays(file, found, {"schema": SCHEMA, **where, "frozen": how})
    return found


def most(params: Params) -> int:
    """Bytes of a file at most."""
    return (2 + PLANES) * params.size + 4 * sum(spec.numel for spec in said(params)) + (1 << 20)


def read(file: Path, params: Params) -> tuple[Content, dict[str, Any]]:
    """Content and header of a file of a network with these parameters; SparselthError where it is none."""
    found, head = load_arrays(file, most=most(params))
    if head.get("cell", file.stem) != file.stem:
        raise SparselthError(f"{file}: is the file of {head['cell']}")
    return content_of(file, params, found, head), head


def content_of(file: Path, params: Params, found: Arrays, head: dict[str, Any]) -> Content:
    """What the arrays and the header of a file say; SparselthError where they are of another network."""
    try:
        return _content(params, found, head)
    except (ValueError, TypeError, KeyError, UsageError) as error:
        raise SparselthError(f"{file}: is no strong ticket of the network ({error})") from error


def _content(params: Params, found: Arrays, head: dict[str, Any]) -> Content:
    how = dict(head["frozen"])
    frozen = METHODS[how.pop("method")].frozen(how.pop("seed"), **how)
    if type(frozen.seed) is not int or frozen.seed >= 1 << 64:
        raise ValueError(f"seed {frozen.seed!s:.30}: expected a whole number below 2^64")
    mask = np.zeros(params.mask_size, np.int8)
    redraws = np.zeros(params.mask_size, np.int32) if METHODS[frozen.method].has_generations else None
    for layer, spec in enumerate(params.weights):
        symbols = entropy.decode_matrix(found[f"mask/{spec.name}"], spec.matrix).ravel()
        if symbols.max(initial=0) > 2:
            raise ValueError(f"mask/{spec.name}: expected 0, 1 and 2")
        mask[spec.span] = np.where(symbols == 2, np.int8(-1), symbols.astype(np.int8))
        if redraws is not None:
            there, kept = np.zeros(spec.numel, np.int64), symbols > 0
            for plane in range(PLANES):
                if (byte := found.get(f"redraws/{spec.name}/{plane}")) is not None:
                    there[kept] |= entropy.decode(byte, int(kept.sum())).astype(np.int64) << 8 * plane
            redraws[spec.span] = _all(frozen, layer, spec, there)
    statistics = found.get("statistics", np.zeros(0, np.float32))
    expected = sum(spec.numel for spec in said(params))
    if statistics.dtype != np.float32 or statistics.shape != (expected,):
        raise ValueError(f"statistics: expected fp32 [{expected}]")
    return Content(frozen, mask, redraws, statistics)


# ---- recycled weights: where a weight's value comes from. A count of redraws is what it is.


def _few(frozen: Frozen, layer: int, spec: TensorSpec, redraws: Whole) -> NDArray[np.int64]:
    """Redraws [numel] as the smallest whole numbers that say the same."""
    found: NDArray[np.int64] = redraws.astype(np.int64)
    if frozen.method == "recycle":
        own = _own(frozen, layer, spec)
        other = own != own[np.arange(spec.numel) + redraws]
        if frozen.law == "signed-constant":
            found = np.where(other, 1, 0)
        else:
            found = np.where(other, np.where(found < 0, -2 * found - 1, 2 * found), 0)
    return found


def _all(frozen: Frozen, layer: int, spec: TensorSpec, few: NDArray[np.int64]) -> NDArray[np.int64]:
    """Inverse of `_few`; ValueError where a number says nothing."""
    place = np.arange(spec.numel)
    if frozen.method != "recycle":
        found = few
    elif frozen.law == "signed-constant":
        positive = _own(frozen, layer, spec) > 0
        first = [int(np.argmax(positive == sign)) for sign in (False, True)]  # places of either sign
        found = np.where(few > 0, np.where(positive, *first) - place, 0)
    else:
        found = np.where(few & 1, -(few + 1) // 2, few // 2)
    if frozen.method == "recycle" and ((place + found < 0) | (place + found >= spec.numel)).any():
        raise ValueError("a weight was recycled from nowhere")
    if found.size and np.abs(found).max() >= 1 << 31:
        raise ValueError("more redraws than there can be")
    return found


def _own(frozen: Frozen, layer: int, spec: TensorSpec) -> NDArray[np.float32]:
    """The first draw of a tensor [numel]."""
    found: NDArray[np.float32] = (
        METHODS[frozen.method].layer_weights(frozen, layer, spec, None, "cpu").numpy()
    )
    return found
