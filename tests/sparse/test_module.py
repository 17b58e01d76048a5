"""Any module is converted to one with its outputs: those of a call, whatever the module looks like."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils import _pytree as pytree

from conversions import NATIVE, prefer, timing
from sparselth import sparse
from sparselth.check import check
from sparselth.engine.dense import init_weights
from sparselth.kernels import _native
from sparselth.models import MODELS
from sparselth.models.torch import sequential
from sparselth.sparse.converted import ConvertedChain, ConvertedModule
from sparselth.sparse.reference import containers, unfolded

FAST = (*NATIVE, "mixed", "converted", "columns", "to columns", "from columns")


@pytest.fixture(autouse=True)
def sparse_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of these tests our forms win wherever there are some."""
    monkeypatch.setattr(timing, "seconds", prefer(*FAST))
    torch.manual_seed(0)


def masks_of(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=g) < density for n, p in model.named_parameters() if p.dim() > 1}


def exact(model: nn.Module, masks: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The outputs in float64 of a copy that was multiplied by its masks, in a call of the copy."""
    with torch.no_grad():
        twin = copy.deepcopy(model)
        own = dict(twin.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            own[name].mul_(mask)
        args, kwargs = wide((args, kwargs))
        return twin.double()(*args, **kwargs)


def wide(tree: Any) -> Any:
    """Its floats in float64."""
    return pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )


def same(found: Any, wanted: Any, terms: int = 200) -> None:
    """Every tensor within the bound of float32."""
    leaves, spec = pytree.tree_flatten(wanted)
    ours, own = pytree.tree_flatten(found)
    assert own == spec
    for a, b in zip(ours, leaves, strict=True):
        if isinstance(b, Tensor):
            assert check(a, b, "fp32", terms=terms).fault is None
        else:
            assert a == b


class Residual(nn.Module):
    """Branches, functions, a concatenation, strides, groups, dilation, norms, a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.uneven = nn.Conv2d(8, 4, (3, 1), padding=(1, 0))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = F.relu(x + F.gelu(self.grouped(x)))
        z = torch.cat([y, self.uneven(y)], 1).mean((2, 3))
        return {"logits": self.head(self.drop(z)) * scale, "parts": (z, [y.size(1)])}


def test_branches_functions_norms_and_containers() -> None:
    model = Residual().eval()
    masks, x = masks_of(model), torch.randn(4, 3, 9, 8)
    before = copy.deepcopy(model.state_dict())
    converted = sparse.convert(model, masks, x)
    assert "a graph by torch.fx" in sparse.explain(converted)
    assert [layer.name for layer in converted.report.layers] == ["stem", "grouped", "uneven", "head"]
    if _native.LIB is not None:
        assert {layer.chosen for layer in converted.report.layers} <= {*NATIVE}
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Conv2d) for m in converted.modules())
    same(converted(x), exact(model, masks, x))
    for shape in ((1, 3, 9, 8), (7, 3, 9, 8), (2, 3, 17, 30), (2, 3, 9, 9), (4, 3, 9, 8)):
        x = torch.randn(shape)
        same(converted(x), exact(model, masks, x))
    same(converted(x=x), exact(model, masks, x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Branching(nn.Module):
    """What torch.fx cannot trace: it looks at numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 2)])

    def forward(self, x: Tensor, *, flip: bool = False) -> tuple[Tensor, None]:
        y = self.layers[1](x).mean((2, 3))
        if float(y.sum()) > 0 or flip:
            y = self.layers[0](y)
        return self.layers[2](y) + self.layers[2].weight.sum(), None


def test_what_cannot_be_traced_is_converted_layer_by_layer() -> None:
    model = Branching().eval()
    masks, x = masks_of(model), torch.randn(3, 2, 5, 5)
    converted = sparse.convert(model, masks, {"x": x, "flip": True})
    assert "one by one in a copy: torch.fx cannot trace it: " in sparse.explain(converted)
    assert sorted(layer.name for layer in converted.report.layers) == ["layers.0", "layers.1", "layers.2"]
    for flip in (True, False):
        for other in (x, torch.randn(2, 2, 7, 4), -x):
            same(converted(other, flip=flip), exact(model, masks, other, flip=flip))


def test_a_dead_branch_of_python_is_not_traced_as_it_stands() -> None:
    """torch.fx takes what is no tensor for a tensor of another kind; the outputs tell."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.a(x) if isinstance(x, Tensor) else self.a(x) * 2

    model, x = Asks().eval(), torch.randn(3, 4)
    converted = sparse.convert(model, None, x)
    assert "cannot trace it: its graph gives other outputs" in converted.report.how
    same(converted(x), exact(model, {}, x))


class Calls(nn.Module):
    """Inputs and outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor] | None = None, k: int = 2) -> Any:
        y = self.b(torch.tanh(self.a(pair[0] + pair[1])))
        return (y * k, {"more": y + more["z"]}) if more is not None else (y * k, {})


def test_tuples_dictionaries_and_words() -> None:
    model = Calls().eval()
    masks, x = masks_of(model), torch.randn(4, 5)
    pair, more = (x, 2 * x), {"z": torch.randn(4, 3)}
    for example in (((pair, more),), ((pair,),), {"pair": pair, "more": more, "k": 3}):
        example = example[0] if isinstance(example, tuple) else example
        args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
        converted = sparse.convert(model, masks, example)
        same(converted(*args, **kwargs), exact(model, masks, *args, **kwargs))
    same(converted((x, x), more, 3), exact(model, masks, (x, x), more, 3))
    with pytest.raises(ValueError, match=r"expected inputs like the example's, .*k: 3"):
        converted(pair, more, 4)
    with pytest.raises(ValueError, match="expected inputs like the example's"):
        converted(pair)


def test_one_tensor_with_two_uses_has_one_mask() -> None:
    shared = nn.Linear(32, 32)
    tied = nn.Linear(32, 32, bias=False)
    tied.weight = shared.weight
    chain = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(32, 4)).eval()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first, self.second = nn.Embedding(32, 32), shared, tied
            self.words.weight = shared.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(self.words(x)).relu())
            return F.linear(y, self.words.weight)

    for model, x in ((chain, torch.randn(5, 32)), (Tied().eval(), torch.randint(32, (4, 3)))):
        masks = masks_of(model, 0.2)
        converted = sparse.convert(model, masks, x)
        same(converted(x), exact(model, masks, x))
    names = dict(model.named_parameters(remove_duplicate=False))
    other = {"second.weight": masks[next(n for n in masks if names[n] is tied.weight)]}
    converted = sparse.convert(model, other, x)
    same(converted(x), exact(model, masks, x))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Behind a step of an optimizer, which leaves weights stale that hooks make."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    return model.eval()


def pruned_by_torch() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.2)
    prune.l1_unstructured(model[2], "bias", 0.5)
    return model


def normed_by_hooks() -> nn.Module:
    norms = weight_norm(nn.Linear(16, 16)), nn.ReLU(), spectral_norm(nn.Linear(16, 4))
    return nn.Sequential(*norms)


def parametrized() -> nn.Module:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 0.5

    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), parametrizations.weight_norm(nn.Linear(16, 4)))
    parametrize.register_parametrization(model[0], "weight", Half())
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 4)))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1][1].register_forward_hook(lambda module, args, out: out.neg())
    model.register_forward_hook(lambda module, args, out: out + 3)
    return model


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[1].forward = F.gelu  # type: ignore[method-assign]
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [pruned_by_torch, normed_by_hooks, parametrized, hooked, patched])
def test_what_acts_in_a_call_is_part_of_the_model(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(5, 16)
    model = trained(make(), x)
    with torch.no_grad():
        before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = sparse.convert(model, None, x)
    with torch.no_grad():
        wanted = model(x)
    same(converted(x), wanted.double())
    x = torch.randn(3, 16)
    with torch.no_grad():
        same(converted(x), model(x).double())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.train()(x).sum().backward()  # it still trains


def test_masks_reach_weights_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 16)
    for model, name in (
        (pruned_by_torch(), "0.weight_orig"),
        (parametrized(), "0.parametrizations.weight.original"),
    ):
        model = trained(model, x)
        mask = {name: torch.rand(16, 16) < 0.3}
        converted = sparse.convert(model, mask, x)
        with torch.no_grad():
            dict(model.named_parameters())[name].mul_(mask[name])
            same(converted(x), model(x).double())


def test_a_patch_that_holds_the_original_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    own = model[2].forward
    model[2].forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    x = torch.randn(5, 16)
    with pytest.raises(ValueError, match="look at '2'") as caught:
        sparse.convert(model, masks_of(model), x)
    assert "\n" not in str(caught.value)

    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(())

    with pytest.raises(ValueError, match="other outputs at every call"):
        sparse.convert(Random().eval(), None, x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("chain", [True, False])
def test_a_converted_network_saves_copies_and_compiles(chain: bool) -> None:
    model: nn.Module
    if chain:
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)
        ).eval()
        x = torch.randn(3, 2, 6, 6)
    else:
        model, x = Residual().eval(), torch.randn(3, 3, 8, 8)
    masks = masks_of(model)
    converted = sparse.convert(model, masks, x)
    assert isinstance(converted, ConvertedChain) == chain
    wanted = converted(x)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        same(
            twin(x),
            wide(wanted),
        )
        assert [form.name for form in twin.forms] == [form.name for form in converted.forms]
        assert sparse.explain(twin) == sparse.explain(converted)
    file = io.BytesIO()
    torch.save(converted, file)
    assert len(file.getvalue()) < 60_000
    file.seek(0)
    torch.load(file, weights_only=False)(x)

    state = converted.state_dict()
    kept = sum(int((t != 0).sum()) for name, t in state.items() if t.dim() > 1)
    assert kept == sum(int(mask.sum()) for mask in masks.values())
    other = copy.deepcopy(converted)
    other.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
    assert not pytree.tree_leaves(other(x))[0].any()
    other.load_state_dict(state)
    same(other(x), wide(wanted))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"none.weight": x})
    name = next(iter(state))
    with pytest.raises(RuntimeError, match="expected"):
        other.load_state_dict(state | {name: torch.zeros(2, 2)})

    holder = nn.ModuleDict({"body": converted})
    assert not holder.train()["body"].training
    holder.to("cpu")
    holder.float()
    with pytest.raises(ValueError, match=r"expected fp32 on cpu, got torch\.float64"):
        holder.double()
    with pytest.raises(ValueError, match="expected inference"):
        converted.train()
    with pytest.raises(ValueError, match="without gradient"):
        converted(x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"torch\.jit\.trace"):
        torch.jit.trace(converted, x)
    with pytest.raises(ValueError, match=r"torch\.export"):
        torch.export.export(converted, (x,))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.export.export(converted, (x,), strict=True)

    @torch.compile(backend="eager")
    def around(x: Tensor) -> Any:
        return converted(x * 1), x + 1

    same(
        around(x)[0],
        wide(wanted),
    )
    with torch.inference_mode():
        converted(torch.cat([x, x]))
        sparse.convert(model, masks, x)
    with torch.no_grad():
        converted(torch.cat([x, x]))  # buffers of an inference mode are no trap behind it
    with torch.autocast("cpu"):
        same(
            converted(x),
            wide(wanted),
        )


def test_threads_take_turns() -> None:
    model = Residual().eval()
    masks = masks_of(model)
    converted = sparse.convert(model, masks, torch.randn(3, 3, 8, 8))
    wrong: list[object] = []

    def work(seed: int) -> None:
        x = torch.randn(1 + seed % 3, 3, 8 + seed % 2, 8, generator=torch.Generator().manual_seed(seed))
        wanted = exact(model, masks, x)
        for _ in range(20):
            try:
                same(converted(x), wanted)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_filters_that_torch_crashes_on_are_not_laid_channels_last() -> None:
    """Dilated ones on a CPU: torch's kernel reads past its memory or errs (torch 2.14, one pixel wide)."""
    x = torch.randn(2, 2, 9, 1)
    for kernel, stride, padding, dilation in (((5, 1), 3, 2, 2), (1, 1, 0, 3), ((3, 1), 3, 2, 2)):
        conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation)
        model = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d((2, 1), 1)).eval()
        converted = sparse.convert(model, None, x)
        assert "channels-last" not in converted.report.layers[0].times
        same(converted(x), exact(model, {}, x))


def test_a_network_with_shortcuts() -> None:
    model = MODELS["resnet20"]
    net = sequential(model, init_weights(model, torch.Generator().manual_seed(0))).requires_grad_(False)
    masks, x = masks_of(net, 0.1), torch.randn(2, *model.input)
    converted = sparse.convert(net, masks, x)
    assert len(converted.report.layers) == 20 + 2
    same(converted(x), exact(net, masks, x), terms=10_000)


def test_misuse_is_one_line() -> None:
    model = Residual().eval()
    x = torch.randn(2, 3, 8, 8)
    cases: list[tuple[str, nn.Module, Any, Any]] = [
        ("unknown parameter 'stem.wait'", model, {"stem.wait": x}, x),
        ("expected evaluation mode", Residual(), None, x),
        ("example: the model cannot compute it", model, None, torch.randn(2, 4, 8, 8)),
        ("example: expected a tensor", model, None, {}),
        ("example: expected a tensor", model, None, x[:0]),
        ("expected finite numbers", model, None, x / 0),
        ("expected a batch in fp32 on a CPU", model, None, x.bfloat16()),
    ]
    for message, network, masks, example in cases:
        with pytest.raises(ValueError, match=message) as caught:
            sparse.convert(network, masks, example)
        assert "\n" not in str(caught.value)
    converted = sparse.convert(model, None, x)
    for wrong in (x.double(), x[0], "words"):
        with pytest.raises(ValueError, match="expected inputs like the example's") as caught:
            converted(wrong)
        assert "\n" not in str(caught.value)


def test_without_any_product_it_stays_torchs() -> None:
    model, x = nn.Sequential(nn.Tanh()).eval(), torch.randn(3, 4)
    converted = sparse.convert(model, None, x)
    same(converted(x), model(x.double()))


def test_a_network_that_was_saved_by_an_older_version_computes() -> None:
    model, x = Residual().eval(), torch.randn(4, 3, 9, 8)
    converted = sparse.convert(model, masks_of(model), x)
    assert converted.outputs is not None
    before = {"like", "outputs", "report", "dtype", "device"}  # all that it ever saved
    older = object.__new__(ConvertedModule)
    older.__setstate__({n: v for n, v in vars(converted).items() if n in before or n in vars(nn.Module())})
    for twin in (older, pickle.loads(pickle.dumps(older))):
        found = twin(x)
        same(found, converted(x))
        assert [*found] == ["logits", "parts"]


def test_containers_are_looked_into_as_torch_does() -> None:
    Pair = namedtuple("Pair", "one other")
    trees = [1, (), [], (1, [2, (3,)], {"b": 4, "a": [5]}), [[], {}], {"a": (1, None)}]
    others = [Pair(1, 2), (1, OrderedDict(a=2))]  # known to torch, and left to it
    for tree in trees + others:
        leaves, spec = pytree.tree_flatten(tree)
        assert unfolded(tree, containers(spec)) == (None if tree in others else leaves)
        for wrong in (
            *trees,
            *others,
            (1, [2, (3, 3)], {"b": 4, "a": [5]}),
            (1, [2, (3,)], {"a": [5], "b": 4}),
        ):
            if spec.num_leaves and pytree.tree_structure(wrong) != spec and tree != 1:
                assert unfolded(wrong, containers(spec)) is None


class Scaled(nn.Module):
    """A product that stays torch's, of a parameter that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.scale = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, more: float = 1.0) -> Tensor:
        return (self.line(x) @ self.scale) * more


def test_what_stays_torchs_knows_neither_gradients_nor_autocast() -> None:
    model, x = Scaled().eval(), torch.randn(5, 6)
    masks = {"line.weight": torch.rand(6, 6) < 0.3}
    fast, right = sparse.convert(model, masks, x), exact(model, masks, x)
    for grad, cast in ((True, False), (False, False), (True, True), (False, True)):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=cast):
            y = fast(x)
            assert not y.requires_grad
            same(y, right)
            assert torch.is_grad_enabled() == grad
    with pytest.raises(ValueError, match="expected inputs like the example's"):
        fast(x, more=2.0)
    with pytest.raises(ValueError, match="expected inputs like the example's"):
        fast(x, 2.0)
    same(fast(x=x), right)


def test_one_tensor_in_a_list_is_no_bare_one() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(6, 6)

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.line(xs[0])

    model, x = Listed().eval(), torch.randn(5, 6)
    masks = {"line.weight": torch.rand(6, 6) < 0.3}
    fast = sparse.convert(model, masks, ([x],))
    same(fast([x]), exact(model, masks, [x]))
    with pytest.raises(ValueError, match="expected inputs like the example's"):
        fast(x)
