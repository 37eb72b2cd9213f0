"""Intervals: cases by hand, then how often they cover a known effect."""

import numpy as np
import pytest

from geli.statistics import Estimate, interval, mean_interval, resample


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


def test_a_mean_interval_resamples_clusters():
    # cluster a has the mean 0 and cluster b 1; a resample has both (5 values: mean 0.4), or one of them twice
    found = mean_interval([0, 0, 0, 1, 1], ["a", "a", "a", "b", "b"])
    assert found == pytest.approx((0.4, 0, 1))


def test_what_is_undefined_has_no_interval():
    assert str(interval(float("nan"), np.zeros(3), 5)) == "-"
    assert np.isnan(interval(1.0, np.zeros(3), 1).low)  # one conversation
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
