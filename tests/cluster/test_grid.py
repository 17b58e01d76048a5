"""Points of a grid: their names, what is refused, and groups of seeds."""

from __future__ import annotations

from typing import Any

import pytest

from sparselth.cluster.grid import Grid, folder_of, groups
from sparselth.errors import UsageError
from sparselth.experiments.training import Training
from sparselth.models import get_model

BASE: dict[str, Any] = {"model": "lenet-300-100", "dataset": "mnist5k", "seeds": (0, 1, 2, 3, 4)}


def names(axes: dict[str, list[Any]], **settings: Any) -> list[str]:
    return [point.name for point in Grid("imp", axes, BASE | settings).points()]


def test_a_name_is_the_same_in_any_order_and_spelling() -> None:
    first = names({"rate": [0.1, 0.2], "batch_size": [20]})
    assert first == ["batch_size=20,rate=0.1", "batch_size=20,rate=0.2"]
    assert names({"batch-size": [20], "rate": [2e-1, 1e-1]}) == first[::-1]


def test_lists_and_ranges_are_tuples() -> None:
    """As docs/clusters.md has them."""
    settings: dict[str, Any] = BASE | {"seeds": range(2)}
    (point,) = Grid("imp", {"arms": [["ticket", "reinit"]]}, settings).points()
    assert (point.name, point.config.seeds) == ("arms=ticket+reinit", (0, 1))  # type: ignore[attr-defined]


def test_names_of_other_kinds() -> None:
    assert names({"one_shot": [True, False]}) == ["one_shot=true", "one_shot=false"]
    arms = names({"arms": [("ticket",), ("reinit", "ticket")]})
    assert arms == ["arms=ticket", "arms=ticket+reinit"]  # in the configuration's order
    assert names({"lr": [1, 0.5]}) == ["lr=1.0", "lr=0.5"]
    epochs = names({"rewind": ["2ep"]}, batch_size=50)
    assert epochs == [f"rewind={2 * 3500 // 50}"]


def test_a_point_is_what_its_values_say_and_the_rest_of_the_settings() -> None:
    (point,) = Grid("imp", {"rate": [0.3], "lr": [0.01]}, BASE | {"steps": 70}).points()
    assert isinstance(point.config, Training)
    assert (point.config.recipe.lr, point.config.recipe.steps, point.config.seeds) == (
        0.01,
        70,
        (0, 1, 2, 3, 4),
    )
    assert point.values == {"lr": 0.01, "rate": 0.3}


def test_the_recipe_is_that_of_the_point_s_model() -> None:
    """And not of the one that stands in the settings, as it would be in a changed configuration."""
    settings = {name: value for name, value in BASE.items() if name != "model"}
    models = [
        point.config for point in Grid("imp", {"model": ["lenet5", "lenet-300-100"]}, settings).points()
    ]
    assert all(isinstance(one, Training) for one in models)

    for one in models:
        assert one.recipe == next(iter(get_model(one.model).recipes.values()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("axes", "settings", "said"),
    [
        ({"rat": [0.1]}, {}, "unknown setting of imp 'rat': did you mean 'rate'"),
        ({"rate": [0.1, 1.5]}, {}, "`rate` 1.5: expected a number between 0 and 1"),
        ({"rate": [0.1, 1e-1]}, {}, "has the point rate=0.1 twice"),
        ({"rate": []}, {}, "`grid` rate: expected a value at least"),
        ({}, {}, "expected an axis at least"),
        ({"seeds": [(1,)]}, {}, "seeds are the replicas"),
        ({"device": ["cpu"]}, {}, "one kind of device"),
        ({"rate": [0.1]}, {"rate": 0.2}, "is given as `rate`, too"),
        ({"score": ["magnitud"]}, {}, "did you mean 'magnitude'"),
        ({"lr": [i + 1 for i in range(1001)]}, {}, "1,001 points; expected at most 1,000"),
        ({"steps": [10], "warmup": [20]}, {}, "`warmup` 20"),
    ],
)
def test_what_makes_no_grid(axes: dict[str, list[Any]], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        names(axes, **settings)


def test_folders_are_names_that_a_file_system_takes() -> None:
    assert folder_of("lr=0.1,rate=0.2") == "lr=0.1,rate=0.2"
    odd = folder_of("model=../nets/my.py:make")
    assert "/" not in odd
    assert ":" not in odd
    assert odd != folder_of("model=../nets/my.py_make")
    assert len(folder_of("x" * 500)) < 120


def test_seeds_are_split_in_order_and_none_is_lost() -> None:
    (point,) = Grid("imp", {"rate": [0.2]}, BASE).points()
    assert groups(point, 1) == [point]
    split = [one.config.seeds for one in groups(point, 3)]  # type: ignore[attr-defined]
    assert split == [(0,), (1, 2), (3, 4)]
    assert len(groups(point, 9)) == 5
