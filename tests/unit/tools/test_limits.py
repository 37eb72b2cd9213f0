"""Intervals within the limits of a measure."""

import numpy as np
import pytest
from scipy import stats

from geli.statistics import interval
from tools.limits import CORRELATION, LIMITS, LOSS, SHARE, within
from tools.seeds import interval_over_seeds, t_interval


def test_a_correlations_interval_is_that_of_fishers_z():
    z = np.arctanh([0.2, 0.5, 0.8])
    low, high = np.tanh(stats.t.interval(0.95, 2, loc=z.mean(), scale=stats.sem(z)))
    assert within(CORRELATION, t_interval, [0.2, 0.5, 0.8]) == pytest.approx((0.5, low, high))
    assert t_interval([0.2, 0.5, 0.8]).high > 1 and within(None, t_interval, [1, 2, 3]) == t_interval([1, 2, 3])


def test_shares_and_losses_stay_where_they_can_be():
    shares, losses = within(SHARE, t_interval, [0.01, 0.05, 0.2]), within(LOSS, t_interval, [1, 2, 30.0])
    assert t_interval([0.01, 0.05, 0.2]).low < 0 < shares.low < shares.value < shares.high < 1
    assert t_interval([1, 2, 30.0]).low < 0 < losses.low < losses.value == 11 < losses.high
    assert within(SHARE, t_interval, [1.0, 1.0, 1.0]) == pytest.approx((1, 1, 1))


def test_an_interval_over_seeds_and_conversations():
    samples = np.array([0.7, 0.99])
    found = within(CORRELATION, interval_over_seeds, [0.7, 0.98], samples, 10)
    assert found.low < found.value == 0.84 < found.high < 1 < interval_over_seeds([0.7, 0.98], samples, 10).high
    assert within(CORRELATION, interval_over_seeds, [0.1], samples, 20) == interval(0.1, samples, 20)
    assert LIMITS["truth_correlation"] == CORRELATION and "delta_li" not in LIMITS
