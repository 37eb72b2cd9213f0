"""95% intervals of what is measured on conversations.

Turns of one conversation are alike, so conversations are resampled, never turns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

TAIL = 0.025  # on each side of an interval


class Estimate(NamedTuple):
    """A measured value with its 95% interval; NaN where it is undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resample(conversations: int, repetitions: int, seed: int = 0) -> np.ndarray:
    """(repetitions, conversations) how often each conversation is drawn in each bootstrap resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(conversations, np.full(conversations, 1 / conversations), size=repetitions)


def interval(value: float, samples: np.ndarray, conversations: int) -> Estimate:
    """The expanded percentile interval (Hesterberg, The American Statistician 2015, section 4): quantiles of the
    bootstrap distribution, further out by what Student's t adds for few conversations.

    Args:
        value: measured on all conversations. samples: (repetitions,) measured on each resample of them; NaN, where a
            resample has nothing to measure, is left out.
    """
    if np.isnan(value) or conversations < 2 or np.isnan(samples).all():
        return Estimate(value, np.nan, np.nan)
    tail = stats.norm.cdf(np.sqrt(conversations / (conversations - 1)) * stats.t.ppf(TAIL, conversations - 1))
    low, high = np.nanquantile(samples, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))


def mean_interval(values: Sequence[float], clusters: Sequence, repetitions: int = 1000, seed: int = 0) -> Estimate:
    """The mean of values and its interval.

    Args:
        values: (k,). clusters: (k,) what each belongs to, such as its conversation, which is resampled.
    """
    values, (names, of) = np.asarray(values, dtype=np.float64), np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(of, values), np.bincount(of)
    weights = resample(len(names), repetitions, seed)
    return interval(float(values.mean()), (weights @ sums) / (weights @ counts), len(names))
