"""Shares, intervals, tests and agreement: by hand and from the literature, then properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.judge.scoring import alpha, count_votes, for_print, holm, score, shares, sign_test

NAN = np.nan
WIN, TIE, LOSS = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def test_votes_are_counted_by_hand():
    votes = np.array([[1, 0, NAN], [1, -1, NAN], [-1, -1, NAN]])  # three raters of three prompts
    assert count_votes(votes).tolist() == [[2, 0, 1], [0, 1, 2], [0, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_an_interval_of_two_prompts_by_hand():
    found = shares(np.array([WIN, LOSS]), seed=0)  # of resamples a quarter are all wins, a quarter all losses
    assert found == [(0.5, 0, 1), (0, 0, 0), (0.5, 0, 1)]


def test_prompts_without_votes_do_not_count():
    with_empty = np.array([WIN, WIN, LOSS, [0, 0, 0]])
    assert shares(with_empty, seed=0) == shares(with_empty[:3], seed=0)
    assert np.isnan(shares(with_empty[3:], seed=0)).all()


def test_raters_who_always_agree_are_worth_no_more_than_one():
    counts = np.array([WIN] * 12 + [TIE] * 5 + [LOSS] * 8)
    assert shares(3 * counts, seed=1) == shares(counts, seed=1)


def test_an_interval_is_that_of_a_normal_distribution_for_many_prompts():
    share, low, high = shares(np.array([WIN] * 240 + [LOSS] * 160), seed=0)[0]
    half = 1.96 * np.sqrt(0.6 * 0.4 / 400)
    assert share == 0.6 and (low, high) == (pytest.approx(0.6 - half, abs=0.004), pytest.approx(0.6 + half, abs=0.004))


# ---------------------------------------------------------------------------------------------------------------------
# Tests


def test_sign_tests_by_hand():
    assert sign_test(np.array([WIN] * 9 + [LOSS])) == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(np.array([WIN] * 9 + [LOSS] + [TIE] * 50)) == pytest.approx(22 / 1024)  # ties do not count
    assert sign_test(np.array([[2, 0, 1]] * 5)) == pytest.approx(2 / 2**5)  # a prompt has one sign: its majority's
    assert sign_test(np.array([[1, 1, 1], [0, 0, 0], TIE])) == 1  # nothing is decided


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferronis(p_values):
    p, corrected = np.array(p_values), holm(p_values)
    assert (corrected >= p).all() and (corrected <= np.minimum(1, len(p) * p)).all()
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def counts_of(raters: list[str]) -> np.ndarray:
    """Counts of the values 1 to 5 from a line a rater, with a dot for what is missing."""
    return np.array([[unit.count(value) for value in "12345"] for unit in zip(*raters, strict=True)])


def test_alpha_of_krippendorffs_example_with_missing_values():
    """Computing Krippendorff's Alpha-Reliability (2011), example C: 4 observers, 12 units, nominal."""
    raters = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    assert alpha(counts_of(raters)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_the_encyclopedias_example_with_missing_values():
    """Wikipedia, Krippendorff's alpha: 3 coders, 15 units, nominal."""
    raters = [".....34121133.3", "1.213343.......", "..21344.21133.4"]
    assert alpha(counts_of(raters)) == pytest.approx(0.691, abs=5e-4)


def test_alpha_at_its_ends():
    assert alpha(counts_of(["1212", "1212"])) == 1
    assert alpha(counts_of(["12", "21"])) == pytest.approx(-0.5)  # observed 1, expected 2/3
    assert np.isnan(alpha(counts_of(["1111", "1111"])))  # no value but one: nothing to disagree about
    assert np.isnan(alpha(counts_of(["12", ".."])))
    chance = np.random.default_rng(0).choice([1, 0, -1], size=(2, 20_000))
    assert abs(alpha(count_votes(chance))) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# All together


def test_a_rows_cells_belong_together():
    rng = np.random.default_rng(0)
    votes = np.stack([rng.choice([1, 0, -1], size=(3, 40), p=[p, 0.2, 0.8 - p]) for p in (0.8, 0.4)], axis=-1)
    clear, even = score(votes.astype(float), ["clear", "even"], seed=0)
    for row in (clear, even):
        assert row["win"] + row["tie"] + row["loss"] == pytest.approx(1)
        assert row["win_low"] < row["win"] < row["win_high"] and row["p"] <= row["p_holm"] and row["votes"] == 120
    assert clear["p_holm"] < 1e-6 and even["p_holm"] > 0.05
    assert clear["win"] > even["win"] and clear["loss"] < even["loss"]


def test_exchanging_the_policies_exchanges_wins_and_losses():
    votes = np.random.default_rng(1).choice([1, 0, -1], size=(2, 30, 8)).astype(float)
    for row, other in zip(score(votes, "abcdefgh", 0), score(-votes, "abcdefgh", 0), strict=True):
        assert (row["win"], row["p"], row["alpha"]) == pytest.approx((other["loss"], other["p"], other["alpha"]))
        assert row["win_high"] == pytest.approx(other["loss_high"])


def test_intervals_narrow_with_the_number_of_prompts():
    widths = []
    for size in (10, 40, 160, 640):
        _, low, high = shares(np.array([WIN, LOSS] * (size // 2)), seed=0)[0]
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_the_printed_table_joins_shares_and_intervals():
    shown = for_print(score(np.full((1, 3, 1), NAN), ["silent"], seed=0) + score(np.ones((1, 3, 1)), ["won"], seed=0))
    assert list(shown[0]) == ["criterion", "votes", "win", "tie", "loss", "p", "p_holm", "alpha"]
    assert shown[1]["win"] == "1.000 [1.000, 1.000]" and shown[1]["alpha"] is None and shown[0]["win"] is None
