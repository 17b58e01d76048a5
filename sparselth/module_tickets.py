"""The file of a ticket of any module: its masks, the values that they leave, and all else it goes back to.

    mask/NAME    bits of a pruned parameter, uint8 [ceil(numel / 8)], row-major, as `sparselth.masks` packs
                 them; not there where all of it is kept
    kept/NAME    its surviving values at the rewind step [kept], row-major
    whole/NAME   every other parameter and buffer, in its shape

Safetensors with a header under "sparselth": schema, notes (whatever the user says of it), network (the
module's class), layers (what owns each weight), versions, shapes and dtypes by name, tied (a second name of a
tensor -> its first), and `sha256`, a checksum of arrays and header. What numpy has no type for, bf16 and
floats of 8 bits, lies there as whole numbers of as many bits. A file of N prunable weights in fp32 is at most
4 bytes a survivor, N / 8 bytes, what is not prunable, and headers; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparselth import __version__, masks
from sparselth.errors import SparselthError, UsageError
from sparselth.files import Arrays, load_arrays, load_header, save_arrays

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "sparselth.ticket/1"
NUMPY = dict[str, np.dtype[Any]]()
for _name in ("float64", "float32", "float16", "complex64", "bool"):
    NUMPY[_name] = np.dtype(_name)
for _name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
    NUMPY[_name] = np.dtype(_name)
BITS: dict[str, np.dtype[Any]] = {  # of torch alone, as whole numbers of as many bits
    "bfloat16": NUMPY["uint16"],
    "float8_e4m3fn": NUMPY["uint8"],
    "float8_e5m2": NUMPY["uint8"],
}
Words = dict[str, str]


def save(
    file: Path, kept: Mapping[str, Tensor], state: Mapping[str, Tensor], tied: Words, **where: Any
) -> None:
    """Write a file, atomically; equal content gives equal bytes.

    kept: masks by parameter name, bool; state: every parameter and buffer by its first name; tied: second
    names of tensors -> first ones; `where` it comes from: notes, network.
    """
    found: Arrays = {}
    for name, tensor in state.items():
        array = bits(name, tensor)
        if name not in kept:
            found[f"whole/{name}"] = array
            continue
        mask = kept[name].detach().cpu().numpy()
        if not mask.all():
            found[f"mask/{name}"] = masks.pack(mask.reshape(-1))
        found[f"kept/{name}"] = array[mask]
    header = {
        "schema": SCHEMA,
        **where,
        "versions": {"sparselth": __version__} | {"torch": _torch_version()},
        "shapes": {name: list(state[name].shape) for name in kept},
        "dtypes": {name: _dtype(tensor) for name, tensor in state.items()},
        "tied": dict(tied),
    }
    try:
        save_arrays(file, found, header)
    except (TypeError, ValueError) as error:
        raise UsageError(f"notes: expected what JSON can say, got {error}") from error


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Masks by parameter name, all tensors by name (0 where pruned; a tied one under each name), the header.

    SparselthError where the file is none or its arrays and header do not belong together.
    """
    if "sha256" not in load_header(file):
        raise SparselthError(f"{file}: is no ticket of a module (it has no checksum)")
    found, head = load_arrays(file)
    try:
        kept, state = _content(found, head)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise SparselthError(f"{file}: is no ticket of a module ({error})") from error
    return kept, state, head


def _content(found: Arrays, head: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import torch

    shapes, dtypes, tied = ({**head[name]} for name in ("shapes", "dtypes", "tied"))
    kept: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    seen = set[str]()

    def array(name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        seen.add(name)
        if name not in found or found[name].dtype != dtype:
            there = f"{found[name].dtype}" if name in found else "nothing"
            raise ValueError(f"{name}: expected {dtype}, found {there}")
        return found[name]

    for name, dtype in dtypes.items():
        stored = {**NUMPY, **BITS}[dtype]
        if name not in shapes:
            state[name] = _tensor(array(f"whole/{name}", stored), dtype)
            continue
        shape = tuple(shapes[name])
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name}: expected a shape, found {shape!s:.60}")
        values, numel = array(f"kept/{name}", stored), prod(shape)
        if f"mask/{name}" in found:
            packed = array(f"mask/{name}", NUMPY["uint8"])
            if packed.shape != (-(-numel // 8),):
                raise ValueError(f"mask/{name}: expected {-(-numel // 8)} bytes, found {list(packed.shape)}")
            mask = masks.unpack(packed, numel)
        else:
            mask = np.ones(numel if values.shape == (numel,) else 0, bool)
        if values.shape != (int(mask.sum()),) or mask.shape != (numel,):
            raise ValueError(f"kept/{name}: expected {int(mask.sum())} values, found {list(values.shape)}")
        whole = np.zeros(numel, stored)
        whole[mask] = values
        kept[name] = torch.from_numpy(mask.reshape(shape))
        state[name] = _tensor(whole.reshape(shape), dtype)
    if unknown := (found.keys() - seen) | (shapes.keys() - state.keys()):
        raise ValueError(f"{min(unknown)}: its header does not know it")
    for second, first in tied.items():
        if second in state:
            raise ValueError(f"{second}: expected another name of {first}, found a tensor of its own")
        state[second] = state[first]
    return kept, state


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def bits(name: str, tensor: Tensor) -> NDArray[Any]:
    """The numbers of a tensor as numpy has them."""
    import torch

    dtype, tensor = _dtype(tensor), tensor.detach().cpu()
    if tensor.layout == torch.strided and dtype in NUMPY:
        return tensor.contiguous().numpy()
    if tensor.layout == torch.strided and dtype in BITS:
        raw: NDArray[Any] = tensor.reshape(-1).view(torch.uint8).numpy().view(BITS[dtype])
        return raw.reshape(tensor.shape)
    raise UsageError(f"{name}: a ticket has dense numbers of at most 64 bits, got {tensor.dtype}")


def _tensor(array: NDArray[Any], dtype: str) -> Tensor:
    import torch

    tensor = torch.from_numpy(array.copy())
    return tensor if dtype in NUMPY else tensor.view(getattr(torch, dtype))


def _torch_version() -> str:
    import torch

    return torch.__version__


# ---- what a module is to a file


def layer_words(module: nn.Module, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What owns each of these parameters: its type, and how a convolution goes over its image."""
    from torch import nn

    owners, found = dict(module.named_modules(remove_duplicate=False)), dict[str, dict[str, Any]]()
    for name in names:
        owner = owners[name.rpartition(".")[0]]
        found[name] = {"type": "Linear" if isinstance(owner, nn.Linear) else type(owner).__name__}
        if isinstance(owner, nn.Conv2d):
            dilation, padding = [*owner.dilation], owner.padding
            if isinstance(padding, str):
                reach = [d * (k - 1) // 2 for d, k in zip(dilation, owner.kernel_size, strict=True)]
                padding = (0, 0) if padding == "valid" else (reach[0], reach[1])
            found[name] = {
                "type": "Conv2d",
                "stride": [*owner.stride],
                "padding": [*padding],
                "dilation": dilation,
                "groups": owner.groups,
            }
    return found


def first_names(module: nn.Module) -> Words:
    """Every name in its `state_dict`, in that order -> the first name of the same tensor.

    UsageError where an entry is no tensor, as what `get_extra_state` gives.
    """
    from torch import Tensor

    firsts, found = dict[int, str](), Words()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{name}: a ticket holds tensors alone, got {type(tensor).__name__}")
        found[name] = firsts.setdefault(id(tensor), name)
    return found
