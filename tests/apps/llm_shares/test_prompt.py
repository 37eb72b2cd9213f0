"""What a model reads about a conversation, whole and in parts."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turn_sets import trajectory

from apps.llm_shares.prompt import make_windows, window_text, windows


def test_windows_by_hand():
    assert windows(3, 4, 1) == [range(0, 3)]
    assert windows(4, 4, 1) == [range(0, 4)]
    assert windows(5, 4, 1) == [range(0, 4), range(1, 5)]  # the last one is moved back, so that it is whole
    assert windows(10, 4, 1) == [range(0, 4), range(3, 7), range(6, 10)]
    assert windows(2, 1, 0) == [range(0, 1), range(1, 2)]


@given(st.integers(1, 200), st.integers(1, 50), st.data())
def test_windows_have_every_turn_and_overlap(n, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    found = windows(n, size, overlap)
    assert sorted({turn for window in found for turn in window}) == list(range(n))
    assert all(len(window) == min(size, n) for window in found) and len(set(found)) == len(found)
    assert all(first.stop - second.start >= overlap for first, second in pairwise(found))


TALK = trajectory("t", 70.0, ["happiness", "neutral", "anger", "surprise"])


def test_the_whole_conversation_as_the_model_reads_it():
    text = window_text(TALK, range(4), "overall_affect", li_text=False)
    assert text.startswith("A conversation of A and B is below. At the end A gave it 7 of 10 points (overall affect).")
    said = [line for line in text.splitlines() if " t turn " in line]
    assert said == [
        "A: t turn 0", "Turn 1, B: t turn 1", "A: t turn 2", "Turn 2, B: t turn 3",
        "A: t turn 4", "Turn 3, B: t turn 5", "A: t turn 6", "Turn 4, B: t turn 7",
    ]  # fmt: skip
    in_json = window_text(TALK, range(4), "overall_affect", li_text=False, form="json")
    assert "a JSON object that has the keys 1 to 4" in in_json and "lines" not in in_json
    assert "B's turns 1 to 4" in text and "conversation must be 7." in text and "Reply with 4 lines" in text


def test_faces_in_words_only_with_li_text():
    text = window_text(TALK, range(4), "overall_affect", li_text=True)
    looks = [line.partition(" (")[2] for line in text.splitlines() if line.startswith("Turn")]
    assert looks == ["A looks happy)", "A looks neutral)", "A looks angry)", "A looks surprised)"]
    assert "looks" not in window_text(TALK, range(4), "overall_affect", li_text=False)


def test_a_part_has_the_users_turns_around_it_and_numbers_of_its_own():
    text = window_text(TALK, range(1, 3), "you_are_funny", li_text=False)
    assert text.startswith("A part of a long conversation") and "(you are funny)" in text
    said = [line for line in text.splitlines() if " t turn " in line]
    assert said == ["A: t turn 2", "Turn 1, B: t turn 3", "A: t turn 4", "Turn 2, B: t turn 5", "A: t turn 6"]


def test_each_trajectory_has_windows_of_its_own():
    other = trajectory("o", 30.0, ["neutral"])
    found = make_windows([TALK, other], "overall_affect", size=3, overlap=1, li_text=False)
    assert [(w.trajectory, w.turns) for w in found] == [(TALK, range(3)), (TALK, range(1, 4)), (other, range(1))]


@pytest.mark.parametrize("utterance", ["two\nlines", "two \r\n\t lines"])
def test_a_turn_is_one_line(utterance):
    turns = TALK.conversation.turns
    object.__setattr__(TALK.conversation, "turns", (turns[0]._replace(utterance=utterance), *turns[1:]))
    assert "A: two lines\nTurn 1" in window_text(TALK, range(4), "overall_affect", li_text=False)
    object.__setattr__(TALK.conversation, "turns", turns)
