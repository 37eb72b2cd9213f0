"""Recognizes a stage-3 run that goes wrong from the metrics it logs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Rows = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """The steps that the checks look at.

    Attributes:
        first: the first steps of the run. last: its last `window` steps. latest: the last quarter of `last`.
        target_kl_response: the KL controller's target, in nats a response.
    """

    first: Rows
    last: Rows
    latest: Rows
    target_kl_response: float


def diagnose(steps: Rows, target_kl_response: float, window: int = 20) -> dict[str, str]:
    """Applies each of `CHECKS` to the last steps of a run.

    Args:
        steps: what the steps logged, in order. target_kl_response: the KL controller's target, in nats a response.
        window: how many of the last steps to look at; with fewer steps nothing is found.

    Returns:
        Name of the check -> what is wrong and what to do, for the checks that found something.
    """
    if len(steps) < window:
        return {}
    last = steps[-window:]
    run = Run(steps[: max(3, window // 4)], last, last[-window // 4 :], target_kl_response)
    return {name: problem for name, check in CHECKS.items() if (problem := check(run))}


def _mean(rows: Rows, name: str) -> float:
    """The mean of a metric over the rows that have it, NaN if none has; a comparison with NaN is false."""
    return float(np.mean([row[name] for row in rows if name in row] or [np.nan]))


def _kl(run: Run) -> str | None:
    kl = _mean(run.latest, "kl")
    if kl > 5 * run.target_kl_response:
        return (
            f"KL runs away: {kl:.1f} nats a response, the target is {run.target_kl_response:g}; this far from the "
            "reference policy the reward is not reliable; lower --learning_rate"
        )
    return None


def _entropy(run: Run) -> str | None:
    entropy, before = _mean(run.latest, "entropy"), _mean(run.first, "entropy")
    if entropy < 0.2 * before:
        return (
            f"entropy collapses: {entropy:.2f} nats a token, {before:.2f} at the start; the responses become alike; "
            "lower --learning_rate, or stop earlier"
        )
    return None


def _length(run: Run) -> str | None:
    if _mean(run.last, "cut_at_length_share") > 0.98:
        return (
            "all responses are cut at their length limit: the policy never ends a turn; its model may lack an end "
            "token, or was not trained to use it"
        )
    return None


def _scores(run: Run) -> str | None:
    mean, deviation = _mean(run.last, "score_mean"), _mean(run.last, "score_std")
    if deviation < 1e-3 or abs(mean) > 0.98:
        return (
            f"scores are saturated: mean {mean:.3f}, standard deviation {deviation:.4f}; the policy cannot learn from "
            "scores that do not differ"
        )
    return None


def _value_loss(run: Run) -> str | None:
    losses = [row["value_loss"] for row in run.last if "value_loss" in row]
    half = len(run.last) // 2
    if len(losses) < len(run.last) or not _mean(run.last, "explained_variance") < -0.5:
        return None
    early, late = np.mean(losses[:half]), np.mean(losses[half:])
    if late >= early:
        return (
            f"the value loss does not fall ({early:.3f}, then {late:.3f}) and the values predict returns worse than a "
            "constant, so the advantages are noise; lower --learning_rate"
        )
    return None


CHECKS: dict[str, Callable[[Run], str | None]] = {
    "kl": _kl,
    "entropy": _entropy,
    "length": _length,
    "scores": _scores,
    "value loss": _value_loss,
}
