"""Intervals over seeds: cases by hand, then how often they cover a known effect."""

import numpy as np
import pytest
from scipy import stats

from geli.statistics import Estimate, interval, resample
from tools.seeds import interval_over_seeds, t_interval

REPETITIONS = 500


def test_an_interval_over_seeds_by_hand():
    # variance between seeds 1/3, none over conversations: the t interval of three numbers
    low, high = stats.t.interval(0.95, 2, loc=2, scale=1 / np.sqrt(3))
    assert interval_over_seeds([1, 2, 3], np.full(9, 2.0), 50) == pytest.approx((2, low, high))
    # no variance between seeds: the t interval over conversations
    samples = np.array([1.0, 3.0])  # variance 1, times 10/9 for ten conversations
    low, high = stats.t.interval(0.95, 9, loc=2, scale=np.sqrt(10 / 9))
    assert interval_over_seeds([2, 2], samples, 10) == pytest.approx((2, low, high))


def test_a_t_interval_by_hand():
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)))
    assert np.isnan(t_interval([1.0]).low) and t_interval([1.0]).value == 1


def test_an_interval_over_one_seed_is_that_of_its_conversations():
    samples = np.random.default_rng(0).normal(size=500)
    assert interval_over_seeds([0.1], samples, 20) == interval(0.1, samples, 20)
    assert interval_over_seeds([1, 1], np.ones(3), 5) == Estimate(1, 1, 1)  # nothing differs


def test_intervals_over_seeds_cover_a_known_effect():
    """Five seeds that differ by 0.1, measured on the same 50 conversations that differ by 0.5."""
    rng, covered = np.random.default_rng(1), 0
    for seed in range(REPETITIONS):
        of_seed, of_conversation = rng.normal(0, 0.1, (5, 1)), rng.normal(0, 0.5, (1, 50))
        measured = 0.3 + of_seed + of_conversation + rng.normal(0, 0.2, (5, 50))
        samples = resample(50, 300, seed) @ measured.mean(axis=0) / 50
        found = interval_over_seeds(measured.mean(axis=1), samples, 50)
        covered += found.low <= 0.3 <= found.high
    assert 0.93 <= covered / REPETITIONS <= 0.97
