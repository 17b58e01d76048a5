"""Any module made fast: its graph where torch.fx can trace it, else its layers one by one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparselth.check import ROUNDING
from sparselth.errors import one_line
from sparselth.sparse.attention import Attention, split_attention
from sparselth.sparse.choice import MARGIN, Choice, Joinable, choose
from sparselth.sparse.compaction import Part, check_evaluation, is_known, plain
from sparselth.sparse.converted import ConvertedModule
from sparselth.sparse.device import Device
from sparselth.sparse.forms import Formed
from sparselth.sparse.forms.stage import without_weight
from sparselth.sparse.grouping import join
from sparselth.sparse.joined import Joined
from sparselth.sparse.reference import Given, Reference, Samples, masked_copy
from sparselth.sparse.report import LayerReport, Report
from sparselth.sparse.segment import Segment
from sparselth.sparse.splitting import split_products
from sparselth.sparse.stretch import join_blocks
from sparselth.sparse.times import Cache
from sparselth.sparse.tokens import join_tokens
from sparselth.sparse.tracing import chain_at, trace
from sparselth.sparse.units import compact_graph

Reports = tuple[list[LayerReport], list[Joinable]]  # of the layers of a chain


def convert_module(
    model: nn.Module, masks: Mapping[Tensor, Tensor], example: Any, *, compact: bool, kernels: str
) -> ConvertedModule:
    """`convert` of a module that is no plain chain; masks by parameter."""
    began = time.perf_counter()
    check_evaluation(model)
    given = Given.of(model, example)
    device = _device(model, given, kernels)
    if not all(bool(t.isfinite().all()) for t in given.tensors if t.is_floating_point()):
        raise ValueError("example: expected finite numbers, got NaN or infinity")
    with torch.cuda.device_of(given.tensors[0]):  # type: ignore[no-untyped-call]
        reference = Reference.of(model, masks, given)
        original = masked_copy(model, masks, given)
        _same_copy(original, model, masks, given, reference)
        work = _Work(device, compact)
        network, how = _layered(original, given), "one by one in a copy"
        like: pytree.TreeSpec | None = None
        try:
            traced = _traced(original, model, masks, given, reference)
        except Exception as error:  # torch.fx, and whatever a forward does with what is no tensor
            reason = one_line(str(error).strip() or type(error).__name__)
            how = f"one by one in a copy: torch.fx cannot trace it: {reason[:160]}"
        else:
            if compact:
                again = partial(_traced, original, model, masks, given, reference)
                traced = work.compacted(traced, again, given, reference)
            network, how, like = work.chains(traced, given.tensors), "a graph by torch.fx", reference.spec
        work.layers(network, _caller(network, given, like is not None))
        networks = {"original": original, "converted": network}
        for name, plans in work.joinable.items():
            if isinstance(network, fx.GraphModule):
                networks |= _joined(name, network, plans, given)
        samples = Samples.of(model, masks, given, reference)
        calls = {
            name: partial(_caller, net, flat=name != "original" and like is not None)
            for name, net in networks.items()
        }
        checks = {
            name: samples.check(partial(_called, of), work.words, work.terms) for name, of in calls.items()
        }
        times = _race({name: of(given) for name, of in calls.items()}, networks, given, device)
    right = {name: times[name] for name in networks if name != "original" and not checks[name].fault}
    chosen = min(right, key=right.__getitem__, default="original")
    if MARGIN * times[chosen] >= times["original"]:
        chosen, like = "original", None
    network = networks[chosen]
    report = Report(
        batch=len(given.tensors[0]) if given.tensors[0].dim() else 1,
        device=str(device),
        layers=_as_taken(work.reports, network),
        units=work.units,
        networks=times,
        checks=checks,
        chosen=chosen,
        seconds=time.perf_counter() - began,
        left_out=work.left_out,
        how=how,
        kept=[name.removeprefix("model.") for name, p in network.named_parameters() if p.dim() > 1],
    )
    return ConvertedModule(network, given.bare() if like else None, like, report, device)


class _Work:
    """What is made and found while layers take forms."""

    def __init__(self, device: Device, compact: bool) -> None:
        self.device, self.compact = device, compact
        self.reports: list[Reports] = []
        self.units: list[Any] = []
        self.left_out: dict[str, str] = {}
        self.joinable: dict[str, dict[Segment, list[Formed]]] = {}  # plans for those that stand together
        self.terms = 1
        kinds = nn.Linear(1, 1, device="meta"), nn.Conv2d(1, 1, 1, device="meta")
        self.words = max((device.precision(module) for module in kinds), key=ROUNDING.__getitem__)

    def segment(self, parts: list[Part], x: Tensor, tokens: bool) -> Segment:
        rows = x.reshape(-1, x.shape[-1]) if tokens else x
        choice: Choice = choose(parts, rows.contiguous(), self.device, self.left_out, self.compact)
        joinable = [one for one in choice.joinable if (one.name == "joined tokens") == tokens]
        self.reports.append((choice.layers, joinable))
        self.units += choice.units
        weights = [p.module.weight for p in parts if isinstance(p.module, nn.Linear | nn.Conv2d)]
        self.terms = max(self.terms, *(w[0].numel() for w in weights))
        segment = Segment(choice.plan, tokens)
        for one in joinable:
            same = all(a is b for a, b in zip(choice.plan, one.plan, strict=False))
            self.joinable.setdefault(one.name, {})[segment] = segment.plan if same else one.plan
        return segment

    def compacted(
        self, traced: fx.GraphModule, again: Callable[[], fx.GraphModule], given: Given, reference: Reference
    ) -> fx.GraphModule:
        """The graph without units that are dead; as it was, where that is not right."""
        try:
            units = compact_graph(traced, given.tensors)
            fault = reference.check(traced(*given.tensors), self.words, 1000).fault
        except Exception as error:  # a graph that does what no rule foresees
            fault = one_line(str(error).strip() or type(error).__name__)
        if fault:
            self.left_out["compaction of the graph"] = fault
            return again()
        self.units += units
        return traced

    def chains(self, traced: fx.GraphModule, tensors: list[Tensor]) -> fx.GraphModule:
        """The graph with a segment in the place of layers that follow each other."""
        found = _Chains(traced, self)
        found.run(*tensors)
        for i, (chain, segment) in enumerate(found.found):
            name = f"segment{i}"
            traced.add_submodule(name, segment)
            first, last = chain.nodes[0], chain.nodes[-1]
            with traced.graph.inserting_before(first):
                new = traced.graph.call_module(name, (first.all_input_nodes[0],))
            last.replace_all_uses_with(new)
            for node in reversed(chain.nodes):
                traced.graph.erase_node(node)
        for node in reversed([*traced.graph.nodes]):
            if node.op == "get_attr" and not node.users:
                traced.graph.erase_node(node)
        traced.delete_all_unused_submodules()
        traced.recompile()
        return traced

    def layers(self, network: nn.Module, call: Callable[[], Any]) -> None:
        """Segments of one layer in the place of those that are called inside other modules."""
        inputs: dict[nn.Module, Tensor] = {}

        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                inputs.setdefault(module, args[0].clone())

        layers = {m: name for name, m in network.named_modules() if _is_layer(m)}
        hooks = [module.register_forward_pre_hook(seen) for module in layers]
        call()
        for hook in hooks:
            hook.remove()
        new: dict[nn.Module, nn.Module] = {}
        for module, x in inputs.items():
            if self._fits(module, x):
                part, tokens = _part(layers[module].removeprefix("model."), module, x)
                new[module] = Layer(self.segment([part], x, tokens), module)
        for parent in [*network.modules()]:
            for name, child in parent._modules.items():
                if child in new:
                    parent._modules[name] = new[child]

    def _fits(self, module: nn.Module, x: Tensor) -> bool:
        weight = module.weight
        assert isinstance(weight, Tensor)
        here = x.dtype == weight.dtype == self.device.dtype and x.device == weight.device == self.device.at
        return here and bool(x.numel()) and (isinstance(module, nn.Linear) or x.dim() == 4)


class _Chains(fx.Interpreter):
    """Runs a graph, and makes a segment of every chain of layers that it meets."""

    def __init__(self, traced: fx.GraphModule, work: _Work) -> None:
        super().__init__(traced)
        self.work = work
        self.found: list[tuple[Any, Segment]] = []
        self.inside: set[fx.Node] = set()
        self.ready: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.ready:
            return self.ready.pop(n)
        if n in self.inside:
            return None
        x: Any = self.env.get(n.all_input_nodes[0]) if n.all_input_nodes else None
        chain = None
        if isinstance(x, Tensor) and x.dtype == self.work.device.dtype and x.device == self.work.device.at:
            chain = chain_at(self.module, n, x, {})  # type: ignore[arg-type]
        if chain is None:
            return super().run_node(n)
        segment = self.work.segment(chain.parts, x, chain.tokens)
        self.found.append((chain, segment))
        self.inside |= {*chain.nodes[1:]}
        y = segment(x)
        if len(chain.nodes) == 1:
            return y
        self.ready[chain.nodes[-1]] = y
        return None


class Layer(nn.Module):
    """A segment in the place of one layer, which others may ask for its weight and its settings."""

    def __init__(self, segment: Segment, like: nn.Module) -> None:
        super().__init__()
        self.segment, self.like = segment, (without_weight(like),)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.segment(x)
        return y

    @property
    def weight(self) -> Tensor:
        """Made for each who asks: dense, with zeros."""
        return self.segment.plan[-1].stage().own_weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "like":
                raise
            return getattr(self.like[0], name)


def _traced(
    original: nn.Module, model: nn.Module, masks: Mapping[Tensor, Tensor], given: Given, reference: Reference
) -> fx.GraphModule:
    """The graph, if what it computes is what the model does, on the example and on other inputs."""
    layered = _layered(original, given)
    traced, twin, own = trace(layered, given), model, masks
    if given.tensors[0].is_cpu:  # on CUDA one product is the faster one
        split_products(traced)
    if any(isinstance(m, Attention) for m in layered.modules()):  # the same sums as torch's, in another order
        twin, own = layered, {}
        reference = Reference.of(twin, own, given, double=False)
    if fault := reference.as_is.check(traced(*given.tensors), "fp32", 1).fault:
        raise ValueError(f"its graph gives other outputs: {fault}")
    other = given.other()
    try:
        right = Reference.of(twin, own, other, double=False)
    except ValueError:  # the model takes no other inputs of this kind
        return traced
    if fault := right.check(traced(*other.tensors), "fp32", 1).fault:
        raise ValueError(f"its graph gives other outputs for other inputs: {fault}")
    return traced


def _layered(original: nn.Module, given: Given) -> nn.Module:
    """A copy to be changed, its attention in layers."""
    twin = masked_copy(original, {}, given)
    return split_attention(twin, _caller(twin, given))


def _same_copy(
    twin: nn.Module, model: nn.Module, masks: Mapping[Tensor, Tensor], given: Given, reference: Reference
) -> None:
    """ValueError unless the copy computes what the model does."""
    fault = reference.as_is.check(_caller(twin, given)(), "fp32", 1).fault
    if not fault:
        return
    again = Reference.of(model, masks, given, double=False)
    if again.check(reference.own, "fp32", 1).fault:
        raise ValueError("model: gives other outputs at every call, so nothing can be held against them")
    names = [
        name or "the model itself"
        for name, m in model.named_modules()
        if "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks
    ]
    raise ValueError(
        f"model: a copy of it gives other outputs ({fault}): what is hooked or patched holds on to the "
        f"original, look at {', '.join(map(repr, names)) or 'its forward'}"
    )


def _caller(network: nn.Module, given: Given, flat: bool = False) -> Callable[[], Any]:
    if flat:
        return partial(network, *given.tensors)
    args, kwargs = given.call(given.tensors)
    return partial(network, *args, **kwargs)


def _called(of: Callable[[Given], Callable[[], Any]], given: Given) -> Any:
    return of(given)()


def _device(model: nn.Module, given: Given, kernels: str) -> Device:
    """That of the first floats among the inputs, else among the parameters."""
    if not given.tensors or not given.tensors[0].numel():
        raise ValueError("example: expected a tensor that is not empty among the inputs, got none")
    tensors = [*given.tensors, *model.parameters()]
    first = next((t for t in tensors if t.is_floating_point()), None)
    if first is None:
        raise ValueError("model: expected parameters that are floats, got none")
    return Device.of(first.detach(), kernels)


def _joined(
    name: str, network: fx.GraphModule, plans: Mapping[Segment, list[Formed]], given: Given
) -> dict[str, fx.GraphModule]:
    """The ways in which layers of these plans stand together."""
    if name != "joined tokens":
        found = {name: join(network, plans), f"{name} in parts": _in_parts(network, plans, given)}
    else:
        found = {name: join_tokens(network, plans, given.tensors)}
        for more in ("joined blocks", "joined blocks in parts") if found[name] else ():
            blocks = join_tokens(network, plans, given.tensors)
            if blocks is None or not join_blocks(blocks, given.tensors, in_parts=more.endswith("parts")):
                break  # nor are there parts of what there is not
            found[more] = blocks
    return {name: graph for name, graph in found.items() if graph}


def _in_parts(
    network: fx.GraphModule, plans: Mapping[Segment, list[Formed]], given: Given
) -> fx.GraphModule | None:
    """As `join` has it, few images at a time; None where that is all of them."""
    found, first = join(network, plans), given.tensors[0]
    parted = False
    for module in found.modules() if found else ():
        if isinstance(module, Joined):
            parted |= module.take_parts(len(first) if first.dim() else 0)
    return found if parted else None


def _race(
    calls: dict[str, Callable[[], Any]], networks: Mapping[str, nn.Module], given: Given, device: Device
) -> dict[str, float]:
    forms = [f"{name} {f.name}: {f.place.key}" for name, net in networks.items() for f in _forms(net)]
    forms += [net.code for net in networks.values() if isinstance(net, fx.GraphModule)]
    shapes = [tuple(t.shape) for t in given.tensors]
    text = f"{networks['original']!r} on {shapes}: {'; '.join(forms)}"
    key = f"module {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    cache = Cache(len(given.tensors[0]) if given.tensors[0].dim() else 1, device.key)
    times = cache.times(key, calls, device.network_clock())
    cache.save()
    return times


def _forms(network: nn.Module) -> list[Formed]:
    return [form for module in network.modules() if isinstance(module, Segment) for form in module.plan]


def _as_taken(reports: list[Reports], network: nn.Module) -> list[LayerReport]:
    """With the forms that layers have in this network; one that is called twice may have two."""
    plans = [module.plan for module in network.modules() if isinstance(module, Segment)]
    found: list[LayerReport] = []
    for layers, joinable in reports:
        found += next((one.layers for one in joinable if any(plan is one.plan for plan in plans)), layers)
    return found


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) and is_known(module)


def _part(name: str, module: nn.Module, x: Tensor) -> tuple[Part, bool]:
    tokens = isinstance(module, nn.Linear) and x.dim() != 2
    module = plain(module, {})
    one = x.reshape(-1, x.shape[-1])[:1] if tokens else x[:1]
    return Part(name, module, tuple(one.shape[1:]), tuple(module(one).shape[1:])), tokens
