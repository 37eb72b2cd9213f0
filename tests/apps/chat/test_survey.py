"""Questions, answers and ids."""

import argparse
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.chat.survey import (
    QUESTIONS,
    answer_range,
    new_user_id,
    partner_id,
    question_text,
    read_answer,
    user_id,
)
from geli.data.candor import ANSWER_LIMITS, REWARD_CLASSES
from geli.run.errors import UserError


def test_every_question_has_words_and_a_range_that_readers_accept():
    assert list(QUESTIONS) == list(REWARD_CLASSES)
    for question, points in REWARD_CLASSES.items():
        (low, high), limits = answer_range(question), ANSWER_LIMITS[points]
        assert limits[0] <= low < high <= limits[1]
        assert f"({low}: " in question_text(question) and f"… {high}: " in question_text(question)


def test_ranges_by_hand():
    assert answer_range("overall_affect") == (1, 9) and answer_range("conversationalist") == (0, 100)
    assert question_text("i_like_you") == "How much did you like your partner? (1: not at all … 9: very much)"


@pytest.mark.parametrize(("question", "text", "answer"), [
    ("end_affect", "1", 1), ("end_affect", " 9 ", 9), ("end_affect", "6.5", 6.5), ("good_for_advice", "0", 0),
])  # fmt: skip
def test_answers_are_read(question, text, answer):
    assert read_answer(question, text) == answer


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
