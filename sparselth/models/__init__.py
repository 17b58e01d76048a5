"""The networks as data: `graph` says what a model is, `zoo` finds it by name, one family a file."""

from sparselth.models.graph import AvgPool, BatchNorm, Conv, Layer, Linear, MaxPool, Model, ReLU
from sparselth.models.zoo import MODELS, get_model, register

__all__ = [
    "MODELS",
    "AvgPool",
    "BatchNorm",
    "Conv",
    "Layer",
    "Linear",
    "MaxPool",
    "Model",
    "ReLU",
    "get_model",
    "register",
]
