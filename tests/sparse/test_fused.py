"""Runs of compressed layers in one call, whatever a loop of torch does with them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

from sparselth.errors import UsageError
from sparselth.kernels import _native
from sparselth.sparse import compress, dense, fused
from sparselth.sparse.fused import FusedSequential, runs

pytestmark = pytest.mark.skipif(_native.LIB is None, reason="runs are taken by the native kernels alone")


def network() -> tuple[nn.Sequential, dict[str, Tensor]]:
    """With a bias or none, a ReLU or none, and what is no part of a run on both sides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(78, 30), nn.ReLU(), nn.Linear(30, 20, bias=False), nn.Linear(20, 17)),
        *(
            nn.ReLU(inplace=True),
            nn.Tanh(),
            nn.Linear(17, 12),
            nn.ReLU(),
            nn.Linear(12, 5),
            nn.ReLU(),
            nn.ReLU(),
        ),
    )
    masks = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters() if p.dim() > 1}
    masks["4.weight"][:, [2, 9]] = False  # nobody reads these two
    masks["3.weight"][:, 7] = False  # and this one is read by them alone
    masks["3.weight"][[2, 9], 7] = True
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model, masks


def fast() -> FusedSequential:
    found = compress(*network(), below=1.0)
    assert isinstance(found, FusedSequential)
    return found


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def near(found: list[Tensor], right: list[Tensor]) -> bool:
    pairs = zip(found, right, strict=True)
    return all(float((a.double() - b).norm()) <= 1e-6 * float(b.norm()) + 1e-12 for a, b in pairs)


def exact(x: Tensor, dy: Tensor) -> list[Tensor]:
    """Outputs and gradients, of x first, of the dense network in float64; of kept weights alone."""
    model, masks = network()
    model, x = model.double(), x.detach().double().requires_grad_()
    y = model(x)
    y.backward(dy.double())
    found = [p.grad[masks[n]] if n in masks else p.grad for n, p in model.named_parameters()]
    assert x.grad is not None
    return [y.detach(), x.grad, *found]  # type: ignore[list-item]


def test_modules_are_cut_into_runs() -> None:
    model = fast()
    cut = [
        [int(list(model).index(m)) for m in run if m is not None] for run in runs([*model._modules.values()])
    ]
    assert cut == [[0], [1, 2, 3, 4, 5], [6], [7, 8, 9, 10], [11]]
    assert repr(model).startswith("Sequential(")
    assert type(dense(model)) is nn.Sequential
    one = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert type(compress(one, {"0.weight": torch.eye(4) > 0}, below=1.0)) is nn.Sequential


def test_a_relu_of_a_users_class_does_what_it_says() -> None:
    class Twice(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.ReLU):
        pass

    for kind, lengths in ((Twice, [1, 1, 1]), (Named, [3])):
        model, x = nn.Sequential(nn.Linear(9, 8), kind(), nn.Linear(8, 5)), torch.randn(7, 9)
        masks = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}
        packed = compress(model, masks, below=1.0)
        torch.testing.assert_close(packed(x), dense(packed)(x))
        assert [len(run) for run in runs([*packed])] == lengths  # type: ignore[call-overload]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 5, 16, 33, 131, 256, 300])
def test_it_is_right_against_float64(batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, x, dy = fast(), torch.randn(batch, 78, requires_grad=True), torch.randn(batch, 5)
    right = exact(x, dy)
    for _ in range(2):  # the second on memory that was used
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(dy)
        assert x.grad is not None
        assert near([y.detach(), x.grad, *gradients(model)], right)
    model.zero_grad()
    model(x.detach()).backward(dy)  # nobody asks for the gradient of x
    assert near(gradients(model), right[2:])
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_forwards_wait_for_their_backwards_in_any_order() -> None:
    model, batches = fast(), [torch.randn(7, 78) for _ in range(3)]
    dy = torch.randn(7, 5)
    outs = [model(x) for x in batches]
    for x, y in [*zip(batches, outs, strict=True)][::-1]:
        model.zero_grad()
        y.backward(dy, retain_graph=True)
        once = gradients(model)
        model.zero_grad()
        y.backward(dy)
        assert all(torch.equal(a, b) for a, b in zip(once, gradients(model), strict=True))
        assert near([y.detach(), *once], [t for i, t in enumerate(exact(x, dy)) if i != 1])


@pytest.mark.parametrize("batch", [7, 131])
def test_inputs_and_gradients_may_lie_in_any_way(batch: int) -> None:
    model, dy = fast(), torch.randn(5, batch).t()
    inputs = [
        torch.randn(78, batch).t(),
        torch.randn(batch, 2 * 78)[:, ::2],
        torch.randn(78).expand(batch, 78),
    ]
    for x in inputs:
        model.zero_grad()
        y = model(x)
        y.backward(dy)
        assert near([y.detach(), *gradients(model)], [t for i, t in enumerate(exact(x, dy)) if i != 1])


def test_two_calls_in_one_graph() -> None:
    model, x, dy = fast(), torch.randn(9, 78), torch.randn(9, 5)
    (model(x) + model(2 * x)).backward(dy)
    rights = [exact(one, dy)[2:] for one in (x, 2 * x)]
    assert near(gradients(model), [a + b for a, b in zip(*rights, strict=True)])


def test_units_that_reach_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = fast(), network()[1]
    dead = fused._dead([model[1], model[3], model[4]])
    assert 7 in dead[0]
    assert {2, 9} <= {*dead[1]}
    assert dead[2] == ()
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
    model(torch.randn(131, 78)).sum().backward()
    for place, gone in ((1, dead[0]), (3, dead[1])):
        mask = masks[f"{place}.weight"]
        slope = torch.zeros(mask.shape).masked_scatter(mask, model[place].weight.grad)
        assert not slope[[*gone]].any()
        assert slope.any()
        assert slope.isfinite().all()
    (index,) = model[1].indices.values()
    assert index.backward is None


def test_weights_are_those_of_the_moment_and_writes_between_are_seen() -> None:
    model, x = fast(), torch.randn(4, 78)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = model(x)
    before.sum().backward()
    optimizer.step()
    after = model(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, dense(model)(x))
    waiting = model(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.sum().backward()
    waiting = model(x)
    x.add_(1)  # as a dense layer sees it, too
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.sum().backward()
    model[1].weight.data = model[1].weight.data * 2  # other memory
    torch.testing.assert_close(model(x), dense(model)(x))


def test_gradients_add_up_and_frozen_weights_have_none() -> None:
    model, x = fast(), torch.randn(4, 78)
    model(x).sum().backward()
    once = gradients(model)
    model(x).sum().backward()
    assert near(gradients(model), [2 * g.double() for g in once])
    model.zero_grad()
    model[1].weight.requires_grad_(False)
    model(x).sum().backward()
    assert model[1].weight.grad is None
    assert model[3].weight.grad is not None
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(model(x).sum(), [model[3].weight], create_graph=True)


def test_hooks_and_other_inputs_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = fast(), torch.randn(4, 78), list[str]()
    right = model(x)
    monkeypatch.setattr(fused, "_fused", lambda *a: pytest.fail("not one call"))
    hooks = [
        m.register_forward_hook(lambda m, a, y: seen.append(type(m).__name__)) for m in (model[2], model[9])
    ]
    torch.testing.assert_close(model(x), right)
    assert seen == ["ReLU", "CompressedLinear"]
    for hook in hooks:
        hook.remove()
    everywhere = nn.modules.module.register_module_full_backward_hook(
        lambda m, dx, dy: seen.append(f"{type(m).__name__} back")
    )
    model[7:11](torch.randn(4, 17)).sum().backward()  # torch has no such hooks on ReLUs in place
    everywhere.remove()
    assert seen.count("CompressedLinear back") == 2
    assert model(x.double().float().to(torch.bfloat16)).dtype == torch.bfloat16
    assert model(torch.empty(0, 78)).shape == (0, 5)
    with pytest.raises(UsageError, match=r"expected an input \[..., 78\]"):
        model(torch.randn(4, 77))
    monkeypatch.setattr(fused, "MOST", 0)
    torch.testing.assert_close(model(x), right)


def test_memory_is_given_back_and_copies_have_their_own() -> None:
    model, x = fast(), torch.randn(9, 78)
    for _ in range(5):
        model(x).sum().backward()
    pools = fused._pools[model]
    assert [len(pool) for pool in pools.values()] == [1, 1]
    kept = [model(x) for _ in range(9)]
    del kept
    gc.collect()
    assert max(len(pool) for pool in pools.values()) == fused.POOL
    for batch in range(1, 12):
        model(torch.randn(batch, 78))
    assert len(pools) <= 2 * fused.SIZES
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[1].weight.mul_(2)
    assert not torch.equal(twin(x), model(x))
    size = len(fused._pools)
    del model, twin, pools
    gc.collect()
    assert len(fused._pools) == size - 2
