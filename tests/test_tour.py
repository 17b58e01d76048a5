"""docs/tour.md: every command of it plans what the page says, one after another as a reader runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sparselth.experiments import connectivity_jobs, price

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tour.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (sparselth .+)$", PAGE, re.MULTILINE)]
PLANNED = [words for words in COMMANDS if words[0] not in ("imp", "show")]


def test_the_tour_plans_all_of_it(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for timed in (price, connectivity_jobs):  # plans need prices, not good ones
        monkeypatch.setattr(timed, "TIMED", 0.02)
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


def test_make_tour_runs_these_very_commands_and_says_what_each_took(tmp_path: Path) -> None:
    venv, tour = tmp_path / "venv", tmp_path / "tour"
    program, said = venv / "bin" / "sparselth", tour / "said"
    program.parent.mkdir(parents=True)
    (venv / ".installed").touch()  # so that nothing is
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def made(program_text: str) -> tuple[int, list[str], str]:
        program.write_text(f'#!/bin/sh\necho "$@" >>said\n{program_text}\n')
        program.chmod(0o755)
        said.unlink(missing_ok=True)
        words = ["make", "tour", f"VENV={venv}", f"TOUR={tour}"]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, said.read_text().splitlines(), done.stdout

    going_on = [" ".join(words).replace(" --out ", " --resume --out ") for words in COMMANDS]
    code, ran, out = made("true")
    assert (code, ran) == (0, going_on), out
    times = out[out.rindex("\n\n") :].split("\n")
    assert [re.fullmatch(r" +\d+ s  (.+)", line)[1] for line in times if line] == [  # type: ignore[index]
        *(f"sparselth {line}" for line in going_on),
        "in all",
    ]
    code, ran, out = made('[ "$1" != transfer ]')
    assert code != 0
    assert ran == going_on[: 1 + [words[0] for words in COMMANDS].index("transfer")]
    assert out.endswith(" s  in all\n")
