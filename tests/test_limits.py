"""Every number a user can give has a range, and what is out of it is refused before anything slow starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import click
import pytest

from sparselth.cli.main import cli as group
from sparselth.cli.options import Numbers
from sparselth.config import EXPERIMENTS, Config, Recipe
from sparselth.errors import UsageError
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.run import most_workers, plan
from sparselth.experiments.source import FromRun
from sparselth.experiments.training import Training
from sparselth.machine import cores
from sparselth.models import get_model
from sparselth.runs import RunRecord

Cli = Callable[..., tuple[int, str, str]]
NO_INT = (-1, -(10**30), 10**16, 10**400, 0.5, math.nan, "3", None, True)
NO_FLOAT = (-1.0, -math.inf, math.inf, math.nan, 1e300, 10**400, "3", None, True)
ZERO_IS_ONE = {"rewind", "warmup", "weight_decay", "momentum"}  # of the values
TINY = ImpConfig(model="lenet-300-100", dataset="mnist5k", seeds=(0,), recipe=Recipe(steps=100, lr=1e-3))


def numbers(options: type[Any]) -> Iterator[tuple[Field[Any], Any]]:
    """The fields that hold numbers, and the type of one of these."""
    kinds = get_type_hints(options)
    for f in fields(options):
        several = get_origin(kinds[f.name]) in (tuple, UnionType)
        kind = get_args(kinds[f.name])[0] if several else kinds[f.name]
        if kind in (int, float):
            yield f, kind


def test_every_number_of_a_configuration_has_a_range(finished: Callable[..., RunRecord]) -> None:
    seen = set()
    finished("--levels", "1", "--seeds", "0", "--arms", "ticket")  # in the folder `run`
    for name, experiment in EXPERIMENTS.items():
        words: dict[str, Any] = {"source": "run"} if issubclass(experiment, FromRun) else {}
        start: Any = experiment(**words) if name != "imp" else TINY
        start.check()
        for part in ("recipe", ""):
            whole = getattr(start, part) if part and isinstance(start, Training) else start
            for f, kind in numbers(type(whole)):
                old = getattr(whole, f.name)
                wrong: tuple[Any, ...] = NO_INT if kind is int else NO_FLOAT
                if f.default is None:  # stands for what a run finds out
                    wrong = tuple(value for value in wrong if value is not None)
                elif f.name not in ZERO_IS_ONE and not isinstance(old, tuple):
                    wrong = (*wrong, 0)
                for value in wrong:
                    given = (value,) if isinstance(old, tuple) else value
                    changed = replace(whole, **{f.name: given})
                    config = replace(start, recipe=changed) if part and whole is not start else changed
                    with pytest.raises(UsageError, match=f"`{f.name}` "):
                        config.check()
                    seen.add(f.name)
    assert {
        "eval_images",
        "eval_every",
        "levels",
        "rate",
        "rewind",
        "reinits",
        "seeds",
        "steps",
        "lr",
        "batch_size",
        "lr_drops",
    } <= seen


def test_values_of_another_type_are_refused_as_they_are_read() -> None:
    data = json.loads(json.dumps(TINY.to_json()))
    for name in ("levels", "rate", "seeds", "arms", "one_shot", "recipe", "model", "experiment"):
        for value in (None, [[]], {"a": 1}, math.nan, "x" if name != "model" else 3, 10**400):
            with pytest.raises(UsageError):
                Config_from(data | {name: value}).check()
    with pytest.raises(UsageError, match="`levels` 3: expected a whole number"):
        Config_from(data | {"levels": "3"})


def Config_from(data: dict[str, Any]) -> Config:
    from sparselth.config import config_from_json

    return config_from_json(data)


class Slow(BaseException):
    """Something slow would begin."""


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(*_: Any, **__: Any) -> Any:
        raise Slow

    monkeypatch.chdir(tmp_path)
    for place in (
        "data.resolve",
        "data.files.fetch",
        "measure.race_layers.bench_layers",
        "measure.race_networks.bench_model",
        "measure.race_networks.bench_run",
        "measure.race_modules.bench_module",
        "measure.train_modules.bench_module_training",
        "measure.training.bench_training",
        "engine.break_even.break_even",
        "experiments.run.Pool",
    ):
        monkeypatch.setattr(f"sparselth.{place}", slow)


INTS = ("-1", "1000000000000000000", "9" * 5000, "nan", "inf", "1e3", "0.5", "")
FLOATS = ("-1", "nan", "inf", "-inf", "1e400", "1e300", "many")
LISTS = ("-1", "1000000000000000000", "9" * 5000, "0-999999999", "nan", "1.5", ",,", "0-")
BENCH = {
    "--sparsity": ("-0.1", "1", "nan", "inf", "1e400", ","),
    "--batch": ("0", "-1", "9" * 5000, "1048577", "1.5", "nan"),
    "--shape": ("0x4", "4x0", "65537x4", f"{'9' * 5000}x4", "4x4x3x3@8x8p9", "4x4x3x3@8x8/0", "65536x65536"),
}


def test_every_number_of_a_command_has_a_range(
    cli: Cli, finished: Callable[..., RunRecord], nothing_slow: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    walked, source = [], tmp_path_factory.mktemp("source") / "run"
    finished("--levels", "1", "--seeds", "0", "--arms", "ticket").path.rename(source)
    for name in group.list_commands(None):  # type: ignore[arg-type]
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        for param in command.params:
            if not isinstance(param, click.Option) or param.is_flag:
                continue
            flag = param.opts[0]
            wrong: tuple[str, ...] = ()
            if isinstance(param.type, Numbers):
                wrong = LISTS
            elif param.type is click.INT:
                wrong = INTS + (("0",) if param.name in ("steps", "batch_size", "threads", "workers") else ())
            elif param.type is click.FLOAT:
                wrong = FLOATS
            elif name == "bench":
                wrong = BENCH.get(flag, ())
            for value in wrong:
                more = ["--run", "."] if flag in ("--level", "--seed") else []
                if name in EXPERIMENTS and issubclass(EXPERIMENTS[name], FromRun):
                    more = ["--from", str(source)] if name == "transfer" else [str(source)]
                code, out, err = cli(name, "--quiet", *more, f"{flag}={value}")
                assert (code, out) == (2, ""), (name, flag, value[:40], err)
                assert len(err.splitlines()) == 1, (name, flag, value[:40], err)
                assert flag in err
                walked.append(flag)
    assert {"--levels", "--seeds", "--workers", "--threads", "--lr", "--rate", "--batch", "--shape"} <= {
        *walked
    }
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--levels 10001", "--levels 10001: expected at most 10,000"),
        ("--levels 100", "--levels 100: level 52 would prune nothing"),
        ("--rate 1e-9", "level 1 would prune nothing: at --rate 1e-09 it rounds to no weight of the 266,200"),
        (
            "--levels 5000 --rate 1e-4 --seeds 0-999",
            "there are 15,000,000 networks to train; expected at most 1,000,000",
        ),
        (
            "--batch-size 3501 --dataset mnist5k",
            "--batch-size 3501: expected at most the 3500 training images",
        ),
        ("--batch-size 1000000000", "--batch-size 1000000000: expected at most the 55000 training images"),
        ("--steps 100 --warmup 101", "--warmup 101: expected at most the 100 --steps of training"),
        ("--steps 100 --lr-drops 50,100", "--lr-drops 50,100: expected steps below 100, where training ends"),
        ("--momentum 0.5", "--momentum 0.5: has no effect with adam; use --optimizer sgd"),
        (
            "--reinits 3 --arms ticket,random-mask",
            "--reinits 3: has no effect without an arm of fresh weights",
        ),
        ("--workers 5000", f"--workers 5000: expected at most {most_workers()} (four a core)"),
        ("--replicas 1000000", "--replicas 1000000: expected at most 100,000"),
    ],
)
def test_it_is_said_before_anything_slow(flags: str, says: str, cli: Cli, nothing_slow: None) -> None:
    code, out, err = cli("imp", "--quiet", "--model", "lenet-300-100", *flags.split())
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_more_threads_than_cores_are_refused(cli: Cli, nothing_slow: None) -> None:
    code, _, err = cli("bench", "--quiet", "--shape", "64x64", "--batch", "1", "--threads", str(cores() + 1))
    assert (code, err) == (
        2,
        f"sparselth: --threads {cores() + 1}: expected at most {cores()} (cores of this process)\n",
    )


def test_a_batch_that_memory_does_not_hold_is_refused(
    cli: Cli, nothing_slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("measure.layers", "machine"):
        monkeypatch.setattr(f"sparselth.{place}.memory_bytes", lambda: 10**8)
    code, _, err = cli("imp", "--quiet", "--model", "lenet5", "--batch-size", "50000")
    assert code == 2
    assert "--batch-size 50000: one network of lenet5 takes about" in err
    for flags in ("--shape 4096x4096", "--model vgg19 --batch 1000"):
        code, _, err = cli("bench", "--quiet", *flags.split())
        assert code == 2
        assert f"{flags[: flags.index(' ', 9)] if '--batch' in flags else flags}: takes about" in err


def test_a_model_s_recipe_may_be_cut_short_as_it_stands() -> None:
    """Its drops and its warm-up are not what the user gave; they stay, and with them the digest."""
    model = get_model("resnet20")
    for recipe in model.recipes.values():
        replace(TINY, model="resnet20", dataset="cifar10", recipe=replace(recipe, steps=15)).check()
    with pytest.raises(UsageError, match="`warmup` 16"):
        replace(TINY, recipe=replace(TINY.recipe, steps=15, warmup=16)).check()


def test_equal_plans_are_equal() -> None:
    one = replace(TINY, seeds=(1, 0, 7), arms=("random-mask", "ticket", "reinit"))
    other = replace(TINY, seeds=(0, 7, 1), arms=("ticket", "reinit", "random-mask"))
    assert one == other
    assert one.digest == other.digest
    assert (one.seeds, one.arms) == ((0, 1, 7), ("ticket", "reinit", "random-mask"))
    drops = [replace(TINY.recipe, lr_drops=drops) for drops in ((50, 20), (20, 50))]
    assert drops[0] == drops[1]
    assert replace(TINY, rate=0.5).digest == replace(TINY, rate=1 / 2).digest
    assert Recipe(steps=1, lr=1).to_json() == Recipe(steps=1, lr=1.0).to_json()


def test_no_more_workers_than_networks_at_a_time(tmp_path: Path) -> None:
    assert plan(TINY, workers=8, out=tmp_path / "run").workers == 3
    assert plan(replace(TINY, arms=("ticket",)), workers=8, out=tmp_path / "run").workers == 1
