"""MNIST-1D (Greydanus & Kobak 2024): digits as signals of 40 numbers, made by the package of its authors.

`pip install mnist1d` or sparselth[mnist1d]; nothing is downloaded. The signals are what its `make_dataset`
makes with the authors' settings, seed 42: 4,000 to train on and 1,000 to test, of mean 0 and deviation 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselth.data.sets import DatasetSpec, MissingData, register

Made = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # images, labels, images, labels


def read(folder: Path) -> Made:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise MissingData(
            f"dataset mnist1d is made by its authors' package, which cannot be imported ({error}); "
            "pip install mnist1d"
        ) from None
    return _made(make_dataset, get_dataset_args)


@cache  # it takes more than a second; who reads it copies
def _made(make_dataset: Callable[..., Any], settings: Callable[[], Any]) -> Made:
    states = random.getstate(), np.random.get_state()
    try:
        made = make_dataset(settings())  # seeds both generators
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return made["x"], made["y"], made["x_test"], made["y_test"]


register(
    DatasetSpec(
        name="mnist1d",
        title="MNIST-1D",
        shape=(1, 1, 40),
        classes=10,
        n_train=4000,
        n_test=1000,
        licence="Apache 2.0; Greydanus, Kobak",
        read=read,
        usual={"model": "mnist1d-mlp", "levels": 12},
    )
)
