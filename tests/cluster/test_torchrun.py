"""Ranks: who they are, how they meet, and runs over two of them beside the run of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import click
import pytest
from ranks import SRUN, Rank

from sparselth.cli import main
from sparselth.cluster import torchrun
from sparselth.cluster.torchrun import Dial, Group, Listener, here, share_of
from sparselth.engine import break_even
from sparselth.experiments import processes
from sparselth.experiments import run as run_module
from sparselth.experiments.run import plan
from sparselth.models import Model
from sparselth.runs import RunRecord

FLAGS = "imp --model lenet-300-100 --dataset mnist5k --seeds 0,1 --levels 1 --arms ticket,reinit"
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "there",
}


@pytest.mark.parametrize(
    ("environ", "group"),
    [
        ({}, None),
        (TORCHRUN, Group(3, 4, 1, 2, "there")),
        (
            TORCHRUN | {"MASTER_PORT": "7", "TORCHELASTIC_RESTART_COUNT": "2"},
            Group(3, 4, 1, 2, "there", 7, 2),
        ),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),  # of something else
        (SRUN, Group(1, 2, 1, 1)),
        (SRUN | {"MASTER_ADDR": "there"}, Group(1, 2, 1, 1, "there")),
        (TORCHRUN | SRUN, Group(3, 4, 1, 2, "there")),  # torchrun in a step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script
    ],
)
def test_who_a_process_is(environ: dict[str, str], group: Group | None) -> None:
    assert here(environ) == group


@pytest.mark.parametrize(
    ("environ", "group", "cores"),
    [
        ({}, None, 12),
        ({}, Group(0, 8, 0, 4), 3),
        ({}, Group(0, 40, 0, 20), 1),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_NTASKS": "3"}, None, 6),  # a batch script
        (SRUN | {"SLURM_CPUS_PER_TASK": "5"}, Group(1, 2, 1, 1), 5),
        (SRUN | {"SLURM_CPUS_PER_TASK": "50"}, None, 12),
        (SRUN | {"SLURM_CPUS_PER_TASK": "8"}, Group(1, 8, 1, 4), 2),  # torchrun in a step
    ],
)
def test_the_cores_of_a_rank(
    environ: dict[str, str], group: Group | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun, "_joined", group)
    assert share_of(12, environ) == cores


@pytest.mark.parametrize(("seen", "gpu"), [(None, "2"), ("4,5,6", "6"), ("7", "7"), ("", ""), ("4,5", "")])
def test_the_gpu_of_a_rank(seen: str | None, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    Group(6, 8, 2, 4).take_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


def test_rank_0_hears_who_has_the_key_alone() -> None:
    listener = Listener("127.0.0.1", 4)
    right = Dial("127.0.0.1", listener.port, listener.key, (1, 5))
    heard: list[Any] = []
    with listener.socket:
        thread = threading.Thread(target=lambda: heard.extend(listener.accept() for _ in range(2)))
        thread.start()
        with pytest.raises((AuthenticationError, ConnectionError, EOFError)):
            Client(("127.0.0.1", listener.port), "AF_INET", authkey=b"another").recv()
        with right.connect() as mine:
            thread.join()
            connection, who = heard[1]
            connection.send("hello")
            assert mine.recv() == "hello"
    assert heard[0] is None
    assert who[:2] == (1, 5)
    connection.close()


def compressed(model: Model, *_: object) -> dict[str, float]:
    """In place of a measured break-even, which others on this machine could move."""
    return {spec.name: 2.0 for spec in model.weights}


@pytest.fixture
def single(
    imp: Callable[..., RunRecord],
    run_contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, bytes]:
    """The files of the run of one process."""
    monkeypatch.setattr(break_even, "break_even", compressed)
    record = imp("--levels", "1", "--arms", "ticket,reinit", "--eval-every", "10", steps=60, out="single")
    return run_contents(record.path)


def restarted() -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def test_two_ranks_come_to_the_bits_of_one_process(
    start: Callable[..., list[Rank]],
    single: dict[str, bytes],
    tmp_path: Path,
    run_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    """Also stopped by USR1 to all, as Slurm sends it, and begun again as torchrun does."""
    words = [
        *FLAGS.split(),
        "--steps",
        "60",
        "--eval-every",
        "10",
        "--out",
        str(tmp_path / "run"),
    ]
    ranks = start(words)
    until = time.monotonic() + 60
    while not (file := tmp_path / "run" / "cells.jsonl").exists() or not file.stat().st_size:
        assert time.monotonic() < until
        time.sleep(0.01)
    for rank in ranks[::-1]:
        os.kill(rank.pid, signal.SIGUSR1)
    first, other = (rank.ended() for rank in ranks)
    assert other == (0, "", "")
    assert first[0] == 130, first[2]
    assert "2 workers on 2 ranks, one thread each" in first[2]
    assert first[2].splitlines()[-1].startswith("sparselth: stopped by SIGUSR1; ")
    first, other = (rank.ended() for rank in start([*words, "--quiet"], {0: restarted, 1: restarted}))
    assert other == (0, "", "")
    assert (first[0], first[2]) == (0, "")
    assert run_contents(tmp_path / "run") == single


def nowhere() -> None:
    os.environ["SPARSELTH_DATA"] = "/nowhere"


def test_what_is_wrong_at_a_rank_is_one_line_of_rank_0(
    start: Callable[..., list[Rank]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stripes = tmp_path / "stripes.py"
    stripes.write_text(
        "from pathlib import Path\nimport os\n\ndef load():\n    import torch\n"
        "    if os.environ.get('SPARSELTH_DATA') == '/nowhere':\n        raise OSError('no such disk')\n"
        "    x = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0))\n"
        "    return x[:150], torch.arange(150) % 10, x[150:], torch.arange(50) % 10\n"
    )
    words = [*FLAGS.split(), "--steps", "20", "--quiet", "--out", str(tmp_path / "run"), "--batch-size", "20"]
    words[words.index("mnist5k")] = f"{stripes}:load"
    first, other = (rank.ended() for rank in start(words, {1: nowhere}))
    assert other == (0, "", "")
    assert first[0] == 1
    assert first[2].startswith("sparselth: rank 1 on ")
    assert "no such disk" in first[2]
    assert len(first[2].splitlines()) == 1


def stillborn() -> None:
    processes.live = lambda *_: os._exit(3)  # type: ignore[assignment]


def test_a_worker_that_never_calls_is_not_waited_for(
    start: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    words = [*FLAGS.split(), "--steps", "20", "--quiet", "--out", str(tmp_path / "run")]
    first, other = (rank.ended() for rank in start(words, {1: stillborn}))
    assert other == (0, "", "")
    assert first[0] == 1
    assert first[2].endswith(": worker 0 ended as it began\n")


def test_a_restart_goes_on_with_the_same_run_alone(
    imp: Callable[..., RunRecord],
) -> None:
    """Not with one that asks for more, which `resume` alone may extend."""
    flags = ["--arms", "ticket", "--levels", "1"]
    record = imp(*flags, steps=20)
    group = Group(0, 2, 0, 2, "127.0.0.1", restarts=1)
    same = run_module._restarted(plan(record.config, out=record.path), group)
    more = run_module._restarted(plan(replace(record.config, levels=2), out=record.path), group)
    assert (same, more) == (True, False)
    assert not run_module._restarted(plan(record.config, out=record.path), replace(group, restarts=0))


@pytest.mark.parametrize(("words", "code"), [(["ls", "models"], 0), (["imp", "--modell", "x"], 2)])
def test_what_is_no_run_rank_0_does_alone(
    words: list[str], code: int, start: Callable[..., list[Rank]]
) -> None:
    first, other = (rank.ended() for rank in start(words))
    assert other == (0, "", "")
    assert first[0] == code
    assert bool(first[1]) != bool(first[2])


def test_rank_0_is_found_before_it_does_anything(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does may take longer than others look for it: a download, `bench`, a sweep."""
    order: list[str] = []

    class Store:
        def check(self, keys: list[str]) -> bool:
            order.append("dismissed")
            return True

    def opened(self: Group) -> Store:
        order.append("opened")
        return Store()

    store = cached_property(opened)
    store.__set_name__(Group, "store")
    monkeypatch.setattr(Group, "store", store)
    called = main._called
    monkeypatch.setattr(main, "_called", lambda *words: order.append("called") or called(*words))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, value in (SRUN | {"SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert cli("ls", "models")[0] == 0
    assert order == ["opened", "called", "dismissed"]


def test_srun_without_an_address_says_how(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, value in (SRUN | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    code, _, err = cli(*FLAGS.split(), "--quiet", "--out", str(tmp_path / "run"))
    assert code == 1
    assert "2 tasks of srun, and MASTER_ADDR is not set: export MASTER_ADDR=$(scontrol show hostnames" in err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cli(*FLAGS.split(), "--out", str(tmp_path / "run")) == (0, "", "")


@pytest.mark.parametrize(("code", "again"), [(0, ""), (1, ""), (130, "requeue 7\n")])
def test_the_script_for_slurm_queues_itself_again(code: int, again: str, tmp_path: Path) -> None:
    """With an srun and an scontrol that only say what they are asked."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$MASTER_ADDR $MASTER_PORT" "$@"\nexit {code}\n')
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\nif [ "$1" = show ]; then echo one; echo two; else echo "$@"; fi\n'
    )
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    script = Path(__file__).resolve().parents[2] / "examples" / "slurm_imp.sh"
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/me", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(script)], env=environ | {"SLURM_JOB_NODELIST": "x"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (code, "")
    line, _, rest = done.stdout.partition("\n")
    assert rest == again
    address, port, python, module, name, command, *words = line.split()
    assert [address, port, python, module, name] == ["one", "20007", "python", "-m", "sparselth"]
    found = main.cli.get_command(click.Context(main.cli), command)
    assert found is not None
    found.make_context(command, words)
