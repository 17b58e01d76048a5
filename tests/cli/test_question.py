"""What a call of `bench` asks: a folder for every question, and no flag without effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparselth.cli.question import LONGEST, Question
from sparselth.errors import UsageError

PLAIN = Question((0.9,), (), (), (), (), None, None, None, None, False, None, False)
RUN = Path("somewhere/run")

QUESTIONS: list[dict[str, Any]] = [
    {},
    {"sparsities": (0.5,)},
    {"sparsities": (0.5, 0.9)},
    {"shapes": ("32x48",)},
    {"shapes": ("32x48", "64x64")},
    {"shapes": ("64x64x3x3@8x8",)},
    {"shapes": ("64x64x3x3@8x8/2",)},
    {"shapes": ("64x64x3x3@8x8p0",)},
    {"shapes": tuple(f"{n}x{n}" for n in range(1000, 1040))},
    {"shapes": tuple(f"{n}x{n}" for n in range(1000, 1041))},
    {"batches": (1,)},
    {"batches": (1, 64)},
    {"dtypes": ("fp32",)},
    {"kinds": ("block",)},
    {"kinds": ("block", "random")},
    {"quick": True},
    {"threads": 1},
    {"strong": True},
    {"strong": True, "batches": (1,)},
    {"model": "lenet5"},
    {"model": "lenet5", "batches": (1,)},
    {"model": "lenet5", "threads": 1},
    {"model": "lenet5", "train": True},
    {"train": True},
    {"run": RUN},
    {"run": Path("elsewhere/run")},
    {"run": RUN, "level": 3},
    {"run": RUN, "seed": 3},
    {"run": RUN, "kinds": ("magnitude",)},
]


def test_every_question_has_a_folder_of_its_own() -> None:
    names = [replace(PLAIN, **changes).folder("cpu") for changes in QUESTIONS]
    names += [PLAIN.folder("cuda"), replace(PLAIN, train=True).folder("cuda")]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) <= LONGEST + 9 for name in names)
    assert names[0] == "bench-cpu-0.9"
    assert names[4] == "bench-cpu-32x48-64x64-0.9"
    assert replace(PLAIN, train=True).folder("cpu") == "bench-cpu-train-lenet-300-100-0.9"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"sparsities": (0.5, 0.9)}, {"sparsities": (0.9, 0.5)}),
        ({"batches": (1, 64)}, {"batches": (64, 1)}),
        ({"shapes": ("1x2", "3x4")}, {"shapes": ("3x4", "1x2")}),
        ({"train": True}, {"train": True, "model": "lenet-300-100"}),
        ({"shapes": ("1x2",)}, {"shapes": ("1x2",), "quick": True}),  # has no effect there
        ({"run": RUN}, {"run": RUN.resolve()}),
    ],
)
def test_equal_questions_have_equal_folders(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert replace(PLAIN, **one).folder("cpu") == replace(PLAIN, **other).folder("cpu")


@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({"model": "lenet5", "sparsities": (0.5, 0.9)}, "sparsity", "--sparsity: a whole network"),
        ({"model": "lenet5", "dtypes": ("bf16",)}, "dtype", "--dtype: whole networks"),
        ({"train": True, "batches": (1, 2)}, "batch", "--batch: a step of training"),
        ({"run": RUN}, "sparsity", "--sparsity: the mask is the ticket's"),
        (
            {"run": RUN, "kinds": ("magnitude",), "level": 2},
            "sparsity",
            "--sparsity: the mask is the ticket's",
        ),
        ({"model": "lenet5"}, "data_dir", "--data-dir: only the tickets"),
        ({}, "data_dir", "--data-dir: only the tickets"),
    ],
)
def test_a_flag_without_effect_is_refused(changes: dict[str, Any], given: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        replace(PLAIN, **changes).check({given})


def test_defaults_are_not_flags_that_were_given() -> None:
    replace(PLAIN, run=RUN).check(())
    replace(PLAIN, run=RUN, kinds=("magnitude",)).check({"sparsity"})
    replace(PLAIN, model="lenet5", dtypes=("fp32",)).check({"dtype"})
