"""Turn rewards against people's judgements of single turns, which no training has seen."""

from collections.abc import Mapping
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


def label_metrics(
    labels: np.ndarray, rewards: np.ndarray, trajectories: list[Trajectory], conversation: np.ndarray
) -> Mapping[str, Metric]:
    """The metrics of turn rewards by their names in `LABEL_COLUMNS`, of the turns that have a label.

    - `label_correlation`: Spearman's, over all turns. `label_auc`: how often a turn of the highest label has a higher
      reward than one of the lowest.
    - `label_within`: the correlation of ranks within trajectories, pooled: which of a conversation's turns are better.
    - `label_given_place`: its partial correlation, given the turn's place, because people may like later turns less,
      and a reward that only falls along a conversation then seems to know turns.

    Args:
        labels: (N,) NaN where there is none. rewards: (N,). trajectories: with N turns in all. conversation: (N,) of
            each turn, as an index into the weights of a `Metric`.
    """
    lengths = [len(t.agent_turns) for t in trajectories]
    known = ~np.isnan(labels)
    table = pd.DataFrame({
        "label": labels, "reward": np.asarray(rewards, dtype=np.float64),
        "place": np.concatenate([np.arange(n) for n in lengths]) if lengths else [],
    })[known]  # fmt: skip
    labels, rewards, of = table["label"].to_numpy(), table["reward"].to_numpy(), conversation[known]
    ranks = table.groupby(np.repeat(np.arange(len(lengths)), lengths)[known]).rank(pct=True)
    ranks -= ranks.groupby(np.repeat(np.arange(len(lengths)), lengths)[known]).transform("mean")
    extreme = (labels == labels.max(initial=-np.inf)) | (labels == labels.min(initial=np.inf))

    def correlation(a: str, b: str) -> Metric:
        products = [ranks[a] * ranks[b], ranks[a] ** 2, ranks[b] ** 2]

        def measure(weights: np.ndarray) -> np.ndarray:
            ab, aa, bb = (weights @ np.bincount(of, p, weights.shape[1]) for p in products)
            return np.divide(ab, np.sqrt(aa * bb), out=np.full(len(ab), np.nan), where=aa * bb > 1e-12)

        return measure

    within, of_reward, of_label = (correlation(*pair) for pair in (("label", "reward"), ("reward", "place"),
                                                                   ("label", "place")))  # fmt: skip

    def given_place(weights: np.ndarray) -> np.ndarray:
        r, x, y = within(weights), of_reward(weights), of_label(weights)
        rest = (1 - x**2) * (1 - y**2)
        return np.divide(r - x * y, np.sqrt(rest), out=np.full(len(r), np.nan), where=rest > 1e-12)

    return {
        "label_correlation": spearman(rewards, labels, of),
        "label_within": within,
        "label_given_place": given_place,
        "label_auc": roc_auc(labels[extreme] == labels.max(initial=-np.inf), rewards[extreme], of[extreme]),
    }
