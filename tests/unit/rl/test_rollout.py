"""Rollouts: sampling, cutting at the end of a turn, scoring."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_model

from experiments.known_optimum import make_model, prompts
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.rl.rollout import (
    RandomScorer,
    Rollout,
    cut_responses,
    distinct,
    draw_length,
    draw_uniforms,
    logprobs_and_values,
    minibatches,
    reached_marker,
    rollout,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("optimum") / "llama", seed=0)


def make_policy(model):
    torch.manual_seed(0)
    return load_policy(str(model), Adapter(4, 8), torch.float32)


def perturbed(policy):
    """The policy with an adapter and a value head that are not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return policy


def some_prompts(n=8):
    return prompts(np.random.default_rng(0), n)


def uniforms(n=8, length=12):
    return draw_uniforms(n, length, torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "blenderbot"])
def test_a_forward_pass_reproduces_the_rollouts_log_probabilities(kind, sample, tmp_path):
    """Rollout and update have the same numerics, whatever else is in the batch, and no dropout."""
    policy = perturbed(make_policy(small_model(kind, tmp_path / kind, sample)))
    sampled = rollout(policy, some_prompts(), uniforms())
    assert sampled.states is not None
    old = logprobs_and_values(policy, sampled, 4)
    for chosen in (np.array([6, 1, 3, 0]), np.array([2])):  # other neighbours, other padding
        logprobs, values, _ = policy(*sampled.rows(chosen))
        assert ((logprobs - old["logprobs"][chosen]).exp() - 1).abs().max() < 1e-5
        torch.testing.assert_close(values, old["values"][chosen], atol=1e-5, rtol=1e-4)
    passed = logprobs_and_values(policy, sampled._replace(states=None), 4)
    for name in old:
        torch.testing.assert_close(old[name], passed[name], atol=5e-6, rtol=1e-5)
    assert not any(module.training for module in policy.modules())


def test_kl_is_0_at_the_start_and_the_reference_does_not_change(model):
    policy = make_policy(model)
    sampled = rollout(policy, some_prompts(), uniforms())
    old = logprobs_and_values(policy, sampled, 4)
    torch.testing.assert_close(old["logprobs"], old["ref_logprobs"], atol=5e-6, rtol=0)
    exact = logprobs_and_values(policy, sampled._replace(states=None), 4)
    assert torch.equal(exact["logprobs"], exact["ref_logprobs"])
    again = logprobs_and_values(perturbed(policy), sampled._replace(states=None), 4)
    assert torch.equal(again["ref_logprobs"], old["ref_logprobs"])
    assert not torch.allclose(again["logprobs"], old["logprobs"])


def test_the_kl_estimate_is_unbiased(model):
    """Mean over samples of log pi - log pi_ref of the first token is the exact KL, summed over the vocabulary."""
    policy, prompt = perturbed(make_policy(model)), some_prompts(1)
    query = policy.tokenize(prompt)
    tokens = torch.arange(policy.model.config.vocab_size)[:, None]
    everything = (*(x.expand(len(tokens), -1) for x in query), tokens, torch.ones(len(tokens), 1))
    with torch.no_grad():
        log_p = policy(*everything)[0][:, 0]
        with policy.reference():
            log_q = policy(*everything)[0][:, 0]
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    old = logprobs_and_values(policy, rollout(policy, prompt * 4000, uniforms(4000, 1)), 4000)
    samples = (old["logprobs"] - old["ref_logprobs"])[:, 0]
    assert exact > 0.05
    assert samples.mean().item() == pytest.approx(exact, abs=4 * samples.std().item() / 4000**0.5)


def test_a_response_does_not_depend_on_the_rest_of_the_batch(model):
    policy = perturbed(make_policy(model))
    whole = rollout(policy, some_prompts(), uniforms()).texts
    part = rollout(policy, some_prompts()[5:2:-1], uniforms()[[5, 4, 3]]).texts
    assert part == whole[5:2:-1] and len(set(whole)) > 4


def test_generation_stops_when_every_response_has_reached_a_marker(model):
    policy = make_policy(model)
    query = policy.tokenize(some_prompts())

    def texts_of(rows):
        return ["AI:" if len(row) >= 3 else "" for row in rows]

    stopped = policy.generate(*query, uniforms(), lambda so_far: reached_marker(so_far, texts_of))[0]
    assert stopped.shape[1] == 4  # checked every fourth token
    assert policy.generate(*query, uniforms())[0].shape[1] == 12


def test_lengths_are_drawn_from_the_whole_range():
    rng = np.random.default_rng(0)
    assert {draw_length(rng, 3, 5) for _ in range(50)} == {3, 4, 5}


def test_padding_that_a_minibatch_does_not_need_is_left_out():
    query_mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    sampled = Rollout(torch.arange(9).view(3, 3), query_mask, torch.zeros(3, 2), torch.ones(3, 2), ["", "", ""])
    assert sampled.rows([0, 1])[0].tolist() == [[1, 2], [4, 5]]
    assert sampled.rows([2])[0].tolist() == [[6, 7, 8]]


def test_minibatches_have_similar_lengths_and_a_sharded_policy_as_many_in_every_process():
    lengths = np.array([10, 700, 30, 700, 20])
    policy = SimpleNamespace(is_sharded=False, device=torch.device("cpu"))
    assert [part.tolist() for part in minibatches(policy, lengths, 2)] == [[1], [3], [2, 4], [0]]
    policy.is_sharded, policy.largest = True, lambda n: 7
    assert [part.tolist() for part in minibatches(policy, lengths, 2)] == [[1, 3], [2, 4], [0], []]


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


def spell(rows: list[list[int]]) -> list[str]:
    """A tokenizer with one letter per token; 0 is a special token."""
    return ["".join(chr(token) for token in row if token) for row in rows]


@pytest.mark.parametrize(
    ("response", "kept", "text"),
    [
        (" hello", 6, "hello"),
        (" hello\0\0\0", 7, "hello"),  # the end token is kept: the policy chose it
        (" hello\1 more\0", 7, "hello"),  # of several the first, which need not be special to the tokenizer
        (" hello User: more", 7, "hello"),
        (" hi AI: AI:", 4, "hi"),
        (" a\0b User:", 3, "a"),
        ("User: me", 1, ""),  # empty: its first token carries the score
        ("\0", 1, ""),
        (" a User", 7, "a User"),  # no marker without its colon
    ],
)
def test_responses_are_cut_at_the_end_token_or_the_next_speaker(response, kept, text):
    tokens = torch.tensor([[ord(c) for c in response], [ord("x")] * len(response)])
    assert [list(column) for column in cut_responses(tokens, spell, ends=[0, 1])] == [
        [kept, len(response)],
        [text, "x" * len(response)],
    ]


def test_distinct_n_by_hand():
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)  # ab, ba of ab, ba, ab
    assert distinct([""], 1) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def test_random_rewards_are_in_minus_1_to_1_and_follow_the_seed():
    rewards = RandomScorer(3)(None, [""] * 1000)
    assert -1 <= rewards.min() < -0.9 and 0.9 < rewards.max() < 1
    assert torch.equal(rewards, RandomScorer(3)(None, [""] * 1000))
