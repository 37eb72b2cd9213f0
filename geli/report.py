"""What stages 1 and 2 measure on the validation conversations, and the files and tables that report it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_utils import Corpus, SignalOptions, TurnSet
from geli import plots
from geli.data.candor import AFFECT_GROUPS, FACES, HAPPINESS
from geli.nets.encoder import encoder_of_head
from geli.nets.pretrained import read_json
from geli.run.console import format_table
from geli.run.errors import UserError
from geli.run.files import atomic_path, write_json
from geli.run.run_names import record_path
from geli.run.tracking import Tracker, versions
from models import RewardHeadConfig

BAR_CHARTS = 4  # validation trajectories that `--bar_chart` shows

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def affect_means(rewards: np.ndarray, affects: np.ndarray, prefix: str) -> dict[str, float]:
    """Mean reward of the turns of each affect group that is present: {prefix}_{neg,pos,neut,sup}_mean."""
    masks = {name: np.isin(affects, group) for name, group in AFFECT_GROUPS.items()}
    return {f"{prefix}_{name}_mean": float(rewards[mask].mean()) for name, mask in masks.items() if mask.any()}


def evaluate(turns: TurnSet, rewards: np.ndarray, returns: np.ndarray, chosen: np.ndarray | None = None) -> dict:
    """Compares predicted rewards with the scores and with the listeners' affect.

    Args:
        turns: n trajectories with N turns. rewards: (N,) predicted. returns: (n,) the returns that they predict, in
            points (`models.predicted_returns`). chosen: (N,) bool, the turns to use; None: all.

    Returns:
        ge_loss (points squared) and li_loss: means over trajectories. roc_auc_happy: how well the reward separates
        turns with a happy listener from the others. delta_li: their difference in mean reward. return_correlation:
        Spearman's, of predicted returns and scores. Mean rewards by affect. None where undefined, as with one class.

    Raises:
        UserError: if a reward is not finite.
    """
    from sklearn.metrics import roc_auc_score

    chosen = np.ones(len(turns), dtype=bool) if chosen is None else chosen
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise UserError("predicted rewards are not finite: training has diverged; try a lower --learning_rate")
    errors = (rewards - turns.targets) ** 2
    parts = [turns.turns_of(i) for i in range(len(turns.trajectories))]
    li = [errors[part][chosen[part]].mean() for part in parts]
    happy, rewards = turns.affects[chosen] == HAPPINESS, rewards[chosen]
    both_classes = happy.any() and not happy.all()
    return {
        "ge_loss": float(np.mean((turns.scores - returns) ** 2)),
        "li_loss": float(np.mean(li)),
        "roc_auc_happy": float(roc_auc_score(happy, rewards)) if both_classes else None,
        "delta_li": float(rewards[happy].mean() - rewards[~happy].mean()) if both_classes else None,
        "return_correlation": spearman(turns.scores, returns),
        **affect_means(rewards, turns.affects[chosen], "reward"),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation; None if either is constant."""
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def choose_turns(turns: TurnSet, k: int, seed: int) -> np.ndarray:
    """(N,) bool: K random turns of every trajectory, the same ones at every call."""
    rng = np.random.default_rng([seed, k])
    chosen = np.zeros(len(turns), dtype=bool)
    for first, end in zip(turns.offsets[:-1], turns.offsets[1:], strict=True):
        chosen[first + rng.permutation(end - first)[:k]] = True
    return chosen


def wandb_validation(metrics: dict) -> dict:
    """Validation metrics under the published wandb keys, in which `loss` is GE and `shaped_loss` is LI."""
    logged = {"val/epoch_loss": metrics["ge_loss"], "val/epoch_shaped_loss": metrics["li_loss"]}
    for name in AFFECT_GROUPS:
        if f"reward_{name}_mean" in metrics:
            logged[f"val_shape_epoch/epoch_running_{name}_mean"] = metrics[f"reward_{name}_mean"]
    for name in ("roc_auc_happy", "delta_li", "return_correlation"):
        if metrics[name] is not None:
            logged[f"val/{name}"] = metrics[name]
    return logged


# ---------------------------------------------------------------------------------------------------------------------
# Files


def turn_table(turns: TurnSet, rewards: np.ndarray) -> pd.DataFrame:
    """One row for each agent turn, without text: the table in `val_turn_rewards_{run}.csv`."""
    rows = []
    for trajectory in turns.trajectories:
        ids = (trajectory.conversation.id, trajectory.flip, trajectory.user, trajectory.agent)
        for i in trajectory.agent_turns:
            turn = trajectory.conversation.turns[i]
            rows.append((*ids, turn.turn_id, turn.start, turn.stop, FACES[turn.affect]))
    columns = ["conversation_id", "flip", "user_id", "agent_id", "turn_id", "start", "stop", "affect"]
    return pd.DataFrame(rows, columns=columns).assign(target=turns.targets, reward=rewards)


def write_validation(folder: Path, run: str, turns: TurnSet, rewards: np.ndarray, returns: np.ndarray) -> list[Path]:
    """Writes `val_turn_rewards_{run}.csv` and two pictures of it; returns their paths."""
    path, table = folder / f"val_turn_rewards_{run}.csv", turn_table(turns, rewards)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")
    return [
        path,
        plots.turn_rewards(table, folder / f"val_turn_rewards_{run}.png"),
        plots.returns(turns.scores, returns, folder / f"val_returns_{run}.png"),
    ]


@dataclass
class RewardRun:
    """A run of stage 1 or 2 as it is reported.

    Attributes:
        title: of the closing table. stage: of the command that ran. encoder: hub id or folder that it started from.
        arguments: name -> value of every option. corpus, training, validation: the data.
        metrics: what was measured; `validation` is what `evaluate` returned.
        rewards: (N,) of the validation turns; None without `--val`. paths: of what was written so far.
    """

    title: str
    stage: int
    encoder: str
    arguments: dict
    corpus: Corpus
    training: TurnSet
    validation: TurnSet
    metrics: dict
    rewards: np.ndarray | None
    paths: list[Path]


def finish_run(run: RewardRun, tracker: Tracker, folder: Path) -> None:
    """Writes `reward1_{run}.json`, closes the wandb run, and prints the closing table and the paths of all files."""
    path = record_path(folder, tracker.name)
    write_json(path, _record(run, tracker.name))
    measured = run.metrics.get("validation", {})
    if run.arguments["log_text"] and measured:
        contexts, responses = zip(*run.validation.texts, strict=True)
        table = turn_table(run.validation, run.rewards).assign(context=contexts, response=responses)
        tracker.log_table("val/turns", table, run.metrics.get("steps", 0) + 1)
    if run.arguments["bar_chart"]:
        for i in range(min(BAR_CHARTS, len(run.validation.trajectories))):  # numbered: ids are not sent to wandb
            rewards = run.rewards[run.validation.turns_of(i)]
            tracker.log_bars(f"val/rewards_by_turn_{i + 1}", {n + 1: float(r) for n, r in enumerate(rewards)})
    tracker.summary({f"final/{key}": value for key, value in measured.items()})
    tracker.finish()
    rows = [{"measured on validation": key, "value": value} for key, value in measured.items()]
    print(format_table(rows or [{"measured": "nothing (no --val)"}], f"\n{run.title}, run {tracker.name}"))
    print("\n".join(["Written:", *(f"  {path}" for path in [*run.paths, path])]))


def _record(run: RewardRun, name: str) -> dict:
    """The content of `reward1_{run}.json`."""
    conversations = {
        key: list(dict.fromkeys(t.conversation.id for t in part.trajectories))
        for key, part in (("training_conversations", run.training), ("validation_conversations", run.validation))
    }
    return {
        "run": name,
        "stage": run.stage,
        "encoder": run.encoder,
        "arguments": run.arguments,
        "seed": run.arguments["seed"],
        "versions": versions(),
        "metrics": run.metrics,
        "data": run.corpus.counts(),
        "dropped_conversations": dict(sorted(run.corpus.dropped.items())),
        "dropped_trajectories": dict(sorted(run.corpus.dropped_trajectories.items())),
        **conversations,
    }


def conversations_seen(head_path: Path, config: RewardHeadConfig) -> frozenset[str]:
    """The conversations that a saved head, or the encoder that it uses, was trained on, as far as records exist.

    Raises:
        UserError: if a record is not readable.
    """
    records = [head_path.with_name(head_path.name + ".json")]
    if config.encoder_is_folder:
        encoder = Path(encoder_of_head(config, head_path))
        records.append(encoder.with_name(f"reward1_{encoder.name.removeprefix('lang_model_')}.json"))
    seen: set[str] = set()
    for record in records:
        if not record.is_file():
            continue  # published heads have none
        content = read_json(record, str(record))
        metrics, trained_on = content.get("metrics", {}), content.get("training_conversations", [])
        if not isinstance(metrics, dict) or not isinstance(trained_on, list):
            raise UserError(f"{record}: expected the record of a run, with its metrics and training_conversations")
        if "steps" in metrics:  # otherwise the run only evaluated
            seen.update(map(str, trained_on))
    return frozenset(seen)


def warn_of_leaks(seen: frozenset[str], validation: TurnSet) -> None:
    """Prints a warning if an earlier stage was trained on conversations that are now used for validation."""
    both = seen & {t.conversation.id for t in validation.trajectories}
    if both:
        print(
            f"Warning: {len(both)} of this run's validation conversations were trained on before: the data has changed "
            "since. Validation results will look better than they are; train stage 1 again."
        )


def warn_of_constant_targets(training: TurnSet, signal: SignalOptions) -> None:
    """Prints a warning if all LI targets are the same, so that there is nothing to learn from them."""
    if training.targets.min() == training.targets.max():
        print(
            f"Warning: all {len(training):,} LI targets are {training.targets[0]:g}: --li_signal {signal.li_signal} "
            "found no reaction that differs; another signal may, or train GE alone"
        )
