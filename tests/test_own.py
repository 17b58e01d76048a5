"""The whole experiment on a training function of one's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sparselth
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments import arms as arms_of
from sparselth.masks import Masks
from sparselth.own import Results, Turn

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def make(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))


class Train:
    """Some steps; remembers whom it was called for and with what."""

    def __init__(self, steps: int = 6, stop: int = 10**9) -> None:
        self.steps, self.stop = steps, stop
        self.called: list[tuple[Turn, dict[str, Tensor], Masks]] = []
        self.passed: dict[int, dict[str, Any]] = {}

    def __call__(self, model: nn.Module, masks: Masks, cell: Turn) -> dict[str, float]:
        if len(self.called) == self.stop:
            raise KeyboardInterrupt
        self.called.append((cell, sparselth.snapshot(model), masks))
        optimizer = sparselth.MaskedAdamW(model.parameters(), lr=0.02, masks=masks)
        for step in range(cell.start_step, self.steps):
            if cell.level == 0:
                self.passed[step] = sparselth.snapshot(model)
            pick = torch.randint(64, (16,))
            optimizer.zero_grad()
            cross_entropy(model(X[pick]), Y[pick]).backward()
            optimizer.step()
        right = (model.eval()(X).argmax(1) == Y).float().mean()
        return {"accuracy": right, "loss": cross_entropy(model(X), Y)}


def bare(results: Results) -> list[dict[str, Any]]:
    return [{k: v for k, v in point.items() if k != "seconds"} for point in results.points]


def test_levels_prune_rewind_and_train_every_arm() -> None:
    train = Train()
    arms = ("ticket", "reinit", "random-mask", "random-reinit")
    results = sparselth.imp(make, train, levels=2, rate=0.3, seeds=(0, 7), arms=arms)
    assert [(c.seed, c.level, c.arm) for c, _, _ in train.called] == [
        (seed, level, arm)
        for seed in (0, 7)
        for level in range(3)
        for arm in (arms if level else ("ticket",))
    ]
    assert len(results.points) == len(train.called)
    n = 12 * 20 + 20 * 3
    left = [n, n - 90, n - 90 - 63]
    starts = {(c.seed, c.level, c.arm): (start, masks) for c, start, masks in train.called}
    for point, (cell, start, masks) in zip(results.points, train.called, strict=True):
        dense, ticket = starts[cell.seed, 0, "ticket"][0], results.tickets[cell.seed, cell.level]
        assert point["weights_remaining"] == left[cell.level] / n
        assert masks.kept == left[cell.level]
        assert 0 <= point["accuracy"] <= 1
        fresh, shuffled = "reinit" in cell.arm, "random" in cell.arm
        for name, mask in masks.items():
            assert not start[name][~mask].any()
            assert torch.equal(start[name][mask], dense[name][mask]) is not fresh
            assert int(mask.sum()) == int(ticket[name].sum())
            assert torch.equal(mask, ticket[name]) is not (shuffled and cell.level > 0)
        if not fresh:
            assert torch.equal(start["1.running_mean"], dense["1.running_mean"])
    first, second = (results.tickets[0, level] for level in (1, 2))
    assert not any((second[name] & ~first[name]).any() for name in first)
    weights = [starts[s, 1, a][0]["0.bias"] for s in (0, 7) for a in ("ticket", "reinit", "random-reinit")]
    assert len({tuple(w.tolist()) for w in weights}) == 6


def test_the_ticket_keeps_what_training_made_large() -> None:
    trained: dict[str, Tensor] = {}

    def train(model: nn.Module, masks: Masks, cell: Turn) -> float:
        if not cell.level:
            with torch.no_grad():
                model[0].weight.copy_(torch.arange(240.0).view(20, 12))
            trained.update({name: model.get_parameter(name).detach().clone() for name in masks})
        return 0.5

    results = sparselth.imp(make, train, levels=1, rate=0.5, seeds=[3], arms=["ticket"], scope="layer")
    for name, mask in results.tickets[3, 1].items():
        size = trained[name].abs().flatten().sort()[0]
        assert torch.equal(mask, trained[name].abs() >= size[len(size) // 2])
    assert results.metric == "metric"


@pytest.mark.parametrize("at", [1, 4])
def test_tickets_go_back_to_the_rewind_step_s_weights_and_buffers(at: int) -> None:
    train = Train()
    results = sparselth.imp(make, train, levels=1, seeds=[0], rewind=at)
    start = results.snapshots[0]
    assert all(torch.equal(start[name], t) for name, t in train.passed[at].items())
    assert int(start["1.num_batches_tracked"]) == at
    by_arm = {cell.arm: (cell, there) for cell, there, _ in train.called if cell.level}
    assert {arm: cell.start_step for arm, (cell, _) in by_arm.items()} == {
        "ticket": at,
        "random-mask": at,
        "reinit": 0,
    }
    assert int(by_arm["ticket"][1]["1.num_batches_tracked"]) == at
    assert int(by_arm["reinit"][1]["1.num_batches_tracked"]) == 0


def test_a_run_goes_on_where_it_was_stopped_and_grows(tmp_path: Path) -> None:
    whole = sparselth.imp(make, Train(), levels=3, seeds=(0, 1), rewind=2)
    small: dict[str, Any] = {"levels": 2, "seeds": (0,), "arms": ("ticket",), "rewind": 2}
    for stop in (1, 1):
        with pytest.raises(KeyboardInterrupt):
            sparselth.imp(make, Train(stop=stop), **small, out=tmp_path / "run")
    done = Train()
    sparselth.imp(make, done, **small, out=tmp_path / "run")
    assert [cell.level for cell, _, _ in done.called] == [2]
    more = Train()
    grown = sparselth.imp(make, more, levels=3, seeds=(0, 1), rewind=2, out=tmp_path / "run")
    assert len(more.called) == len(whole.points) - 3
    assert bare(grown) == bare(whole)
    nothing = Train()
    again = sparselth.imp(make, nothing, levels=3, seeds=(0, 1), rewind=2, out=tmp_path / "run")
    assert not nothing.called
    assert again.points == grown.points
    assert str(again) == str(grown)
    assert again.tickets == whole.tickets
    ticket = sparselth.load_ticket(tmp_path / "run" / "cells" / "seed1-ticket-02.safetensors")
    assert ticket.masks == whole.tickets[1, 2]
    model = make(0)
    ticket.apply(model)
    for name, mask in ticket.masks.items():
        assert torch.equal(model.get_parameter(name).detach(), whole.snapshots[1][name] * mask)


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        ("seed0-ticket-01.json", ["ticket"]),
        ("seed0-reinit-02.json", ["reinit"]),
        ("seed0-ticket-02.safetensors", ["ticket"]),
        ("seed0-ticket-00.safetensors", ["ticket"]),
    ],
)
def test_damaged_files_are_computed_again(name: str, computed: list[str], tmp_path: Path) -> None:
    first = sparselth.imp(make, Train(), levels=2, seeds=(0,), out=tmp_path)
    file = tmp_path / "cells" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train = Train()
    second = sparselth.imp(make, train, levels=2, seeds=(0,), out=tmp_path)
    assert [cell.arm for cell, _, _ in train.called] == computed
    assert bare(first) == bare(second)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_file_it_comes_to_the_same(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"levels": 1, "seeds": (0,), "arms": ("reinit",), "rewind": 1}
    whole = sparselth.imp(make, Train(), **small)
    replace, written = os.replace, 0

    def dies(at: int) -> Callable[[Any, Any], None]:
        def then(source: Any, target: Any) -> None:
            nonlocal written
            written += 1
            if written == at and before:
                raise Killed
            replace(source, target)
            if written == at:
                raise Killed

        return then

    for at in range(1, 8):  # the settings, tickets of levels 0 to 2, three cells
        folder, written = tmp_path / str(at), 0
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dies(at))
            with pytest.raises(Killed):
                sparselth.imp(make, Train(), **small, out=folder)
        again = sparselth.imp(make, Train(), **small, out=folder)
        assert bare(again) == bare(whole)
        assert again.tickets == whole.tickets
    assert len(list((tmp_path / "7" / "cells").iterdir())) == 6


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    sparselth.imp(make, Train(), levels=1, seeds=(0,), out=tmp_path)
    for other, says in (
        ({"rate": 0.3}, r"`rate` 0.3: the run in .* has 0.2; choose another `out`"),
        ({"exclude": "0"}, "`exclude`"),
        ({"rewind": 1}, "`rewind` 1"),
        ({"score": lambda name, w: w.abs()}, "`score` "),
    ):
        with pytest.raises(UsageError, match=says):
            sparselth.imp(make, Train(), levels=1, seeds=(0,), out=tmp_path, **other)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SparselthError, match=r"config.json: .*choose another `out`"):
        sparselth.imp(make, Train(), levels=1, seeds=(0,), out=tmp_path)


def test_what_a_cell_computes_depends_on_its_names_alone() -> None:
    both = sparselth.imp(make, Train(), levels=1, seeds=(0, 5))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    alone = sparselth.imp(make, Train(), levels=1, seeds=(5,), arms=("random-mask", "ticket"))
    assert torch.equal(torch.random.get_rng_state(), state)
    points = {(p["seed"], p["arm"], p["level"]): p for p in bare(both)}
    assert all(point == points[point["seed"], point["arm"], point["level"]] for point in bare(alone))


def test_results_are_printed_as_a_table_with_differences_seed_by_seed() -> None:
    scores = iter([0.9, 0.8, 0.7, 0.92, 0.84, 0.72])

    def train(model: nn.Module, masks: Masks, cell: Turn) -> float:
        return next(scores)

    results = sparselth.imp(make, train, levels=1, seeds=(0, 1), arms=("reinit", "ticket"))
    lines = str(results).splitlines()
    assert lines[0].split() == ["level", "weights", "ticket", "reinit"]
    assert lines[1].split() == ["0", "100.0", "%", "0.9100", "±", "0.1271"]
    numbers = [float(word) for word in lines[2].replace("±", "").replace("%", "").split()]
    assert numbers[:2] == [1, 80.0]
    assert numbers[2::2] == [0.82, 0.71]
    assert lines[3:5] == ["", "level   ticket - reinit"]
    assert lines[5].split() == ["1", "+0.1100", "±", "0.1271"]
    assert lines[6] == "metric, mean of 2 seeds and its 95 % interval; differences seed by seed"
    assert len(lines) == 7
    assert max(map(len, lines)) <= 80


def forgets(model: nn.Module, masks: Masks, cell: Turn) -> float:
    with torch.no_grad():
        model[0].weight.sub_(model[0].weight / 2 - 1e-3)
    return 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"train": forgets},
            r"seed 0 ticket level 1: train left \d+ pruned weights of 0.weight other than 0; give",
        ),
        ({"train": lambda *_: None}, "`train`: expected a number, or a dict .* got metric: NoneType"),
        ({"train": lambda *_: {}}, "empty dict"),
        ({"train": lambda *_: {"seed": 1.0}}, "none of them called seed, .* got seed: float"),
        ({"make": lambda seed: None}, "`make`: expected a torch.nn.Module, got a NoneType"),
        ({"make": lambda seed: nn.ReLU()}, "ReLU: has no prunable weights"),
        (
            {"make": lambda seed: torch.manual_seed(0) and make(0)},
            "arm 'reinit': make gives the same weights",
        ),
        ({"rate": 1.0}, "`rate` 1.0: expected a share between 0 and 1"),
        ({"rate": 0.001}, "level 1 would prune nothing of 300 weights"),
        ({"levels": 0}, "`levels` 0: expected 1 or more"),
        ({"seeds": ()}, r"`seeds` \[\]: expected different whole numbers"),
        ({"seeds": (1, 1)}, r"`seeds` \[1, 1\]"),
        ({"arms": ("tickt",)}, "did you mean 'ticket'"),
        ({"rewind": 7}, "`rewind` 7: train took fewer steps"),
        ({"rewind": -1}, "`rewind` -1: expected 0 or more"),
        ({"score": "magnitud"}, "did you mean 'magnitude'"),
        ({"seeds": 3}, r"`seeds` 3: expected different whole numbers, such as \(0, 1, 2\)"),
        ({"seeds": np.array([0.5])}, "`seeds` 0.5: expected whole numbers"),
        ({"seeds": np.array([])}, r"`seeds` \[\]: expected different"),
        ({"levels": 1.5}, "`levels` 1.5: expected whole numbers"),
        ({"rate": "half"}, "`rate` half: expected a share"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"make": make, "train": Train(), "levels": 1, "seeds": (0,)} | change
    with pytest.raises(SparselthError, match=says) as error:
        sparselth.imp(**arguments)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plain = sparselth.imp(make, Train(), levels=1, seeds=(0, 1), rate=0.5, arms=())
    numpy = {"levels": np.int64(1), "seeds": np.arange(2), "rate": np.float32(0.5), "rewind": np.int32(0)}
    assert bare(sparselth.imp(make, Train(), arms=(), out=tmp_path, **numpy)) == bare(plain)
    assert json.loads((tmp_path / "config.json").read_text())["rate"] == 0.5


def test_metrics_may_have_other_names_at_another_level() -> None:
    def train(model: nn.Module, masks: Masks, cell: Turn) -> dict[str, float]:
        if cell.arm == "reinit":
            return {"error": 0.5} if cell.seed else {"accuracy": 0.25}
        return {"accuracy": 0.5} if cell.level < 2 else {"loss": 0.5}

    results = sparselth.imp(make, train, levels=2, seeds=(0, 1), arms=("reinit",))
    means, gaps = str(results).split("\n\n")
    assert [line.split() for line in means.splitlines()[1:]] == [
        ["0", "100.0", "%", "0.5000", "±", "0.0000"],
        ["1", "80.0", "%", "0.5000", "±", "0.0000", "0.2500"],
        ["2", "64.0", "%", "0.2500"],  # the ticket has no accuracy there
    ]
    assert gaps.splitlines()[1].split() == ["1", "+0.2500"]


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None: ...


class Complex(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 3)
        self.register_buffer("angles", torch.zeros(2, dtype=torch.complex128))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            lambda: Extra(12, 3),
            "`out`: _extra_state: a ticket holds tensors alone, got dict; leave out `out`",
        ),
        (Complex, "`out`: angles: a ticket has dense numbers of at most 64 bits, got torch.complex128"),
    ],
)
def test_what_no_ticket_can_hold_is_refused_before_anything_is_trained(
    kind: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    def train(model: nn.Module, masks: Masks, cell: Turn) -> float:
        trained.append(cell)
        return 1.0

    trained = list[Turn]()
    with pytest.raises(UsageError, match=says):
        sparselth.imp(lambda seed: kind(), train, levels=1, seeds=(0,), arms=(), out=tmp_path)
    assert not trained
    sparselth.imp(lambda seed: kind(), train, levels=1, seeds=(0,), arms=())  # without files it goes
    assert len(trained) == 2


def test_an_arm_that_makes_weights_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ones(arms_of.Arm):
        def weights(self, model: Any, rewound: Callable[[], Tensor], generator: Any) -> Tensor:
            return torch.ones(1)

    monkeypatch.setitem(arms_of.ARMS.things, "ones", Ones("ones", ""))
    with pytest.raises(UsageError, match="arm 'ones': makes weights of built-in networks"):
        sparselth.imp(make, Train(), arms=("ones",))


@pytest.mark.parametrize("name", ["lr-rewind", "finetune", "last-rate", "continue"])
def test_an_arm_that_goes_on_or_has_a_rate_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"arm '{name}': goes on from trained weights, or sets the learning"):
        sparselth.imp(make, Train(), arms=(name,))


def test_an_unknown_arm_is_offered_those_that_can_be_trained_here() -> None:
    with pytest.raises(UsageError) as caught:
        sparselth.imp(make, Train(), arms=("quite another",))
    assert str(caught.value) == (
        "unknown arm 'quite another': choose from ticket, reinit, random-mask, random-reinit"
    )


@pytest.mark.parametrize("score", ["movement", "snip"])
def test_a_score_that_takes_more_than_there_is_is_refused_before_anything_is_trained(score: str) -> None:
    def train(model: nn.Module, masks: Masks, cell: Turn) -> float:
        raise AssertionError

    with pytest.raises(UsageError, match=f"`score` '{score}'"):
        sparselth.imp(make, train, score=score)


def test_cells_are_plain_json(tmp_path: Path) -> None:
    sparselth.imp(make, Train(), levels=1, seeds=(0,), arms=(), out=tmp_path)
    point = json.loads((tmp_path / "cells" / "seed0-ticket-01.json").read_text())
    assert {"seed", "arm", "level", "accuracy", "loss", "weights_remaining", "sha256"} <= point.keys()


def test_another_lambda_is_another_score(tmp_path: Path) -> None:
    def run(score: Any) -> object:
        return sparselth.imp(make, Train(), levels=1, seeds=(0,), arms=(), score=score, out=tmp_path)

    first = run(lambda name, w: w.abs())
    assert run(lambda name, w: w.abs()).tickets == first.tickets  # type: ignore[attr-defined]
    for other in (lambda name, w: -w.abs(), lambda name, w: w.abs() * 2, lambda name, w: w.square()):
        with pytest.raises(UsageError, match="`score`"):
            run(other)


def test_a_folder_that_cannot_be_made_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"`out` .*file: no folder can be made there .Not a directory"):
        sparselth.imp(make, Train(), levels=1, out=tmp_path / "file")
