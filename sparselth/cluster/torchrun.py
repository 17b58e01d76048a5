"""Processes that torchrun or srun started together: who this one is, and how they find each other.

RANK, WORLD_SIZE and LOCAL_RANK are torchrun's; srun's are SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID.
At MASTER_ADDR and MASTER_PORT lies torch's key-value store: in it rank 0 says where it listens, with a key
drawn for this run, or that nobody is needed. Then ranks talk over connections of multiprocessing. Whoever
reads the store can take part, as with torch.distributed. Imports torch late.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sparselth.errors import SparselthError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PORT = 29500  # torch's own default
COME = 300.0  # seconds that ranks have to come
LEAVE = 60.0  # that they have to leave when nobody is needed
SHAKE = 10  # that a caller has to prove that it has the key


@dataclass(frozen=True)
class Dial:
    """Where rank 0 listens, and as whom a process calls it."""

    host: str
    port: int
    key: bytes
    who: tuple[int, int | None]  # its rank; of a worker its number there

    def connect(self) -> Connection:
        from multiprocessing.connection import Client

        connection = Client((self.host, self.port), "AF_INET", authkey=self.key)
        connection.send((*self.who, socket.gethostname()))
        return connection


class Listener:
    """Rank 0's ear: a socket on the address of the store alone, for who has the key.

    On all addresses where the host calls its own name 127.0.1.1, as Debian does: other hosts do not.
    """

    def __init__(self, host: str, size: int) -> None:
        self.host, self.key = host, secrets.token_bytes(32)
        try:
            address = socket.gethostbyname(host)
            known = host in ("localhost", address) or not address.startswith("127.")
            self.socket = socket.create_server((address if known else "", 0), backlog=size)
        except OSError as error:
            raise SparselthError(
                f"MASTER_ADDR {host}: rank 0 cannot listen there ({error.strerror}); name the host of rank 0"
            ) from error
        self.port: int = self.socket.getsockname()[1]

    def accept(self) -> tuple[Connection, tuple[int, int | None, str]] | None:
        """Who calls: rank, number of a worker or None, host. None where it has no key."""
        from multiprocessing import AuthenticationError
        from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

        caller, _ = self.socket.accept()
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SHAKE, 0))
        connection = Connection(caller.detach())
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            who = connection.recv()
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return None
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        return connection, who


@dataclass(frozen=True)
class Group:
    """This process among those that were started together; see `here`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str = ""  # of rank 0; where it is not told nobody can be found
    port: int = PORT
    restarts: int = 0  # of all ranks by torchrun

    def check(self) -> None:
        """Raise SparselthError where nothing says how ranks find each other."""
        if not self.host:
            raise SparselthError(
                f"{self.size} tasks of srun, and MASTER_ADDR is not set: export MASTER_ADDR=$(scontrol show "
                "hostnames $SLURM_JOB_NODELIST | head -n 1) in the script, or start one task"
            )

    @cached_property
    def store(self) -> Any:
        """torch's store; of srun rank 0 has it, of torchrun its agent."""
        os.environ |= {"MASTER_ADDR": self.host, "MASTER_PORT": str(self.port)}
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.size)}
        from torch.distributed.rendezvous import rendezvous

        try:
            found, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=COME))))
        except RuntimeError as error:  # DistNetworkError
            raise SparselthError(
                f"rank {self.rank} cannot reach MASTER_ADDR {self.host}, MASTER_PORT {self.port}: {error}"
            ) from error
        return found

    def open(self) -> None:
        """By rank 0, before all else: others look for the store for COME seconds, whatever is done meanwhile.

        Under srun it waits until all are there; SparselthError where one does not come.
        """
        if self.host:
            _ = self.store

    def _key(self, name: str) -> str:
        return f"sparselth/{self.restarts}/{name}"

    def shared(self, name: str) -> tuple[tuple[str, int], str]:
        """Where any process finds the store, and what a name of this start of the ranks is there."""
        return (self.host, self.port), self._key(name)

    def call(self) -> Listener:
        """By rank 0: the others are needed, and called to a listener."""
        store, listener = self.store, Listener(self.host, 4 * self.size)
        where = {"host": listener.host, "port": listener.port, "key": listener.key.hex()}
        store.set(self._key("call"), json.dumps(where))
        return listener

    def dismiss(self) -> None:
        """By rank 0: nobody is needed any more; ranks that were never called leave, and are awaited."""
        if "store" not in vars(self):  # none was opened
            return
        with suppress(RuntimeError, SparselthError):
            if self.store.check([self._key("call")]):
                return
            self.store.set(self._key("call"), "")
            until = time.monotonic() + LEAVE
            while self.store.add(self._key("left"), 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(0.05)

    def awaited(self) -> Dial | None:
        """By another rank: where rank 0 listens, once it calls; None where it needs nobody."""
        if not self.host:
            return None
        try:
            while not self.store.check([self._key("call")]):
                time.sleep(0.1)
            told = self.store.get(self._key("call"))
            if not told:
                self.store.add(self._key("left"), 1)
                return None
        except RuntimeError:  # it has gone with rank 0
            return None
        where = json.loads(told)
        return Dial(where["host"], where["port"], bytes.fromhex(where["key"]), (self.rank, None))

    def take_gpu(self) -> None:
        """Let this process and its children see one GPU: that of its place on the host.

        Where the launcher left it one, that one; a rank beyond the last sees none.
        """
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen is not None else [str(self.local_rank)]
        if len(names) > 1:
            names = names[self.local_rank : self.local_rank + 1]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)


_joined: Group | None = None


def join(group: Group | None) -> None:
    """Make this process one of a group, for the runs it begins from now on; None: it is alone."""
    global _joined
    _joined = group


def joined() -> Group | None:
    """The group that this process is one of."""
    return _joined


def here(environ: Mapping[str, str] = os.environ) -> Group | None:
    """The group that the environment tells of; None where a process is alone."""

    def number(name: str, default: int) -> int:
        found = environ.get(name, "")
        return int(found) if found.isdecimal() else default

    host = environ.get("MASTER_ADDR", "")
    if environ.get("RANK") and environ.get("WORLD_SIZE") and host:
        rank, size, local_rank = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    else:  # a batch script itself has these numbers of Slurm, too, but for that of its step
        rank, size, local_rank = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    if number(size, 1) < 2:
        return None
    return Group(
        number(rank, 0),
        number(size, 1),
        number(local_rank, 0),
        number("LOCAL_WORLD_SIZE", 1),
        host,
        number("MASTER_PORT", PORT),
        number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def share_of(cores: int, environ: Mapping[str, str] = os.environ) -> int:
    """Of the cores that a process may use, those for its workers: what Slurm gave its task, and beside other
    ranks of torchrun's on its host an even share.
    """
    cpus, tasks = environ.get("SLURM_CPUS_PER_TASK", ""), environ.get("SLURM_NTASKS", "")
    if cpus.isdecimal():
        alone = "SLURM_STEP_NUM_TASKS" not in environ  # a batch script, which has the cores of all its tasks
        cores = min(cores, int(cpus) * (int(tasks) if alone and tasks.isdecimal() else 1))
    if _joined:
        cores //= _joined.local_size
    return max(1, cores)
