"""open_lth (github.com/facebookresearch/open_lth): masks and weights of a level.

A level's folder holds mask.pth, 0s and 1s by parameter name, and model_epE_itI.pth, `state_dict`s at steps of
training: the first of them is what the level rewinds to, and is taken. A checkpoint.pth under way has both,
masks as buffers mask_NAME with ___ for each dot, and the weights behind "model.". A mask.pth alone needs
`weights`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sparselth.errors import SparselthError
from sparselth.exchange.checkpoint import as_mask, plain_state
from sparselth.exchange.table import Format, Found, register

if TYPE_CHECKING:
    from torch import Tensor

BUFFER, WITHIN = "mask_", "model."


def read(file: Path, keep: float | None) -> Found:
    if file.is_dir():
        return _folder(file)
    state = plain_state(file)
    masks = {
        name.removeprefix(BUFFER).replace("___", "."): as_mask(file, name, tensor)
        for name, tensor in state.items()
        if name.startswith(BUFFER)
    }
    if masks:
        return Found(masks, _within(state))
    if all(bool(((t == 0) | (t == 1)).all()) for t in state.values()):
        return Found({name: as_mask(file, name, tensor) for name, tensor in state.items()}, {})
    raise SparselthError(
        f"{file}: has weights and no masks; give the folder of its level, or mask.pth and its `weights`"
    )


def _within(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the network inside the one that prunes it."""
    return {
        name.removeprefix(WITHIN): tensor for name, tensor in state.items() if not name.startswith(BUFFER)
    }


def _folder(folder: Path) -> Found:
    if not (folder / "mask.pth").is_file():
        raise SparselthError(f"{folder}: has no mask.pth, as the folder of a level of open_lth has")
    steps = {}
    for one in folder.glob("model_ep*_it*.pth"):
        if numbers := re.fullmatch(r"model_ep(\d{1,9})_it(\d{1,9})\.pth", one.name):
            steps[int(numbers[1]), int(numbers[2])] = one
    if not steps:
        raise SparselthError(f"{folder}: has no model_epE_itI.pth; give mask.pth and its `weights`")
    mask = plain_state(folder / "mask.pth")
    masks = {name: as_mask(folder / "mask.pth", name, tensor) for name, tensor in mask.items()}
    return Found(masks, plain_state(steps[min(steps)]))


register(Format("open_lth", "masks and weights of open_lth: a level's folder or a checkpoint", read=read))
