"""Actions print and parse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seq1f1b.schedule import Action, Kind

ACTIONS = st.builds(
    Action, st.sampled_from(Kind), st.integers(0, 99), st.integers(0, 999), st.integers(0, 99)
)


@given(ACTIONS)
def test_an_action_reads_back_from_its_text(action):
    assert Action.parse(str(action)) == action


def test_the_text_says_chunk_kind_micro_batch_and_sub_sequence():
    assert str(Action(Kind.F, 1, 0, 2)) == "1F0.2"
    assert str(Action(Kind.SEND_B, 0, 3, 1)) == "0SEND_B3.1"
    assert Action.parse(" 0F3.1\n") == Action(Kind.F, 0, 3, 1)


@pytest.mark.parametrize("text", ["", "F0.0", "0F0", "0X1.2", "0F1.2.3", "-1F0.0", "0RECV1.0"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="not an action") as error:
        Action.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("kind", Kind)
def test_a_kind_does_one_thing(kind):
    does = [kind.is_compute, kind.is_send, kind.is_receive, kind.is_load, kind.is_free]
    assert does.count(True) == 1
