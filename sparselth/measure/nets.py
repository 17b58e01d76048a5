"""A network of any kind as it is raced: by name, its masks in its weights, and inputs like those of use.

Inputs are of a built-in model's shape, or of one that is asked for, or what `example(batch)` of a user's
file gives: all that `sparselth.convert` takes as an example, a tensor, a tuple or a dict. `target(batch)`
beside it, for a step of training, is what the file's `loss` compares outputs with. torchvision's and timm's
classifiers see 224 pixels and tell 1,000 classes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparselth import tickets, user_files
from sparselth.data import get_dataset
from sparselth.engine.autograd import one_number
from sparselth.engine.dense import init_weights
from sparselth.errors import SparselthError, UsageError
from sparselth.masks import by_parameter
from sparselth.models import get_model
from sparselth.models.graph import Model
from sparselth.models.module import ModuleModel
from sparselth.models.torch import network
from sparselth.params import Params
from sparselth.sparse.reference import Given
from sparselth.streams import drawing_apart, seed_everything, stream

PIXELS, CLASSES = (3, 224, 224), 1000  # of torchvision's and timm's classifiers
VOCABULARY = 256  # where nobody says how many words there are
Draw = Callable[[int], Any]  # of a batch size


@dataclass(frozen=True)
class Net:
    """A network in fp32 on the CPU, 0 where it is pruned, in evaluation mode."""

    name: str
    module: nn.Module
    masks: dict[str, Tensor]  # bool by parameter name, of what is prunable
    draw: Draw  # an example of so many samples
    target: Draw | None = None  # for `loss`; labels of the output's last axis where there is none
    loss: Callable[[Any, Any], Tensor] | None = None
    what: str = "random mask"
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Share of the prunable weights."""
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def given(self, batch: int, seed: int = 0) -> Given:
        """Inputs of so many samples, others for each seed."""
        example = _drawn(self.name, "example", self.draw, batch, seed)
        return Given.of(self.module, example)

    def objective(self, batch: int, seed: int = 0) -> Callable[[Any], Tensor]:
        """The loss of outputs for a batch: the file's own, or cross-entropy with random labels."""
        if self.loss is not None and self.target is None:
            raise UsageError(
                f"`model` {self.name}: has a `loss` of its own; expected `target(batch)` beside it, which it "
                "compares outputs with"
            )
        known = None if self.target is None else _drawn(self.name, "target", self.target, batch, seed)
        labels: list[Tensor] = []

        def loss(output: Any) -> Tensor:
            if self.loss is not None:
                return one_number("loss", self.loss(output, known))
            first = next((t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)), None)
            if first is None or not first.dim():
                raise SparselthError(
                    "gives no tensor of outputs for samples; expected one, such as [B, classes]"
                )
            rows = first.reshape(-1, first.shape[-1])
            if known is not None:
                return F.cross_entropy(rows, known.reshape(-1))
            if not labels:
                draw = stream(seed, "bench", 0, "labels")
                labels.append(torch.randint(rows.shape[-1], (len(rows),), generator=draw, device="cpu"))
            return F.cross_entropy(rows, labels[0])

        return loss


def net(
    name: str | None,
    sparsity: float,
    ticket: Path | None = None,
    shape: tuple[int, ...] | None = None,
) -> Net:
    """The network of that name under a random mask, of which each layer keeps the same share, or a ticket's.

    A ticket of a run knows its network; that of a module is put into `name`. `shape` are the samples.
    """
    if ticket is not None:
        return _of_ticket(name, ticket, shape)
    assert name is not None
    module, draw, more = _made(name, shape)
    return of_module(name, module, sparsity, draw, **more)


def of_module(
    name: str, module: nn.Module, sparsity: float, draw: Draw, exclude: tuple[str, ...] = (), **more: Any
) -> Net:
    """A module under a random mask of what is prunable and not excluded; it is changed."""
    _check_dtypes(name, module)
    try:
        weights = Params.of(module, exclude).weights
    except SparselthError as error:
        raise UsageError(f"`model` {name}: {error}") from error
    _settle(module)
    masks = random_masks({w.name: w.shape for w in weights}, sparsity)
    zero(module, masks)
    return Net(name, module.eval(), masks, draw, **more)


def _check_dtypes(name: str, module: nn.Module) -> None:
    for key, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise UsageError(f"`model` {name}: {key} is {parameter.dtype}; expected torch.float32")


def random_masks(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, Tensor]:
    """Of each tensor exactly round((1 - sparsity) n) weights, one at least, chosen at random."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"`sparsity` {sparsity:g}: expected a number from 0 to below 1, the share of zeros")
    draw, found = stream(0, "bench", 0, "mask"), {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        mask = torch.zeros(size, dtype=torch.bool, device="cpu")
        order = torch.randperm(size, generator=draw, device="cpu")
        mask[order[: max(1, round((1 - sparsity) * size))]] = True
        found[name] = mask.view(shape)
    return found


@torch.no_grad()
def zero(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what is pruned to 0."""
    for parameter, mask in by_parameter(module, masks).items():
        parameter.masked_fill_(~mask, 0)


def is_plain_chain(name: str) -> bool:
    """Whether it is a built-in model of one layer behind another, which has a race of its own."""
    model = get_model(name)
    return not isinstance(model, ModuleModel) and model.is_chain


def _of_ticket(name: str | None, file: Path, shape: tuple[int, ...] | None) -> Net:
    found = tickets.load_ticket(file)
    what = f"ticket of {file}"
    if isinstance(found, tickets.RunTicket):
        own = found.model
        if name not in (None, own.name):
            raise UsageError(f"`ticket` {file}: is of {own.name}; expected one of {name}")
        module = found.trained()
        draw = _drawing(own, shape)
        module.requires_grad_(True)
        masks = {n: m.clone() for n, m in found.masks.items()}
        return Net(own.name, module.eval(), masks, draw, what=what)
    if name is None:
        raise UsageError(f"`ticket` {file}: is of a module; name its network, such as `model` my_net.py:make")
    module, draw, more = _made(name, shape)
    _check_dtypes(name, module)
    masks = {n: m.clone() for n, m in found.apply(module).items()}
    return Net(name, module.eval(), masks, draw, what=what, **more)


def _made(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, Draw, dict[str, Any]]:
    """A network with fresh weights, how its inputs are drawn, and its own loss."""
    model = get_model(name)
    if not isinstance(model, ModuleModel):
        flat = init_weights(model, stream(0, "bench", 0, "init"))
        return network(model, flat), _drawing(model, shape), {}
    more: dict[str, Any] = {"loss": model.loss}
    draw: Draw | None = None
    if user_files.is_file(name):
        file = user_files.module("model", name)
        for key in ("example", "target"):
            function = getattr(file, key, None)
            if function is not None and not callable(function):
                kind = type(function).__name__
                raise UsageError(f"`model` {name}: `{key}` is a {kind}; expected `{key}(batch)`")
            if key == "target":
                more[key] = function
            elif shape is None:
                draw = function
        samples: Any = get_dataset(model.dataset)
    else:
        samples = SimpleNamespace(name="bench", shape=PIXELS, classes=CLASSES, tokens=False)
    if shape is not None:
        samples = SimpleNamespace(name="bench", shape=shape, classes=samples.classes, tokens=samples.tokens)
    placed = model.on(samples)
    assert isinstance(placed, ModuleModel)
    return placed.build(0), draw or _drawing(placed, None), more


def _drawing(model: Model, shape: tuple[int, ...] | None) -> Draw:
    """Noise as images, or tokens, of a model's samples."""
    size = shape or model.input
    if isinstance(model, ModuleModel) and model.tokens:
        return lambda batch: torch.randint(model.classes or VOCABULARY, (batch, *size), device="cpu")
    return lambda batch: torch.randn(batch, *size, dtype=torch.float32, device="cpu")


def _drawn(name: str, key: str, draw: Draw, batch: int, seed: int) -> Any:
    """What a function of a batch size gives, under a stream of its own."""
    with drawing_apart():
        seed_everything(stream(seed, "bench", batch, key).initial_seed())
        try:
            return draw(batch)
        except SparselthError:
            raise
        except Exception as error:
            raise SparselthError(f"`model` {name}: `{key}(batch)`: {user_files.said(error)}") from error


@torch.no_grad()
def _settle(module: nn.Module) -> None:
    """Statistics as after training: a fresh batch norm does nothing, and nothing is what it costs."""
    draw = stream(0, "bench", 0, "statistics")
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.running_mean is not None:
            assert one.running_var is not None
            one.running_mean.normal_(0, 0.1, generator=draw)
            one.running_var.uniform_(0.5, 1.5, generator=draw)
