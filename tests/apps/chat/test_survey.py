"""Questions, answers and ids."""

import argparse
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.chat.survey import new_user_id, partner_id, question_text, read_answer, user_id
from geli.data.questions import QUESTIONS, Question
from geli.run.errors import UserError


def test_every_question_has_words_and_a_range_that_readers_accept():
    for name, question in QUESTIONS.items():
        low, high = question.scale
        assert low < high and question.accepts(low) and question.accepts(high)
        assert f"({low}: " in question_text(name) and f"… {high}: " in question_text(name)


def test_ranges_by_hand():
    assert QUESTIONS["overall_affect"].scale == (1, 9) and QUESTIONS["conversationalist"].scale == (0, 100)
    assert question_text("i_like_you") == "How much did you like your partner? (1: not at all … 9: very much)"


@pytest.mark.parametrize(("question", "text", "answer"), [
    ("end_affect", "1", 1), ("end_affect", " 9 ", 9), ("end_affect", "6.5", 6.5), ("good_for_advice", "0", 0),
])  # fmt: skip
def test_answers_are_read(question, text, answer):
    assert read_answer(question, text) == answer


def test_a_scale_may_begin_below_zero(monkeypatch):
    monkeypatch.setitem(QUESTIONS, "mood", Question((-3, 3), 10, "How was it?", "bad", "good"))
    assert read_answer("mood", "-2.5") == -2.5 and question_text("mood") == "How was it? (-3: bad … 3: good)"
    with pytest.raises(UserError, match="a number from -3 to 3"):
        read_answer("mood", "-3.1")


@pytest.mark.parametrize("text", ["0", "10", "-1", "nan", "inf", "1e0", "", "good", "٣", "1 2", "9.0001"])
def test_what_is_no_answer_is_refused(text):
    with pytest.raises(UserError, match="end_affect: a number from 1 to 9 is expected, not '"):
        read_answer("end_affect", text)


def test_an_unknown_question_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="'height' is no question; the questions are you_are_funny, "):
        read_answer("height", "5")


def test_random_ids_are_ids():
    assert user_id(new_user_id()) != user_id(new_user_id())


@given(st.text(max_size=80))
def test_an_id_can_stand_in_every_file_and_is_no_policys(text):
    try:
        assert user_id(text) == text
    except argparse.ArgumentTypeError:
        return
    assert text.isprintable() and not re.search(r"[\s,;\"':/\\]", text) and not text.startswith(partner_id(""))
