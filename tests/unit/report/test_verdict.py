"""Verdicts on made-up outcomes of each stage."""

import re

import numpy as np
import pytest

from geli.report.verdict import dead_rewards, policy_verdict, reward_verdict
from geli.statistics import Estimate

ALIVE = {"reward_mean": 0.33, "reward_spread": 0.06}
BETTER, SAME, WORSE = Estimate(0.75, 0.6, 0.9), Estimate(0.97, 0.9, 1.04), Estimate(1.3, 1.1, 1.5)
ABOVE, CHANCE, BELOW = Estimate(0.74, 0.66, 0.8), Estimate(0.52, 0.44, 0.6), Estimate(0.4, 0.31, 0.48)
ONE, NONE = Estimate(0.7, np.nan, np.nan), Estimate(np.nan, np.nan, np.nan)

STAGE_1 = {
    "good": (ALIVE, dict(li_share=BETTER, roc_auc=ABOVE), "Learned: L_LI is lower than the mean target's .0.750 .0.6"),
    "ranks, but on another scale": (ALIVE, dict(li_share=WORSE, roc_auc=ABOVE), "Learned in part: L_LI is higher than"),
    "no better": (ALIVE, dict(li_share=SAME, roc_auc=CHANCE), "Nothing learned that shows: .*no lower .*no better"),
    "worse": (ALIVE, dict(li_share=WORSE, roc_auc=CHANCE), "Worse than without learning: L_LI is higher"),
    "the wrong way round": (ALIVE, dict(li_share=SAME, roc_auc=BELOW), "Worse than .*found worse than by chance"),
    "as published, on the sample": (
        {"reward_mean": 0.2721, "reward_spread": 7e-5}, dict(li_share=SAME, roc_auc=ABOVE),
        "Learned nothing: .* constant .mean 0.272, standard deviation 7e-05.: give --preset small",
    ),
    "no faces": (ALIVE, dict(li_share=BETTER, roc_auc=NONE, target_correlation=Estimate(0.2, 0.1, 0.3)),
                 "Learned: .*; LI's targets are followed better than by chance .rank correlation 0.200"),
    "one conversation": (ALIVE, dict(li_share=ONE, roc_auc=ONE), "Not judged: .* on one conversation alone; .* alone"),
    "nothing known of the targets": (ALIVE, dict(roc_auc=NONE), "Not judged: nothing that this head learned from"),
    "not measured": ({}, {}, "Not measured: --val measures"),
}  # fmt: skip
STAGE_2 = {
    "GE": ("GE", ALIVE, dict(ge_share=BETTER, roc_auc=BELOW), "^Learned: L_GE is lower than the mean score's [^;]*$"),
    "GELI": ("GELI", ALIVE, dict(ge_share=BETTER, roc_auc=ABOVE), "^Learned: L_GE is lower .*; happy listeners"),
    "the score alone": ("GELI", ALIVE, dict(ge_share=BETTER, roc_auc=CHANCE), "^Learned in part: L_GE is lower"),
    "the faces alone": ("GELI", ALIVE, dict(ge_share=SAME, roc_auc=ABOVE), "^Learned in part: L_GE is no lower"),
    "the mean": ("GE", ALIVE, dict(ge_share=SAME), "^Nothing learned that shows: L_GE is no lower than"),
    "worse": ("GE", ALIVE, dict(ge_share=WORSE), "^Worse than without learning: L_GE is higher"),
    "constant": ("GE", {"reward_mean": 0.4, "reward_spread": 1e-6}, dict(ge_share=SAME), "^Learned nothing.*constant"),
    "zero": ("GE", {"reward_mean": 0.0, "reward_spread": 0.0}, dict(ge_share=WORSE), "^Learned nothing: .* constant"),
    "actual lengths and tanh": ("GELI", {"reward_mean": 0.9976, "reward_spread": 2e-5}, dict(ge_share=WORSE),
                                "^Learned nothing: .* saturated .*: give a larger --ep_len"),
    "one conversation": ("GE", ALIVE, dict(ge_share=ONE), "^Not judged: .* 0.700 of .* on one conversation alone"),
}  # fmt: skip
BEFORE, AFTER = {"kl": 0.0, "distinct_2": 0.8, "empty_share": 0.0}, {"kl": 3.7, "distinct_2": 0.7, "empty_share": 0.0}


def gain(value, low, high, **after):
    of_gain = {"reward": value, "reward_low": low, "reward_high": high}
    return {"before": BEFORE, "after": {**AFTER, **after}, "gain": of_gain}


STAGE_3 = {
    "better": (gain(0.129, 0.115, 0.142), [], r"^Better: \+0.129 \[0.115, 0.142\] in its own reward at a KL of 3.70"),
    "no gain": (gain(0.01, -0.01, 0.03), [], r"^No gain that shows: \+0.010 \[-0.010, 0.030\][^;]*$"),
    "hardly moved": (gain(0.0, -0.01, 0.01, kl=0.01), [], "^No gain that shows: .*; it has hardly moved: try"),
    "worse": (gain(-0.1, -0.2, -0.05), [], "^Worse: -0.100"),
    "alike": (gain(0.3, 0.2, 0.4, distinct_2=0.1), [], r"^Better: .*\. Its responses have become alike \(dist"),
    "empty": (gain(0.3, 0.2, 0.4, empty_share=0.9), [], r"^Better: .*\. 90% of its responses are empty"),
    "runaway": (gain(0.3, 0.2, 0.4, kl=60), ["step 40: KL runs away"], r"^Better: .*\. In training, step 40: KL runs"),
    "one conversation": (gain(0.3, None, None), [], "^Not judged: a gain of .0.300 on the prompts of one conversation"),
    "the reference alone": ({"before": BEFORE}, [], "^The reference policy alone was measured"),
    "not measured": ({}, [], "^Not measured: --val"),
    "generated alone": ({"before": BEFORE, "after": AFTER}, [], "^Not measured by a reward: --val"),
}  # fmt: skip


@pytest.mark.parametrize("outcome", STAGE_1)
def test_stage_1(outcome):
    metrics, found, words = STAGE_1[outcome]
    matches(words, reward_verdict("LI", metrics, found))


@pytest.mark.parametrize("outcome", STAGE_2)
def test_stage_2(outcome):
    method, metrics, found, words = STAGE_2[outcome]
    matches(words, reward_verdict(method, metrics, found))


@pytest.mark.parametrize("outcome", STAGE_3)
def test_stage_3(outcome):
    metrics, problems, words = STAGE_3[outcome]
    matches(words, policy_verdict(metrics, problems))


def matches(words: str, verdict: str) -> None:
    assert re.search(words, verdict) and verdict.endswith(".") and "\n" not in verdict and "nan" not in verdict, verdict


def test_rewards_are_dead_where_nothing_in_them_differs():
    assert dead_rewards(0.44, 1e-4).startswith("constant") and dead_rewards(0.44, 1e-3) is None
    assert dead_rewards(-0.99, 0.01).startswith("saturated") and dead_rewards(0.99, 0.1) is None
    assert dead_rewards(6.2, 0.5) is None  # a head without tanh, or a function
