"""ONNX: the network with dense weights, zeros where pruned, any batch size, written by torch's exporter.

Where onnxruntime is installed, what it computes is held against float64 before the file is written.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselth.errors import SparselthError, UsageError, one_line
from sparselth.exchange.table import Format, Given, register
from sparselth.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


TERMS = 1 << 12  # numbers that are added for one of the results, about


def write(given: Given, file: Path) -> str:
    import torch

    net, x = given.module, given.example
    if net is None or x is None:
        raise UsageError(
            f"{file}: ONNX says how a network computes, and a ticket does not; "
            "give its `model`, as my_net.py:make, and the `dataset` that it reads unless it is the model's"
        )
    _installed("onnx")
    net = net.eval()
    with torch.no_grad():
        own = _output(net(x))
        exact = copy.deepcopy(net).double()(x.double() if x.is_floating_point() else x)
    buffer = io.BytesIO()
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                net,
                (x,),
                buffer,  # type: ignore[arg-type]
                input_names=["input"],
                output_names=["output"],
                dynamic_axes=axes,
                dynamo=False,
            )
    except Exception as error:  # of the exporter, about a layer that ONNX does not have
        raise SparselthError(
            f"{file}: torch cannot export this network: {one_line(str(error)):.300}"
        ) from error
    said = _checked(buffer.getvalue(), x, own, exact, file)
    write_atomically(file, buffer.getvalue())
    return said


def _output(found: Any) -> Tensor:
    import torch

    if not isinstance(found, torch.Tensor):
        raise SparselthError(f"the network gives a {type(found).__name__}; expected one tensor")
    return found


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SparselthError(
            f"ONNX needs the package {name}, which is not installed: pip install {name}"
        ) from error


def _checked(model: bytes, x: Tensor, own: Tensor, exact: Tensor, file: Path) -> str:
    """What is to be said of a check by onnxruntime; SparselthError where it finds other numbers."""
    import torch

    from sparselth.check import check

    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for n in (1, len(x)):
        (found,) = session.run(None, {"input": x[:n].numpy()})
        checked = check(torch.from_numpy(found), exact[:n], "fp32", terms=TERMS, own=own[:n])
        if checked.fault:
            raise SparselthError(f"{file}: onnxruntime computes other numbers ({checked.fault}); not written")
    if not exact.any():  # as of a last layer that begins with zeros
        return f"runs in onnxruntime {runtime.__version__}; all outputs are 0, which says little of the rest"
    return f"checked by onnxruntime {runtime.__version__}: error {checked.error:.1e} of float64"


register(Format("onnx", "ONNX with dense weights, zeros where pruned", write))
