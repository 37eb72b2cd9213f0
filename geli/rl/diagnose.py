"""Recognizes a stage-3 run that goes wrong from the metrics it logs."""

from collections.abc import Sequence

import numpy as np

Rows = Sequence[dict[str, float]]


def diagnose(steps: Rows, target_kl_response: float, window: int = 20) -> dict[str, str]:
    """Looks for signs of failure in the last steps of a run.

    Args:
        steps: what the steps logged, in order. target_kl_response: the KL controller's target, in nats a response.
        window: how many of the last steps to look at; with fewer steps nothing is found.

    Returns:
        Name of the check -> what is wrong and what to do, for the checks that found something.
    """
    if len(steps) < window:
        return {}
    found, last = {}, steps[-window:]
    latest, first = last[-window // 4 :], steps[: max(3, window // 4)]
    kl = _mean(latest, "kl")
    if kl > 5 * target_kl_response:
        found["kl"] = (
            f"KL runs away: {kl:.1f} nats a response, the target is {target_kl_response:g}; this far from the "
            "reference policy the reward is not reliable; lower --learning_rate"
        )
    entropy, before = _mean(latest, "entropy"), _mean(first, "entropy")
    if entropy < 0.2 * before:
        found["entropy"] = (
            f"entropy collapses: {entropy:.2f} nats a token, {before:.2f} at the start; the responses become alike; "
            "lower --learning_rate, or stop earlier"
        )
    if _mean(last, "cut_at_length_share") > 0.98:
        found["length"] = (
            "all responses are cut at their length limit: the policy never ends a turn; its model may lack an end "
            "token, or was not trained to use it"
        )
    mean, deviation = _mean(last, "score_mean"), _mean(last, "score_std")
    if deviation < 1e-3 or abs(mean) > 0.98:
        found["scores"] = (
            f"scores are saturated: mean {mean:.3f}, standard deviation {deviation:.4f}; the policy cannot learn from "
            "scores that do not differ"
        )
    early, late = _mean(last[: window // 2], "value_loss"), _mean(last[window // 2 :], "value_loss")
    if late >= early and _mean(last, "explained_variance") < -0.5:
        found["value loss"] = (
            f"the value loss does not fall ({early:.3f}, then {late:.3f}) and the values predict returns worse than a "
            "constant, so the advantages are noise; lower --learning_rate"
        )
    return found


def _mean(rows: Rows, name: str) -> float:
    """The mean of a metric over the rows that have it, NaN if none has; a comparison with NaN is false."""
    return float(np.mean([row[name] for row in rows if name in row] or [np.nan]))
