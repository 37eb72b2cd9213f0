"""Metrics of turn rewards: by hand, and against scikit-learn and scipy on conversations that are really repeated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from turn_sets import trajectory, turn_set

from geli.report.metrics import HeldOut, average_precision, metrics, roc_auc, spearman

TURNS = turn_set(
    trajectory("a", 80.0, ["happiness", "neutral"]),
    trajectory("b", 40.0, ["surprise", "happiness", "neutral", "anger"]),
)
REWARDS, RETURNS = np.array([0.5, 0.1, 0.2, 0.4, 0.3, 0.0]), np.array([70.0, 60.0])
TRUTH = np.array([3.0, 1, 2, 5, 4, 0])


def measured(weights, **more):
    data = HeldOut.from_turns(TURNS)
    found = metrics(data, REWARDS, RETURNS, 50.0) | {"truth_correlation": spearman(REWARDS, TRUTH, data.of_turn)}
    return {name: float(metric(np.array([weights]))[0]) for name, metric in found.items()}


def test_metrics_by_hand():
    assert measured([1, 1]) == {
        "ge_loss": pytest.approx(250),  # (10^2 + 20^2) / 2
        "ge_share": pytest.approx(250 / 500),  # (30^2 + 10^2) / 2
        "delta_li": pytest.approx(0.45 - 0.15),
        "roc_auc": 1,  # 0.5 and 0.4 are above all others
        "average_precision": 1,
        "return_correlation": pytest.approx(1),
        "truth_correlation": pytest.approx(1 - 6 * (2**2 + 1 + 1) / (6 * 35)),  # ranks 4 6 5 of 6 5 4, else equal
    }


def test_metrics_of_a_resample_by_hand():
    found = measured([0, 2])  # conversation b twice
    assert found["ge_loss"] == pytest.approx(400) and found["ge_share"] == pytest.approx(4)
    assert found["delta_li"] == pytest.approx(0.4 - 0.5 / 3) and np.isnan(found["return_correlation"])


def test_what_a_resample_cannot_measure_is_undefined():
    rewards, of = np.array([0.1, 0.2, 0.3]), np.array([0, 0, 1])
    happy = np.array([True, True, False])
    alone = np.array([[1, 0], [0, 1], [1, 1]])
    assert roc_auc(happy, rewards, of)(alone) == pytest.approx([np.nan, np.nan, 0], nan_ok=True)
    assert average_precision(happy, rewards, of)(alone) == pytest.approx([1, np.nan, (1 / 2 + 2 / 3) / 2], nan_ok=True)


@st.composite
def cases(draw):
    turns = draw(st.integers(2, 12))
    a, b = (np.array(draw(st.lists(st.integers(0, 5), min_size=turns, max_size=turns))) / 4 for _ in "ab")
    happy = np.array(draw(st.lists(st.booleans(), min_size=turns, max_size=turns)))
    of = np.array(draw(st.lists(st.integers(0, 2), min_size=turns, max_size=turns)))
    weights = np.array(draw(st.lists(st.integers(0, 3), min_size=3, max_size=3)))
    return a, b, happy, of, weights


@given(cases())
def test_a_weight_is_the_number_of_times_that_a_conversation_is_there(case):
    a, b, happy, of, weights = case
    rows = np.repeat(np.arange(len(a)), weights[of])
    both = len(set(happy[rows])) == 2
    found, peers = {}, {}
    for name, metric, peer in (
        ("auc", roc_auc(happy, a, of), roc_auc_score), ("ap", average_precision(happy, a, of), average_precision_score)
    ):  # fmt: skip
        found[name] = metric(weights[None])[0]
        peers[name] = peer(happy[rows], a[rows]) if both else found[name]
    varied = len(rows) and np.ptp(a[rows]) and np.ptp(b[rows])
    found["rho"] = spearman(a, b, of)(weights[None])[0]
    peers["rho"] = spearmanr(a[rows], b[rows]).statistic if varied else np.nan
    assert found == pytest.approx(peers, nan_ok=True)
