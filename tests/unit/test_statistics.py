"""Intervals: cases by hand, then how often they cover a known effect."""

import numpy as np
import pytest
from scipy import stats

from geli.statistics import Estimate, interval, interval_over_seeds, mean_interval, resample, t_interval


def test_a_resample_draws_as_many_conversations_as_there_are():
    weights = resample(7, 50)
    assert weights.shape == (50, 7) and (weights.sum(axis=1) == 7).all()
    assert (weights == resample(7, 50)).all() and (weights != resample(7, 50, seed=1)).any()
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.5)


def test_an_interval_by_hand():
    # two conversations: t of one degree of freedom puts the quantile at the smallest and the largest sample
    found = interval(0.5, np.arange(101) / 100, 2)
    assert found == pytest.approx((0.5, 0.0, 1.0))
    # many conversations: quantiles 2.5% and 97.5%
    assert interval(0.5, np.arange(100_001) / 100_000, 10**6) == pytest.approx((0.5, 0.025, 0.975), abs=1e-4)


def test_an_interval_over_seeds_by_hand():
    # variance between seeds 1/3, none over conversations: the t interval of three numbers
    low, high = stats.t.interval(0.95, 2, loc=2, scale=1 / np.sqrt(3))
    assert interval_over_seeds([1, 2, 3], np.full(9, 2.0), 50) == pytest.approx((2, low, high))
    # no variance between seeds: the t interval over conversations
    samples = np.array([1.0, 3.0])  # variance 1, times 10/9 for ten conversations
    low, high = stats.t.interval(0.95, 9, loc=2, scale=np.sqrt(10 / 9))
    assert interval_over_seeds([2, 2], samples, 10) == pytest.approx((2, low, high))


def test_a_mean_interval_resamples_clusters():
    # cluster a has the mean 0 and cluster b 1; a resample has both (5 values: mean 0.4), or one of them twice
    found = mean_interval([0, 0, 0, 1, 1], ["a", "a", "a", "b", "b"])
    assert found == pytest.approx((0.4, 0, 1))


def test_a_t_interval_by_hand():
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)))
    assert np.isnan(t_interval([1.0]).low) and t_interval([1.0]).value == 1


def test_an_interval_over_one_seed_is_that_of_its_conversations():
    samples = np.random.default_rng(0).normal(size=500)
    assert interval_over_seeds([0.1], samples, 20) == interval(0.1, samples, 20)


def test_what_is_undefined_has_no_interval():
    assert str(interval(float("nan"), np.zeros(3), 5)) == "-"
    assert np.isnan(interval(1.0, np.zeros(3), 1).low)  # one conversation
    assert interval_over_seeds([1, 1], np.ones(3), 5) == Estimate(1, 1, 1)
    skipped = interval(1.0, np.array([0.0, np.nan, 2.0]), 10**6)
    assert skipped.low == pytest.approx(0.05, abs=1e-3) and skipped.high == pytest.approx(1.95, abs=1e-3)
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


REPETITIONS = 500


@pytest.mark.parametrize("conversations", [20, 100])
def test_intervals_cover_a_known_effect(conversations):
    """Turn rewards of happy listeners are higher by 0.3, and every conversation has an offset of its own."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(REPETITIONS):
        offsets = rng.normal(size=(conversations, 1))
        happy = rng.normal(0.3, 1, (conversations, 4)) + offsets + rng.normal(size=(conversations, 1))
        others = rng.normal(0, 1, (conversations, 4)) + offsets
        effects = (happy - others).mean(axis=1)
        samples = resample(conversations, 1000, seed) @ effects / conversations
        found = interval(effects.mean(), samples, conversations)
        covered += found.low <= 0.3 <= found.high
    assert 0.93 <= covered / REPETITIONS <= 0.97


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
