"""hidden-networks (github.com/allenai/hidden-networks): weights that were never trained, and a score each.

A checkpoint has NAME.weight and NAME.scores in its `state_dict`. Of each such layer the share `keep` with
the largest |score| stays (Ramanujan et al. 2020, edge-popup); the share is the run's `prune_rate`, which
stands in its settings and not in the file. Of n weights n - int((1 - keep) n) are kept, as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparselth.errors import SparselthError, UsageError
from sparselth.exchange.checkpoint import plain_state
from sparselth.exchange.table import Format, Found, register

if TYPE_CHECKING:
    from torch import Tensor

SCORES = ".scores"


def read(file: Path, keep: float | None) -> Found:
    found = plain_state(file)
    scores = {name.removesuffix(SCORES) + ".weight": t for name, t in found.items() if name.endswith(SCORES)}
    if not scores:
        raise SparselthError(f"{file}: has no NAME{SCORES}, as checkpoints of hidden-networks have")
    if keep is None:
        raise UsageError(f"{file}: says no share of weights to keep; give its prune_rate as `keep`, as 0.5")
    if not 0 < keep <= 1:
        raise UsageError(f"`keep` {keep}: expected more than 0 and at most 1")
    state = {name: tensor for name, tensor in found.items() if not name.endswith(SCORES)}
    return Found({name: largest(values, keep) for name, values in scores.items()}, state, keep)


def largest(scores: Tensor, keep: float) -> Tensor:
    """The mask of the share with the largest |score|; of equal ones the last are kept."""
    import torch

    order = scores.detach().float().abs().flatten().sort(stable=True).indices
    mask = torch.ones(scores.numel(), dtype=torch.bool, device="cpu")
    mask[order[: int((1 - keep) * scores.numel())]] = False
    return mask.view(scores.shape)


register(Format("hidden-networks", "weights and scores of hidden-networks, edge-popup", read=read))
