"""A rewind step in epochs; what a data set brings that is named alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.core import ParameterSource

from sparselth.cli import experiment
from sparselth.experiments.base import Experiment
from sparselth.experiments.connectivity import ConnectivityConfig
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.rewinding import RewindingConfig
from sparselth.experiments.transfer import TransferConfig


@pytest.mark.parametrize(
    ("words", "step"),
    [("--rewind 7", 7), ("--rewind 2ep", 2 * 58), ("--rewind 1.5ep --batch-size 100", 53)],
)
def test_a_rewind_step_in_epochs(words: str, step: int, document: Callable[..., dict[str, Any]]) -> None:
    """Of mnist5k 3,500 images are trained on: 58 batches of 60, 35 of 100."""
    command = "imp --model lenet-300-100 --dataset mnist5k --steps 1000 --dry-run --json --device cpu"
    assert document(*command.split(), *words.split())["config"]["rewind"] == step


def test_no_other_data_set_takes_the_place_of_one_whose_epochs_were_counted() -> None:
    """2 epochs of MNIST are not 2 epochs of the 5,000 digits that stand in for it."""
    for kind, rewind in ((ImpConfig, "2ep"), (RewindingConfig, (0, "2ep"))):
        said: Any = {"model": "lenet-300-100", "rewind": rewind}
        config: Any = kind(**said)
        assert (config.dataset, config.rewind) == ("mnist", 1832 if kind is ImpConfig else (0, 1832))
    assert ImpConfig(model="lenet-300-100", rewind=2).dataset == ""


def test_epochs_of_no_images_a_step(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = cli("imp", "--rewind", "2ep", "--batch-size", "0", "--dry-run")
    assert (code, said) == (2, "sparselth: --batch-size 0: expected 1 or more\n")


@pytest.mark.parametrize("word", ["2e", "5,6", "ep", "1ep,2ep"])
def test_a_rewind_step_that_is_none(word: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = cli("imp", "--rewind", word, "--dry-run")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "'--rewind'" in said
    assert "500, or epochs, 2ep" in said


def test_a_data_set_named_alone_brings_what_is_usual_for_it() -> None:
    def of(*words: str, kind: type[Experiment] = ImpConfig) -> Any:
        command = experiment.command(kind)
        ctx = command.make_context(kind.name, [*words])
        given = {n for n in ctx.params if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
        experiment.usual(kind, ctx.params, given)
        return ctx.params["model"], ctx.params["levels"]

    assert of("--dataset", "mnist1d") == ("mnist1d-mlp", 12)
    assert of("--dataset", "mnist1d", "--levels", "3") == ("mnist1d-mlp", 3)
    assert of("--dataset", "mnist1d", "--model", "lenet5") == ("lenet5", 8)
    assert of("--dataset", "mnist") == of("--dataset", "no-such") == of() == ("lenet5", 8)
    # levels that are listed are not how many there are, and what is not said of a target is its source's
    for kind, levels in ((RewindingConfig, (3, 7)), (ConnectivityConfig, (0, 7))):
        assert of("--dataset", "mnist1d", kind=kind) == ("mnist1d-mlp", levels)
    assert of("--from", "run", "--to", "mnist1d", kind=TransferConfig) == ("", None)
