"""The networks as data: `graph` says what a model is, `zoo` finds it by name, one family a file."""

from sparselth.models.graph import (
    INPUT,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Layer,
    Linear,
    MaxPool,
    Model,
    Node,
    ReLU,
)
from sparselth.models.zoo import MODELS, get_model, register

__all__ = [
    "INPUT",
    "MODELS",
    "Add",
    "AvgPool",
    "BatchNorm",
    "Conv",
    "Layer",
    "Linear",
    "MaxPool",
    "Model",
    "Node",
    "ReLU",
    "get_model",
    "register",
]
