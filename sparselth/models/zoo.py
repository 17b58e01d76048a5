"""The models by name. A family is a file of this folder that registers its models."""

from __future__ import annotations

from sparselth.models.graph import Model
from sparselth.registry import Registry

MODELS: Registry[Model] = Registry("model", "sparselth.models", but=("graph", "zoo", "torch"))


def register(model: Model) -> Model:
    """Make a model known by its name, which must be free."""
    return MODELS.add(model.name, model)


def get_model(name: str) -> Model:
    """The model of that name; an unknown name raises UsageError with the nearest one."""
    return MODELS[name]
