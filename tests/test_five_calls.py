"""The calls of the README on networks of torch, torchvision, timm and transformers, in loops people have.

Large ones take few steps here; pytest -m science tests/test_five_calls.py (or `make science`) takes 50 of
every optimizer on each network, with inductor behind torch.compile. timm and transformers are optional.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparselth
from sparselth.masks import Masks

IMAGES = (2, 3, 32, 32)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 30), nn.ReLU(), nn.Linear(30, 17), nn.Linear(17, 10)
    )


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=10)


def mobilenet() -> nn.Module:
    return pytest.importorskip("torchvision").models.mobilenet_v3_small(num_classes=10)


def vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is an optional dependency")
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)


class Bert(nn.Module):
    """A classifier of token sequences by a Hugging Face configuration with random weights."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=10, **sizes)
        self.inner = transformers.BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).logits


class Tied(nn.Module):
    """A language model whose output layer is its embedding, and one linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.mix = nn.MultiheadAttention(24, 3, batch_first=True)
        self.again = nn.Linear(24, 24)
        self.out = nn.Linear(24, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.out(self.again(F.relu(self.again(x))).mean(1))


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 24, 3, groups=4), nn.Conv2d(24, 24, 3, groups=24), nn.GELU()),
        *(nn.ConvTranspose2d(24, 8, 3, groups=2), nn.Conv2d(8, 8, (1, 3), dilation=(1, 2))),
        # to one pixel: torch 2.11, compiled, takes four of a channels-last image for contiguous
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 10)),
    )


TOKENS = {"bert", "tied"}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "mobilenet": mobilenet,
    "vit": vit,
    "bert": Bert,
    "tied": Tied,
    "grouped": grouped,
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, masks: sparselth.MaskedSGD(
        params, lr=1e-3, momentum=0.9, weight_decay=0.01, masks=masks
    ),
    "adam": lambda params, masks: sparselth.MaskedAdam(params, lr=1e-3, weight_decay=0.01, masks=masks),
    "adamw": lambda params, masks: sparselth.MaskedAdamW(params, lr=1e-3, weight_decay=0.1, masks=masks),
}


def batch(name: str, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(50, (2, 9), generator=draw) if name in TOKENS else torch.randn(IMAGES, generator=draw)
    return x, torch.randint(10, (2,), generator=draw)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def zero(t: Tensor, mask: Tensor) -> bool:
    """Whether all that is pruned is exactly 0."""
    return not bool(((t != 0) & ~mask).any())


def awake(model: nn.Module, masks: Masks) -> list[str]:
    """The names of weights of which a pruned one is not 0."""
    return [name for name, mask in masks.items() if not zero(model.get_parameter(name), mask)]


@dataclass
class Loop:
    """A loop: autocast, a compiled model, two batches a step, clipping, a scaler, a moving average."""

    name: str
    model: nn.Module
    masks: Masks
    optimizer: torch.optim.Optimizer
    backend: str

    def __post_init__(self) -> None:
        self.called = torch.compile(self.model, backend=self.backend) if self.backend else self.model
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        self.taken = 0

    def step(self, scaled: bool, autocast: bool = True) -> None:
        dtype = next(self.model.parameters()).dtype
        self.optimizer.zero_grad()
        for micro in range(2):
            x, y = batch(self.name, 2 * self.taken + micro)
            x = x.to(dtype) if x.is_floating_point() else x
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = F.cross_entropy(self.called(x).float(), y) / 2
            (self.scaler.scale(loss) if scaled else loss).backward()
        for name, mask in self.masks.items():  # whatever a gradient is there
            grad = self.model.get_parameter(name).grad
            if grad is not None and not scaled:
                grad.masked_fill_(~mask, torch.nan)
        if scaled:
            self.scaler.unscale_(self.optimizer)
        self.optimizer.mask_gradients()  # type: ignore[attr-defined]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        assert norm.isfinite()
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.taken += 1
        assert not awake(self.model, self.masks), self.taken
        for param, state in self.optimizer.state.items():
            mask = self.optimizer.mask(param)  # type: ignore[attr-defined]
            for key, t in state.items():
                assert t.isfinite().all()
                assert mask is None or key == "step" or zero(t, mask), key

    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.average.to(dtype)
        self.optimizer.load_state_dict(self.optimizer.state_dict())


def run(name: str, optimizer: str, steps: int, backend: str) -> tuple[nn.Module, Masks, dict[str, Any]]:
    """`steps` steps, and between them whatever happens to the weights."""
    model = build(name)
    start = sparselth.snapshot(model)
    masks = sparselth.prune(model, 0.8, "layer")  # global would leave linear layers beside embeddings empty
    for mask in masks.values():
        assert int(mask.sum()) == mask.numel() - int(0.8 * mask.numel() + 0.5)
    assert not awake(model, masks)
    sparselth.rewind(model, masks, start)
    loop = Loop(name, model, masks, OPTIMIZERS[optimizer](model.parameters(), masks), backend)
    part = max(1, steps // 7)

    def train(scaled: bool = False, autocast: bool = True) -> None:
        for _ in range(part):
            loop.step(scaled, autocast)
            loop.average.update_parameters(model)
            assert not awake(loop.average.module, masks)

    train()
    model.load_state_dict({n: t.clone() for n, t in start.items()})  # dense again
    train(scaled=True)
    model.to(memory_format=torch.channels_last)
    for p in model.parameters():
        p.data.add_(0.01)
    train()
    loop.cast(torch.float64)
    train(autocast=False)
    loop.cast(torch.float32)
    train()
    for p in model.parameters():
        p.data = p.data.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.01)
    train(scaled=True)
    sparselth.rewind(model, masks, start)
    loop.optimizer = OPTIMIZERS[optimizer](model.parameters(), masks)
    while loop.taken < steps:
        loop.step(scaled=False)
    rewound = {n: start[n] * masks[n] if n in masks else start[n] for n, _ in model.named_parameters()}
    still = [n for n, p in model.named_parameters() if torch.equal(rewound[n], p)]
    assert len(still) < len(rewound) / 4  # a dead layer has no gradient
    return model, masks, start


def check_converted(name: str, model: nn.Module, masks: Masks) -> None:
    x, _ = batch(name, 0)
    fast = sparselth.convert(model, masks, x)
    for seed in (0, 1):
        x, _ = batch(name, seed)
        with torch.no_grad():
            right = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
            assert (fast(x) - right).abs().max() <= 1e-4 * right.abs().max()


def check_ticket(
    name: str, model: nn.Module, masks: Masks, start: dict[str, Any], folder: Path, converts: bool
) -> None:
    """The file leads another network to the ticket's weights, which convert; a copy of all goes on."""
    sparselth.save_ticket(folder / "ticket.safetensors", model, masks, start, notes={"network": name})
    ticket = sparselth.load_ticket(folder / "ticket.safetensors")
    assert ticket.masks == masks
    other = build(name)
    for p in other.parameters():
        nn.init.ones_(p)
    again = ticket.apply(other)
    sparselth.rewind(model, masks, start)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())
    if converts:
        check_converted(name, other.eval(), again)
    twin, copied, optimizer = copy.deepcopy(
        (other, again, sparselth.MaskedAdamW(other.parameters(), masks=again))
    )
    assert copied.model is twin
    x, y = batch(name, 0)
    F.cross_entropy(twin(x), y).backward()
    optimizer.step()
    assert not awake(twin, copied)


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_hold_in_a_loop_of_one_s_own(name: str, tmp_path: Path) -> None:
    large = name in ("resnet18", "mobilenet")
    model, masks, start = run(name, "adamw", 8 if large else 50, "" if large else "eager")
    check_ticket(name, model, masks, start, tmp_path, converts=not large)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mlp", "tied", "grouped"])
def test_masks_hold_under_every_optimizer(name: str, optimizer: str) -> None:
    run(name, optimizer, 50, "aot_eager")


@pytest.mark.science
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_hold_for_50_steps_of_every_optimizer_on_every_network(
    name: str, optimizer: str, tmp_path: Path
) -> None:
    model, masks, start = run(name, optimizer, 50, "inductor")
    check_ticket(name, model, masks, start, tmp_path, converts=True)
