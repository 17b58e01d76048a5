"""Configurations: checks, config.json of this version and the one before, digests, flags."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from sparselth.cli.experiment import command
from sparselth.cli.options import Numbers, as_flags, shown
from sparselth.config import (
    MOST,
    Cell,
    Config,
    Options,
    Recipe,
    at_least,
    below_one,
    config_from_json,
    like,
    not_negative,
    option,
    positive,
)
from sparselth.errors import UsageError
from sparselth.experiments.base import Experiment
from sparselth.experiments.imp import ImpConfig
from sparselth.models import get_model

ROOT = Path(__file__).resolve().parents[1]

# as the version before experiments had names wrote it, digest 9cc5976d
BEFORE = """{
  "model": "lenet-300-100",
  "dataset": "mnist5k",
  "seeds": [
    0
  ],
  "arms": [
    "ticket",
    "reinit",
    "random-mask"
  ],
  "levels": 2,
  "rate": 0.2,
  "scope": "layer",
  "one_shot": false,
  "rewind": 20,
  "reinits": 1,
  "device": "cpu",
  "kernels": "auto",
  "recipe": {
    "steps": 100,
    "lr": 0.0012,
    "batch_size": 60,
    "optimizer": "adam",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "warmup": 0,
    "lr_drops": [],
    "eval_every": 100
  }
}
"""
EQUAL = ImpConfig(
    model="lenet-300-100",
    dataset="mnist5k",
    seeds=(0,),
    levels=2,
    rewind=20,
    device="cpu",
    eval_images=0,
    recipe=Recipe(steps=100, lr=1.2e-3),
)


def test_a_configuration_of_the_version_before_is_read_with_its_digest() -> None:
    config = config_from_json(json.loads(BEFORE))
    assert config == EQUAL
    assert config.digest_before() == "9cc5976d"
    assert isinstance(config, ImpConfig)
    assert config.folder == f"lenet-300-100-mnist5k-{config.digest}"
    assert config.score == "magnitude"


def test_config_json_gives_an_equal_configuration_and_only_adds_fields() -> None:
    config = replace(EQUAL, score="random", recipe=replace(EQUAL.recipe, lr_drops=(10, 20)))
    data = json.loads(json.dumps(config.to_json()))
    assert config_from_json(data) == config
    before = json.loads(BEFORE)
    assert set(data) - set(before) == {"experiment", "score", "eval_images", "code", "exclude", "pattern"}
    assert data["experiment"] == "imp"
    now = EQUAL.to_json()
    assert now["recipe"].pop("cosine") is False
    assert now["recipe"].pop("augment") == "none"
    assert now["recipe"].pop("inputs") == "standard"
    assert {name: value for name, value in now.items() if name in before} == before


def test_every_setting_tells_digests_apart_but_what_was_added_and_what_says_which_cells_there_are() -> None:
    other: dict[str, Any] = {
        "model": "lenet5", "dataset": "mnist", "seeds": (1,), "arms": ("ticket",), "levels": 3, "rate": 0.3,
        "scope": "global", "one_shot": True, "rewind": 1, "reinits": 2, "device": "cuda", "kernels": "torch",
        "score": "random", "eval_images": 1000, "code": ("a.py:make 0123",), "exclude": ("fc1",),
        "pattern": "unit",
        "recipe": replace(EQUAL.recipe, lr=1e-3),
    }  # fmt: skip
    assert set(other) == {f.name for f in fields(ImpConfig)}
    changed = {name: replace(EQUAL, **{name: value}) for name, value in other.items()}
    before = {config.digest_before() for config in changed.values()}
    assert len(before | {EQUAL.digest_before()}) == len(other) + 1
    extends = [name for name, config in changed.items() if config.digest == EQUAL.digest]
    assert sorted(extends) == sorted(EQUAL.extends()) == ["arms", "levels", "reinits", "seeds"]
    assert len({config.digest for config in changed.values()}) == len(other) - len(extends) + 1


def test_unknown_and_missing_fields_are_named() -> None:
    before = json.loads(BEFORE)
    with pytest.raises(UsageError, match="unknown speed, wings"):
        config_from_json(before | {"speed": 9, "wings": 2})
    with pytest.raises(UsageError, match="unknown haste"):
        config_from_json(before | {"recipe": before["recipe"] | {"haste": 9}})
    recipe = dict(before["recipe"])
    del recipe["steps"], recipe["eval_every"]
    with pytest.raises(UsageError, match="missing steps, eval_every"):
        config_from_json(before | {"recipe": recipe})
    with pytest.raises(UsageError, match="missing model, dataset, seeds, device"):
        config_from_json({})
    with pytest.raises(UsageError, match="unknown experiment 'inp': did you mean 'imp'"):
        config_from_json(before | {"experiment": "inp"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"levels": 0}, "`levels` 0: expected 1 or more (level 0 is the dense network and always runs)"),
        ({"rate": 1.5}, "`rate` 1.5: expected a number between 0 and 1"),
        ({"rate": float("nan")}, "`rate` nan: expected a number between 0 and 1"),
        ({"rewind": 100}, "`rewind` 100: expected a step from 0 to 99, because training ends at step 100"),
        ({"seeds": (1, 1)}, "`seeds` 1,1: expected different numbers from 0 on"),
        ({"seeds": ()}, "`seeds` : expected different numbers from 0 on"),
        ({"arms": ("reinit",)}, "`arms` reinit: 'ticket' is missing"),
        ({"arms": ("ticket", "ticket")}, "`arms` ticket,ticket: an arm is named twice"),
        ({"arms": ("ticket", "renit")}, "unknown arm 'renit': did you mean 'reinit'?"),
        ({"model": "lenet6"}, "unknown model 'lenet6': did you mean 'lenet5'?"),
        ({"dataset": "mnost"}, "unknown dataset 'mnost': did you mean 'mnist'?"),
        ({"score": "magnitud"}, "unknown score 'magnitud': did you mean 'magnitude'?"),
        ({"scope": "layers"}, "unknown scope 'layers': did you mean 'layer'?"),
        ({"recipe": Recipe(steps=0, lr=1.0)}, "`steps` 0: expected 1 or more"),
        ({"recipe": Recipe(steps=1, lr=float("nan"))}, "`lr` nan: expected a positive number"),
        (
            {"recipe": Recipe(steps=1, lr=1.0, momentum=1.0)},
            "`momentum` 1: expected a number from 0 to below 1",
        ),
        (
            {"recipe": Recipe(steps=1, lr=1.0, optimizer="adm")},
            "unknown optimizer 'adm': did you mean 'adam'?",
        ),
    ],
)
def test_what_makes_no_experiment_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        replace(EQUAL, **change).check()
    assert says in str(raised.value)


def test_a_configuration_in_python_takes_the_model_s_recipe() -> None:
    assert ImpConfig(model="lenet-300-100").recipe == get_model("lenet-300-100").recipes["short"]
    ImpConfig().check()
    with pytest.raises(UsageError, match="unknown model"):
        ImpConfig(model="lenet6")


def test_options_of_any_dataclass() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(Options):
        n: int = option(2, "How many.", at_least(1))
        way: str = option("up", "Which way.", choices=("up", "down"))
        late: bool = option(False, added=True)

    Mine().check()
    assert Mine().identity() == {"n": 2, "way": "up"}
    assert Mine(late=True).identity() == {"n": 2, "way": "up", "late": True}
    with pytest.raises(UsageError, match="`n` 0: expected 1 or more"):
        Mine(n=0).check()
    with pytest.raises(UsageError, match="unknown way 'dwn': did you mean 'down'"):
        Mine(way="dwn").check()


def test_ranges_hold_their_ends() -> None:
    some, few = at_least(3), at_least(3, "a why", 5)
    assert [some(value) for value in (3, MOST)] == [few(value) for value in (3, 5)] == [None, None]
    assert (some(2), some(MOST + 1)) == ("expected 3 or more", "expected at most 1,000,000,000")
    assert (few(2), few(6)) == ("expected 3 or more (a why)", "expected at most 5")
    assert [below_one(value) for value in (0, 0.999)] == [None, None]
    assert {below_one(value) for value in (-1e-9, 1.0)} == {"expected a number from 0 to below 1"}
    assert [positive(value) for value in (1e-300, 0.5, MOST)] == [None] * 3
    assert {positive(value) for value in (0, MOST + 1)} == {"expected a positive number, at most 1e+09"}
    assert [not_negative(value) for value in (0, 0.5, MOST)] == [None] * 3
    wrong = "expected 0 or a positive number, at most 1e+09"
    assert {not_negative(value) for value in (-1e-9, MOST + 1)} == {wrong}


def test_what_a_field_knows() -> None:
    bare = {"help": "", "check": None, "choices": None, "added": False, "ordered": True, "extends": False}
    bare |= {"argument": False, "also": "", "epochs": False}
    assert dict(option(3).metadata) == bare | {"before": 3}
    whole = {"help": "How.", "check": positive, "choices": ("a",), "added": True, "ordered": False}
    more = {"before": 2, "extends": True, "argument": True, "also": "or", "epochs": True}
    made = option(3, **whole, **more)
    assert (made.default, dict(made.metadata)) == (3, whole | more)


def test_a_field_like_another_was_there_from_the_first() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Theirs(Options):
        n: int = option(3, "How many.", at_least(1), added=True, before=2, extends=True)

    theirs = dict(fields(Theirs)[0].metadata) | {"added": False}
    same, other = like(Theirs, "n"), like(Theirs, "n", 5, "How often.")
    assert (same.default, dict(same.metadata)) == (3, theirs | {"before": 3})
    assert (other.default, dict(other.metadata)) == (5, theirs | {"before": 5, "help": "How often."})


def test_the_learning_rate_of_a_step() -> None:
    plain, warm = Recipe(steps=9, lr=0.5), Recipe(steps=9, lr=0.5, warmup=4, lr_drops=(6, 8))
    assert [plain.lr_at(step) for step in (0, 8)] == [0.5, 0.5]
    rates = [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005]
    assert [warm.lr_at(step) for step in range(9)] == pytest.approx(rates)


def test_a_cosine_takes_the_learning_rate_to_0_behind_the_warm_up() -> None:
    whole, warm = Recipe(steps=4, lr=2.0, cosine=True), Recipe(steps=6, lr=2.0, warmup=2, cosine=True)
    rates = [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]
    assert [whole.lr_at(step) for step in range(5)] == pytest.approx([*rates, 0.0])
    assert [warm.lr_at(step) for step in range(6)] == pytest.approx([1.0, 2.0, *rates])
    assert Recipe(steps=2, lr=2.0, warmup=2, cosine=True).lr_at(1) == 2.0
    assert Recipe(steps=9, lr=2.0, lr_drops=(3,), cosine=True).lr_at(3) == pytest.approx(0.15)


def test_numbers_of_a_list_are_floats_and_shown_short() -> None:
    @dataclass(frozen=True)
    class Some(Options):
        widths: tuple[float, ...] = option((1, 0.5), "How wide.")
        names: tuple[str, ...] = option(("a",), "Who.")

    found = Some()
    assert found.widths == (1.0, 0.5)
    assert [type(one) for one in found.widths] == [float, float]
    assert Some(widths=(0.125, 1.0 / 3)).widths == (0.125, 1.0 / 3)
    assert str(Some(widths=(0.125, 1.0 / 3)).wrong("widths", "so")) == "`widths` 0.125,0.333333: so"
    assert str(found.wrong("names", "so")) == "`names` a: so"
    assert Some(widths=("wide",)).widths == ("wide",)  # type: ignore[arg-type]  # which the check refuses


def test_a_digest_of_the_version_before_is_of_its_lists_as_they_were_written() -> None:
    written = EQUAL.to_json()
    assert EQUAL.digest_before(written) == EQUAL.digest_before()
    assert EQUAL.digest_before(written | {"seeds": [7, 5]}) != EQUAL.digest_before()
    assert EQUAL.digest_before(written | {"rate": 0.75}) == EQUAL.digest_before()


def test_a_schedule_that_was_added_leaves_the_digests_of_others_as_they_were() -> None:
    recipe = replace(EQUAL.recipe, cosine=True)
    assert "cosine" not in EQUAL.recipe.identity()
    assert replace(EQUAL, recipe=recipe).digest != EQUAL.digest
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_what_is_no_configuration_is_shown_up_to_its_fortieth_character() -> None:
    long = ["0123456789"] * 9
    for read in (config_from_json, ImpConfig.from_json):
        with pytest.raises(UsageError) as raised:
            read(long)  # type: ignore[arg-type]
        assert str(raised.value) == f"expected a JSON object, found {json.dumps(long)[:40]}"
    with pytest.raises(UsageError) as raised:
        config_from_json(json.loads(BEFORE) | {"experiment": long})
    assert str(raised.value) == f"`experiment` {json.dumps(long)[:40]}: expected a name"


def test_names_that_a_plugin_may_know_are_read_and_not_run() -> None:
    found = config_from_json(json.loads(BEFORE) | {"score": "mine", "sha256": "of the file"})
    assert found == replace(EQUAL, score="mine")
    with pytest.raises(UsageError, match="unknown score 'mine'"):
        found.check()


@pytest.mark.parametrize(
    ("drops", "right"),
    [
        ((0,), True),
        ((-1,), False),
        ((MOST,), True),
        ((MOST + 1,), False),
        ((1,) * 100, True),
        ((1,) * 101, False),
    ],
)
def test_drops_have_a_range_and_a_number(drops: tuple[int, ...], right: bool) -> None:
    recipe = Recipe(steps=1, lr=1.0, lr_drops=drops)
    says = "`lr_drops` .*: expected up to 100 steps from 0 to 1,000,000,000"
    with nullcontext() if right else pytest.raises(UsageError, match=says):
        recipe.check()


@dataclass(frozen=True, kw_only=True)
class Kinds(Options):
    whole: int = option(0)
    some: float = option(0.0)
    name: str = option("")
    off: bool = option(False)
    many: tuple[int, ...] = option(())
    recipe: Recipe = field(default=EQUAL.recipe)


@pytest.mark.parametrize(
    ("name", "right", "wrong", "expected"),
    [
        ("whole", (-3, 2**53 - 1), (0.5, "3", None, True), "expected a whole number"),
        ("whole", (1 - 2**53,), (2**53, -(2**53)), "expected numbers below 9,007,199,254,740,992"),
        ("some", (-0.5, 3), ("3", None, True), "expected a number"),
        ("some", (1e300,), (float("nan"), float("inf"), -float("inf")), "expected a finite number"),
        ("name", ("", "x"), (3, None), "expected a name"),
        ("off", (True, False), (0, "yes", None), "expected true or false"),
        ("many", ((), (1, 2)), ([1], 3, None), "expected a list"),
        ("many", ((3,),), ((1, "2"), (0.5,)), "expected a whole number"),
        ("many", ((3,),), ((1, 2**53),), "expected numbers below 9,007,199,254,740,992"),
        ("recipe", (Recipe(steps=2, lr=0.5),), ({}, 3, None), "expected settings by name"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_expected(
    name: str, right: tuple[Any, ...], wrong: tuple[Any, ...], expected: str
) -> None:
    for value in right:
        Kinds(**{name: value}).check()
    for value in wrong:
        with pytest.raises(UsageError) as raised:
            Kinds(**{name: value}).check()
        assert str(raised.value).startswith(f"`{name}` ")
        assert str(raised.value).endswith(f": {expected}")


def test_what_is_wrong_in_a_part_is_told_by_the_whole() -> None:
    with pytest.raises(UsageError, match="`lr` 0: expected a positive number"):
        Kinds(recipe=Recipe(steps=1, lr=0.0)).check()
    with pytest.raises(UsageError, match="unknown optimizer 'adm'"):
        Kinds(recipe=Recipe(steps=1, lr=1.0, optimizer="adm")).check()


def test_whole_numbers_in_a_float_s_place_are_floats() -> None:
    assert type(Kinds(some=3).some) is float
    assert type(Kinds(whole=3).whole) is int


def test_what_two_configurations_differ_in() -> None:
    other = replace(EQUAL, levels=3, recipe=replace(EQUAL.recipe, lr=0.5))
    assert list(EQUAL.difference(other)) == [("levels", 2, 3), ("lr", 1.2e-3, 0.5)]
    assert list(other.difference(EQUAL)) == [("levels", 3, 2), ("lr", 0.5, 1.2e-3)]
    assert list(EQUAL.difference(replace(EQUAL))) == []

    @dataclass(frozen=True, kw_only=True)
    class Plain(Config):
        name = "plain"
        n: int = option(1)

    assert list(Plain().difference(Plain(n=2))) == [("n", 1, 2)]


def test_a_cell_has_a_line_a_name_and_a_key() -> None:
    assert str(Cell(3, "ticket", 11)) == "seed 3 ticket level 11"
    assert Cell(3, "ticket", 11).key == "seed3-ticket-11"
    cell = Cell(3, "reinit", 4, 1)
    assert (str(cell), cell.key) == ("seed 3 reinit draw 1 level 4", "seed3-reinit-04-draw1")
    assert Cell.of({"seed": 3, "arm": "reinit", "level": 4, "draw": 1, "more": 0}) == cell


def test_every_field_with_a_help_is_a_flag_with_its_default() -> None:
    flags = {param.name: param for param in command(ImpConfig).params}
    for f in fields(ImpConfig):
        if f.name in ("recipe", "code"):
            assert not f.metadata.get("help")
            continue
        param = flags[f.name]
        found = param.type_cast_value(None, param.default)  # type: ignore[arg-type]
        assert found == f.default, f.name
        assert as_flags(f.metadata["help"]) == param.help  # type: ignore[attr-defined]
    for f in fields(Recipe):
        assert (f.name in flags) == bool(f.metadata["help"])
        if f.name in flags:
            assert flags[f.name].default is None
            known = "" if f.default in (MISSING, ()) else f", {f.default}"
            assert f"[default: the recipe's{known}]" in flags[f.name].help  # type: ignore[attr-defined]


@pytest.mark.parametrize("values", [(0, 1), (3,), (0, 2, 5), (4, 5, 6, 7), ("ticket", "reinit")])
def test_values_are_shown_as_their_flag_takes_them(values: tuple[Any, ...]) -> None:
    text = shown(values)
    found = Numbers().convert(text, None, None) if isinstance(values[0], int) else tuple(text.split(","))
    assert found == values


def strings(file: Path) -> Iterator[str]:
    """The string constants of a file that are no docstrings."""
    tree = ast.parse(file.read_text())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_the_library_names_fields_and_only_the_command_line_flags() -> None:
    found = [
        (file.name, text)
        for file in (ROOT / "sparselth").rglob("*.py")
        if file.relative_to(ROOT / "sparselth").parts[0] not in ("cli", "kernels")
        for text in strings(file)
        if re.search(r"(?<![\w-])--[a-z]", text)
    ]
    others = ("--query-gpu", "--format=", "--porcelain")  # of nvidia-smi and git
    assert [pair for pair in found if not pair[1].startswith(others)] == []
    assert (
        as_flags("`batch_size` 0: see `sparselth ls models`") == "--batch-size 0: see `sparselth ls models`"
    )


def test_an_experiment_is_a_configuration() -> None:
    assert issubclass(ImpConfig, Experiment)
    assert all(cell.level == 0 or EQUAL.needs(cell) for cell in EQUAL.cells())
