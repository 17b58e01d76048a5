"""Screens: as wide as the terminal, nothing vanishes without a sign, and what a newcomer types first."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparselth.cli import progress
from sparselth.config import Cell, Recipe
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Plan
from sparselth.experiments.training import evaluated_images
from sparselth.runs import RunRecord

Cli = Callable[..., tuple[int, str, str]]
CONFIG = ImpConfig(dataset="mnist5k", device="cpu", eval_images=0)


def test_alone_it_prints_its_help(cli: Cli) -> None:
    code, out, err = cli()
    assert (code, err) == (0, "")
    assert out == cli("--help")[1]
    assert "Commands:" in out
    assert len(out.splitlines()) > 10


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell, its bar and its numbers; names that lack room end in dots."""
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: screen)
    plan = Plan(CONFIG, None, Path("run"), "asked for", 2, 1, {})
    cell = Cell(4, "random-mask", CONFIG.levels)
    with progress.Bars(plan) as bars:
        bars.started(0, [cell])
        bars.evaluated(0, [cell], CONFIG.recipe.steps, 0.9654, 1234.0)
        bars.bars.refresh()
        lines = Console(file=io.StringIO(), width=width).render_lines(bars.bars.get_renderable())
    shown = ["".join(part.text for part in line) for line in lines]
    assert len(shown) == 2
    whole, own = shown
    assert re.search(r"━{8}|[━╸╺ ]{8}", whole)
    assert re.search(r"[━╸╺]{8,}", own)
    assert whole.startswith("all cells")
    assert "0/" in whole
    assert "cells" in whole
    assert f"{CONFIG.recipe.steps:,}: 96.54 %" in own
    assert "1,234 steps/s" in own
    name = f"{cell} ({CONFIG.about(cell)})"
    assert own.startswith(name if width >= 80 else name[:15])
    assert ("…" in own) == (width < 80)


def test_a_data_folder_that_is_not_there_is_an_error_at_once(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparselth.experiments.run.plan", lambda *_, **__: pytest.fail("too late"))
    for words in (
        "imp --data-dir TYPO",
        "imp --data-dir TYPO --dataset mnist5k",
        "ls datasets --data-dir TYPO",
    ):
        code, out, err = cli(*words.split())
        assert (code, out) == (1, "")
        assert err.startswith("sparselth: --data-dir TYPO: there is no such folder")
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_how_a_run_was_pruned_is_listed(finished: Callable[..., RunRecord], cli: Cli) -> None:
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket", "--one-shot", "--scope", "global")
    out = cli("ls", "runs", "--out", str(record.path.parent))[1]
    assert "one-shot pruning by magnitude, 20 % a level over all layers, rewound to step 0" in " ".join(
        out.split()
    )
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 80


@pytest.mark.parametrize(
    ("recipe", "dataset", "images"),
    [
        (
            Recipe(steps=1200, lr=1e-3),
            "mnist5k",
            0,
        ),  # 12 evaluations of 500 and 1,000 test images twice: little
        (Recipe(steps=10, lr=1e-3), "mnist5k", 0),  # never under 1,000
        (Recipe(steps=15, lr=1e-3), "cifar10", 1000),
        (Recipe(steps=1200, lr=1e-3), "mnist", 0),
        (Recipe(steps=100, lr=1e-3), "mnist", 6000),  # 3 * 100 * 60 images' worth, for 1 + 2 evaluations
        (Recipe(steps=100, lr=1e-3, batch_size=32), "cifar10", 3200),
        (Recipe(steps=1200, lr=1e-3, eval_every=1), "mnist", 1000),  # who asks for many has them
    ],
)
def test_evaluation_takes_no_longer_than_training(recipe: Recipe, dataset: str, images: int) -> None:
    from sparselth.data import get_dataset

    spec = get_dataset(dataset)
    assert evaluated_images(recipe, spec) == images
    looked = images or max(spec.n_validation, spec.n_test)
    rounds = -(-recipe.steps // recipe.eval_every)
    work = rounds * min(looked, spec.n_validation) + 2 * min(looked, spec.n_test)
    assert images == 1000 or looked <= 1000 or work <= 3 * recipe.steps * recipe.batch_size


def test_default_recipes_look_at_all_images_but_those_of_large_networks() -> None:
    from sparselth.data import get_dataset
    from sparselth.models import MODELS

    fewer = {
        (model.name, name)
        for model in MODELS.values()
        for name, recipe in model.recipes.items()
        if evaluated_images(recipe, get_dataset(model.dataset))
    }
    large = ("conv8", "resnet18", "resnet20", "resnet50", "resnet56", "vgg16", "vgg19")
    assert fewer == {(name, "short") for name in large}


def test_evaluation_flags_are_read_back(finished: Callable[..., RunRecord]) -> None:
    record = finished(
        *["--levels", "1", "--seeds", "0", "--arms", "ticket", "--eval-every", "40", "--eval-images", "200"]
    )
    assert (record.config.recipe.eval_every, record.config.eval_images) == (40, 200)
    assert [e["step"] for e in record.evaluations if e["level"] == 1] == [40, 80, 100]
    for e in record.evaluations:
        assert (200 * e["validation_accuracy"]) % 1 == pytest.approx(0, abs=1e-6)
    for point in record.points:
        assert (200 * point["final_accuracy"]) % 1 == pytest.approx(0, abs=1e-6)


def test_all_images_are_one_plan_however_they_are_asked_for(
    finished: Callable[..., RunRecord], cli: Cli
) -> None:
    """5,000 of 1,000 are all, as 0 is and as the default is here: one digest, and an older run goes on."""
    record = finished("--levels", "1", "--seeds", "0", "--arms", "ticket")
    assert record.config.eval_images == 0
    flags = (
        "imp --model lenet-300-100 --dataset mnist5k --levels 1 --seeds 0 --arms ticket --steps 100 --quiet"
    )
    for more in ((), ("--eval-images", "0"), ("--eval-images", "5000")):
        assert cli(*flags.split(), *more, "--out", "run")[0] == 0
    code, _, err = cli(*flags.split(), "--eval-images", "999", "--out", "run")
    assert code == 1
    assert "eval_images" in err
