"""Rewards against labels of single turns."""

import numpy as np
import pytest
from scipy import stats

from experiments.credit_measures import centred, label_metrics, partial_within, within

ONES = np.ones((1, 2))
OF = np.array([0, 0, 0, 1, 1, 1])  # two conversations of three turns
PLACES = np.array([0, 1, 2, 0, 1, 2])


def test_a_small_case_by_hand():
    # The labels fall along both conversations; the second one's are higher as a whole, and so are its rewards.
    labels = np.array([1.0, 1, 0, 2, 2, 1])
    rewards = np.array([2.0, 3, 1, 12, 13, 11])
    found = {name: metric(ONES)[0] for name, metric in label_metrics(rewards, labels, PLACES, OF).items()}
    # within: rewards 0, 1, -1 and labels 1/3, 1/3, -2/3, twice; ranks 3.5, 5.5, 1.5 and 4.5, 4.5, 1.5
    assert found["within"] == pytest.approx(3 / np.sqrt(12))
    # place: ranks 1.5, 3.5, 5.5; with rewards -0.5, with labels -3/sqrt(12); partial (0.866 - 0.433) / (0.866 * 0.5)
    assert found["given_place"] == pytest.approx(1)
    assert found["label_auc"] == 1  # 12 and 13 against 1
    assert found["over_all"] == pytest.approx(stats.spearmanr(rewards, labels).statistic)


def test_what_is_of_the_whole_conversation_or_of_the_place_is_no_credit():
    rng = np.random.default_rng(0)
    of, places = np.repeat(np.arange(50), 8), np.tile(np.arange(8), 50)
    labels, weights = rng.normal(size=400) - places, np.ones((1, 50))
    falls = 100 * rng.normal(size=50)[of] - places + 0.01 * rng.normal(size=400)
    assert within(falls, labels, of)(weights)[0] > 0.8
    assert abs(partial_within(falls, labels, places, of)(weights)[0]) < 0.15
    assert np.isnan(partial_within(-2.0 * places, labels, places, of)(weights)[0])
    assert np.isnan(within(np.repeat(rng.normal(size=50), 8), labels, of)(weights)[0])


def test_the_partial_correlation_is_that_of_the_residuals_of_ranks():
    rng = np.random.default_rng(1)
    of, places = np.repeat(np.arange(30), 6), np.tile(np.arange(6.0), 30)
    labels = rng.integers(3, size=180).astype(float)
    rewards = labels + rng.normal(size=180) + places
    x, y, z = (stats.rankdata(centred(values, of)) for values in (rewards, labels, places))
    left = [values - np.polyval(np.polyfit(z, values, 1), z) for values in (x, y)]
    expected = np.corrcoef(*left)[0, 1]
    assert partial_within(rewards, labels, places, of)(np.ones((1, 30)))[0] == pytest.approx(expected)
