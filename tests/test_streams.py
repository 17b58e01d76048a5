"""Random streams: what their names are worth, and that a name means the same in every version."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparselth.streams import stream


def test_streams_differ_in_every_part_of_their_name() -> None:
    names = [(0, "ticket", 1, "init", 0), (1, "ticket", 1, "init", 0), (0, "reinit", 1, "init", 0)]
    names += [(0, "ticket", 2, "init", 0), (0, "ticket", 1, "mask", 0), (0, "ticket", 1, "init", 1)]
    names += [(0, "ticket", 11, "init", 0), (0, "ticket", 1, "1/init", 0)]
    draws = {tuple(torch.rand(4, generator=stream(*name)).tolist()) for name in names}
    assert len(draws) == len(names)
    again = torch.rand(4, generator=stream(*names[0]))
    assert tuple(again.tolist()) in draws


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ((0, "ticket", 0, "init"), 0x4F6D743366E94CDD),
        ((2, "ticket", 0, "init", 0), 0x28C00E380FCEF82C),  # the highest bit of the digest is cut off
        ((3, "reinit", 12, "order/7", 2), 0x2C287A67C998E10A),
    ],
)
def test_a_name_is_the_same_seed_in_every_version(name: Any, seed: int) -> None:
    """Little-endian, the first eight bytes of its SHA-256; runs of older versions go on to their own bits."""
    generator = stream(*name)
    assert generator.initial_seed() == seed
    assert generator.device.type == "cpu"
