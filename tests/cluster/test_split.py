"""Runs whose networks are split over workers: beside one worker, stopped, killed, at odds, wrongly asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import Rank

from sparselth.config import Cell
from sparselth.data.batches import Batches
from sparselth.engine.team import Team
from sparselth.experiments import pool
from sparselth.runs import cell_path, read
from sparselth.tickets import read as read_ticket

pytestmark = [pytest.mark.host, pytest.mark.forks]

IMP = "imp --model lenet-300-100 --dataset mnist5k --seeds 0 --levels 1 --arms ticket --steps 40"
IMP += " --batch-size 61"
SPLIT = [*IMP.split(), "--eval-every", "10", "--split", "2", "--resume"]


@pytest.fixture(scope="module")
def made() -> list[Path]:
    return []


@pytest.fixture
def split(
    made: list[Path], cli: Callable[..., tuple[int, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of two workers of this process that nobody stopped, to read; computed once."""
    if not made:
        out = tmp_path_factory.mktemp("split") / "split"
        code, _, err = cli(*SPLIT, "--workers", "2", "--quiet", "--out", str(out))
        assert (code, err) == (0, "")
        made.append(out)
    return made[0]


def test_a_run_over_two_workers_is_that_of_one_but_for_rounding(
    split: Path, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Odd batches. Shares round their sums otherwise, and Adam steps by what is rounding alone: in norm it
    was 8e-8 of the weights, and no bit of the masks. The mean of two shares of 30 and 31 comes to 3e-2."""
    words = [*IMP.split(), "--eval-every", "10", "--kernels", "autograd", "--quiet"]
    assert cli(*words, "--out", str(tmp_path / "alone"))[0] == 0
    one, two = read(tmp_path / "alone"), read(split)
    assert one.config == two.config
    for mine, theirs in zip(one.points, two.points, strict=True):
        assert mine["weights_remaining"] == theirs["weights_remaining"]
        assert abs(mine["final_accuracy"] - theirs["final_accuracy"]) <= 1e-3  # an image
    params = one.config.network.params  # type: ignore[attr-defined]
    for level in (0, 1):
        a, b = (read_ticket(cell_path(r.path, Cell(0, "ticket", level)), params)[0] for r in (one, two))
        assert (a.mask != b.mask).sum() <= 2  # at the threshold
        assert np.linalg.norm(a.weights - b.weights) < 1e-5 * np.linalg.norm(a.weights)


def asks() -> None:
    """The worker of rank 0 has rank 0 asked to stop at its 55th step, and takes its time from then on."""
    pool.GRACE, real, steps = 60.0, Batches.labels, list[int]()

    def labels(self: Batches, step: int) -> Any:  # not asked for while a price is measured
        steps.append(step)
        if len(steps) == 55:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.2 * (len(steps) >= 55))
        return real(self, step)

    Batches.labels = labels  # type: ignore[method-assign]


def test_two_ranks_that_were_stopped_come_to_the_bits_of_two_workers(
    split: Path,
    start: Callable[..., list[Rank]],
    tmp_path: Path,
    run_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    """SIGTERM within level 1, then the same command."""
    words = [*SPLIT, "--out", str(tmp_path / "run")]
    first, other = (rank.ended() for rank in start(words, {0: asks}))
    assert other == (0, "", "")
    assert first[0] == 130, first[2]
    assert "2 workers on 2 ranks, one thread each; each network over 2 workers" in " ".join(first[2].split())
    assert "1 of 2 cells are finished, 1 under way are saved" in first[2]
    first, other = (rank.ended() for rank in start([*words, "--quiet"]))
    assert other == (0, "", "")
    assert (first[0], first[2]) == (0, "")
    assert run_contents(tmp_path / "run") == run_contents(split)


def another_mask() -> None:
    real = Team.follow

    def follow(self: Team, *tensors: Any) -> None:
        real(self, *tensors)
        if len(tensors) == 2:
            tensors[0][5] ^= True

    Team.follow = follow  # type: ignore[method-assign]


def own_sum() -> None:
    """A gradient that is not that of the others, behind the sum."""
    real = Team.add

    def add(self: Team, tensor: Any) -> None:
        real(self, tensor)
        if tensor.dim() == 2 and len(tensor) == 1:
            tensor[0, 99] += 1e-3

    Team.add = add  # type: ignore[method-assign]


@pytest.mark.parametrize(("fault", "what"), [(another_mask, "mask"), (own_sum, "weights")])
def test_a_rank_with_another_network_ends_the_run_in_a_line(
    fault: Callable[[], None], what: str, start: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    first, other = (r.ended() for r in start([*SPLIT, "--quiet", "--out", str(tmp_path / "run")], {1: fault}))
    assert other == (0, "", "")
    assert first[0] == 1
    (line,) = first[2].splitlines()
    assert line.startswith(f"sparselth: seed 0 ticket level 0: the {what} of worker 0 of rank 1 on ")
    assert f"came out other than the {what} of worker 0 of rank 0; with --split they must be" in line


def dies(rank: int) -> None:
    """In the fork: the worker of that place in its team is killed at its 15th step."""
    real, steps = Batches.index, list[int]()

    def index(self: Batches, step: int) -> Any:
        steps.append(step)
        if len(steps) == 15 and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, step)

    Batches.index = index  # type: ignore[method-assign]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_dies_is_named_and_its_team_is_not_waited_for(
    rank: int, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not what the other one saw of it."""
    monkeypatch.setattr(Batches, "index", Batches.index)  # and put back
    dies(rank)
    code, _, err = cli(*SPLIT, "--workers", "2", "--quiet", "--out", str(tmp_path / "run"))
    assert code == 1
    assert err.startswith(f"sparselth: worker {rank} ended without a result, killed by signal 9 ")
    assert len(err.splitlines()) == 1


def test_a_worker_of_another_rank_that_dies_is_named(
    start: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    words = [*SPLIT, "--quiet", "--out", str(tmp_path / "run")]
    first, other = (r.ended() for r in start(words, {1: partial(dies, 1)}))
    assert other == (0, "", "")
    assert first[0] == 1
    (line,) = first[2].splitlines()
    assert line.startswith("sparselth: worker 0 of rank 1 on ")
    assert "ended without a result; what is finished is kept" in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--split 3", "--split 3: expected at most 2, the workers that there are; start more ranks, or more"),
        ("--split 0", "--split 0: expected 1 or more"),
        ("--split 2 --kernels reference", "--kernels reference: with --split networks train through"),
        ("--split 2 --replicas 2", "--replicas 2: with --split networks train one by one; expected 1"),
        ("--split 2 --batch-size 1", "--split 2: expected at most the 1 samples of a batch"),
    ],
)
def test_what_cannot_be_split_is_said(
    flags: str, says: str, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = [*IMP.split(), "--workers", "2", "--quiet", "--out", str(tmp_path / "run")]
    code, _, err = cli(*words, *flags.split())
    assert (code, err[:11]) == (2, "sparselth: ")
    assert says in err
    assert not (tmp_path / "run").exists()


def test_a_plan_says_over_how_many_workers_and_prices_a_share(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = [*IMP.split(), "--seeds", "0-2", "--workers", "5", "--split", "2", "--dry-run"]
    planned = json.loads(cli(*words, "--json", "--out", str(tmp_path / "run"))[1])
    assert (planned["workers"], planned["split"], planned["replicas"]) == (4, 2, 1)  # the fifth has no other
    assert planned["config"]["kernels"] == "autograd"
    assert planned["config"]["recipe"]["batch_size"] == 61
    said = cli(*words, "--out", str(tmp_path / "run"))[2]
    assert "4 workers, one thread each; each network over 2 workers" in " ".join(said.split())
    assert "ms a step, without sending" in " ".join(said.split())


@pytest.mark.whole
def test_torchrun_restarts_a_split_run_whose_rank_was_killed(
    split: Path,
    environment: dict[str, str],
    tmp_path: Path,
    run_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    """Without --resume: the worker of rank 1 kills its rank at its 50th step, in level 1."""
    (tmp_path / "kill.py").write_text(
        "import os, signal\nfrom sparselth.data.batches import Batches\n"
        "from sparselth.experiments.imp import ImpConfig\n\n"
        "real, steps = Batches.index, []\n\ndef index(self, *args):\n    steps.append(1)\n"
        "    if len(steps) == 50 and os.environ['RANK'] == '1' and "
        "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return real(self, *args)\n\nBatches.index, ImpConfig.draw = index, lambda *_: None\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*SPLIT[:-1], "--plugin", "kill.py", "--workers", "1", "--out", "run"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "1", "-m", "sparselth", *words],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert read(tmp_path / "run").complete
    assert run_contents(tmp_path / "run") == run_contents(split)
