"""Layers that train as their kept weights: outputs and gradients of float64, state, copies, refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from sparselth.check import check
from sparselth.errors import UsageError
from sparselth.masks import Masks
from sparselth.optim import MaskedAdam, MaskedSGD
from sparselth.sparse import compress, dense, masks_left
from sparselth.sparse.compress import compressed_state
from sparselth.sparse.trainable import CompressedConv2d, CompressedLinear

WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def random_mask(shape: tuple[int, ...], keep: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


def pair(layer: nn.Module, keep: float | Tensor, name: str = "weight") -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer compressed, the same in float64 with zeros, and the mask; NaN stood where it is pruned."""
    weight = layer.get_parameter(name)
    mask = keep if isinstance(keep, Tensor) else random_mask(tuple(weight.shape), keep)
    right = deepcopy(layer).double()
    with torch.no_grad():
        right.get_parameter(name).mul_(mask)
        weight[~mask] = torch.nan
    fast = compress(layer, {name: mask}, below=2.0)
    assert fast is not layer
    return fast, right, mask


def same(fast: nn.Module, right: nn.Module, mask: Tensor, x: Tensor, terms: int) -> None:
    """Output and all gradients against float64, as strictly, relative to the size of what is added up."""
    word = WORDS[x.dtype]
    dy = torch.randn(right(x.double()).shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    squares = deepcopy(right)
    for p in squares.parameters():
        p.data.square_()
    found = results(fast, x, dy)
    expected, sizes = (
        results(right, x.double(), dy.double()),
        results(squares, x.double() ** 2, dy.double() ** 2),
    )
    expected["weight"], sizes["weight"] = expected["weight"][mask], sizes["weight"][mask]
    counts = {
        "y": terms,
        "x": dy[0].numel(),
        "weight": dy.numel() // len(mask),
        "bias": dy.numel() // len(mask),
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        seen = check(value, expected[name], word, terms=counts[name], scale=sizes[name].sqrt())
        assert not seen.fault, f"{name}: {seen.fault}"


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of a layer, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def turned(x: Tensor) -> Tensor:
    """The same numbers with the batch last in memory, and a gap behind it."""
    room = torch.full((*x.shape[1:], len(x) + 3), torch.nan, dtype=x.dtype)[..., : len(x)]
    room.copy_(x.movedim(0, -1))
    return room.movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": torch.Tensor.contiguous,
    "turned": turned,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", WORDS, ids=WORDS.values())
@pytest.mark.parametrize("keep", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("n", "k", "lead"), [(1, 1, (1,)), (13, 37, (60,)), (300, 129, (5, 7)), (16, 64, (2, 3, 4)), (7, 11, ())]
)
def test_linear(n: int, k: int, lead: tuple[int, ...], keep: float, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(n)
    layer = nn.Linear(k, n, bias=n != 16).to(dtype)
    fast, right, mask = pair(layer, keep)
    assert isinstance(fast, CompressedLinear)
    assert fast.weight.shape == (int(mask.sum()),)
    x = torch.randn(*lead, k, dtype=dtype)
    same(fast, right, mask, LAYOUTS[layout](x), terms=k + 1)


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels-last"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("n", "c", "kernel", "stride", "padding", "size", "batch"),
    [
        (5, 3, 3, 1, 1, (8, 8), 16),
        (7, 5, 3, 2, 1, (9, 7), 3),
        (4, 6, 1, 2, 0, (6, 6), 17),
        (3, 2, 5, 1, 0, (5, 5), 1),
        (8, 4, 3, 3, 2, (11, 4), 33),
    ],
)
def test_conv2d(
    n: int, c: int, kernel: int, stride: int, padding: int, size: tuple[int, int], batch: int,
    keep: float, layout: str,
) -> None:  # fmt: skip
    torch.manual_seed(n)
    layer = nn.Conv2d(c, n, kernel, stride, padding, bias=n != 4)
    fast, right, mask = pair(layer, keep)
    assert isinstance(fast, CompressedConv2d)
    x = torch.randn(batch, c, *size)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels-last" else LAYOUTS[layout](x)
    same(fast, right, mask, x, terms=c * kernel**2 + 1)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    fast, right, mask = pair(nn.Conv2d(3, 4, 3, padding=padding), 0.4)
    assert isinstance(fast, CompressedConv2d)
    same(fast, right, mask, torch.randn(5, 3, 6, 7), terms=28)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv2d_of_16_bits(dtype: torch.dtype) -> None:
    fast, right, mask = pair(nn.Conv2d(6, 9, 3, padding=1).to(dtype), 0.2)
    same(fast, right, mask, torch.randn(5, 6, 7, 7, dtype=dtype), terms=55)


@settings(max_examples=30)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    n, c, kernel, stride, padding, batch = (
        draw(1, 9),
        draw(1, 9),
        draw(1, 4),
        draw(1, 3),
        draw(0, 2),
        draw(1, 35),
    )
    size = draw(kernel, 12), draw(kernel, 12)
    torch.manual_seed(n)
    mask = random_mask((n, c, kernel, kernel), data.draw(st.sampled_from([0.05, 0.3, 0.9])))
    mask[data.draw(st.integers(0, n - 1))] = False
    fast, right, mask = pair(nn.Conv2d(c, n, kernel, stride, padding), mask)
    same(fast, right, mask, torch.randn(batch, c, *size), terms=c * kernel**2 + 1)


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 3, padding=1)], ids=["linear", "conv2d"])
def test_float64_goes_through_the_dense_product(layer: nn.Module) -> None:
    fast, _, _ = pair(layer, 0.4)
    fast.double()
    x = torch.randn(3, 5, *([6, 6] if isinstance(layer, nn.Conv2d) else []), dtype=torch.float64)

    def of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(fast, {"weight": weight, "bias": bias}, x)

    given = [t.detach().requires_grad_() for t in (x, fast.weight, fast.bias)]
    assert torch.autograd.gradcheck(of, given)
    assert torch.autograd.gradgradcheck(of, given)


def test_images_of_another_size_and_batches_of_nothing() -> None:
    fast, right, mask = pair(nn.Conv2d(3, 4, 3, 2, 1), 0.3)
    for size in range(3, 12):
        same(fast, right, mask, torch.randn(2, 3, size, size + 1), terms=28)
        fast.zero_grad()
        right.zero_grad()
    assert fast(torch.randn(0, 3, 5, 5)).shape == (0, 4, 3, 3)
    assert fast(torch.randn(3, 5, 5)).shape == (4, 3, 3)
    linear, _, _ = pair(nn.Linear(3, 2), 0.5)
    assert linear(torch.randn(0, 3)).shape == (0, 2)
    assert linear(torch.randn(4, 0, 3)).shape == (4, 0, 2)


def test_what_needs_no_gradient_gets_none() -> None:
    fast, _, _ = pair(nn.Linear(6, 4), 0.5)
    x = torch.randn(3, 6)
    fast(x).sum().backward()
    assert x.grad is None
    fast.weight.requires_grad_(False)
    fast.bias.grad = fast.weight.grad = None
    fast(x).sum().backward()
    assert fast.weight.grad is None
    assert fast.bias.grad is not None
    with torch.no_grad():
        assert fast(x).grad_fn is None
    first = next(iter(fast.indices.values()))
    assert first.backward is None  # nobody asked for the gradient of x
    fast(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_a_result_may_be_changed_in_place_and_an_input_not() -> None:
    fast, _, _ = pair(nn.Linear(6, 4), 0.5)
    fast(torch.randn(3, 6)).relu_().sum().backward()
    conv, _, _ = pair(nn.Conv2d(2, 3, 3, padding=1), 0.5)
    conv(torch.randn(16, 2, 6, 6)).relu_().sum().backward()
    x = torch.randn(6, 3).t()
    y = fast(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def net(smooth: bool = False) -> nn.Sequential:
    """With everything that is changed; `smooth`: no near-tie can fall either way and make a large error."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU() if smooth else nn.ReLU(inplace=True),
        nn.AvgPool2d(2) if smooth else nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.Tanh() if smooth else nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.Tanh() if smooth else nn.ReLU(),
        nn.Linear(20, 5),
    )


def masks_of(model: nn.Module, keep: float) -> Masks:
    return Masks(
        {
            name: random_mask(tuple(p.shape), keep, i)
            for i, (name, p) in enumerate(model.named_parameters())
            if p.dim() > 1
        },
        model,
    )


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_fifty_steps_are_those_of_the_dense_masked_loop(name: str) -> None:
    model = net(smooth=True)
    masks = masks_of(model, 0.2)
    fast, right = compress(model, masks, below=2.0), deepcopy(model).double()
    make = {
        "sgd": lambda kind, params, **more: kind(params, 0.05, 0.9, weight_decay=1e-3, **more),
        "adam": lambda kind, params, **more: kind(params, 1e-3, **more),
    }[name]
    masked, plain = (MaskedSGD, torch.optim.SGD) if name == "sgd" else (MaskedAdam, torch.optim.Adam)
    optimizers = [
        make(masked, right.parameters(), masks=Masks(masks, right)),
        make(masked, model.parameters(), masks=masks),
        make(plain, fast.parameters()),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        x, y = torch.randn(23, 1, 12, 12, generator=generator), torch.randint(5, (23,), generator=generator)
        for one, optimizer in zip((right, model, fast), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(one(x.double() if one is right else x), y).backward()
            optimizer.step()
    exact, usual, found = (
        torch.cat([v.double().flatten() for v in one.state_dict().values() if v.is_floating_point()])
        for one in (right, model, fast)
    )
    off, most = (found - exact).norm() / exact.norm(), (usual - exact).norm() / exact.norm()
    assert off <= 3 * most
    plain = optimizers[2]
    kept, size = masks.kept, masks.size
    held = [t for state in plain.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    others = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert sum(t.numel() for t in held) == (1 + (name == "adam")) * (kept + others)
    assert kept < 0.25 * size


def test_state_is_dense_unless_asked_otherwise() -> None:
    model = net()
    masks = masks_of(model, 0.2)
    fast = compress(model, masks, below=2.0)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    state = fast.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    other = compress(net(), masks, below=2.0)
    for p in other.parameters():
        torch.nn.init.normal_(p)
    assert not other.load_state_dict(state).missing_keys
    assert all(map(torch.equal, other.parameters(), fast.parameters()))
    small = compressed_state(fast)
    assert small["0.weight"].shape == fast[0].weight.shape
    for p in other.parameters():
        torch.nn.init.normal_(p)
    other.load_state_dict(small, assign=True)
    assert all(map(torch.equal, other.parameters(), fast.parameters()))
    back = dense(fast)
    assert [type(module) for module in back] == [type(module) for module in model]
    assert all(map(torch.equal, back.parameters(), model.parameters()))
    assert isinstance(fast[0], CompressedConv2d)
    x = torch.randn(3, 1, 12, 12)
    torch.testing.assert_close(fast.eval()(x), back.eval()(x))


@pytest.mark.parametrize("wrong", [1.0, torch.nan])
def test_weights_under_another_mask_are_refused(wrong: float) -> None:
    fast, _, mask = pair(nn.Linear(6, 4), 0.5)
    state = fast.state_dict()
    state["weight"][tuple((~mask).nonzero()[0])] = wrong
    before = fast.weight.clone()
    with pytest.raises(RuntimeError, match="weight: 1 weights are not 0 that are pruned here"):
        fast.load_state_dict(state)
    assert torch.equal(fast.weight, before)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        fast.load_state_dict({**state, "weight": torch.zeros(3, 3)})


@pytest.mark.parametrize("twin", [deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_train_on_alone(twin: Callable[[nn.Module], nn.Module]) -> None:
    fast = compress(net(), masks_of(net(), 0.2), below=2.0)
    x = torch.randn(4, 1, 12, 12)
    fast(x).sum().backward()
    other = twin(fast)
    with torch.no_grad():
        other[0].weight.zero_()
    assert fast[0].weight.any()
    other(x).sum().backward()
    assert torch.equal(other[0].mask, fast[0].mask)
    assert str(other.compression) == str(fast.compression)


def test_hooks_and_frozen_weights_stay() -> None:
    layer = nn.Linear(6, 4)
    layer.weight.requires_grad_(False)
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    fast, _, _ = pair(layer, 0.5)
    fast(torch.randn(2, 6))
    assert seen
    assert not fast.weight.requires_grad
    assert isinstance(fast, nn.Linear)
    assert "kept=" in repr(fast)


def test_autocast_changes_no_number() -> None:
    fast, right, mask = pair(nn.Linear(64, 32), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        same(fast, right, mask, torch.randn(5, 64), terms=65)
        assert fast(torch.randn(5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.grouped, self.dilated = (
            nn.Embedding(7, 6),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Conv2d(4, 4, 2, dilation=2),
        )
        self.head, self.free, self.full, self.last = (
            nn.Linear(6, 7),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
        )
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.free(self.full(self.embed(x))))


def test_every_layer_has_its_reason() -> None:
    model = Tied()
    masks = {n: random_mask(tuple(p.shape), 0.2) for n, p in model.named_parameters() if p.dim() > 1}
    del masks["last.weight"]
    masks["full.weight"], masks["free.weight"] = torch.ones(6, 6), torch.eye(6)
    fast = compress(model, masks)
    became = {one.name: (one.compressed, one.why) for one in fast.compression}
    assert became == {
        "embed.weight": (False, "tied: its weight has several names"),
        "grouped.weight": (False, "2 groups"),
        "dilated.weight": (False, "dilation"),
        "head.weight": (False, "tied: its weight has several names"),
        "free.weight": (True, ""),
        "full.weight": (False, "keeps too many weights"),
        "last.weight": (False, "no mask"),
    }
    assert fast.head.weight is fast.embed.weight
    assert "1 of 7 layers compressed" in str(fast.compression)
    assert "25 %" in str(fast.compression)
    assert "always" in str(compress(model, masks, below=2.0).compression)
    assert fast(torch.randint(7, (2, 5))).shape == (2, 5, 7)


def test_what_is_compressed_already_stays_so_and_says_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4)
    )
    masks = {n: random_mask(tuple(p.shape), 0.1) for n, p in model.named_parameters() if p.dim() > 1}
    some = {name: masks[name] for name in ("0.weight", "4.weight")}
    once, x = compress(model, some), torch.randn(5, 3, 6, 6)
    for again in (masks, {"5.weight": masks["5.weight"]}):
        twice = compress(once, again)
        became = {one.name: (one.compressed, one.kept, one.shape, one.why) for one in twice.compression}
        assert became == {
            "0.weight": (True, int(masks["0.weight"].sum()), (8, 3, 3, 3), "compressed before"),
            "4.weight": (True, int(masks["4.weight"].sum()), (16, 128), "compressed before"),
            "5.weight": (True, int(masks["5.weight"].sum()), (4, 16), ""),
        }
        assert "3 of 3 layers compressed" in str(twice.compression)
        assert torch.equal(twice.eval()(x), compress(model, masks).eval()(x))
        twice.train()(x).sum().backward()
        assert twice[4].weight.grad.shape == once[4].weight.shape
    with pytest.raises(UsageError, match=r"4.weight: is compressed under another mask; expected the same"):
        compress(once, masks | {"4.weight": torch.ones(16, 128)})


def test_what_stays_dense_is_pruned_too_and_stays_so_under_the_masks_left() -> None:
    model = Tied()
    masks = {n: random_mask(tuple(p.shape), 0.2) for n, p in model.named_parameters() if p.dim() > 1}
    given: dict[str, Tensor] | Masks
    for given in (masks, Masks(masks, model)):
        fast = compress(model, given, below=1.0)
        left = masks_left(fast, given)
        assert len(left) == len(masks) - 3  # free, full and last are compressed
        optimizer = MaskedAdam(fast.parameters(), 0.1, masks=left)
        for _ in range(2):
            optimizer.zero_grad()
            y = fast(torch.randint(7, (2, 5))).square().sum()
            (y + fast.grouped(torch.randn(1, 4, 5, 5)).square().sum()).backward()
            optimizer.step()
        for name in ("embed.weight", "grouped.weight", "dilated.weight"):
            assert not fast.get_parameter(name)[~masks[name]].any()
            assert model.get_parameter(name)[~masks[name]].any()


def test_a_transformer_layer_takes_no_fast_path() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    masks = {"linear1.weight": random_mask((32, 16), 0.2), "linear2.weight": random_mask((16, 32), 0.2)}
    fast = compress(model, masks, below=1.0)
    back = dense(fast)
    assert back.activation_relu_or_gelu == model.activation_relu_or_gelu
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), back(x))


def test_the_example_is_measured(cache: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparselth.engine import break_even

    asked = []

    def measure(case: break_even.Case) -> break_even.Measured:
        asked.append(case)
        return break_even.Measured(0.3 if len(case.before) == 3 else 0.05, 1.0)

    monkeypatch.setattr(break_even, "_measure", measure)
    model, x = net(), torch.randn(40, 1, 12, 12)
    fast = compress(model, masks_of(model, 0.2), x)
    assert [(case.before, case.after, case.batch) for case in asked] == [
        ((1, 12, 12), (8, 12, 12), 32),
        ((8, 6, 6), (12, 3, 3), 32),
        ((48,), (20,), 40),
        ((20,), (5,), 40),
    ]
    assert [one.compressed for one in fast.compression] == [True, True, False, False]
    assert model[1].num_batches_tracked == fast[1].num_batches_tracked == 0
    assert fast.training
    masks = {**masks_of(model, 0.2), "4.weight": torch.ones(12, 8, 3, 3)}
    assert not any(one.compressed for one in compress(model, masks, x).compression)
    asked.clear()
    compress(model, masks, below=0.5)
    assert not asked


def test_refusals_in_one_line() -> None:
    model = net()
    with pytest.raises(UsageError, match="`below` -1"):
        compress(model, {}, below=-1)
    with pytest.raises(UsageError, match=r"expected a model on a CPU, got 0\.weight on meta"):
        compress(model.to("meta"), {})
    fast, _, _ = pair(nn.Linear(6, 4), 0.5)
    with pytest.raises(UsageError, match=r"expected an input \[..., 6\], got \[3, 4\]"):
        fast(torch.randn(3, 4))
    with pytest.raises(UsageError, match="train on a CPU, got an input on meta"):
        fast(torch.randn(3, 6, device="meta"))
    x = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    conv, _, _ = pair(nn.Conv2d(3, 4, 3), 0.5)
    with pytest.raises(UsageError, match=r"expected images \[B, 3, H, W\], got \[1, 4, 5, 5\]"):
        conv(torch.randn(1, 4, 5, 5))


def test_a_transformer_takes_padding_in_evaluation() -> None:
    """Whose batch torch makes nested there, for a fast path that would read dense weights."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2)
    wide = {name: p for name, p in model.named_parameters() if "linear" in name and p.dim() > 1}
    masks = {name: random_mask(tuple(p.shape), 0.1) for name, p in wide.items()}
    for name, p in wide.items():
        p.data.mul_(masks[name])
    fast = compress(model, masks, below=0.5).eval()
    again, right = dense(fast), deepcopy(model).double().eval()
    assert (again.use_nested_tensor, right.use_nested_tensor, fast.use_nested_tensor) == (True, True, False)
    right.use_nested_tensor = False
    x, padding = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    with torch.no_grad():
        expected = right(x.double(), src_key_padding_mask=padding)[~padding]
        for net in (fast, again):
            check(net(x, src_key_padding_mask=padding)[~padding], expected, "fp32", terms=256)


def test_a_model_whose_weights_a_hook_makes_is_copied_after_a_forward() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    prune.l1_unstructured(model[0], "weight", 0.9)
    x = torch.randn(4, 64)
    y = model(x)
    y.sum().backward()
    fast = compress(model, {"2.weight": torch.ones(10, 32, dtype=torch.bool)}, below=2.0)
    assert isinstance(fast[2], CompressedLinear)
    torch.testing.assert_close(fast(x), y)
    fast(x).sum().backward()
    torch.testing.assert_close(dense(fast)(x), y)


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x)


@pytest.mark.parametrize(
    ("model", "x", "name"),
    [
        (ByName(), torch.randn(5, 48), "fc.weight"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(3, 8, 8), "0.weight"),
    ],
)
def test_an_example_by_keyword_or_of_one_image(model: nn.Module, x: Tensor, name: str) -> None:
    mask = random_mask(tuple(model.get_parameter(name).shape), 0.1)
    model.get_parameter(name).data.mul_(mask)
    fast = compress(model, {name: mask}, x)
    torch.testing.assert_close(fast(x), model(x))
