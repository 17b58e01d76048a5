"""`imp` of a narrow ResNet-50 on a small folder of JPEGs, as ImageNet is laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pictures
import pytest

from sparselth.begun import read_environment
from sparselth.config import Recipe
from sparselth.data import streamed
from sparselth.errors import UsageError
from sparselth.experiments.landscape import LandscapeConfig
from sparselth.experiments.run import plan
from sparselth.experiments.strong import StrongConfig
from sparselth.models import MODELS, get_model
from sparselth.runs import read
from sparselth.verify import verify

Cli = Callable[..., tuple[int, str, str]]
Contents = Callable[[Path], dict[str, bytes]]
NARROW = "resnet50@0.0625"
FLAGS = [
    *("imp", "--model", NARROW, "--data-dir", "data", "--seeds", "0", "--levels", "1", "--arms", "ticket"),
    *(
        "--steps",
        "2",
        "--eval-every",
        "1",
        "--batch-size",
        "4",
        "--augment",
        "crop-flip",
        "--scope",
        "global",
    ),
    *("--scope", "global", "--workers", "1", "--out", "run"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pictures.folder(Path("data/imagenet"), train=5, test=2)
    return tmp_path


def test_a_run_on_jpegs_is_like_any_other(
    folder: Path, cli: Cli, run_contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And workers may have processes that decode, as where there is a GPU; forked ones are told so here."""
    code, _, err = cli(*FLAGS)
    assert code == 0, err
    assert "data     ImageNet from" in err
    assert "random parts of images, flipped" in " ".join(err.split())
    record, before = read(Path("run")), run_contents(Path("run"))
    assert record.complete
    assert (record.config.dataset, record.config.kernels) == ("imagenet", "autograd")
    assert {*record.config.exclude} == {*get_model("resnet50").exempt}
    assert read_environment(Path("run"))["test_images"] == 4
    assert len(record.points) == 2
    ticket = Path("run/cells/seed0-ticket-01.safetensors")
    assert not verify(ticket, Path("run"), Path("data")).faults
    ticket.unlink()
    monkeypatch.setattr(streamed, "loaders", lambda device: 1)
    assert cli(*FLAGS, "--resume", "--quiet")[0] == 0
    assert run_contents(Path("run")) == before


def test_a_landscape_says_whether_it_decodes_once(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*FLAGS, "--quiet")[0] == 0
    some = LandscapeConfig(source="run", images=200)
    assert some.plan(None, 0)["slices"].endswith("200 training images, decoded once a cell")
    once = some.seconds(some.cells()[0])
    monkeypatch.setattr(streamed, "memory_bytes", lambda: 1 << 20)
    assert "decoded anew by each network: fewer images" in some.plan(None, 0)["slices"]
    anew = some.seconds(some.cells()[0])
    assert once is not None
    assert anew is not None
    assert anew - once > 200 * some.grid**2 / 300


def test_what_a_run_on_jpegs_cannot_do_is_a_line(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = cli(*FLAGS, "--kernels", "torch", "--quiet")
    assert code == 2
    assert "--kernels torch: expected auto; images of imagenet stay in files" in err
    code, _, err = cli(*FLAGS, "--batch-size", "10", "--quiet")
    assert code == 2
    assert "--batch-size 10: expected at most the 9 training images" in err
    (folder / "data" / "imagenet" / "train" / "n01" / "n01_2.JPEG").write_bytes(b"no picture")
    code, _, err = cli(*FLAGS, "--batch-size", "9", "--quiet")
    assert code == 1
    assert "imagenet/train/n01/n01_2.JPEG: cannot be decoded" in err
    assert len(err.splitlines()) == 1
    ten = replace(get_model("resnet20@0.25"), name="ten", input=(3, 224, 224))
    monkeypatch.setitem(MODELS.things, "ten", ten)
    with pytest.raises(UsageError, match="its images stay in files, which autograd alone trains on"):
        plan(
            StrongConfig(model="ten", dataset="imagenet", recipe=Recipe(steps=1, lr=1, batch_size=4)),
            data_dir="data",
        )
