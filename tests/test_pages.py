"""README and docs: what they show runs, what they link to is there."""

from __future__ import annotations

import copy
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
from sparselth.masks import Masks
from sparselth.runs import RunRecord, cell_path
from sparselth.tickets import load_ticket

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


def test_the_readme_s_calls_prune_rewind_train_save_and_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"((?:^    .*\n|^\n)*^    start = (?:.*\n)(?:^    .*\n|^\n)*)", text, re.MULTILINE)
    assert block
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))
    example, first = torch.randn(8, 20), copy.deepcopy(model)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            model(example).square().mean().backward()
            optimizer.step()

    names: dict[str, object] = {"model": model, "train": train, "torch": torch, "example": example}
    exec(textwrap.dedent(block[0]), names)
    masks, fast = names["masks"], names["fast"]
    assert isinstance(masks, Masks)
    assert isinstance(fast, torch.nn.Module)
    assert masks.kept == 144
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert torch.allclose(fast(example), model(example), atol=1e-6)
    ticket = load_ticket("ticket.safetensors")
    ticket.apply(model)
    for name, p in first.named_parameters():
        assert torch.equal(model.get_parameter(name), p * masks[name] if name in masks else p)


def test_the_experiment_of_the_page_on_any_network_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "any-network.md").read_text()
    code = next(
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sparselth.imp" in code
    )
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(100, 1, 28, 28), torch.randint(10, (100,))
    exec(
        code.replace("300)", "24)").replace("(784, 24)", "(784, 300)"),
        {"x": x, "y": y, "test_x": x, "test_y": y},
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].split()[:3] == ["level", "weights", "ticket"]
    assert (tmp_path / "runs" / "mine" / "cells" / "seed1-ticket-03.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def commands() -> list[str]:
    """What the pages show of the command line, comments cut off."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(r"^    (sparselth [a-z-]+[^#\n|]*)", text, re.MULTILINE)
    return sorted({" ".join(line.split()) for line in found})


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_are_understood(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = main.cli.get_command(click.Context(main.cli), name)
    if isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(click.Context(command), name)
    assert command is not None
    command.make_context(name, words)
