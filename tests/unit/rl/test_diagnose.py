"""Warnings about a run that goes wrong."""

import pytest

from geli.rl.diagnose import diagnose

FINE = dict(
    kl=4.0, entropy=3.0, cut_at_length_share=0.3, score_std=0.2, score_mean=0.1, value_loss=1.0, explained_variance=0.2
)


@pytest.mark.parametrize(
    ("change", "check", "problem"),
    [
        (dict(kl=100.0), "kl", "KL runs away: 100.0 nats a response, the target is 6"),
        (dict(entropy=0.1), "entropy", "entropy collapses: 0.10 nats a token, 3.00 at the start"),
        (dict(cut_at_length_share=1.0), "length", "all responses are cut at their length limit"),
        (dict(score_std=0.0), "scores", "scores are saturated: mean 0.100, standard deviation 0.0000"),
        (dict(score_mean=-0.99), "scores", "scores are saturated: mean -0.990, standard deviation 0.2000"),
        (dict(explained_variance=-2.0), "value loss", "the value loss does not fall"),
    ],
)
def test_each_problem_is_found_alone(change, check, problem):
    rows = [dict(FINE) for _ in range(8)] + [{**FINE, **change} for _ in range(22)]
    found = diagnose(rows, target_kl_response=6.0)
    assert list(found) == [check] and found[check].startswith(problem)


def test_a_good_run_has_no_problem():
    assert diagnose([FINE] * 30, 6.0) == {}


def test_a_few_steps_say_nothing():
    assert diagnose([{**FINE, "kl": 100.0}] * 19, 6.0) == {}
    assert list(diagnose([{**FINE, "kl": 100.0}] * 19, 6.0, window=10)) == ["kl"]


def test_a_value_loss_that_falls_is_no_problem():
    rows = [{**FINE, "explained_variance": -2.0, "value_loss": 9.0 - step / 10} for step in range(30)]
    assert diagnose(rows, 6.0) == {}


def test_metrics_that_trl_does_not_log_are_not_judged():
    rows = [{key: FINE[key] for key in ("entropy", "score_mean", "score_std")}] * 30
    assert diagnose(rows, 6.0) == {}
