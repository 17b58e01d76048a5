"""Prune, snapshot, rewind, on any module; and what `import sparselth` offers."""

from __future__ import annotations

import doctest
import math
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparselth
from sparselth import calls
from sparselth.errors import SparselthError, UsageError
from sparselth.masks import MaskError, Masks
from sparselth.registry import Registry
from sparselth.scores import SCORES, Scored


class Net(nn.Module):
    """Batch norm, grouped, depthwise, transposed convolutions, an embedding tied to the output, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.words = nn.Embedding(11, 7)
        self.out = nn.Linear(7, 11)
        self.out.weight = self.words.weight


WEIGHTS = ("conv.weight", "depthwise.weight", "up.weight", "attention.in_proj_weight")
WEIGHTS += ("attention.out_proj.weight", "words.weight")


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def right(scores: list[tuple[float, str, int]], going: int) -> set[tuple[str, int]]:
    """Which go: the least scores, equal ones by where they come."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i][0], i))
    return {scores[i][1:] for i in order[:going]}


def entries(net: nn.Module, name: str) -> list[tuple[float, str, int]]:
    return [(abs(w), name, i) for i, w in enumerate(net.get_parameter(name).flatten().tolist())]


def pruned(masks: Masks) -> set[tuple[str, int]]:
    return {(name, i) for name, mask in masks.items() for i in (~mask).flatten().nonzero()[:, 0].tolist()}


@given(st.floats(0, 0.999), st.sampled_from(["global", "layer"]), st.integers(0, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_exactly_so_many_go_the_smallest_first(sparsity: float, scope: Any, seed: int, ties: bool) -> None:
    net = build(seed)
    if ties:
        for p in net.parameters():
            p.data.copy_((p.data * 20).round())
    before = {name: entries(net, name) for name in WEIGHTS}
    masks = sparselth.prune(net, sparsity, scope)
    assert tuple(masks) == WEIGHTS
    parts = [[*chain.from_iterable(before.values())]] if scope == "global" else [*before.values()]
    going: set[tuple[str, int]] = set()
    for part in parts:
        going |= right(part, math.floor(sparsity * len(part) + 0.5 + 1e-9))
    assert pruned(masks) == going
    assert masks.model is net
    for name, mask in masks.items():
        left = net.get_parameter(name)
        assert not left[~mask].any()
        assert [abs(w) for w in left[mask].tolist()] == [w for w, n, i in before[name] if (n, i) not in going]
    assert net.out.weight is net.words.weight


def rows(name: str, weight: Tensor) -> list[Tensor]:
    """What feeds each unit, as boolean tensors of the weight's shape."""
    found = []
    for unit in range(6 if name == "up.weight" else len(weight)):
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        if name == "up.weight":  # [8 inputs, 3 outputs of each of 2 groups, 3, 3]
            mask[4 * (unit // 3) : 4 * (unit // 3) + 4, unit % 3] = True
        else:
            mask[unit] = True
        found.append(mask)
    return found


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_whole_units_go_by_the_sum_of_their_scores(sparsity: float) -> None:
    net = build()
    before = sparselth.snapshot(net)
    masks = sparselth.prune(net, sparsity, "unit", exclude="words")
    assert tuple(masks) == WEIGHTS[:-1]
    for name, mask in masks.items():
        units = rows(name, mask)
        size = [float(before[name][unit].double().abs().sum()) for unit in units]
        order = sorted(range(len(units)), key=lambda i: (size[i], i))
        going = {*order[: math.floor(sparsity * len(units) + 0.5)]}
        wanted = torch.stack([unit for i, unit in enumerate(units) if i not in going]).any(0)
        assert torch.equal(mask, wanted), name


@pytest.mark.parametrize("scope", ["global", "layer", "unit"])
def test_what_was_pruned_stays_pruned(scope: Any) -> None:
    net = build()
    first = sparselth.prune(net, 0.5, scope)
    for p in net.parameters():
        nn.init.uniform_(p, 1, 2)  # whatever is written since
    second = sparselth.prune(net, 0.75, scope, masks=first)
    for name, mask in second.items():
        assert not (mask & ~first[name]).any()
        assert not net.get_parameter(name)[~mask].any()
    assert second.kept < first.kept
    assert sparselth.prune(net, 0.75, scope, masks=dict(second)) == second
    with pytest.raises(
        UsageError, match=r"`sparsity` 0.2: keeps .* the masks only .* expected 0\.7"
    ) as error:
        sparselth.prune(net, 0.2, scope, masks=second)
    assert "\n" not in str(error.value)


def test_masks_of_what_is_excluded_now_go_on() -> None:
    net = build()
    first = sparselth.prune(net, 0.5, "layer")
    second = sparselth.prune(net, 0.75, exclude=("conv", nn.Embedding), masks=first)
    assert tuple(second) == WEIGHTS
    for name in ("conv.weight", "words.weight"):
        assert torch.equal(second[name], first[name])
    ranked = [second[name] for name in WEIGHTS if name not in ("conv.weight", "words.weight")]
    n = sum(mask.numel() for mask in ranked)
    assert sum(int(mask.sum()) for mask in ranked) == n - round(0.75 * n)


@pytest.mark.parametrize("exclude", ["out", "words.weight", "wor*", ["out.*"], nn.Embedding, (nn.Linear,)])
def test_either_name_of_a_tied_weight_excludes_it(exclude: Any) -> None:
    net = build()
    assert "words.weight" not in sparselth.prune(net, 0.5, exclude=exclude)
    assert net.words.weight.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_are_told_apart(dtype: torch.dtype) -> None:
    net = nn.Linear(4, 3, bias=False).to(dtype)
    steps = torch.arange(1, 13, dtype=torch.float64)[torch.randperm(12)]
    tiny = {torch.float64: 2**-40, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    net.weight.data.copy_((1 + tiny * steps).view(3, 4))
    masks = sparselth.prune(net, 0.5)
    assert torch.equal(masks["weight"], (steps > 6).view(3, 4))
    assert net.weight.dtype == dtype


def test_scores_of_any_kind() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    net(torch.randn(7, 6)).square().sum().backward()
    want = [(p * p.grad).abs().detach() for p in (net[0].weight, net[1].weight)]
    masks = sparselth.prune(net, 0.5, "layer", score=lambda name, w: (w * w.grad).abs())
    for mask, score in zip(masks.values(), want, strict=True):
        assert torch.equal(mask, score > score.flatten().sort()[0][score.numel() // 2 - 1])
    torch.manual_seed(5)
    one = sparselth.prune(nn.Linear(30, 30), 0.5, score="random")
    two = sparselth.prune(nn.Linear(30, 30), 0.5, score="random")
    torch.manual_seed(5)
    three = sparselth.prune(nn.Linear(30, 30), 0.5, score="random")
    assert one == three
    assert one != two
    negative = sparselth.prune(nn.Linear(9, 9), 0.5, score=lambda name, w: torch.arange(-81, 0).view(9, 9))
    assert pruned(negative) == {("weight", i) for i in range(41)}


def test_a_registered_score_ranks_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    known: Registry[Scored] = Registry("score")
    known.add("last", Scored(lambda net, w, m, batch, g: torch.arange(len(m)).float(), "", autograd=False))
    known.add("slope", Scored(SCORES["magnitude"].score, ""))
    monkeypatch.setattr(calls, "SCORES", known)
    masks = sparselth.prune(nn.Linear(8, 8), 0.5, score="last")
    assert pruned(masks) == {("weight", i) for i in range(32)}
    with pytest.raises(UsageError, match="`score` 'slope': takes gradients of a batch"):
        sparselth.prune(nn.Linear(8, 8), 0.5, score="slope")


def test_a_score_that_compares_with_the_start_is_refused() -> None:
    with pytest.raises(UsageError, match="`score` 'movement': compares with the weights that training began"):
        sparselth.prune(nn.Linear(8, 8), 0.5, score="movement")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sparsity": 1.0}, "`sparsity` 1.0: expected a share from 0 to below 1"),
        ({"sparsity": float("nan")}, "`sparsity` nan"),
        ({"sparsity": "much"}, "`sparsity` much"),
        ({"scope": "layers"}, "`scope` layers: expected one of global, layer, unit"),
        ({"score": "magnitud"}, "did you mean 'magnitude'"),
        ({"score": lambda name, w: w[0]}, r"`score`: expected numbers \[8, 2, 3, 3\] for conv.weight, got"),
        ({"score": lambda name, w: 1.0}, "got a float"),
        ({"score": lambda name, w: w * torch.nan}, "NaN"),
        ({"exclude": "cnov"}, "unknown parameter or module to exclude 'cnov'"),
        ({"masks": {"conv.weight": torch.ones(3)}}, r"mask of conv.weight: expected a mask bool \[8, 2"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: dict[str, Any], says: str) -> None:
    net = build()
    before = sparselth.snapshot(net)
    with pytest.raises(SparselthError, match=says) as error:
        sparselth.prune(net, **{"sparsity": 0.5, **arguments})
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_weights_that_are_nan_are_not_ranked() -> None:
    net = nn.Linear(4, 4)
    net.weight.data[1, 1] = torch.nan
    with pytest.raises(SparselthError, match="score magnitude: 1 of its numbers are NaN"):
        sparselth.prune(net, 0.5)
    mask = torch.ones(4, 4)
    mask[1, 1] = 0
    masks = sparselth.prune(net, 0.5, masks={"weight": mask})
    assert masks.kept == 8
    assert net.weight.isfinite().all()


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, torch.compile])
def test_rewinding_brings_back_parameters_and_buffers(wrap: Any) -> None:
    net = build()
    model = wrap(net)
    start = sparselth.snapshot(model)
    assert start.keys() == net.state_dict().keys()
    first = {name: t.clone() for name, t in net.state_dict().items()}
    net.norm(torch.randn(3, 8, 4, 4))
    for p in net.parameters():
        p.data.add_(1.0)
    assert not torch.equal(net.norm.running_mean, first["norm.running_mean"])
    masks = sparselth.prune(model, 0.7)
    params = dict(net.named_parameters())
    for kind in (masks, dict(masks), {params[name]: mask for name, mask in masks.items()}):
        sparselth.rewind(model, kind, start)
        for name, t in net.state_dict().items():
            mask = masks.get(name.replace("out.weight", "words.weight"))
            assert torch.equal(t, first[name] if mask is None else first[name] * mask), name
    assert all(net.get_parameter(name) is p for name, p in params.items())


def test_a_snapshot_is_a_copy_and_another_model_s_is_refused() -> None:
    net = build()
    start = sparselth.snapshot(net)
    net.conv.weight.data.zero_()
    assert start["conv.weight"].any()
    masks = sparselth.prune(net, 0.5)
    before = sparselth.snapshot(net)
    for change, says in (
        ({"conv.weight": torch.ones(3)}, r"conv.weight is \[3\], of the Net it is \[8, 2, 3, 3\]"),
        ({"convx.weight": torch.ones(3)}, r"convx.weight is \[3\], of the Net it is missing"),
    ):
        with pytest.raises(UsageError, match=says):
            sparselth.rewind(net, masks, start | change)
    del start["norm.running_var"]
    with pytest.raises(UsageError, match=r"norm.running_var is missing, of the Net it is \[8\]"):
        sparselth.rewind(net, masks, start)
    with pytest.raises(MaskError, match="unknown parameter"):
        sparselth.rewind(net, {"x": torch.ones(1)}, before)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_the_calls_are_imported_when_asked_for(environment: dict[str, str]) -> None:
    code = (
        "import sys, sparselth; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'; "
        "assert set(sparselth.__all__) <= set(dir(sparselth)); "
        "from sparselth import prune, MaskedAdamW; assert sparselth.prune is prune"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = sparselth.prun  # type: ignore[attr-defined]
    stub = Path(sparselth.__file__).with_suffix(".pyi").read_text()
    lines = re.findall(r"^from sparselth\.(\S+) import \w+ as (\w+)$", stub, re.MULTILINE)
    typed = {name: room for room, name in lines}
    assert typed == sparselth._FROM  # type: ignore[attr-defined]
    for name in sparselth.__all__:  # type: ignore[attr-defined]
        assert getattr(sparselth, name).__doc__


def test_the_example_runs() -> None:
    found = doctest.testmod(calls)
    assert found.attempted > 8
    assert not found.failed


def test_units_of_a_table_of_places_are_places() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(40.0).view(1, 5, 8))
            self.layer = nn.Linear(8, 1)  # one neuron: it is a unit, however wide it is

    net = Places()
    masks = sparselth.prune(net, 0.4, "unit")
    assert masks["table"][0].all(1).tolist() == [False, False, True, True, True]
    assert masks["layer.weight"].all()
