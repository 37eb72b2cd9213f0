"""Measuring a policy on held-out prompts."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from experiments.known_optimum import make_model, prompts, share_of_good_words
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.rl.evaluation import efficiency, evaluate_policy, score_together
from geli.rl.rollout import distinct
from geli.run.distributed import make_accelerator

SIZES = dict(batch_size=4, mini_batch_size=3, min_new_tokens=6, max_new_tokens=12)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(
        str(make_model(tmp_path_factory.mktemp("optimum") / "llama", seed=0)), Adapter(4, 8), torch.float32
    )


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return make_accelerator("cpu", "float32")


def some_prompts(n=10):
    """Prompts of n conversations."""
    return [prompt._replace(name=f"{i}/0/1") for i, prompt in enumerate(prompts(np.random.default_rng(0), n))]


def test_the_metrics_are_those_of_the_responses(policy, accelerator):
    metrics, texts, rewards = evaluate_policy(policy, share_of_good_words, some_prompts(), accelerator, seed=1, **SIZES)
    scores = share_of_good_words(None, texts).numpy()
    assert len(texts) == 10 and rewards == scores.tolist()
    assert metrics == {
        "reward": pytest.approx(scores.mean()),
        "reward_low": pytest.approx(scores.mean() - 2.26 * scores.std() / 9**0.5, rel=0.1),  # t of 9 degrees
        "reward_high": pytest.approx(scores.mean() + 2.26 * scores.std() / 9**0.5, rel=0.1),
        "reward_std": pytest.approx(scores.std()),
        "kl": pytest.approx(0, abs=1e-4),
        "response_words": np.mean([len(text.split()) for text in texts]),
        "ended_share": np.mean([len(text.split()) < 6 for text in texts]),
        "empty_share": np.mean([not text for text in texts]),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def test_kl_is_that_to_the_reference(policy, accelerator):
    saved = [p.detach().clone() for p in policy.trainable()]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    try:
        tuned, *_ = evaluate_policy(policy, None, some_prompts(), accelerator, seed=1, **SIZES)
        with policy.reference():
            base, *_ = evaluate_policy(policy, None, some_prompts(), accelerator, seed=1, **SIZES)
    finally:
        with torch.no_grad():
            for p, before in zip(policy.trainable(), saved, strict=True):
                p.copy_(before)
    assert tuned["kl"] > 0.05 and base["kl"] == pytest.approx(0, abs=1e-4)
    assert "reward" not in tuned


def test_it_draws_its_own_random_numbers(policy, accelerator):
    torch.manual_seed(0)
    first = evaluate_policy(policy, share_of_good_words, some_prompts(), accelerator, seed=1, **SIZES)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    assert evaluate_policy(policy, share_of_good_words, some_prompts(), accelerator, seed=1, **SIZES) == first
    assert evaluate_policy(policy, share_of_good_words, some_prompts(), accelerator, seed=2, **SIZES) != first


def test_score_together_scores_all(accelerator):
    assert score_together(share_of_good_words, some_prompts(2), ["w00 w59", "w01"], accelerator).tolist() == [0.5, 1]


def test_efficiency_is_the_gain_over_what_the_best_tilt_would_gain():
    assert efficiency(0.3, 0.2, 2.0) == pytest.approx(0.3 / (0.2 * 2))
    assert efficiency(0.3, 0.2, 0.1) is None and efficiency(0.3, 0.0, 2.0) is None
