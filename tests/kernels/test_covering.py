"""covering.py: every value of every parameter is met, and by few cases."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from covering import covering

CASES = st.lists(st.fixed_dictionaries({"a": st.sampled_from("xyz"), "b": st.sampled_from("uv")}), max_size=9)


@given(CASES)
def test_every_value_is_met(cases: list[dict[str, str]]) -> None:
    kept = [cases[i] for i in covering(cases)]
    assert {v for case in kept for v in case.items()} == {v for case in cases for v in case.items()}


def test_a_product_takes_as_many_cases_as_its_longest_side_in_changing_company() -> None:
    cases = [dict(zip("abc", values, strict=True)) for values in product("12345", "123", "12")]
    kept = [cases[i] for i in covering(cases)]
    assert len(kept) == 5
    assert len({(case["b"], case["c"]) for case in kept}) >= 4
    assert covering([{"a": str(i)} for i in range(7)]) == list(range(7))
