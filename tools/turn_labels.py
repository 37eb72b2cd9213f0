"""Turn rewards against people's judgements of single turns, which no training has seen."""

from pathlib import Path

import numpy as np
import pandas as pd

from data_utils import Trajectory
from geli.data.chats import ChatFiles, chat_files
from geli.report.metrics import Column, Metric, roc_auc, spearman
from geli.run.errors import UserError

Labels = dict[tuple[str, str], float]  # (conversation id, turn id) -> label

LABEL_COLUMNS = {
    "label_correlation": Column("ρ labels", "rank correlation of turn reward and label"),
    "label_within": Column("within", "the same within conversations"),
    "label_given_place": Column("given place", "the same within conversations, given the turn's place"),
    "label_auc": Column("AUC labels", "area under the ROC curve: highest label against lowest"),
}


def read_labels(path: Path) -> Labels:
    """The labels in a CSV file with `conversation_id`, `turn_id` and `label`, or the `turn_rating`s of chats.

    Raises:
        UserError: if it is neither.
    """
    if path.suffix != ".csv":
        chats = ChatFiles(chat_files(path), rated=False).chats()
        found = [(chat.id, turn.turn_id, turn.rating) for _, chat in chats if not isinstance(chat, str)
                 for turn in chat.turns if turn.rating is not None]  # fmt: skip
    else:
        columns = {"conversation_id": str, "turn_id": str, "label": float}
        try:
            found = pd.read_csv(path, usecols=list(columns), dtype=columns)[list(columns)].dropna().to_numpy().tolist()
        except (OSError, ValueError) as error:
            raise UserError(f"--turn_labels {path}: expected a CSV file with {', '.join(columns)}: {error}") from None
    if not found:
        raise UserError(f"--turn_labels {path}: expected labels of turns, found none")
    return {(conversation, turn): label for conversation, turn, label in found}


def labels_of(trajectories: list[Trajectory], labels: Labels | None) -> np.ndarray:
    """(N,) labels of the agent turns of these trajectories, NaN where there is none.

    Args:
        labels: None: the `turn_rating`s of the chats.
    """
    turns = [(t.conversation.id, t.conversation.turns[i]) for t in trajectories for i in t.agent_turns]
    found = [turn.rating if labels is None else labels.get((name, turn.turn_id)) for name, turn in turns]
    return np.array([np.nan if label is None else label for label in found], dtype=np.float64)


def centred(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Values (k,) less the mean of their conversation `of` (k,); rounded, so that equal values stay equal."""
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
    """The metrics in `LABEL_COLUMNS` of the rewards (k,) of turns, as `geli.report.metrics` has them.

    Args:
        labels: (k,) of people, NaN where there is none. places: (k,) of the turns in their conversations. of: (k,)
            conversation of each, as an index into the weights of a `Metric`.

    Returns:
        `label_correlation`: Spearman's over all turns with a label; `label_within`: `within`; `label_given_place`:
        `partial_within`; `label_auc`: how often a turn with the highest label has more reward than one with the lowest.
    """
    rewards, labels, places, of = (values[~np.isnan(labels)] for values in (rewards, labels, places, of))
    ends = (labels == labels.min(initial=np.inf)) | (labels == labels.max(initial=-np.inf))
    return {
        "label_correlation": spearman(rewards, labels, of),
        "label_within": within(rewards, labels, of),
        "label_given_place": partial_within(rewards, labels, places, of),
        "label_auc": roc_auc(labels[ends] == labels.max(initial=-np.inf), rewards[ends], of[ends]),
    }
