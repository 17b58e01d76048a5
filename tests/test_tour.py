"""docs/tour.md: every command of it plans what the page says, one after another as a reader runs them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "tour.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (sparselth .+)$", PAGE, re.MULTILINE)]
PLANNED = [words for words in COMMANDS if words[0] not in ("imp", "show")]


def test_the_tour_plans_all_of_it(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (imp,) = (words for words in COMMANDS if words[0] == "imp")
    code, out, _ = cli(*imp, "--dry-run", "--json")
    assert code == 0
    whole = json.loads(out)
    assert whole["config"]["dataset"] == "mnist1d"
    # its run, in small: the same seeds and levels, what others read of it
    small = ["--steps", "10", "--eval-every", "10", "--arms", "ticket", "--quiet"]
    assert cli(*imp, *small)[0] == 0
    folders = {whole["run"]}
    for words in PLANNED:
        code, out, error = cli(*words, "--dry-run", "--json")
        assert code == 0, error
        plan = json.loads(out)
        assert plan["cells"] > 0
        assert plan["seconds"] > 0
        assert plan["config"]["dataset"] == "mnist1d"
        folders.add(plan["run"])
    assert len(folders) == 1 + len(PLANNED) == 9  # each its own


def test_the_tour_has_every_experiment_that_reads_images() -> None:
    from sparselth.config import EXPERIMENTS

    assert {words[0] for words in COMMANDS} - {"show"} == set(EXPERIMENTS) - {"subset-sum", "neurons"}
