"""`torch.nn.utils.prune`: NAME_orig and NAME_mask in a `state_dict` in place of NAME.

A module whose parameters were pruned there, by `prune.identity(layer, "weight")` if by nothing else, loads
what is written. Values of pruned weights are 0: a ticket does not have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparselth.errors import SparselthError
from sparselth.exchange.checkpoint import as_mask, plain_state
from sparselth.exchange.state_dicts import write_state
from sparselth.exchange.table import Format, Found, Given, register

if TYPE_CHECKING:
    from torch import Tensor

ORIG, MASK = "_orig", "_mask"


def write(given: Given, file: Path) -> str:
    state: dict[str, Tensor] = {}
    for name, tensor in given.state.items():
        if name in given.masks:
            state[name + ORIG] = tensor
            state[name + MASK] = given.masks[name].to(tensor.dtype)
        else:
            state[name] = tensor
    write_state(state, file)
    return ""


def read(file: Path, keep: float | None) -> Found:
    found = plain_state(file)
    masks, state = dict[str, "Tensor"](), dict[str, "Tensor"]()
    for name, tensor in found.items():
        base = name.removesuffix(ORIG)
        if name.endswith(MASK) and name.removesuffix(MASK) + ORIG in found:
            masks[name.removesuffix(MASK)] = as_mask(file, name, tensor)
        elif name.endswith(ORIG) and base + MASK in found:
            state[base] = tensor
        else:
            state[name] = tensor
    if not masks:
        raise SparselthError(
            f"{file}: has no NAME{MASK} beside a NAME{ORIG}, as torch.nn.utils.prune makes them"
        )
    return Found(masks, state)


register(Format("torch-prune", "masks of torch.nn.utils.prune", write, read))
