"""Networks that are modules of torch's, whatever they compute: the autograd engine trains them.

    my_net.py:make          what the function `make` of a user's file returns
    torchvision:resnet18    a classifier of torchvision's, its weights drawn anew
    timm:vit_tiny_patch16_224

The function may take `classes`, the number of classes of the data set. Beside it the file may have `recipe`,
how the network is trained (a `Recipe`); `dataset`, the name of what it is trained on; `loss(output, target)`,
the mean over the batch, where that is not cross-entropy; and `accuracy(output, target)`, a share of the
batch, where targets are no labels. Initial weights are what the function draws under the seed's own stream.

Imports torch when a network is made.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from sparselth import user_files
from sparselth.config import Recipe
from sparselth.errors import SparselthError, UsageError, unknown
from sparselth.models.graph import Model, Node
from sparselth.params import Params, TensorSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Judge = Callable[["Tensor", "Tensor"], "Tensor"]  # a user's loss or accuracy

RECIPE = Recipe(steps=1000, lr=1e-3)  # of a network that says nothing else
PACKAGES = ("torchvision", "timm")
IGNORED = -100  # the target that torch's cross-entropy leaves out
EXAMPLES = 2  # samples that a network is shown to see whether it reads them


class Samples(Protocol):
    """What is known of a data set: `data.DatasetSpec`."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def classes(self) -> int | None: ...
    @property
    def tokens(self) -> bool: ...


@dataclass(frozen=True)
class Seen:
    """What was found when a network was shown samples."""

    params: Params
    shapes: tuple[tuple[int, ...], ...]  # of a sample, and of what its layers make of one
    output: tuple[int, ...]  # of a sample
    channels_last: bool  # whether it takes images so
    convolves: bool


@dataclass(frozen=True)
class ModuleModel(Model):
    """A network made by a function, for the samples and classes of one data set.

    What needs known layers asks for `nodes`, and is told in a line that there are none.
    """

    make: Callable[[Model], nn.Module] = None  # type: ignore[assignment]
    loss: Judge | None = None  # mean of a batch; None is cross-entropy
    accuracy: Judge | None = None
    tokens: bool = False
    samples: str = ""  # the name of their data set

    def __post_init__(self) -> None:
        """Nothing is known of it yet."""

    def on(self, samples: Samples) -> Model:
        """The network for the samples and classes of a data set, always the same object."""
        key = samples.name, samples.shape, samples.classes or 0, samples.tokens
        if key not in self._on:
            name, shape, classes, tokens = key
            self._on[key] = replace(self, input=shape, classes=classes, tokens=tokens, samples=name)
        return self._on[key]

    @cached_property
    def _on(self) -> dict[Any, Model]:
        return {}

    @property
    def nodes(self) -> tuple[Node, ...]:
        raise self.unknown()

    @property
    def needs_autograd(self) -> bool:
        return True

    def check_engines(self) -> None:
        raise self.unknown()

    def unknown(self) -> UsageError:
        """The error of what needs more than a module tells."""
        return UsageError(
            f"`model` {self.name} is a module of torch's, and this takes networks of known layers alone; see "
            "`sparselth ls models`"
        )

    def widened(self, factor: float) -> Model:
        raise UsageError(f"`model` {self.name} is a module of torch's, which has one width")

    @property
    def params(self) -> Params:
        return self.seen.params

    @property
    def weights(self) -> tuple[TensorSpec, ...]:
        return self.params.weights

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.seen.shapes

    @property
    def convolves(self) -> bool:
        return self.seen.convolves

    def build(self, seed: int) -> nn.Module:
        """The network of a seed on the CPU, with the weights that its function draws."""
        from sparselth.streams import stream

        return self.drawn(stream(seed, "ticket", 0, "init"))

    def drawn(self, generator: Generator) -> nn.Module:
        """The network with weights from a stream; torch's, numpy's and Python's own draws are as before."""
        from torch import nn

        from sparselth.streams import drawing_apart, seed_everything

        with drawing_apart():
            seed_everything(generator.initial_seed())
            try:
                net = self.make(self)
            except SparselthError:
                raise
            except Exception as error:
                raise SparselthError(f"`model` {self.name}: {user_files.said(error)}") from error
            if not isinstance(net, nn.Module):
                raise UsageError(
                    f"`model` {self.name}: gives {_kind(net)}; expected a torch.nn.Module, which it makes"
                )
            if any(map(nn.parameter.is_lazy, net.parameters())):
                self._shown(net.eval(), self.example())
        return net.train()

    def example(self) -> Tensor:
        """A few samples of nothing, [EXAMPLES, *input]."""
        import torch

        kind = torch.int64 if self.tokens else torch.float32
        return torch.zeros(EXAMPLES, *self.input, dtype=kind, device="cpu")

    @cached_property
    def seen(self) -> Seen:
        """What samples show; errors, each a line, where the network cannot be trained on them."""
        import torch
        from torch import nn

        if not self.input:  # nobody has asked for it `on` a data set
            raise self.unknown()
        net, x = self.build(0).eval(), self.example()
        shapes, last = [tuple(self.input)], ""
        first = {id(tensor): name for name, tensor in net.named_parameters()}

        def saw(module: nn.Module, _: Any, output: Any) -> None:
            nonlocal last
            if isinstance(output, torch.Tensor):
                shapes.append(tuple(output.shape[1:]))
            if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.dim() > 1:
                last = first.get(id(weight), last)

        hooks = [one.register_forward_hook(saw) for one in net.modules() if not [*one.children()]]
        output = self._shown(net, x)
        for hook in hooks:
            hook.remove()
        if not isinstance(output, torch.Tensor) or output.dim() < 1 or len(output) != EXAMPLES:
            what = f"shape {list(output.shape)}" if isinstance(output, torch.Tensor) else _kind(output)
            raise UsageError(
                f"`model` {self.name}: gives {what} for {EXAMPLES} samples; expected one tensor, "
                f"[{EXAMPLES}, classes]"
            )
        try:
            params = Params.of(net, output=last)
        except SparselthError as error:
            raise UsageError(f"`model` {self.name}: {error}") from error
        for name, tensor in net.named_parameters():
            if tensor.dtype != torch.float32:
                raise UsageError(f"`model` {self.name}: {name} is {tensor.dtype}; expected torch.float32")
        convolves = any(isinstance(one, nn.modules.conv._ConvNd) for one in net.modules())
        return Seen(params, tuple(shapes), tuple(output.shape[1:]), self._reads_channels_last(net), convolves)

    def _shown(self, net: nn.Module, x: Tensor) -> Any:
        import torch

        try:
            with torch.no_grad(), redirect_stdout(sys.stderr):  # stdout is for results
                return net(x)
        except Exception as error:
            what = "tokens" if self.tokens else "samples"
            raise UsageError(
                f"`model` {self.name}: cannot read {what} of {' x '.join(map(str, self.input))}, as "
                f"{self.samples or 'the data set'} has them: {user_files.said(error)}"
            ) from error

    def _reads_channels_last(self, net: nn.Module) -> bool:
        """Whether images may lie channels-last: a network that calls `view` on them may not take it."""
        import torch

        if self.tokens or len(self.input) != 3:
            return False
        try:
            with torch.no_grad(), redirect_stdout(sys.stderr):
                net(self.example().contiguous(memory_format=torch.channels_last))
        except Exception:
            return False
        return True

    def check_labels(self, *sets: Any) -> None:
        """Raise UsageError where the network does not fit targets [n, ...], numpy arrays."""
        for labels in sets:
            self._check_labels(labels)

    def _check_labels(self, labels: Any) -> None:
        output, whole = self.seen.output, labels.dtype.kind in "iu"
        if not whole and self.loss is None:
            raise UsageError(
                f"`model` {self.name}: targets of {self.samples} are no labels; expected `loss(output, "
                "target)` in the file of the network"
            )
        if self.accuracy is None and not whole:
            raise UsageError(
                f"`model` {self.name}: targets of {self.samples} are no labels; expected `accuracy(output, "
                "target)`, a share of the batch, in the file of the network"
            )
        if self.loss is not None and self.accuracy is not None:
            return
        if not output or output[:-1] != labels.shape[1:]:
            raise UsageError(
                f"`model` {self.name}: gives {list(output)} for a sample, whose labels in {self.samples} are "
                f"{list(labels.shape[1:])}; expected {[*labels.shape[1:], 'classes']}, or "
                "`accuracy(output, target)` in the file of the network"
            )
        labels = labels[labels != IGNORED]
        if labels.size and not 0 <= labels.min() <= labels.max() < output[-1]:
            raise UsageError(
                f"`model` {self.name}: tells {output[-1]} classes apart; {self.samples} has labels from "
                f"{labels.min()} to {labels.max()}"
            )

    @property
    def evaluation_batch(self) -> int:
        """Samples of one evaluation batch: fewer where they are large."""
        return 100 if self.convolves or prod(self.input) > 4096 else 500


# by name, of a file by its whole path, with the file as it was imported
_named: dict[str, tuple[ModuleType | None, ModuleModel]] = {}

standing_in: dict[str, Callable[[], ModuleModel]] = {}  # for networks whose runs are read (`remembered`)


def is_module(name: str) -> bool:
    """Whether a name is a module's: of a user's file, or of a package that has models by name."""
    return user_files.is_file(name) or name.startswith(tuple(f"{package}:" for package in PACKAGES))


def module_model(name: str) -> ModuleModel:
    """The network of that name, one object until its file is refreshed; UsageError where it is not there."""
    if name in standing_in:
        return standing_in[name]()
    key, (package, _, wanted), imported = name, name.partition(":"), None
    if user_files.is_file(name):
        file, _, function = name.rpartition(":")
        key, imported = f"{Path(file).expanduser().resolve()}:{function}", user_files.module("model", name)
    if key not in _named or _named[key][0] is not imported:
        model = _of_file(name) if user_files.is_file(name) else _of_package(name, package, wanted)
        _named[key] = imported, model
    return _named[key][1]


def _of_file(name: str) -> ModuleModel:
    function, file = user_files.function("model", name), user_files.module("model", name)
    recipe, loss, accuracy = (getattr(file, key, None) for key in ("recipe", "loss", "accuracy"))
    if not isinstance(recipe or RECIPE, Recipe):
        raise UsageError(f"`model` {name}: `recipe` is {_kind(recipe)}; expected a sparselth.config.Recipe")
    for key, judge in (("loss", loss), ("accuracy", accuracy)):
        if judge is not None and not callable(judge):
            raise UsageError(f"`model` {name}: `{key}` is {_kind(judge)}; expected `{key}(output, target)`")
    takes = "classes" in inspect.signature(function).parameters
    return ModuleModel(
        name=name,
        input=(),
        layers=(),
        recipes={"short": recipe or RECIPE},
        source=(inspect.getdoc(function) or "").partition("\n")[0],
        dataset=str(getattr(file, "dataset", "mnist")),
        make=(lambda model: function(classes=model.classes)) if takes else (lambda _: function()),
        loss=loss,
        accuracy=accuracy,
    )


def _of_package(name: str, package: str, wanted: str) -> ModuleModel:
    import importlib

    try:
        importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"`model` {name}: {package} is not installed; `pip install {package}` brings it"
        ) from None
    make, known = _torchvision(wanted) if package == "torchvision" else _timm(wanted)
    if wanted not in known:
        near = get_close_matches(wanted, known, n=1)
        raise unknown(f"model of {package}", wanted, near or known[:10])
    recipe = Recipe(steps=1000, lr=0.05, batch_size=128, optimizer="sgd", weight_decay=5e-4, cosine=True)
    return ModuleModel(
        name=name,
        input=(),
        layers=(),
        recipes={"short": recipe},
        source=f"{wanted} of {package}, weights drawn anew",
        dataset="cifar10",
        make=make,
    )


def _torchvision(wanted: str) -> tuple[Callable[[Model], nn.Module], list[str]]:
    from torchvision import models  # type: ignore[import-untyped]

    def make(model: Model) -> nn.Module:
        more: dict[str, Any] = {}
        if wanted.startswith("vit_"):
            more = {"image_size": model.input[-1]}
        if wanted in ("googlenet", "inception_v3"):  # whose other outputs are for training alone
            more = {"aux_logits": False, "init_weights": True}
        return models.get_model(wanted, weights=None, num_classes=model.classes, **more)  # type: ignore[no-any-return]

    return make, models.list_models(module=models)


def _timm(wanted: str) -> tuple[Callable[[Model], nn.Module], list[str]]:
    import timm  # type: ignore[import-not-found]

    def make(model: Model) -> nn.Module:
        words = {"pretrained": False, "num_classes": model.classes, "in_chans": model.input[0]}
        try:  # transformers must know the size of their images, others do not take one
            return timm.create_model(wanted, **words, img_size=model.input[1:])  # type: ignore[no-any-return]
        except TypeError:
            return timm.create_model(wanted, **words)  # type: ignore[no-any-return]

    return make, timm.list_models()


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"
