"""What stages 1 and 2 measure on the validation conversations, and the files and tables that report it."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_utils import NO_FACE, Corpus, TurnSet
from geli.data.candor import AFFECT_GROUPS, FACES, HAPPINESS
from geli.data.corpus import by_count
from geli.data.words import SURFACE
from geli.report import plots
from geli.report.lineage import lineage
from geli.report.metrics import COLUMNS, HeldOut, cell, estimates, metrics
from geli.report.page import Page, Section, changed_options, seconds_table, write_page
from geli.report.verdict import reward_verdict
from geli.run.console import format_table, format_written
from geli.run.errors import UserError
from geli.run.files import atomic_path, write_json
from geli.run.run_names import record_path, report_path
from geli.run.tracking import Tracker, versions
from geli.statistics import Estimate
from models import RewardHead, head_rewards, predicted_returns, surface_correlations

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
        Spearman's, of predicted returns and scores. reward_mean, and reward_spread: the standard deviation within a
        trajectory, means over trajectories. Mean rewards by affect. None where undefined, as with one class.
        What needs faces is measured on the conversations that have them.

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
    of_chosen = [errors[part][chosen[part]] for part in parts]
    li = [some[~np.isnan(some)].mean() for some in of_chosen if not np.isnan(some).all()]
    of_each = [rewards[part][chosen[part]] for part in parts]
    chosen = chosen & (turns.affects != NO_FACE)
    happy, rewards = turns.affects[chosen] == HAPPINESS, rewards[chosen]
    both_classes = happy.any() and not happy.all()
    return {
        "ge_loss": float(np.mean((turns.scores - returns) ** 2)),
        "li_loss": float(np.mean(li)) if li else None,
        "roc_auc_happy": float(roc_auc_score(happy, rewards)) if both_classes else None,
        "delta_li": float(rewards[happy].mean() - rewards[~happy].mean()) if both_classes else None,
        "return_correlation": spearman(turns.scores, returns),
        "reward_mean": float(np.mean([some.mean() for some in of_each])),
        "reward_spread": float(np.mean([some.std() for some in of_each])),
        **affect_means(rewards, turns.affects[chosen], "reward"),
    }


def measure(
    head: RewardHead, features: torch.Tensor, turns: TurnSet, ep_len: int | str, chosen: np.ndarray | None = None
) -> tuple[dict, np.ndarray, np.ndarray]:
    """What a head predicts for turns, and how good that is.

    Args:
        features: (N, hidden) of the turns. ep_len: L of the returns. chosen: (N,) bool, the turns that `features` has,
            for a head that is not sequential; None: all.

    Returns:
        What `evaluate` returns, the rewards (N,), and the returns (n,) in points.
    """
    rewards = np.zeros(len(turns), dtype=np.float32)
    rewards[slice(None) if chosen is None else chosen] = head_rewards(head, features, turns)
    returns = predicted_returns(turns, rewards, ep_len, chosen)
    return evaluate(turns, rewards, returns, chosen), rewards, returns


def correlations_with_surface(turns: TurnSet, rewards: np.ndarray) -> dict[str, float]:
    """How far rewards (N,) follow length and punctuation: their correlation with each of `SURFACE`."""
    found = surface_correlations(torch.from_numpy(rewards).double(), torch.from_numpy(turns.surface).double())
    return {f"correlation_with_{name}": value for name, value in zip(SURFACE, found.tolist(), strict=True)}


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation; None if either is constant."""
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def choose_turns(turns: TurnSet, k: int, seed: int) -> np.ndarray:
    """(N,) bool: K random turns of every trajectory, those with an LI target first; the same ones at every call."""
    rng = np.random.default_rng([seed, k])
    chosen = np.zeros(len(turns), dtype=bool)
    for first, end in zip(turns.offsets[:-1], turns.offsets[1:], strict=True):
        order = first + rng.permutation(end - first)
        chosen[order[np.argsort(np.isnan(turns.targets[order]), kind="stable")][:k]] = True
    return chosen


# metric of `evaluate` -> key in wandb: the published one, in which `loss` is GE and `shaped_loss` LI, or our own
WANDB_KEYS = {
    "ge_loss": "val/epoch_loss",
    "li_loss": "val/epoch_shaped_loss",
    **{f"reward_{name}_mean": f"val_shape_epoch/epoch_running_{name}_mean" for name in AFFECT_GROUPS},
    **{name: f"val/{name}" for name in ("roc_auc_happy", "delta_li", "return_correlation")},
}


def wandb_validation(metrics: dict) -> dict:
    """Validation metrics, those that are defined, under `WANDB_KEYS`."""
    return {key: metrics[name] for name, key in WANDB_KEYS.items() if metrics.get(name) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def turn_table(turns: TurnSet, rewards: np.ndarray) -> pd.DataFrame:
    """One row for each agent turn, without text: the table in `val_turn_rewards_{run}.csv`. The affect is empty in
    conversations without faces."""
    rows = []
    for trajectory in turns.trajectories:
        ids = (trajectory.conversation.id, trajectory.flip, trajectory.user, trajectory.agent)
        for i in trajectory.agent_turns:
            turn = trajectory.conversation.turns[i]
            rows.append((*ids, turn.turn_id, turn.start, turn.stop))
    columns = ["conversation_id", "flip", "user_id", "agent_id", "turn_id", "start", "stop"]
    affects = ["" if affect == NO_FACE else FACES[affect] for affect in turns.affects]
    return pd.DataFrame(rows, columns=columns).assign(affect=affects, target=turns.targets, reward=rewards)


@dataclass
class RewardRun:
    """A run of stage 1 or 2 as it is reported.

    Attributes:
        title: of the closing table. stage: of the command that ran. method: LI, GE or GELI, what its head learned.
        encoder: hub id or folder that it started from.
        arguments: name -> value of every option. defaults: the same without a command line.
        corpus, training, validation: the data. metrics: what was measured; `validation` is what `evaluate` returned.
        rewards, returns: (N,) and (n,) predicted for validation; None without `--val`. paths: of what was written.
        started_from: the saved head that training started from, or that was evaluated. seconds: part -> time.
    """

    title: str
    stage: int
    method: str
    encoder: str
    arguments: dict
    defaults: dict
    corpus: Corpus
    training: TurnSet
    validation: TurnSet
    metrics: dict
    rewards: np.ndarray | None
    returns: np.ndarray | None
    paths: list[Path]
    started_from: Path | None
    seconds: dict[str, float]

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """The metrics with their intervals; empty without `--val`."""
        if self.rewards is None:
            return {}
        scores, targets = float(self.training.scores.mean()), self.training.targets
        target = None if np.isnan(targets).all() else float(np.nanmean(targets))
        data = HeldOut.from_turns(self.validation)
        return estimates(data, metrics(data, self.rewards, self.returns, scores, target))

    @cached_property
    def verdict(self) -> str:
        """What was learned, in words."""
        return reward_verdict(self.method, self.metrics.get("validation", {}), self.estimates)


def finish_run(run: RewardRun, tracker: Tracker, folder: Path) -> None:
    """Writes tables, pictures, the page and `reward1_{run}.json`, closes the wandb run, and prints the closing table
    and the paths of all files."""
    pictures = write_pictures(run, tracker, folder)
    measured = run.metrics.get("validation", {})
    if run.arguments["log_text"] and measured:
        contexts, responses = zip(*run.validation.texts, strict=True)
        table = turn_table(run.validation, run.rewards).assign(context=contexts, response=responses)
        tracker.log_table("val/turns", table, run.metrics.get("steps", 0) + 1)
    if run.arguments["bar_chart"]:
        for i in range(min(BAR_CHARTS, len(run.validation.trajectories))):  # numbered: ids are not sent to wandb
            rewards = run.rewards[run.validation.turns_of(i)]
            tracker.log_bars(f"val/rewards_by_turn_{i + 1}", {n + 1: float(r) for n, r in enumerate(rewards)})
    tracker.log_pictures({f"report/{name}": path for name, (path, _) in pictures.items()})
    tracker.summary({**{f"final/{key}": value for key, value in measured.items()}, "verdict": run.verdict})
    run.paths.append(write_page(reward_page(run, tracker, pictures), report_path(folder, tracker.name)))
    path = record_path(folder, tracker.name)
    write_json(path, _record(run, tracker, folder))
    run.paths.append(path)
    tracker.finish()
    rows = [{"measured on validation": key, "value": value} for key, value in measured.items() if value is not None]
    print(format_table(rows or [{"measured": "nothing (no --val)"}], f"\n{run.title}, run {tracker.name}"))
    print(f"{run.verdict}\n{format_written(run.paths)}")


def write_pictures(run: RewardRun, tracker: Tracker, folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes `val_turn_rewards_{run}.csv` and the pictures, and adds their paths to the run's; returns name -> (PNG,
    caption)."""
    captions = {
        "learning": "Losses by optimizer step.",
        "val_turn_rewards": "Predicted reward along two validation conversations, with the user's reactions above.",
        "val_returns": "The return that the turn rewards predict, against the score that was given.",
        "val_affects": "Predicted rewards by the user's reaction: quartiles, and whiskers of 1.5 times their range.",
    }
    png = {name: folder / f"{name}_{tracker.name}.png" for name in captions}
    written = []
    if tracker.logged["rows"]:
        written += plots.learning(tracker.logged["rows"], png["learning"])
    if run.rewards is not None:
        table = turn_table(run.validation, run.rewards)
        path = png["val_turn_rewards"].with_suffix(".csv")
        with atomic_path(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")
        written += [path, *plots.turn_rewards(table, png["val_turn_rewards"])]
        written += plots.returns(run.validation.scores, run.returns, png["val_returns"])
        if (plots.reactions(table)[0] != "").any():
            written += plots.affects(table, png["val_affects"])
    run.paths += written
    return {name: (path, captions[name]) for name, path in png.items() if path in written}


def _record(run: RewardRun, tracker: Tracker, folder: Path) -> dict:
    """The content of `reward1_{run}.json`."""
    conversations = {
        key: list(dict.fromkeys(t.conversation.id for t in part.trajectories))
        for key, part in (("training_conversations", run.training), ("validation_conversations", run.validation))
    }
    return {
        "run": tracker.name,
        "stage": run.stage,
        "started_from": run.started_from and os.path.relpath(run.started_from, folder),
        "wandb": tracker.wandb_run,
        "encoder": run.encoder,
        "arguments": run.arguments,
        "seed": run.arguments["seed"],
        "versions": versions(),
        "verdict": run.verdict,
        "metrics": run.metrics,
        "intervals": {
            name: [value if np.isfinite(value) else None for value in found] for name, found in run.estimates.items()
        },
        "data": run.corpus.counts(),
        "dropped_conversations": dict(sorted(run.corpus.dropped.items())),
        "dropped_trajectories": dict(sorted(run.corpus.dropped_trajectories.items())),
        **conversations,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The page


def reward_page(run: RewardRun, tracker: Tracker, pictures: dict[str, tuple[Path, str]]) -> Page:
    """The page of a run of stage 1 or 2."""
    sizes = {
        name: f"{len({t.conversation.id for t in part.trajectories}):,} conversations, {len(part):,} agent turns"
        for name, part in (("training", run.training), ("validation", run.validation))
    }
    summary = {
        "verdict": run.verdict,
        "data": f"{Path(run.arguments['data_dir']).name}, score {run.arguments['reward_class']}", **sizes,
        "encoder": Path(run.encoder).name, "seed": str(run.arguments["seed"]),
        **{name: f"{value:.4g}" for name, value in run.metrics.items() if isinstance(value, (int, float))},
    }  # fmt: skip
    sections = [Section("What was learned", pictures=list(pictures.values()))]
    if run.rewards is not None:
        note = "On the validation conversations, with 95% intervals over them. The baseline predicts the mean score."
        sections.insert(0, Section("Measured", note, measured_rows(run)))
        if run.arguments["log_text"]:
            sections.append(Section("Best and worst turns", "By predicted reward.", extreme_turns(run)))
    dropped = by_count([*run.corpus.dropped.values(), *run.corpus.dropped_trajectories.values()])
    sections += [
        Section("Data", run.corpus.describe(), [{"dropped because": k, "times": str(n)} for k, n in dropped.items()]),
        Section("Time", "Of this process, slowest part first.", seconds_table(run.seconds)),
        Section("Options", "Those that differ from the defaults come first.",
                changed_options(run.arguments, run.defaults), folded=True),
        Section("Versions", rows=[{"package": k, "version": v} for k, v in versions().items()], folded=True),
    ]  # fmt: skip
    links = [(ancestor.label, ancestor.report) for ancestor in lineage(run.started_from)]
    return Page(f"{run.title}: run {tracker.name}", summary, links, sections, run.arguments["log_text"])


def measured_rows(run: RewardRun) -> list[dict]:
    """Each metric with its interval, and that of always predicting the mean training score."""
    data = HeldOut.from_turns(run.validation)
    mean = float(run.training.scores.mean())
    constant = (np.zeros(len(run.rewards)), np.full(len(run.returns), mean))
    columns = [run.estimates, estimates(data, metrics(data, *constant, mean))]
    return [
        {"metric": column.meaning, **{name: cell(found.get(metric), column.decimals) for name, found in
         zip(("this head", "mean score"), columns, strict=True)}}
        for metric, column in COLUMNS.items() if str(columns[0].get(metric, "-")) != "-"
    ]  # fmt: skip


def extreme_turns(run: RewardRun) -> list[dict]:
    """The three turns with the highest and the three with the lowest predicted reward, with their words."""
    table = turn_table(run.validation, run.rewards).assign(text=[response for _, response in run.validation.texts])
    ordered = table.sort_values("reward", ascending=False, kind="stable")
    chosen = pd.concat([ordered.head(3), ordered.tail(3)])
    return [
        {"reward": float(row.reward), "listener": row.affect or "-", "turn": row.text.removeprefix("AI: ")}
        for row in chosen.itertuples()
    ]
