"""README and docs: what they show runs, what they link to is there."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

from sparselth.cli import main
from sparselth.config import Cell
from sparselth.data.batches import Resident
from sparselth.runs import RunRecord, cell_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_s_python_loads_trains_and_converts_a_ticket(
    finished: Callable[..., RunRecord], digits: Resident, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"((?:^    .*\n|^\n)*^    ticket = (?:.*\n)(?:^    .*\n|^\n)*)", text, re.MULTILINE)
    assert block
    code = textwrap.dedent(block[0])
    assert len(code.strip().splitlines()) <= 18
    record = finished("--levels", "2", "--seeds", "0", "--rewind", "30", "--arms", "ticket,random-mask")
    file = cell_path(record.path, Cell(0, "ticket", 2))
    x, y = digits.test()[0]
    batches = [(x[0].T.contiguous(), y.flatten())] * 3
    names: dict[str, object] = {"batches": batches}
    exec(code.replace(f"runs/NAME/cells/{file.name}", str(file)), names)
    model, masks = names["model"], names["masks"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(masks, dict)
    assert len(masks) == 3
    assert not any(p[~mask].any() for p, mask in masks.items())
    assert "chosen" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def commands() -> list[str]:
    """What the pages show of the command line, comments cut off."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(r"^    (sparselth (?:imp|bench|show|subset-sum) [^#\n|]*)", text, re.MULTILINE)
    return sorted({" ".join(line.split()) for line in found})


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_are_understood(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None
    command.make_context(name, words)
