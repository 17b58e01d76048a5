"""Data sets: `sets` says what they are, `files` reads and fetches them, `batches` feeds them to training."""

from sparselth.data.files import ASSETS, data_dir, fetch, load, look, resolve, when, where
from sparselth.data.sets import (
    DATASETS,
    DEFAULT,
    FALLBACK,
    DatasetSpec,
    Images,
    MissingData,
    check_inputs,
    get_dataset,
    register,
)

__all__ = [
    "ASSETS",
    "DATASETS",
    "DEFAULT",
    "FALLBACK",
    "DatasetSpec",
    "Images",
    "MissingData",
    "check_inputs",
    "data_dir",
    "fetch",
    "get_dataset",
    "load",
    "look",
    "register",
    "resolve",
    "when",
    "where",
]
