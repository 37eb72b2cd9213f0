"""95% intervals of what is measured on conversations, with one seed or several.

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
    `interval`, which is about that seed only.

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
