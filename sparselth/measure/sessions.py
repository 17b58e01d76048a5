"""An ONNX file in a runtime of others, on so many threads. Imports no torch, since it is also run by itself:

    python -m sparselth.measure.sessions onnxruntime network.onnx 2 inputs.npz

prints by how many bytes this process grows as it loads the network and computes it once. What the runtime's
own library takes is not counted: it is no network's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = list[NDArray[Any]]
Run = Callable[[Arrays], Arrays]


def onnxruntime(file: str, threads: int) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down others
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def openvino(file: str, threads: int, precision: str = "f32") -> Run:
    runtime = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = runtime.Core()
    network = core.compile_model(core.read_model(file), "CPU", settings)
    request = network.create_infer_request()
    ports = len(network.inputs)

    def run(arrays: Arrays) -> Arrays:
        if len(arrays) != ports:
            raise ValueError(f"its graph reads {ports} of {len(arrays)} inputs")
        return [*request.infer(arrays, share_inputs=True, share_outputs=True).values()]

    return run


RUNTIMES: dict[str, Callable[[str, int], Run]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino-bf16": partial(openvino, precision="bf16"),
}


def memory(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def main(name: str, file: str, threads: str, inputs: str) -> None:
    with np.load(inputs) as found:
        arrays = [found[f"x{i}"] for i in range(len(found.files))]
    importlib.import_module(name.removesuffix("-bf16"))
    before = memory("VmRSS")
    RUNTIMES[name](file, int(threads))(arrays)
    print("grew by", memory("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
