"""Measures saved reward heads and constant baselines on the same validation conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from accelerate import Accelerator

from data_utils import Corpus, DataOptions, Trajectory, TurnSet, read_corpus, split
from geli.heads import find_head, load_reward_head
from geli.nets.features import TurnFeatures
from geli.report.checks import conversations_seen, warn_of_leaks
from geli.report.metrics import HeldOut, Metric, metrics, spearman
from geli.reward import GELIReward
from geli.run.errors import UserError
from geli.statistics import resample
from models import RewardHead, head_rewards, predicted_returns
from tools.limits import LIMITS, within
from tools.seeds import interval_over_seeds
from tools.tables import TRUTH, Row
from tools.turn_labels import label_metrics, labels_of, read_labels


class Setting(NamedTuple):
    """Heads that were trained alike, from different seeds: one row of the table."""

    label: str
    paths: tuple[Path, ...]


def parse_settings(words: Sequence[str], output_dir: str) -> list[Setting]:
    """The settings that `[LABEL=]HEAD[,HEAD…]` name; a head is the path of a `reward1_` file or a run's name.

    Raises:
        UserError: if a head is not found, or a label names two settings.
    """
    settings = []
    for word in words:
        label, equals, names = word.rpartition("=")
        paths = tuple(find_head(name, output_dir) for name in names.split(","))
        settings.append(Setting(label if equals else paths[0].name.removeprefix("reward1_"), paths))
    labels = [setting.label for setting in settings]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: two rows of the table have this name; give others: LABEL=HEAD")
    return settings


def reward_class_of(paths: Sequence[Path], given: str | None) -> str:
    """The score that the heads were trained for; of published heads, which may not record it, the one that is `given`.

    Raises:
        UserError: if heads were trained for different scores.
    """
    learned = {str(path): load_reward_head(path).config.reward_class for path in paths}
    chosen = given or next(filter(None, learned.values()), "overall_affect")
    for path, name in learned.items():
        if name not in (None, chosen):
            raise UserError(f"{path}: was trained for {name}, others for {chosen}: measure them in two runs")
    return chosen


@dataclass(frozen=True)
class Evaluation:
    """The conversations that heads are measured on, and how.

    Attributes:
        corpus: as read. training, validation: its trajectories. truth: (conversation id, turn id) -> hidden reward;
            None where it is not known. labels: (N,) people's labels of the validation turns, NaN where there is none.
            repetitions, seed: of the bootstrap.
    """

    corpus: Corpus
    training: list[Trajectory]
    validation: list[Trajectory]
    truth: dict[tuple[str, str], float] | None
    labels: np.ndarray
    repetitions: int = 1000
    seed: int = 0

    @classmethod
    def of(
        cls, data: DataOptions, paths: Sequence[Path], *, cache: Path | None, val_all: bool, truth: Path | None,
        turn_labels: Path | None = None, **more
    ):  # fmt: skip
        """Reads the corpus; prints how much was read, and a warning if a head was trained on what it is measured on.

        Args:
            paths: of all heads. val_all: measure on all conversations that none of the heads was trained on.
            turn_labels: people's judgements of turns (`read_labels`); None: those in the chats, if any.
        """
        corpus = read_corpus(data.data_dir, data.reward_class, data.transcript, cache, rating_range=data.rating_range)
        print(corpus.describe())
        seen = frozenset().union(*(conversations_seen(path, load_reward_head(path).config) for path in paths))
        training, validation = split(corpus, data.train_size or len(corpus.conversations), seen if val_all else None)
        if not validation:
            raise UserError(f"--data_dir {data.data_dir}: no validation conversation has an answer to the score")
        warn_of_leaks(seen, validation)
        labels = labels_of(validation, turn_labels and read_labels(turn_labels))
        if turn_labels and np.isnan(labels).all():
            raise UserError(f"--turn_labels {turn_labels}: has no label of the {len(labels):,} validation turns")
        return cls(corpus, training, validation, truth and read_truth(truth), labels, **more)

    @property
    def training_scores(self) -> np.ndarray:
        """(n,) R of the training trajectories, of which the constant baselines are made."""
        scores = np.array([t.score for t in self.training])
        return scores if len(scores) else np.array([t.score for t in self.validation])


def read_truth(path: Path) -> dict[tuple[str, str], float]:
    """(conversation id, turn id) -> hidden reward, from a table with these columns.

    Raises:
        UserError: if it is not such a table.
    """
    columns = {"conversation_id": str, "turn_id": str, "reward": float}
    try:
        table = pd.read_csv(path, usecols=list(columns), dtype=columns)
    except (OSError, ValueError) as error:
        raise UserError(f"--truth {path}: expected a CSV file with {', '.join(columns)}: {error}") from None
    return dict(zip(zip(table["conversation_id"], table["turn_id"], strict=True), table["reward"], strict=True))


def truth_of(turns: TurnSet, truth: dict[tuple[str, str], float]) -> np.ndarray:
    """(N,) hidden rewards. Raises a `UserError` if one is missing."""
    keys = [(t.conversation.id, t.conversation.turns[i].turn_id) for t in turns.trajectories for i in t.agent_turns]
    if missing := sum(key not in truth for key in keys):
        raise UserError(f"--truth: has no hidden reward for {missing} of the {len(keys)} validation turns")
    return np.array([truth[key] for key in keys])


# ---------------------------------------------------------------------------------------------------------------------
# Rewards of heads


class Predictions(NamedTuple):
    """A head's rewards (N,) of the validation turns, and the returns (n,) in points that they predict."""

    rewards: np.ndarray
    returns: np.ndarray


class Scorer:
    """Rewards of saved heads for the same validation trajectories. Features of an encoder are computed once.

    Args:
        named: encoder of published heads, which record none.
    """

    def __init__(
        self, evaluation: Evaluation, accelerator: Accelerator, cache: Path | None, named: str | None = None,
        trust_remote_code: bool = False,
    ):  # fmt: skip
        self.evaluation, self.accelerator, self.cache, self.named = evaluation, accelerator, cache, named
        self.trust_remote_code = trust_remote_code
        self._turns: dict[int, TurnSet] = {}  # context turns -> turns
        self._features: dict[tuple, np.ndarray] = {}

    def turns(self, context_turns: int) -> TurnSet:
        """The validation turns with their texts."""
        if context_turns not in self._turns:
            self._turns[context_turns] = TurnSet.from_trajectories(self.evaluation.validation, context_turns)
        return self._turns[context_turns]

    def __call__(self, path: Path) -> Predictions:
        """The predictions of the head in a file."""
        head = load_reward_head(path)
        turns = self.turns(head.config.context_turns)
        rewards = head_rewards(head, self._encode(head, path, turns), turns)
        if not np.isfinite(rewards).all():
            raise UserError(f"{path}: gives rewards that are not finite: its training has diverged")
        return Predictions(rewards, predicted_returns(turns, rewards, head.config.ep_len))

    def _encode(self, head: RewardHead, path: Path, turns: TurnSet):
        config = head.config
        where = path.parent.resolve() if config.encoder_is_folder or config.encoder is None else None
        key = (config.encoder, where, config.max_length, config.context_turns)
        if key not in self._features:
            encoder = GELIReward.load(
                path, device=self.accelerator.device.type, lang_model_path=None if config.encoder else self.named,
                dtype="bfloat16" if self.accelerator.mixed_precision == "bf16" else "float32",
                max_length=config.max_length, trust_remote_code=self.trust_remote_code,
            ).encoder  # fmt: skip
            self._features[key] = TurnFeatures(encoder, self.accelerator, self.cache).held_out(turns.texts)
        return self._features[key]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def compare(evaluation: Evaluation, predictions: dict[str, list[Predictions]]) -> list[Row]:
    """The metrics of each setting and of the constant baselines, with intervals, and their differences from the first.

    Args:
        predictions: label of a setting -> predictions of its heads.
    """
    turns = TurnSet.from_trajectories(evaluation.validation, 1)
    data, truth = HeldOut.from_turns(turns), None
    if evaluation.truth is not None:
        truth = truth_of(turns, evaluation.truth)
    scores = evaluation.training_scores
    constants = {"mean": float(scores.mean()), "mode": float(pd.Series(scores).mode()[0])}
    for name, value in constants.items():
        zeros = np.zeros(len(turns))
        predictions = predictions | {name: [Predictions(zeros, np.full(len(turns.trajectories), value))]}
    places = np.concatenate([np.arange(len(t.agent_turns)) for t in turns.trajectories])
    weights = resample(data.conversations, evaluation.repetitions, evaluation.seed)
    rows, first = [], {}
    for label, heads in predictions.items():
        of_heads = [metrics(data, *head, constants["mean"]) for head in heads]
        for of_head, head in zip(of_heads, heads, strict=True):
            if truth is not None:
                of_head[TRUTH] = spearman(head.rewards, truth, data.of_turn)
            if not np.isnan(evaluation.labels).all():
                of_head |= label_metrics(head.rewards, evaluation.labels, places, data.of_turn)
        for name in of_heads[0]:
            measured = _measure([of_head[name] for of_head in of_heads], weights)
            first.setdefault(name, measured)
            rows.append(_row(label, name, measured, first[name], data.conversations))
    return rows


class _Measured(NamedTuple):
    """Values (seeds,) on all conversations, and samples (seeds, B) on the resamples of them."""

    values: np.ndarray
    samples: np.ndarray


def _measure(metric_of_seeds: list[Metric], weights: np.ndarray) -> _Measured:
    everything = np.ones((1, weights.shape[1]))
    values = np.array([metric(everything)[0] for metric in metric_of_seeds])
    return _Measured(values, np.array([metric(weights) for metric in metric_of_seeds]))


def _row(label: str, name: str, measured: _Measured, first: _Measured, conversations: int) -> Row:
    values, samples = measured
    estimate = within(LIMITS.get(name), interval_over_seeds, values, samples.mean(axis=0), conversations)
    difference = None
    if measured is not first:
        seeds = {len(values), len(first.values)} - {1}  # one seed, or a constant, is compared with all of the other's
        pairs = min(seeds, default=1)
        (mine, my_samples), (theirs, their_samples) = (
            _Measured(values[:pairs], samples[:pairs]) for values, samples in (measured, first)
        )
        difference = interval_over_seeds(mine - theirs, (my_samples - their_samples).mean(axis=0), conversations)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Row(label, name, len(values), estimate, spread, difference)
