"""examples/: each runs on small inputs, ends in a ticket that is what it says, and is short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sparselth.tickets import load_ticket

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = {"own_model": "accuracy", "resnet": "accuracy", "vit": "accuracy", "transformer": "loss"}


def test_these_are_the_examples_and_they_are_short() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(EXAMPLES)
    for file in FOLDER.glob("*.py"):
        assert len(file.read_text().splitlines()) < 120, file.name


@pytest.mark.whole
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ends_in_a_ticket(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    names = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    ticket = load_ticket(f"{name}.safetensors")
    size = Path(f"{name}.safetensors").stat().st_size
    end = re.search(
        rf"{name}.safetensors: {EXAMPLES[name]} ([0-9.]+)( %)?, ([0-9,]+) bytes beside ([0-9,]+)", said
    )
    assert end, said
    found = ticket.notes[EXAMPLES[name]]
    assert float(end[1]) == pytest.approx(100 * found if end[2] else found, abs=0.006)
    assert int(end[3].replace(",", "")) == size
    assert int(end[4].replace(",", "")) == ticket.dense_bytes
    if name != "own_model":  # whose controls are arms
        control = re.search(rf"at random: .*{EXAMPLES[name]} ([0-9.]+)", said)
        assert control, said
        beside = ticket.notes[f"random_{EXAMPLES[name]}"]
        assert float(control[1]) == pytest.approx(100 * beside if end[2] else beside, abs=0.006)
    masks = ticket.masks
    rest = sum(t.numel() * t.element_size() for t in ticket.snapshot.values()) - 4 * masks.size
    assert size <= 4 * masks.kept + masks.size / 8 + rest + (1 << 17)
    assert 0 < ticket.weights_remaining < 1
    if name == "transformer":  # goes into a model made anew, and its two names of a weight stay one
        model = names["Transformer"](len(ticket.notes["characters"]))
        ticket.apply(model)
        assert model.head.weight is model.embed.weight
        assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, len(ticket.notes["characters"]))
