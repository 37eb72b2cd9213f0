"""Metrics of turn rewards as functions of how often each conversation counts.

Weights (B, C) are how often each of C conversations is drawn in each of B bootstrap resamples (`geli.statistics`);
ones give the metric itself. A metric returns (B,), NaN where it is undefined. Turns are sorted once for all resamples,
which is why scikit-learn and scipy, with which the tests compare, are not used here.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_utils import NO_FACE, TurnSet
from geli.data.candor import HAPPINESS
from geli.run.distributed import available_cores
from geli.statistics import Estimate, interval, resample

Metric = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class HeldOut:
    """What rewards are measured against.

    Attributes:
        conversations: C. of_turn: (N,) the conversation of each turn. of_trajectory: (n,) that of each trajectory.
        happy, others: (N,) bool, whether the listener was happy, and whether not; both are False without faces.
        scores: (n,) R in points.
        targets: (N,) of the LI loss, NaN where they are not known; None: not measured against.
    """

    conversations: int
    of_turn: np.ndarray
    of_trajectory: np.ndarray
    happy: np.ndarray
    others: np.ndarray
    scores: np.ndarray
    targets: np.ndarray | None = None

    @classmethod
    def from_turns(cls, turns: TurnSet):
        """What the turns of some trajectories are measured against."""
        places: dict[str, int] = {}
        of_trajectory = np.array([places.setdefault(t.conversation.id, len(places)) for t in turns.trajectories])
        of_turn = np.repeat(of_trajectory, np.diff(turns.offsets))
        happy = turns.affects == HAPPINESS
        others = ~happy & (turns.affects != NO_FACE)
        return cls(len(places), of_turn, of_trajectory, happy, others, turns.scores, turns.targets)


def metrics(
    data: HeldOut, rewards: np.ndarray, returns: np.ndarray, baseline: float, target: float | None = None
) -> dict[str, Metric]:
    """The metrics of predicted rewards, by name.

    Args:
        rewards: (N,). returns: (n,) that they predict, in points. baseline: a constant prediction of R in points, the
            mean score of the training conversations. target: a constant prediction of LI's targets; None: those of
            the turns are not used.

    Returns:
        `ge_loss`: mean of (R - return)², points². `ge_share`: as a share of the baseline's. `delta_li`: mean reward of
        turns with a happy listener less that of the others (the paper's Δr_LI). `roc_auc`, `average_precision`: of
        happy listeners. `return_correlation`: Spearman's, of returns and R. With a `target`, `li_share`: mean of
        (r - f)² as a share of the constant's, and `target_correlation`: Spearman's, of turn rewards and targets.
    """
    rewards, returns = np.asarray(rewards, dtype=np.float64), np.asarray(returns, dtype=np.float64)
    errors, constant = (_Sums(data, (data.scores - value) ** 2, data.of_trajectory) for value in (returns, baseline))
    happy, others = (_Sums(data, rewards, data.of_turn, chosen) for chosen in (data.happy, data.others))
    seen = data.happy | data.others
    judged = data.happy[seen], rewards[seen], data.of_turn[seen]
    found = {
        "ge_loss": errors.mean,
        "ge_share": lambda weights: _divide(errors.mean(weights), constant.mean(weights)),
        "delta_li": lambda weights: happy.mean(weights) - others.mean(weights),
        "roc_auc": roc_auc(*judged),
        "average_precision": average_precision(*judged),
        "return_correlation": spearman(returns, data.scores, data.of_trajectory),
    }
    if target is not None:
        known = ~np.isnan(data.targets)
        follows, fixed = (
            _Sums(data, np.where(known, (data.targets - value) ** 2, 0.0), data.of_turn, known)
            for value in (rewards, target)
        )
        found["li_share"] = lambda weights: _divide(follows.mean(weights), fixed.mean(weights))
        found["target_correlation"] = spearman(rewards[known], data.targets[known], data.of_turn[known])
    return found


def estimates(
    data: HeldOut, measured: dict[str, Metric], repetitions: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """The metrics of one head with their intervals."""
    weights, everything = resample(data.conversations, repetitions, seed), np.ones((1, data.conversations))
    return {
        name: interval(metric(everything)[0], metric(weights), data.conversations) for name, metric in measured.items()
    }


class _Sums:
    """The mean of values (k,) that belong to conversations `of` (k,); only the `chosen` (k,) count."""

    def __init__(self, data: HeldOut, values: np.ndarray, of: np.ndarray, chosen: np.ndarray | None = None):
        counts = np.ones(len(of)) if chosen is None else chosen.astype(np.float64)
        self.sums = np.bincount(of, values * counts, data.conversations)
        self.counts = np.bincount(of, counts, data.conversations)

    def mean(self, weights: np.ndarray) -> np.ndarray:
        return _divide(weights @ self.sums, weights @ self.counts)


def roc_auc(positive: np.ndarray, values: np.ndarray, of: np.ndarray) -> Metric:
    """The area under the ROC curve: how often a positive's value (k,) is above a negative's; ties count half."""
    ranked = _Ranked(values, of)
    positive = positive[ranked.order]

    def measure(weights: np.ndarray) -> float:
        drawn = weights[ranked.of]
        positives = drawn * positive
        negatives = ranked.groups(drawn - positives)
        positives = ranked.groups(positives)
        below = negatives.cumsum() - negatives / 2
        return _ratio(positives @ below, positives.sum() * negatives.sum())

    return _for_each(measure)


def average_precision(positive: np.ndarray, values: np.ndarray, of: np.ndarray) -> Metric:
    """The mean, over positives, of the precision among the values (k,) that are not below theirs."""
    ranked = _Ranked(-values, of)
    positive = positive[ranked.order]

    def measure(weights: np.ndarray) -> float:
        drawn = weights[ranked.of]
        positives, everything = ranked.groups(drawn * positive), ranked.groups(drawn)
        found, seen = positives.cumsum(), everything.cumsum()
        counted = np.flatnonzero(positives)
        return _ratio(positives[counted] @ (found[counted] / seen[counted]), positives.sum())

    return _for_each(measure)


def spearman(a: np.ndarray, b: np.ndarray, of: np.ndarray) -> Metric:
    """Spearman's rank correlation of two quantities (k,): Pearson's of their ranks, ties at their mean rank."""
    order = np.argsort(a, kind="stable")  # the ranks of `a` are then in memory's order
    first, second = _Ranked(a[order], of[order]), _Ranked(b[order], of[order])

    def measure(weights: np.ndarray) -> float:
        drawn = weights[of[order]]
        x, y = (part.ranks(weights) - (drawn.sum() + 1) / 2 for part in (first, second))
        weighted = drawn * x
        return _ratio(weighted @ y, np.sqrt((weighted @ x) * ((drawn * y) @ y)))

    return _for_each(measure)


class _Ranked:
    """Values (k,) in ascending order, in groups of equal ones.

    Attributes:
        order: (k,) indices that sort the values. of: (k,) their conversations in that order.
    """

    def __init__(self, values: np.ndarray, of: np.ndarray):
        self.order = np.argsort(values, kind="stable")
        self.of = of[self.order]
        ascending = values[self.order]
        new = np.concatenate([[True], ascending[1:] != ascending[:-1]])[: len(values)]  # there may be no values
        self.starts = np.flatnonzero(new)
        self.group = np.empty(len(values), dtype=int)  # of each value, in the original order
        self.group[self.order] = new.cumsum() - 1

    def groups(self, ordered: np.ndarray) -> np.ndarray:
        """(groups,) sums over groups of (k,) in ascending order."""
        return ordered if len(self.starts) == len(ordered) else np.add.reduceat(ordered, self.starts)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """(k,) mean ranks in the original order, from 1, for weights (C,)."""
        sizes = self.groups(weights[self.of])
        return (sizes.cumsum() - (sizes - 1) / 2)[self.group]


def _for_each(measure: Callable[[np.ndarray], float]) -> Metric:
    """`measure` of weights (C,) as a metric of weights (B, C). NumPy lets go of the interpreter, so threads help."""

    def measured(weights: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(available_cores()) as pool:
            return np.fromiter(pool.map(measure, weights.astype(np.float64)), dtype=np.float64)

    return measured


def _ratio(a: float, b: float) -> float:
    """a / b, NaN if b is 0."""
    return a / b if b else np.nan


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b != 0)


# ---------------------------------------------------------------------------------------------------------------------
# How metrics are shown


class Column(NamedTuple):
    """How a metric is shown: name, what it is, decimals."""

    name: str
    meaning: str
    decimals: int = 3


COLUMNS = {
    "ge_loss": Column("L_GE", "L_GE: squared error of the predicted return, points²", 1),
    "ge_share": Column("of mean's", "L_GE as a share of the mean baseline's"),
    "li_share": Column("LI of mean's", "L_LI as a share of the mean target's"),
    "delta_li": Column("Δr_LI", "Δr_LI: reward of turns with a happy listener less that of the others"),
    "roc_auc": Column("ROC AUC", "area under the ROC curve: happy listeners by reward"),
    "average_precision": Column("AP", "average precision: happy listeners by reward"),
    "return_correlation": Column("ρ return", "rank correlation of predicted return and score"),
    "target_correlation": Column("ρ target", "rank correlation of turn reward and LI target"),
}


def cell(estimate: Estimate | None, decimals: int) -> str:
    """`value [low, high]`, or `-` where it is undefined."""
    if estimate is None or np.isnan(estimate.value):
        return "-"
    value, low, high = (f"{number:.{decimals}f}" for number in estimate)
    return value if np.isnan(estimate.low) or low == high else f"{value} [{low}, {high}]"
