"""Shares of wins, their intervals, significance, and agreement between raters.

A vote is 1 for the first response, 0 for no difference, -1 for the second, and NaN where there is none. Answers of
several raters to one prompt are not independent, so intervals and tests are over prompts.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from geli.statistics import Estimate, interval, resample

BOOTSTRAP = 10_000  # repetitions
VALUES = (1, 0, -1)
OUTCOMES = ("win", "tie", "loss")  # of the first response, for each of `VALUES`


def count_votes(votes: np.ndarray) -> np.ndarray:
    """(prompts, 3): how many raters gave each of `VALUES`. Args: votes: (raters, prompts)."""
    return np.stack([(votes == value).sum(0) for value in VALUES], axis=-1)


def shares(counts: np.ndarray, seed: int) -> list[Estimate]:
    """The share of each of `VALUES` with its 95% bootstrap interval over prompts; NaN if nobody voted. Args: counts:
    (prompts, 3)."""
    counts = counts[counts.sum(1) > 0]
    n = len(counts)
    if not n:
        return [Estimate(np.nan, np.nan, np.nan)] * len(VALUES)
    drawn = resample(n, BOOTSTRAP, seed) @ counts
    samples = drawn / drawn.sum(1, keepdims=True)
    measured = counts.sum(0) / counts.sum()
    return [interval(value, of_value, n) for value, of_value in zip(measured, samples.T, strict=True)]


def sign_test(counts: np.ndarray) -> float:
    """The p-value of a two-sided sign test over prompts. A prompt's sign is that of the majority of its raters, and
    prompts without a majority do not count. Args: counts: (prompts, 3)."""
    signs = np.sign(counts[:, 0] - counts[:, 2])
    decided = int((signs != 0).sum())
    return float(binomtest(int((signs > 0).sum()), decided).pvalue) if decided else 1.0


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number (Holm, 1979)."""
    p, order = np.asarray(p_values, float), np.argsort(p_values)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def alpha(counts: np.ndarray) -> float:
    """Krippendorff's alpha for nominal values: 1 is perfect agreement, 0 is agreement by chance.

    NaN if no unit has two values, or all values are the same, in which case there is nothing to disagree about.

    Args:
        counts: (units, values) how many raters gave each value. Raters may have missed units.
    """
    paired = counts[counts.sum(1) >= 2]
    of_unit, of_value, n = paired.sum(1), paired.sum(0), paired.sum()
    expected = n**2 - (of_value**2).sum()
    if expected == 0:
        return float("nan")
    observed = ((of_unit**2 - (paired**2).sum(1)) / (of_unit - 1)).sum()
    return float(1 - (n - 1) * observed / expected)


def score(votes: np.ndarray, criteria: Sequence[str], seed: int) -> list[dict]:
    """A row of results for each criterion, and none where nobody voted. Args: votes: (raters, prompts, criteria)."""
    counts = [count_votes(votes[..., place]) for place in range(len(criteria))]
    rows = []
    tests = [sign_test(count) for count in counts]
    for name, count, p, corrected in zip(criteria, counts, tests, holm(tests), strict=True):
        row = {"criterion": name, "votes": int(count.sum())}
        for outcome, (share, low, high) in zip(OUTCOMES, shares(count, seed), strict=True):
            row |= {outcome: share, f"{outcome}_low": low, f"{outcome}_high": high}
        rows.append({**row, "p": p, "p_holm": float(corrected), "alpha": alpha(count)})
    return rows


def for_print(rows: Sequence[dict]) -> list[dict]:
    """The rows with each share and its interval in one cell, and `None` for what is undefined."""
    shown = []
    for row in rows:
        cells = {}
        for name, value in row.items():
            if value != value:  # NaN
                value = None
            elif name in OUTCOMES:
                value = f"{value:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
            if not name.endswith(("_low", "_high")):
                cells[name] = value
        shown.append(cells)
    return shown
