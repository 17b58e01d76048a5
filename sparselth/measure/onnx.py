"""ONNX Runtime as a rival: a network as a graph of it, where `onnx` and `onnxruntime` are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def onnx_call(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """ONNX Runtime on the same network, where it and `onnx` are installed."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    make, nodes, constants, name = onnx.helper, [], [], "x"
    for i, module in enumerate(net.children()):
        inputs = [name]
        settings: dict[str, Any] = {}
        for label, parameter in module.named_parameters():
            inputs.append(f"{i}.{label}")
            constants.append(onnx.numpy_helper.from_array(parameter.detach().numpy(), inputs[-1]))
        match module:
            case nn.Linear():
                kind, settings = "Gemm", {"transB": 1}
            case nn.Conv2d():
                pad = int(module.padding[0])
                kind, settings = "Conv", {"pads": [pad] * 4}
            case nn.MaxPool2d():
                size = [int(module.kernel_size)] * 2  # type: ignore[arg-type]
                kind, settings = "MaxPool", {"kernel_shape": size, "strides": size}
            case _:
                kind = {nn.ReLU: "Relu", nn.Flatten: "Flatten"}[type(module)]
        name = f"y{i}"
        nodes.append(make.make_node(kind, inputs, [name], **settings))
    kind = onnx.TensorProto.FLOAT
    ends = [make.make_tensor_value_info(end, kind, None) for end in ("x", name)]
    graph = make.make_graph(nodes, "network", ends[:1], ends[1:], constants)
    file = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down others
    session = runtime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, fed)[0])
