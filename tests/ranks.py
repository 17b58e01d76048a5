"""Ranks that srun would have started, as forks of this process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

from sparselth.cli.main import run

SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}


class Rank:
    """A rank of srun's as a fork of this process, which has torch loaded."""

    def __init__(self, number: int, port: int, words: list[str], prepare: Callable[[], object]) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            os.setpgid(0, 0)
            for file, stream in zip(self.files, (1, 2), strict=True):
                os.dup2(file.fileno(), stream)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
            os.environ |= SRUN | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
            os.environ |= {"SLURM_CPUS_PER_TASK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            prepare()
            code = run(words)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for file in self.files:
            file.seek(0)
        out, err = (file.read().decode() for file in self.files)
        return code, out, err
