"""What the interpreter cannot run: sources and compilations in processes without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from covering import covering
from oracle import poisoned
from sparselth.kernels import _native
from sparselth.kernels._triton import INTERPRET
from triton_of_the_device import folder

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """In the interpreter every launch of every test is watched for races."""
    if not INTERPRET:
        yield
        return
    from races import watched

    with watched():
        yield


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """What an op allocates, or a test for it, is full of NaN, which shows where it is left unwritten."""
    with poisoned(guard=0):
        yield


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The level of the native kernels and torch's threads are what they were, whatever a test chose."""
    threads = torch.get_num_threads()
    yield
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if _native.LEVEL:
        _native.choose(_native.LEVEL)


@contextmanager
def server(*first: str) -> Iterator[Callable[[str], str]]:
    """What `without_interpreter` is, with these folders in front of PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {
        "PYTHONPATH": os.pathsep.join([*first, str(HERE.parents[1])]),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # leaves CUDA alone, which does not outlive a fork
    }
    command = [sys.executable, str(HERE / "without_interpreter.py")]
    processes: list[subprocess.Popen[str]] = []

    def run(source: str) -> str:
        if not processes:
            processes.append(
                subprocess.Popen(
                    command, env=environment | paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
        stdin, stdout = processes[0].stdin, processes[0].stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(source), file=stdin, flush=True)
        done = json.loads(stdout.readline())
        assert done["code"] == 0, f"exit code {done['code']}: {done['err'][-3000:]}"
        return str(done["out"])

    yield run
    for process in processes:
        process.communicate()  # the end of its input is its end


@pytest.hookimpl(tryfirst=True)  # before -m leaves any out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What starts processes of its own is not for a device; the interpreter takes not every combination.

    All are run on a device, and where `every` says so.
    """
    for item in items:
        if "without_interpreter" in getattr(item, "fixturenames", ()):
            item.add_marker("host")
    if not INTERPRET or every(config):
        return
    functions: dict[Any, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent == HERE and hasattr(item, "callspec") and has_triton(item.path):
            functions[item.path, item.originalname].append(item)  # type: ignore[attr-defined]
    left = set[pytest.Item]()
    for cases in functions.values():
        params = [case.callspec.params for case in cases]  # type: ignore[attr-defined]
        kept = covering([{name: repr(value) for name, value in p.items()} for p in params])
        left |= set(cases) - {cases[i] for i in kept}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def every(config: pytest.Config) -> bool:
    """Whether all combinations are run: where tests are asked for by name, and with SPARSELTH_EVERY=1
    (`make gpu-dry`, `make properties`)."""
    named = config.option.keyword or any("::" in arg for arg in config.args)
    return bool(named) or "SPARSELTH_EVERY" in os.environ


@cache
def has_triton(test: Path) -> bool:
    """Whether the kernel that a file tests is one of Triton's."""
    kernel = HERE.parents[1] / "kernels" / test.name.removeprefix("test_")
    return kernel.exists() and "@triton.jit" in kernel.read_text()


@pytest.fixture(scope="session")
def without_interpreter() -> Iterator[Callable[[str], str]]:
    """`without_interpreter(source)`: its stdout, run in a process of its own; asserts exit code 0."""
    with server() as run:
        yield run


def examined(
    run: Callable[[str], str], name: str, capabilities: str, some: bool = False
) -> list[dict[str, Any]]:
    source = f"""
import json, sys
sys.path.insert(0, {str(HERE)!r})
import aot
print(json.dumps(aot.examine({name!r}, {capabilities}, {some})))
"""
    facts: list[dict[str, Any]] = json.loads(run(source))
    return facts


@pytest.fixture(scope="session")
def machine_code(
    without_interpreter: Callable[[str], str], pytestconfig: pytest.Config
) -> Callable[[str], list[dict[str, Any]]]:
    """`machine_code("masked_linear")`: what aot.py finds in configurations that meet every parameter, or in
    each; compiled once."""
    some = not every(pytestconfig)
    return cache(lambda name: examined(without_interpreter, name, "(80, 90)", some))


@pytest.fixture(scope="session")
def machine_code_of_the_device() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """The same in each, for sm_90 and the device's Triton, which is fetched where it is missing."""
    try:
        place = folder()
    except OSError as why:
        pytest.skip(str(why))
    with server(str(place)) as run:
        yield cache(lambda name: examined(run, name, "(90,)"))


@pytest.fixture(scope="session")
def takes_warp_groups(
    machine_code_of_the_device: Callable[[str], list[dict[str, Any]]],
) -> Callable[[str, dict[str, tuple[Any, ...]], str], None]:
    """`takes_warp_groups("block_linear", TILES, "BLOCK_B")`: on sm_90, tiles of 64 rows or more do."""

    def check(name: str, tiles: dict[str, tuple[Any, ...]], rows: str) -> None:
        wanted = {(kind, tile) for kind in ("half", "tf32") for tile in tiles[kind] if tile.rows >= 64}
        for facts in machine_code_of_the_device(name)[: sum(map(len, tiles.values()))]:
            c = facts["constants"]
            kind = "half" if facts["signature"]["x_ptr"] == "*bf16" else c["PRECISION"]
            sizes = int(c[rows]), int(c["BLOCK_N"])
            tile = next(t for t in tiles[kind] if (t.rows, t.columns) == sizes)
            if (kind, tile) not in wanted:
                continue
            assert facts["wgmma"], (kind, tile)
            # the pipeline has all its stages
            stage = (tile.rows + tile.columns) * tile.depth * (2 if kind == "half" else 4)
            assert facts["shared_bytes"] >= tile.stages * stage, (kind, tile)
            wanted.remove((kind, tile))
        assert not wanted, wanted

    return check


@pytest.fixture(params=[*(_native.levels() or ["torch"])])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """What to ask for: the native kernels at each level in turn, or torch's where there are none."""
    if request.param == "torch":
        yield "torch"
        return
    _native.choose(request.param)
    yield "native"
    assert _native.LEVEL is not None
    _native.choose(_native.LEVEL)
