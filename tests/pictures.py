"""A folder of small JPEGs, as ImageNet is laid out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02")


def folder(root: Path, train: int = 16, test: int = 4) -> Path:
    """`root` with so many JPEGs of each class in train/ and val/, of sizes and brightness of their own."""
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for number, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = draw.integers(40, 70, 2)
                pixels = draw.integers(100, size=(height, width, 3)) + 140 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{name}_{i}.JPEG")
    return root
