"""Runtimes of others as rivals: a network as ONNX, where `onnx` is installed, in ONNX Runtime and OpenVINO.

`pip install sparselth[rivals]` brings them. Their memory is no allocator's of torch: it is what a process
of its own grows by which loads the file and computes once, `measure.sessions`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselth.errors import SparselthError, one_line
from sparselth.measure.sessions import RUNTIMES, Run
from sparselth.sparse.reference import Given

EXTRA = "pip install sparselth[rivals]"
SECONDS = 300  # for a process that measures memory


def need(*packages: str) -> None:
    """SparselthError where one is not installed."""
    for package in packages:
        try:
            there = importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):  # None in sys.modules
            there = False
        if not there:
            raise SparselthError(f"{package} is not installed ({EXTRA})")


@dataclass
class Exported:
    """A network as an ONNX file for inputs of these shapes, in a folder that goes with it."""

    net: nn.Module
    given: Given
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="sparselth-onnx-")
    )

    @cached_property
    def file(self) -> Path:
        """Written by torch's exporter of graphs where it has what it needs, else by the older one."""
        need("onnx")
        file, (args, kwargs) = Path(self.folder.name, "network.onnx"), self.given.call(self.given.tensors)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the older exporter knows no such operator
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                graphs = importlib.util.find_spec("onnxscript") is not None
                torch.onnx.export(self.net, args, str(file), kwargs=kwargs, dynamo=graphs, verbose=False)
        except Exception as error:  # of an exporter, about an operator that ONNX does not have
            raise SparselthError(f"torch cannot export it: {_reason(error)}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return file

    @property
    def bytes(self) -> int:
        """Of the file, and of one beside it that holds large weights."""
        return sum(one.stat().st_size for one in self.file.parent.glob("network.onnx*"))

    def arrays(self, given: Given) -> list[NDArray[Any]]:
        """Inputs in the order of the file's."""
        leaves = pytree.tree_leaves(given.call(given.tensors))
        return [t.detach().contiguous().numpy() for t in leaves if isinstance(t, Tensor)]


@dataclass
class Outside:
    """A network in a runtime of others."""

    name: str
    exported: Exported
    run: Run
    file_bytes: int

    def bind(self, given: Given) -> Callable[[], list[Tensor]]:
        """A call on inputs that lie where the runtime reads them."""
        arrays = self.exported.arrays(given)
        return lambda: [torch.from_numpy(y) for y in self.run(arrays)]

    def peak_bytes(self, given: Given) -> int | None:
        """What a process of its own grows by as it loads the file and computes; None where nobody counts."""
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder, "inputs.npz")
            arrays: dict[str, Any] = {f"x{i}": x for i, x in enumerate(self.exported.arrays(given))}
            np.savez(inputs, **arrays)
            words = [self.name, str(self.exported.file), str(torch.get_num_threads()), str(inputs)]
            command = [sys.executable, "-m", "sparselth.measure.sessions", *words]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
            except (OSError, subprocess.SubprocessError):
                return None
        found = re.search(r"grew by (\d+)", done.stdout)
        return int(found[1]) if found else None


def _reason(error: BaseException) -> str:
    """The first cause in one line, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error).strip())
    return f"{one_line(text or type(error).__name__):.160}"


def onnxruntime(exported: Exported) -> Outside:
    """ONNX Runtime, on torch's number of threads."""
    need("onnxruntime")
    return _made("onnxruntime", exported)


def openvino(exported: Exported, name: str = "openvino") -> Outside:
    """OpenVINO for least latency, in fp32 or by its other name in bf16; its file is of its own format."""
    need("openvino")
    made = _made(name, exported)
    library = importlib.import_module("openvino")
    file = Path(exported.folder.name, "network.xml")
    library.save_model(library.Core().read_model(str(exported.file)), str(file), compress_to_fp16=False)
    made.file_bytes = sum(one.stat().st_size for one in (file, file.with_suffix(".bin")))
    return made


def _made(name: str, exported: Exported) -> Outside:
    with redirect_stdout(sys.stderr):
        run = RUNTIMES[name](str(exported.file), torch.get_num_threads())
    return Outside(name, exported, run, exported.bytes)
