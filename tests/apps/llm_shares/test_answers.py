"""What is read from a model's replies, and how numbers become shares: first by hand, then in general."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.llm_shares.answers import merge_windows, read_reply, shares_of_numbers, summary

LINES = "1: 7\n2: 2.5\n3: 10"
OBJECT = json.dumps({"1": 7, "2": 2.5, "3": "10"})
NAN = np.nan


@pytest.mark.parametrize(
    "reply",
    [
        LINES,
        f"Sure! Here are the points:\n\n{LINES}\n\nI hope that helps with all 3 turns.",
        LINES.replace(": ", ", B: ").replace("\n", "\nTurn "),
        "**Turn 1:** 7/10 (friendly)\n- Turn 2, B: **2.5**\n- Turn 3: 10 points",
        "1. 7\n2) 2.5\n3 = 10",
        "| 1 | 7 |\n| 2 | 2.5 |\n| 3 | 10 |",
        f"```json\n{OBJECT}\n```",
        json.dumps({"points": json.loads(OBJECT), "why": "{"}),
        f"<think>1: 0\n2: 0\n3: 0</think>\n{LINES}",
        f"1: 0\n2: 0\n3: 0\nOn reflection:\n{LINES}",
    ],
)
def test_numbers_are_found_in_replies(reply):
    reading = read_reply(reply, 3)
    assert reading.numbers.tolist() == [7, 2.5, 10] and reading.problems == ()


@pytest.mark.parametrize(
    ("reply", "numbers", "problems"),
    [
        ("1: 7\n3: 10", [7, NAN, 10], ("missing turns",)),
        (f"{LINES}\n4: 5", [7, 2.5, 10], ("extra turns",)),
        ("1: 7\n2: -1\n3: 99", [7, -1, 99], ("out of range",)),
        ("1: 7\n2: good\n3: 10\n0: 1", [7, NAN, 10], ("missing turns", "extra turns")),
        ("All turns of B were equally good.", [NAN] * 3, ("no numbers",)),
        ("", [NAN] * 3, ("no numbers",)),
        ("1: A said 7\n2: 70%\n3: 1.2.3", [NAN] * 3, ("no numbers",)),
        ('{"1": true, "2": null, "3": NaN}', [NAN] * 3, ("no numbers",)),
        ("1.5", [NAN] * 3, ("no numbers",)),
        ("{" * 50 + '{"a": {"1": ', [NAN] * 3, ("no numbers",)),
    ],
)
def test_what_is_wrong_with_a_reply_is_named(reply, numbers, problems):
    reading = read_reply(reply, 3)
    assert np.array_equal(reading.numbers, numbers, equal_nan=True) and reading.problems == problems


@given(st.text(alphabet=st.sampled_from('1234:. \n-*{}"TurnB,/'), max_size=60), st.integers(1, 4))
def test_any_reply_gives_a_number_or_none_for_each_turn(reply, n):
    reading = read_reply(reply, n)
    assert reading.numbers.shape == (n,) and not np.isinf(reading.numbers).any()


def test_windows_are_merged_by_the_mean_of_what_both_say():
    parts = [(range(0, 3), np.array([1.0, NAN, 4.0])), (range(2, 5), np.array([8.0, 2.0, NAN]))]
    assert np.array_equal(merge_windows(5, parts), [1, NAN, 6, 2, NAN], equal_nan=True)
    one_knows = [(range(0, 2), np.array([1.0, NAN])), (range(1, 3), np.array([7.0, 3.0]))]
    assert merge_windows(3, one_knows).tolist() == [1, 7, 3]


def test_shares_of_four_turns_by_hand():
    # 2 and 12, which is cut to 10, and 3; the missing one gets their mean, 5. Their mean is 5, R is 7 of 10: all get
    # 2 more. In points, of 4 turns, a number of 4 is a share of 4 * 10 / 4.
    found = shares_of_numbers(np.array([2.0, 12.0, NAN, 3.0]), 70.0)
    assert found.shares.tolist() == [10, 30, 17.5, 12.5] and found.shares.sum() == 70
    assert found.statuses == ["answered", "clipped", "filled", "answered"] and found.shift == 2
    assert shares_of_numbers(np.array([7.0, 7.0]), 70.0).shift == 0
    assert shares_of_numbers(np.array([0.0, 0.0]), 70.0).shares.tolist() == [35, 35]  # no factor could do that


def test_with_fewer_numbers_than_half_of_the_turns_there_are_no_shares():
    assert shares_of_numbers(np.array([5.0, NAN, NAN]), 70.0) is None
    assert shares_of_numbers(np.array([5.0, NAN]), 70.0).shares.tolist() == [35, 35]


@given(st.lists(st.floats(-20, 20) | st.just(NAN), min_size=1, max_size=12), st.floats(-10, 110))
def test_shares_sum_to_the_score_and_keep_the_order_of_the_numbers(numbers, score):
    found = shares_of_numbers(np.array(numbers), score)
    if found is None:
        assert 2 * np.isnan(numbers).sum() > len(numbers)
        return
    assert found.shares.sum() == pytest.approx(score, abs=1e-6)
    known = [
        (min(max(number, 0), 10), share)
        for number, share in zip(numbers, found.shares, strict=True)
        if number == number
    ]
    assert all(a[1] <= b[1] + 1e-9 for a in known for b in known if a[0] <= b[0])


def test_the_summary_counts_turns_and_trajectories():
    every = [shares_of_numbers(np.array(numbers), 50.0) for numbers in ([5.0, NAN], [5.01, 5.0], [9.0, 11.0])]
    assert summary(every) == {
        "turns_answered": 4, "turns_clipped": 1, "turns_filled": 1, "trajectories_moved": 1,
        "mean_move": pytest.approx((0 + 0.005 + 4.5) / 3),
    }  # fmt: skip
