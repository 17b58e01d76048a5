"""RMS norms in a graph by their formula, as most decoders write them, and as one module each.

y = x * rsqrt(mean(x^2 over the features) + eps) * weight        (Zhang & Sennrich 2019, arXiv:1910.07467)
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparselth.sparse.grouping import PRODUCTS, SUMS, calls

if TYPE_CHECKING:
    from sparselth.sparse.tokens import Values

CASTS = {"float", "to", "type_as", "type"}  # of what is fp32 before and behind
SQUARES = {torch.square, "square"}
POWERS = {operator.pow, torch.pow, "pow"}
MEANS = {torch.mean, "mean"}
ROOTS = {torch.rsqrt, "rsqrt"}
FUNCTIONS = {F.rms_norm, torch.rms_norm}


def name_norms(graph: fx.GraphModule, values: Values) -> None:
    """One `nn.RMSNorm` where there is such a formula, in place; what nobody else reads of it goes."""
    names = iter(range(len(graph.graph.nodes)))
    for node in [*graph.graph.nodes]:
        found = _function(graph, node) or _formula(graph, node, values)
        if found is None:
            continue
        x, weight, eps, last = found
        width = values.shapes[x][-1] if x in values.shapes else 0
        if not width or last not in values.shapes:
            continue
        norm = nn.RMSNorm(width, eps, elementwise_affine=False)
        norm.elementwise_affine = weight is not None
        norm.register_parameter("weight", None if weight is None else _parameter(weight))
        name = next(n for n in (f"rms_norm{i}" for i in names) if not hasattr(graph, n))
        graph.add_submodule(name, norm.eval())
        with graph.graph.inserting_after(last):
            new = graph.graph.call_module(name, (x,))
        last.replace_all_uses_with(new)
        values.shapes[new] = values.shapes[last]
        _erase(graph.graph, last, until=x)


def _parameter(weight: Tensor) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


_Found = tuple[fx.Node, Tensor | None, float, fx.Node]  # x, weight, eps, and the last node of it


def _function(graph: fx.GraphModule, node: fx.Node) -> _Found | None:
    """By torch's own function."""
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return None
    given: dict[str, Any] = (
        dict(zip(("input", "normalized_shape", "weight", "eps"), node.args, strict=False)) | node.kwargs
    )
    x, shape, eps = given.get("input"), given.get("normalized_shape"), given.get("eps")
    if not isinstance(x, fx.Node) or not isinstance(shape, list | tuple | torch.Size) or len(shape) != 1:
        return None
    weight = _constant(graph, given.get("weight"))
    if not isinstance(eps, float | None) or (given.get("weight") is not None and weight is None):
        return None
    return x, weight, torch.finfo(torch.float32).eps if eps is None else eps, node


def _formula(graph: fx.GraphModule, node: fx.Node, values: Values) -> _Found | None:
    """By rsqrt of a mean square, that stands at `node`."""
    if not calls(node, ROOTS) or len(node.args) != 1:
        return None
    root, total = _cast(node, values), node.args[0]
    if not isinstance(total, fx.Node) or not calls(total, SUMS) or len(total.args) != 2:
        return None
    numbers = [arg for arg in total.args if isinstance(arg, int | float)]
    means = [arg for arg in total.args if isinstance(arg, fx.Node)]
    if len(numbers) != 1 or len(means) != 1:
        return None
    x = _squared(means[0], values)
    if x is None:
        return None
    scaled = [
        user
        for user in root.users
        if calls(user, PRODUCTS) and any(_same(arg, x, values) for arg in user.args if arg is not root)
    ]
    if len(scaled) != 1 or len(root.users) != 1:
        return None
    last, weight = _cast(scaled[0], values), None
    users = [*last.users]
    if len(users) == 1 and calls(users[0], PRODUCTS) and len(users[0].args) == 2:
        others = [arg for arg in users[0].args if arg is not last]
        weight = _constant(graph, others[0]) if len(others) == 1 else None
        if weight is not None and weight.shape == values.shapes.get(x, ())[-1:]:
            last = users[0]
        else:
            weight = None
    return x, weight, float(numbers[0]), last


def is_square(node: fx.Node) -> bool:
    """Whether it is its first argument by itself."""
    if node.kwargs:
        return False
    power = calls(node, POWERS) and len(node.args) == 2 and node.args[1] in (2, 2.0)
    return power or (calls(node, SQUARES) and len(node.args) == 1)


def _squared(node: fx.Node, values: Values) -> fx.Node | None:
    """Of whose squares it is the mean over the features, kept as an axis."""
    names = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    axes, square = names.get("dim"), names.get("input")
    axes = [*axes] if isinstance(axes, list | tuple) else [axes]
    if not calls(node, MEANS) or names.keys() - {"input", "dim", "keepdim"} or not names.get("keepdim"):
        return None
    if not isinstance(square, fx.Node) or axes not in ([-1], [len(values.shapes.get(square, ())) - 1]):
        return None
    args = square.args
    if not is_square(square) and not (calls(square, PRODUCTS) and len(args) == 2 and args[0] is args[1]):
        return None
    x = args[0]
    return _origin(x, values) if isinstance(x, fx.Node) else None


def _origin(node: fx.Node, values: Values) -> fx.Node:
    """What it is a cast of that changes nothing."""
    while calls(node, CASTS) and node in values.shapes and node.args[0] in values.shapes:
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _same(node: Any, x: fx.Node, values: Values) -> bool:
    return isinstance(node, fx.Node) and _origin(node, values) is x


def _cast(node: fx.Node, values: Values) -> fx.Node:
    """The last of the casts of it that nobody else reads."""
    while len(node.users) == 1:
        (user,) = node.users
        if not calls(user, CASTS) or user.args[0] is not node or user not in values.shapes:
            break
        node = user
    return node


def _constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """A parameter or buffer, or 1 + one, as Gemma has it."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        found: Any = graph
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found if isinstance(found, Tensor) and found.dtype == torch.float32 else None
    if calls(node, CASTS):
        return _constant(graph, node.args[0])
    if calls(node, SUMS) and len(node.args) == 2:
        number = next((arg for arg in node.args if isinstance(arg, int | float)), None)
        weights = [found for arg in node.args if (found := _constant(graph, arg)) is not None]
        return None if number is None or not weights else weights[0].detach() + number
    return None


def _erase(graph: fx.Graph, last: fx.Node, until: fx.Node) -> None:
    """It and what it was made of, back to `until`, where nobody reads it."""
    if last is until or last.users or last.op == "placeholder":
        return
    sources = last.all_input_nodes
    graph.erase_node(last)
    for source in sources:
        if source in graph.nodes:
            _erase(graph, source, until)
