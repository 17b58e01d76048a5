"""Checkpoints of torch, read without running what they say: tensors and plain containers."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselth.errors import SparselthError, one_line
from sparselth.files import ARRAYS_BYTES, check_file

if TYPE_CHECKING:
    from torch import Tensor

NESTED = "state_dict", "model_state_dict", "model"  # where checkpoints keep their tensors
PARALLEL = "module."  # before every name that nn.DataParallel saves


def read_checkpoint(file: Path) -> Any:
    """What a file of `torch.save` holds; a file of safetensors is its tensors by name.

    SparselthError where it is none, or holds objects, which only code that the file names could make.
    """
    import torch
    from safetensors.torch import load_file

    try:
        check_file(file, ARRAYS_BYTES)
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages and formats of old
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = one_line(str(error))
        names = said.partition("GLOBAL ")[2].split(" ")[0] or said.partition("class ")[2].split(" ")[0]
        if not names and "Unsupported" not in said:
            raise _unreadable(file, error) from error
        raise SparselthError(
            f"{file}: holds code or objects{f' ({names})' * bool(names)}, and nothing here unpickles them; "
            "save its state_dict, tensors alone"
        ) from error
    except Exception as error:  # torch's readers say anything of rotten bytes, that memory is short too
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> SparselthError:
    why = one_line(str(error)).partition(". ")[0] or type(error).__name__
    return SparselthError(f"{file}: expected a checkpoint of torch.save or safetensors ({why:.200})")


def plain_state(file: Path) -> dict[str, Tensor]:
    """The `state_dict` in a checkpoint, wherever it keeps it, names without what data parallelism adds."""
    return state_of(file, read_checkpoint(file))


def state_of(file: Path, found: Any) -> dict[str, Tensor]:
    """The same of what `read_checkpoint` gave."""
    import torch

    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not found:
        raise SparselthError(f"{file}: expected tensors by name, found {type(found).__name__}")
    state = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SparselthError(
                f"{file}: expected tensors by name, found {name!s:.60}, a {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise SparselthError(f"{file}: {name}: expected a dense tensor, found {tensor.layout}")
        state[name] = tensor
    if all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    return state


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Second names of a tensor in a `state_dict` -> the first."""
    firsts: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        if not tensor.numel():
            continue
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if (first := firsts.setdefault(place, name)) != name:
            found[name] = first
    return found


def as_mask(file: Path, name: str, tensor: Tensor) -> Tensor:
    """0s and 1s as a mask; SparselthError where there is anything else."""
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise SparselthError(f"{file}: {name}: expected a mask of 0s and 1s, found other numbers")
    return tensor.bool()
