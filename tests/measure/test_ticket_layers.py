"""Why a ticket is fast: the line and its break-even by hand, layers of every kind; no time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparselth.compare import layers
from sparselth.errors import UsageError
from sparselth.measure.ticket_layers import PROBES, Speed, break_even, speeds
from sparselth.report import ticket_tables
from sparselth.tickets import Ticket, load_ticket, save_ticket


@pytest.mark.parametrize(
    ("points", "limit", "right"),
    [
        ([(0.1, 1.0), (0.3, 3.0)], 2.0, 0.2),
        ([(0.3, 3.0), (0.1, 1.0)], 2.0, 0.2),
        ([(0.1, 1.0), (0.3, 3.0)], 0.5, 0.0),
        ([(0.1, 1.0), (0.3, 3.0)], 9.0, 0.3),
        ([(0.1, 1.0), (0.2, 5.0), (0.3, 3.0), (0.4, 5.0)], 4.0, 0.35),  # the largest of three crossings
        ([(0.1, 1.0)], 2.0, 0.1),
        ([(0.1, 3.0)], 2.0, 0.0),
    ],
)
def test_break_even_is_where_the_line_meets_the_limit(
    points: list[tuple[float, float]], limit: float, right: float
) -> None:
    assert break_even(points, limit) == pytest.approx(right)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, (3, 1), groups=4, padding="valid")
        self.embed = nn.Embedding(20, 8)
        self.line = nn.Linear(24, 16)


def drawn(tmp_path: Path) -> Ticket:
    model, draw = Net(), torch.Generator().manual_seed(0)
    masks = {n: torch.rand(p.shape, generator=draw) < 0.2 for n, p in model.named_parameters() if p.dim() > 1}
    return load_ticket(save_ticket(tmp_path / "t", model, masks, model.state_dict()))


def test_layers_of_a_module_are_measured_where_they_can_be(tmp_path: Path) -> None:
    ticket = drawn(tmp_path)
    found = {speed.name: speed for speed in speeds(ticket, 2)}
    assert "does not say which images" in found["conv.weight"].missing
    assert "no sparse form for Embedding" in found["embed.weight"].missing
    assert not found["line.weight"].missing
    assert found["line.weight"].dense > 0
    found = {speed.name: speed for speed in speeds(ticket, 2, (9, 8))}
    for name in ("conv.weight", "grouped.weight", "line.weight"):
        speed = found[name]
        assert not speed.missing
        assert speed.dense > 0
        assert 0 <= speed.break_even <= 1
        assert speed.noise >= 1
        assert speed.best <= speed.dense
    with pytest.raises(UsageError, match="`image` 1x1: too small for a convolution"):
        list(speeds(ticket, 2, (1, 1)))
    assert "too large" in next(iter(speeds(ticket, 1 << 28, (9, 8)))).missing


@pytest.mark.parametrize(
    "said", [None, [], "x", {"type": 3}, {"type": "Conv2d", "stride": "2"}, {"groups": 0}]
)
def test_what_a_header_says_of_layers_may_be_anything(said: object, tmp_path: Path) -> None:
    ticket = drawn(tmp_path)
    ticket.header["layers"] = {"conv.weight": said}
    assert {speed.name for speed in speeds(ticket, 1, (9, 9))} == set(ticket.masks)
    ticket.header["layers"] = said
    assert len(list(speeds(ticket, 1))) == len(ticket.masks)


def test_the_page_says_why_and_what_would_have_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ticket = drawn(tmp_path)
    found = [
        Speed("conv.weight", 9e-6, 3e-6, "sparse_conv2d_rows", max(PROBES)),
        Speed("grouped.weight", 1e-4, 2e-4, "csr_tiled", 0.05),
        Speed("embed.weight", 0.0, None, "", 0.0, missing="no sparse form for Embedding: stays dense"),
        Speed("line.weight", 2e-6, 4e-6, "csr_tiled", 0.0, noise=3.0),
    ]
    text = ticket_tables.fast(layers(ticket), found, 4, "a machine")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "faster, as long as less than their break-even is kept: 1 of 4 (conv.weight)" in words
    assert "3.00x" in text
    assert ">60.0" in text
    assert "below about 5.0 % it would be: prune" in words
    assert "line.weight: not faster: at a batch of 4 dense wins from 2 % kept on" in words
    assert "other programs were at work on 1 of 3 layers (?)" in words
    assert "0.50x?" in text
    assert "together: dense 111 us, with the faster of both 105 us, 1.06x?" in words
