"""The models by name. A family is a file of this folder that registers its models.

"NAME@0.25" is the model NAME with every hidden layer a quarter as wide. "my_net.py:make" and
"torchvision:NAME" are modules of torch's, see `module`.
"""

from __future__ import annotations

import math

from sparselth.errors import UsageError
from sparselth.models.graph import Model
from sparselth.models.module import is_module, module_model
from sparselth.registry import Registry


class Models(Registry[Model]):
    """Every model at any width, too; iteration gives those that were registered."""

    def __getitem__(self, name: str) -> Model:
        if is_module(name):
            return module_model(name)
        base, at, factor = name.rpartition("@")
        if not at:
            return super().__getitem__(name)
        model = self[base]
        found = _widened.get(name)
        if found is None or found[0] is not model:
            found = _widened[name] = model, _wide(model, factor)
        return found[1]

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and is_module(name):
            return True  # asked for, it says what is wrong with it
        return super().__contains__(name.partition("@")[0] if isinstance(name, str) else name)


_widened: dict[str, tuple[Model, Model]] = {}  # a name with a width: the model it was made of, and it
MODELS = Models("model", "sparselth.models", but=("graph", "module", "remembered", "zoo", "torch"))


def register(model: Model) -> Model:
    """Make a model known by its name, which must be free."""
    if "@" in model.name:
        raise UsageError(f"model {model.name!r}: expected a name without @, which is followed by a width")
    return MODELS.add(model.name, model)


def get_model(name: str) -> Model:
    """The model of that name; an unknown name raises UsageError with the nearest one."""
    return MODELS[name]


def _wide(model: Model, factor: str) -> Model:
    try:
        width = float(factor)
    except ValueError:
        width = 0.0
    if not 0 < width < math.inf:
        raise UsageError(f"model {model.name}@{factor:.40}: expected a positive number behind the @, a width")
    return model if width == 1 else model.widened(width)
