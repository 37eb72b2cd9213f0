"""What a run learned, in words: functions of what it measured."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from geli.statistics import Estimate

CONSTANT = 1e-3  # rewards are constant if their standard deviation is at most this share of their mean
SATURATED = 0.98  # beyond it tanh is flat
HARDLY_MOVED = 0.05  # nats a response
ALIKE = 0.5  # of the reference's distinct-2
UNDEFINED = Estimate(np.nan, np.nan, np.nan)


class Judged(NamedTuple):
    """A measure against what would be without learning. better: 1, -1 (worse), 0 (neither shows); None: not known."""

    better: int | None
    words: str


def dead_rewards(mean: float, spread: float) -> str | None:
    """Why nothing can be learned from rewards of this mean and standard deviation; None if something can."""
    if SATURATED < abs(mean) <= 1 and spread < 1 - SATURATED:
        return f"saturated at the end of tanh's range (mean {mean:.3f}, standard deviation {spread:.1g})"
    if spread <= CONSTANT * abs(mean):
        return f"constant (mean {mean:.3g}, standard deviation {spread:.1g})"
    return None


def reward_verdict(method: str, metrics: Mapping[str, float | None], found: Mapping[str, Estimate]) -> str:
    """The verdict on a reward head.

    Args:
        method: LI, GE or GELI: what the head learned. metrics: what `evaluate` returned; empty if nothing was measured.
        found: metrics with their intervals (`geli.report.metrics`): `ge_share`, `li_share`, `roc_auc`, and
            `target_correlation` in place of an undefined `roc_auc`.
    """
    if not metrics:
        return "Not measured: --val measures it on conversations that it was not trained on."
    if dead := dead_rewards(metrics["reward_mean"], metrics["reward_spread"]):
        advice = "give --preset small (for small encoders) or a higher --learning_rate"
        advice = "give a larger --ep_len, or another head" if dead.startswith("saturated") else advice
        return f"Learned nothing: the rewards within a conversation are {dead}: {advice}."
    loss, constant = ("L_LI", "mean target") if method == "LI" else ("L_GE", "mean score")
    judged = [_against_constant(loss, constant, found.get("li_share" if method == "LI" else "ge_share", UNDEFINED))]
    auc = found.get("roc_auc", UNDEFINED)
    if method != "GE" and not np.isnan(auc.value):
        judged.append(_against_chance("happy listeners are found", "ROC AUC", auc, 0.5))
    elif method != "GE":
        correlation = found.get("target_correlation", UNDEFINED)
        judged.append(_against_chance("LI's targets are followed", "rank correlation", correlation, 0.0))
    return _joined([one for one in judged if one])


def _against_constant(loss: str, constant: str, share: Estimate) -> Judged | None:
    """Judges a loss, as a share of that of always predicting the mean."""
    if np.isnan(share.value):
        return None
    if np.isnan(share.low):
        return Judged(None, f"{loss} is {share.value:.3f} of the {constant}'s, on one conversation alone")
    better = (share.high < 1) - (share.low > 1)
    words = {1: "lower than", 0: "no lower than", -1: "higher than"}[better]
    return Judged(better, f"{loss} is {words} the {constant}'s ({share} of it)")


def _against_chance(what: str, measure: str, estimate: Estimate, chance: float) -> Judged | None:
    """Judges a measure that is `chance` for rewards that say nothing."""
    if np.isnan(estimate.value):
        return None
    if np.isnan(estimate.low):
        return Judged(None, f"{what} with a {measure} of {estimate.value:.3f}, on one conversation alone")
    better = (estimate.low > chance) - (estimate.high < chance)
    words = {1: "better than", 0: "no better than", -1: "worse than"}[better]
    return Judged(better, f"{what} {words} by chance ({measure} {estimate})")


def _joined(judged: Sequence[Judged]) -> str:
    """One verdict of several measures."""
    better = [one.better for one in judged if one.better is not None]
    if not judged:
        return "Not judged: nothing that this head learned from is known of the validation conversations."
    if not better:
        heading = "Not judged"
    elif min(better) == 1:
        heading = "Learned"
    elif max(better) == 1:
        heading = "Learned in part"
    else:
        heading = "Worse than without learning" if min(better) == -1 else "Nothing learned that shows"
    return f"{heading}: {'; '.join(one.words for one in judged)}."


def policy_verdict(metrics: Mapping[str, Mapping], problems: Sequence[str] = ()) -> str:
    """The verdict on a policy.

    Args:
        metrics: of the reference `before`, the trained policy `after`, and their `gain`, where measured. problems: what
            `diagnose` said in training.
    """
    gain, after, before = (metrics.get(name, {}) for name in ("gain", "after", "before"))
    said = [_of_gain(gain, after)] if gain else [_without_gain(before, after)]
    if after.get("empty_share", 0) > ALIKE:
        said.append(f"{after['empty_share']:.0%} of its responses are empty")
    elif after and after["distinct_2"] < ALIKE * before["distinct_2"]:
        said.append(
            f"Its responses have become alike (distinct-2 {after['distinct_2']:.2f}, {before['distinct_2']:.2f} before)"
        )
    return ". ".join([*said, *(f"In training, {problem}" for problem in problems)]) + "."


def _of_gain(gain: Mapping, after: Mapping) -> str:
    value, low, high = (gain[name] for name in ("reward", "reward_low", "reward_high"))
    kl = f"at a KL of {after['kl']:.2f} nats a response"
    if low is None:
        return f"Not judged: a gain of {value:+.3f} on the prompts of one conversation, {kl}"
    shown = f"{value:+.3f} [{low:.3f}, {high:.3f}] in its own reward {kl}"
    if low > 0:
        return f"Better: {shown}"
    if high < 0:
        return f"Worse: {shown}"
    hint = "; it has hardly moved: try --preset small, more --steps or a higher --learning_rate"
    return f"No gain that shows: {shown}{hint if abs(after['kl']) < HARDLY_MOVED else ''}"


def _without_gain(before: Mapping, after: Mapping) -> str:
    if after:
        return "Not measured by a reward: --val measures the gain on held-out prompts"
    if before:
        return "The reference policy alone was measured: nothing was trained"
    return "Not measured: --val measures the gain on held-out prompts"
