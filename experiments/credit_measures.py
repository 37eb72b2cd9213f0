"""Turn rewards against people's labels of single turns, as metrics of how often each conversation counts
(`geli.report.metrics`)."""

import numpy as np

from geli.report.metrics import Metric, roc_auc, spearman


def centred(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Values (k,) less the mean of their conversation; rounded, so that equal values stay equal."""
    means = np.bincount(of, values) / np.maximum(np.bincount(of), 1)
    return np.round(values - means[of], 9)


def within(rewards: np.ndarray, labels: np.ndarray, of: np.ndarray) -> Metric:
    """Spearman's rank correlation within conversations: of rewards (k,) and labels (k,), each less the mean of its
    conversation `of` (k,)."""
    return spearman(centred(rewards, of), centred(labels, of), of)


def partial_within(rewards: np.ndarray, labels: np.ndarray, places: np.ndarray, of: np.ndarray) -> Metric:
    """`within` given the turn's place (k,): the partial rank correlation, which is about the turn itself, since people
    label later turns lower and a reward may fall along a conversation. NaN where the place says all."""
    pairs = (within(rewards, labels, of), within(rewards, places, of), within(labels, places, of))

    def measured(weights: np.ndarray) -> np.ndarray:
        both, of_rewards, of_labels = (pair(weights) for pair in pairs)
        left = (1 - of_rewards**2) * (1 - of_labels**2)
        possible = left > 1e-9
        return np.where(possible, both - of_rewards * of_labels, np.nan) / np.sqrt(np.where(possible, left, 1))

    return measured


def label_metrics(rewards: np.ndarray, labels: np.ndarray, places: np.ndarray, of: np.ndarray) -> dict[str, Metric]:
    """What is measured of rewards (k,) of labelled turns.

    Args:
        labels: (k,) of people. places: (k,) of the turns in their conversations. of: (k,) conversation of each.

    Returns:
        `over_all`: the rank correlation over all turns; `within`; `given_place`: `partial_within`; `label_auc`: how
        often a turn with the highest label has more reward than one with the lowest.
    """
    ends = (labels == labels.min()) | (labels == labels.max())
    return {
        "over_all": spearman(rewards, labels, of),
        "within": within(rewards, labels, of),
        "given_place": partial_within(rewards, labels, places, of),
        "label_auc": roc_auc(labels[ends] == labels.max(), rewards[ends], of[ends]),
    }
