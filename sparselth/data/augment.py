"""Training images shifted and flipped, all images of a batch at once, on the device that holds them.

"crop-flip" moves an image by up to SHIFT pixels along each side, black (0 of the raw image) where nothing
was, and mirrors every second one: the crop of an image padded by 4, and the flip, of He et al. 2016,
section 4.2.
A move is a number: which of the 9 x 9 shifts, and whether mirrored. A table has for every move where each
pixel comes from, so that a batch is one gather.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from sparselth.config import Cell
from sparselth.errors import UsageError
from sparselth.streams import stream

SHIFT = 4
SIDE = 2 * SHIFT + 1
MOVES = 2 * SIDE * SIDE
LEAST = 2 * SHIFT  # pixels along a side


def check(augment: str, shape: tuple[int, ...], name: str) -> None:
    """Raise UsageError where samples of that shape cannot be shifted and flipped."""
    if augment == "none" or (len(shape) == 3 and min(shape[1:]) >= LEAST):
        return
    raise UsageError(
        f"`augment` {augment}: expected images [C, H, W] of {LEAST} x {LEAST} at least, {name} has samples "
        f"of {' x '.join(map(str, shape))}; use `augment` none"
    )


def sources(shape: tuple[int, ...]) -> Tensor:
    """Where each pixel comes from by move, int64 [MOVES, C * H * W]; C * H * W is from nowhere."""
    channels, height, width = shape
    move = torch.arange(MOVES, device="cpu")
    shift = move.div(2, rounding_mode="floor")
    down, right, mirrored = shift.div(SIDE, rounding_mode="floor") - SHIFT, shift % SIDE - SHIFT, move % 2
    row = torch.arange(height, device="cpu") + down[:, None]  # [MOVES, H]
    across = torch.arange(width, device="cpu")
    # [MOVES, W]; shifted first, then mirrored
    column = torch.stack([across, across.flip(0)])[mirrored] + right[:, None]
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    place = row[:, :, None] * width + column[:, None]  # [MOVES, H, W]
    plane = torch.arange(channels, device="cpu")[:, None, None] * (height * width)
    found = torch.where(inside[:, None], plane + place[:, None], prod(shape))
    return found.view(MOVES, -1)


def moves(who: Cell, epoch: int, steps: int, batch: int) -> Tensor:
    """The moves of a replica's images in one epoch, int64 [steps, B], each as likely as any other."""
    generator = stream(who.seed, who.arm, who.level, f"augment/{epoch}", who.draw)
    return torch.randint(MOVES, (steps, batch), generator=generator, device="cpu")
