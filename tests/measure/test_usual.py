"""The usual loop that runs are compared with: of pictures and classes, of built-in networks and others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparselth.config import Recipe
from sparselth.data import load
from sparselth.experiments.imp import ImpConfig
from sparselth.measure import usual

NET = """
from torch import nn

def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes))
"""


@pytest.mark.parametrize("name", ["lenet-300-100", "net.py:make"])
def test_a_step_and_an_image_are_timed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="the usual loop has its transforms")
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    config = ImpConfig(model=name, dataset="mnist5k", recipe=Recipe(steps=10, lr=1e-3), levels=1)
    images = load("mnist5k", Path())
    assert usual.fits(config, images)
    found = usual.sample(config, images, 0.02)
    assert found.step > 0
    assert found.steps >= 2  # at the first and the last level


def test_what_is_no_picture_of_a_class_has_no_usual_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET + "\ndef loss(output, target): return output.square().mean()\n")
    images = load("mnist5k", Path())
    assert not usual.fits(ImpConfig(model="net.py:make", dataset="mnist5k"), images)
    config = ImpConfig(model="lenet-300-100", dataset="mnist5k")
    assert usual.fits(config, images)
    assert not usual.fits(config, replace(images, spec=replace(images.spec, shape=(784,))))
    assert not usual.fits(config, replace(images, spec=replace(images.spec, classes=None)))
