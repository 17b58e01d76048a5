"""What the interpreter cannot run: sources and compilations in processes without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def without_interpreter() -> Iterator[Callable[[str], str]]:
    """`without_interpreter(source)`: its stdout, run in a process of its own; asserts exit code 0."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {
        "PYTHONPATH": str(HERE.parents[1]),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # leaves CUDA alone, which does not outlive a fork
    }
    command = [sys.executable, str(HERE / "without_interpreter.py")]
    server: list[subprocess.Popen[str]] = []

    def run(source: str) -> str:
        if not server:
            server.append(
                subprocess.Popen(
                    command, env=environment | paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
        stdin, stdout = server[0].stdin, server[0].stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(source), file=stdin, flush=True)
        done = json.loads(stdout.readline())
        assert done["code"] == 0, f"exit code {done['code']}: {done['err'][-3000:]}"
        return str(done["out"])

    yield run
    for process in server:
        process.communicate()  # the end of its input is its end


@pytest.fixture(scope="session")
def machine_code(without_interpreter: Callable[[str], str]) -> Callable[[str], list[dict[str, Any]]]:
    """`machine_code("masked_linear")`: what aot.py finds in each configuration, compiled once."""

    @cache
    def found(name: str) -> list[dict[str, Any]]:
        source = f"""
import json, sys
sys.path.insert(0, {str(HERE)!r})
import aot
print(json.dumps(aot.examine({name!r})))
"""
        facts: list[dict[str, Any]] = json.loads(without_interpreter(source))
        return facts

    return found
