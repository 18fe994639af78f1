"""The text form of tables, there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.parallel.pipeline import actions
from deepseek_jax.parallel.pipeline.actions import Action

ONE = st.builds(
    Action, st.sampled_from("FBIW"), st.integers(0, 20), st.integers(0, 999)
)
OPS = st.lists(ONE, min_size=1, max_size=2).map(tuple)
LINES = st.lists(OPS, min_size=1, max_size=6).map(tuple)
TABLES = st.lists(LINES, min_size=1, max_size=4).map(tuple)


def test_an_example():
    text = "F0:3 F1:2+B0:0 I1:3 W1:3\nF0:12"
    first = (
        (Action("F", 0, 3),),
        (Action("F", 1, 2), Action("B", 0, 0)),
        (Action("I", 1, 3),),
        (Action("W", 1, 3),),
    )
    assert actions.parse(text) == (first, ((Action("F", 0, 12),),))
    assert actions.table_text(actions.parse(text)) == text


@given(TABLES)
def test_round_trip(table):
    text = actions.table_text(table)
    assert actions.parse(text) == table
    assert actions.parse(f"{text}\n\n") == table
    assert len(text.split("\n")) == len(table)


@pytest.mark.parametrize(
    "word",
    ["X0:1", "f0:1", "F0", "F:1", "F0:", "F0:1:2", "F-1:0", "F0:1+", "F0:1++B0:0"],
)
def test_what_is_no_action_is_named_by_rank_and_place(word):
    with pytest.raises(ValueError) as refused:
        actions.parse(f"F0:0 F0:1\nF0:0 F0:1 {word} F0:2")
    assert f"rank 1, op 2, {word!r}: must be" in str(refused.value)


def test_a_rank_may_have_nothing_to_do():
    assert actions.parse("F0:0\n\nB0:0\n")[1] == ()
