"""95% intervals of what is measured with several seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from geli.statistics import TAIL, Estimate, interval


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of independent measurements, such as one a seed and corpus, with Student's t interval."""
    value = float(np.mean(values))
    if len(values) < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan)
    half = -stats.t.ppf(TAIL, len(values) - 1) * stats.sem(values)
    return Estimate(value, value - half, value + half)


def interval_over_seeds(values: Sequence[float], samples: np.ndarray, conversations: int) -> Estimate:
    """The interval of a mean over seeds, for other seeds and other conversations.

    The squared standard error is the variance between seeds over their number, plus the variance over resamples of the
    conversations. They are joined with the degrees of freedom of Welch and Satterthwaite. With one seed it is
    `geli.statistics.interval`, which is about that seed only.

    Args:
        values: (seeds,) measured on all conversations. samples: (repetitions,) means over the same seeds, measured on
            each resample.
    """
    value, seeds = float(np.mean(values)), len(values)
    if seeds == 1 or np.isnan(value):
        return interval(value, samples, conversations)
    parts = np.array([np.var(values, ddof=1) / seeds, np.nanvar(samples) * conversations / (conversations - 1)])
    error = parts.sum()
    if error == 0:
        return Estimate(value, value, value)
    freedom = error**2 / (parts**2 / [seeds - 1, conversations - 1]).sum()
    half = -stats.t.ppf(TAIL, freedom) * np.sqrt(error)
    return Estimate(value, value - half, value + half)
