"""Intervals that stay within what a measure can be."""

from collections.abc import Callable, Sequence

import numpy as np

from geli.statistics import Estimate

Limits = tuple[float, float]
LOSS, SHARE, CORRELATION = (0.0, np.inf), (0.0, 1.0), (-1.0, 1.0)
LIMITS = {  # metric of geli.report.metrics -> its limits; a difference of rewards has none
    **dict.fromkeys(("ge_loss", "ge_share", "li_share"), LOSS),
    **dict.fromkeys(("roc_auc", "average_precision", "label_auc"), SHARE),
    **dict.fromkeys(("return_correlation", "target_correlation", "truth_correlation"), CORRELATION),
    **dict.fromkeys(("label_correlation", "label_within", "label_given_place"), CORRELATION),
}


def within(limits: Limits | None, interval: Callable[..., Estimate], values: Sequence[float], *more) -> Estimate:
    """The mean of several values, with the interval that `interval` gives where errors are symmetric: on the scale of
    Fisher's z (correlations), of half the logit (shares), of the logarithm (losses).

    Args:
        limits: of the measure; None: the scale of the values. more: arguments of `interval`; arrays are of the measure.
    """
    if limits is None or len(values) < 2:
        return interval(values, *more)
    moved = (to_line(part, limits) if isinstance(part, np.ndarray) else part for part in more)
    _, *ends = interval(to_line(values, limits), *moved)
    return Estimate(float(np.mean(values)), *(from_line(end, limits) for end in ends))


def to_line(values: Sequence[float], limits: Limits) -> np.ndarray:
    """Values within limits on the whole line."""
    (low, high), values = limits, np.asarray(values, dtype=np.float64)
    if np.isinf(high):
        return np.log(np.maximum(values - low, 1e-12))
    return np.arctanh(np.clip((2 * values - low - high) / (high - low), -1 + 1e-9, 1 - 1e-9))


def from_line(value: float, limits: Limits) -> float:
    """The inverse of `to_line`."""
    low, high = limits
    return float(low + (np.exp(value) if np.isinf(high) else (high - low) * (1 + np.tanh(value)) / 2))
