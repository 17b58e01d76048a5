"""A module as a graph of calls, by torch.fx; which of its nodes are layers that follow each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparselth.sparse.attention import Attention
from sparselth.sparse.compaction import NOTHING, POINTWISE, Part, is_hooked, is_known, plain, rebuilt
from sparselth.sparse.reference import Given


class _Root(nn.Module):
    """The model as a function of its tensors alone; all else is as in the example."""

    def __init__(self, model: nn.Module, given: Given) -> None:
        super().__init__()
        self.model, self.given = model, given

    def run(self, *tensors: Any) -> Any:
        args, kwargs = self.given.call([*tensors])
        return self.model(*args, **kwargs)


class _Unpacked(fx.Proxy):
    """What may be unpacked by a star: then Python asks for a length, and takes a TypeError for an answer."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _UnpackedAttribute(self, k)

    def __len__(self) -> int:
        raise TypeError("a length is not known while torch.fx traces")


class _UnpackedAttribute(fx.proxy.Attribute):
    __len__ = _Unpacked.__len__


class _Tracer(fx.Tracer):
    tensors: Sequence[Tensor] = ()  # inputs of the example
    lengths: fx.Interpreter | None = None  # which computes what was asked for, each node once
    computes = False  # whether modules are called, not noted

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Unpacked(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """What is unpacked where torch.fx does not see into how many, as in `view(*x.shape[:-1], -1)`."""
        asked = obj.node  # of an attribute it is made now
        if self.lengths is None:
            self.lengths = fx.Interpreter(self.root, graph=self.graph)
            self.lengths.args_iter = iter(self.tensors)
        env, self.computes = self.lengths.env, True
        try:
            with torch.no_grad():
                for node in [*self.graph.nodes]:
                    if node not in env:
                        env[node] = self.lengths.run_node(node)
        finally:
            self.computes = False
        every: Any = obj
        return iter([every[i] for i in range(len(env[asked]))])

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computes else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.computes:
            return forward(*args, **kwargs)
        if isinstance(m, Attention) and not is_hooked(m) and m.opens(*args, **kwargs):
            return m.opened(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, Attention) or is_hooked(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


class _BufferTracer(_Tracer):  # a class of its own, by which torch.fx reads back what was saved
    proxy_buffer_attributes = True


def trace(model: nn.Module, given: Given) -> fx.GraphModule:
    """A graph of the model as a function of its tensors; raises whatever torch.fx does where it cannot."""
    names = [f"x{i}" for i in range(len(given.tensors))]
    space: dict[str, Any] = {}
    exec(f"def forward(self, {', '.join(names)}): return self.run({', '.join(names)})", space)
    root = type("Root", (_Root,), {"forward": space["forward"]})(model, given)
    graph = _graph(root, given.tensors)
    traced = fx.GraphModule(root, graph, "Traced")
    for node in [*graph.nodes]:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(source, fx.Node) and _does_nothing(traced, node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    traced.recompile()
    return traced


def _graph(root: nn.Module, tensors: Sequence[Tensor]) -> fx.Graph:
    """With buffers as they are or, where inputs say what is cut out of them, as nodes."""
    try:
        return _of(_Tracer(), tensors).trace(root)
    except Exception:
        with suppress(Exception):
            return _of(_BufferTracer(), tensors).trace(root)
        raise


def _of(tracer: _Tracer, tensors: Sequence[Tensor]) -> _Tracer:
    tracer.tensors = tensors
    return tracer


def chain_at(traced: fx.GraphModule, node: fx.Node, x: Tensor, masks: dict[Tensor, Tensor]) -> Chain | None:
    """The layers from this node on, if it is a product that can take a form on an input like x."""
    layer = layer_of(traced, node)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.dtype != x.dtype or not x.numel():
        return None
    if layer.weight.device != x.device or (isinstance(layer, nn.Conv2d) and x.dim() != 4):
        return None
    tokens = isinstance(layer, nn.Linear) and x.dim() != 2
    y = x.reshape(-1, x.shape[-1])[:1] if tokens else x[:1]
    parts: list[Part] = []
    nodes: list[fx.Node] = []
    at: fx.Node | None = node
    while at is not None and layer is not None and _follows(layer, y, tokens):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            last = parts[-1]
            if not isinstance(last.module, nn.Linear | nn.Conv2d):
                break
            parts[-1] = Part(last.name, folded(last.module, layer), last.before, last.after)
            z = y
        else:
            layer = plain(layer, masks)
            z = layer(y)
            parts.append(Part(_name(at), layer, tuple(y.shape[1:]), tuple(z.shape[1:])))
        nodes.append(at)
        y, at = z, next(iter(at.users)) if len(at.users) == 1 else None
        layer = None if at is None or at.all_input_nodes[:1] != nodes[-1:] else layer_of(traced, at)
    return Chain(nodes, parts, tokens)


class Chain:
    """Nodes that follow each other, what they compute, and whether on [..., K] instead of [B, ...]."""

    def __init__(self, nodes: list[fx.Node], parts: list[Part], tokens: bool) -> None:
        self.nodes, self.parts, self.tokens = nodes, parts, tokens


def layer_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer of KINDS, or the batch norm, that a node computes of its first argument; else None."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if len(node.args) != 1 or node.kwargs:
            return None
        return module if is_known(module) or _is_norm(module) else None
    if node.op == "call_function" and node.target in (F.linear, F.conv2d):
        return _functional(traced, node)
    kind = LAYERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if (
        kind is None
        or not node.args
        or not isinstance(node.args[0], fx.Node)
        or len(node.all_input_nodes) != 1
    ):
        return None
    try:
        return kind(*node.args[1:], **node.kwargs)
    except TypeError:  # an argument that the layer has not
        return None


def mean_at(traced: fx.GraphModule, node: fx.Node) -> bool | None:
    """Of a mean of each plane of [B, C, H, W] whether it stays as 1 x 1 pixels; None if a node is none."""
    if node.op == "call_module":
        pool = traced.get_submodule(str(node.target))
        known = type(pool) is nn.AdaptiveAvgPool2d and not is_hooked(pool)
        return True if known and len(node.args) == 1 and pool.output_size in ONE else None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
    if node.target is F.adaptive_avg_pool2d:
        return True if given.get("output_size", given.get("dim")) in ONE else None
    if node.target not in ("mean", torch.mean) or not {*given} <= {"input", "dim", "keepdim"}:
        return None
    axes = given.get("dim")
    over = isinstance(axes, list | tuple) and {*axes} in ({2, 3}, {-1, -2})
    return given.get("keepdim", False) is True if over else None


def _flat(start_dim: int = 0, end_dim: int = -1) -> nn.Module | None:
    return nn.Flatten().eval() if (start_dim, end_dim) == (1, -1) else None


def _once(kind: Callable[..., nn.Module], *names: str) -> Callable[..., nn.Module]:
    """A layer from the arguments behind the input that its function takes; never in place."""
    signature = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in (*names, "inplace")]
    )

    def make(*args: Any, **kwargs: Any) -> nn.Module:
        given = signature.bind_partial(*args, **kwargs).arguments
        given.pop("inplace", None)
        return kind(**given).eval()

    return make


ONE = 1, (1, 1), [1, 1]  # sizes of one pixel
POOL = "kernel_size", "stride", "padding"
LAYERS: dict[Any, Callable[..., nn.Module | None]] = {
    torch.flatten: _flat,
    "flatten": _flat,
    F.max_pool2d: _once(nn.MaxPool2d, *POOL, "dilation", "ceil_mode"),
    F.avg_pool2d: _once(nn.AvgPool2d, *POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    F.gelu: _once(nn.GELU, "approximate"),
    F.leaky_relu: _once(nn.LeakyReLU, "negative_slope"),
    F.elu: _once(nn.ELU, "alpha"),
    F.softplus: _once(nn.Softplus, "beta", "threshold"),
    F.silu: _once(nn.SiLU),
    F.mish: _once(nn.Mish),
    F.relu6: _once(nn.ReLU6),
    F.hardswish: _once(nn.Hardswish),
    F.hardsigmoid: _once(nn.Hardsigmoid),
    **dict.fromkeys((F.relu, torch.relu, "relu"), _once(nn.ReLU)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), _once(nn.Sigmoid)),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), _once(nn.Tanh)),
}


def _functional(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A product by its function, of weights that are the model's own."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    tensors = []
    for name in ("weight", "bias"):
        source = given.get(name)
        if source is not None and not (isinstance(source, fx.Node) and source.op == "get_attr"):
            return None
        tensors.append(None if source is None else _attribute(traced, str(source.target)))
    weight, bias = tensors
    if weight is None or given.get("input") is not node.all_input_nodes[0]:
        return None
    product: nn.Linear | nn.Conv2d
    if node.target is F.linear:
        product = nn.Linear(1, 1, device="meta")
    else:
        settings = {n: given[n] for n in names[3:] if n in given}
        if any(isinstance(v, fx.Node) for v in settings.values()):
            return None
        groups = settings.get("groups", 1)
        product = nn.Conv2d(groups, groups, weight.shape[2:], **settings, device="meta")  # type: ignore[arg-type]
    # the parameter itself: its mask is found by it
    product.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    product.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, False)
    product.in_features = product.in_channels = 0
    return product.eval()


def _attribute(traced: fx.GraphModule, name: str) -> Tensor:
    found: Any = traced
    for word in name.split("."):
        found = getattr(found, word)
    assert isinstance(found, Tensor)
    return found


def folded(product: nn.Linear | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Linear | nn.Conv2d:
    """The product with the norm behind it, in evaluation mode, as one."""
    weight, bias = product.weight.detach(), product.bias
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    wide = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return rebuilt(product, wide.to(weight.dtype), shift.to(weight.dtype))


def _is_norm(module: nn.Module) -> bool:
    kind = next((k for k in (nn.BatchNorm1d, nn.BatchNorm2d) if isinstance(module, k)), None)
    known = kind is not None and type(module).forward is kind.forward and not is_hooked(module)
    return known and module.running_mean is not None


def _follows(layer: nn.Module, x: Tensor, tokens: bool) -> bool:
    """Whether it can stand in a chain behind what gives x."""
    if isinstance(layer, nn.Linear):
        return x.dim() == 2 and x.shape[1] == layer.weight.shape[1]
    if isinstance(layer, nn.BatchNorm1d):
        return x.dim() == 2 and not tokens
    if isinstance(layer, (nn.ReLU, *POINTWISE)):
        return True
    return x.dim() == 4


def _does_nothing(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return isinstance(module, NOTHING) and is_known(module)
    dropout = node.op == "call_function" and node.target in (F.dropout, F.dropout2d, F.alpha_dropout)
    depth = getattr(node.target, "__module__", "") == "torchvision.ops.stochastic_depth"  # not imported here
    place = 2 if dropout else 3 if depth else None
    return place is not None and node.kwargs.get("training", [*node.args, *[True] * 4][place]) is False


def _name(node: fx.Node) -> str:
    name = str(node.target) if node.op == "call_module" else node.name
    return name.removeprefix("model.")
