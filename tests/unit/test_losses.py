"""The losses of reward training, decompositions, and the pure functions of PPO: each first by hand, then in general."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_sets import trajectory, turn_set

from geli.data.shares import TrajectoryShares
from models import (
    DECOMPOSITIONS,
    HEADS,
    RunningMoments,
    adapted_beta,
    contrastive_term,
    gae,
    geli_loss,
    ircr_loss,
    kl_ahead,
    length_of,
    li_loss,
    llm_loss,
    loss_scales,
    ppo_loss,
    predicted_return,
    predicted_returns,
    rrd_loss,
    rudder_loss,
    rudder_rewards,
    sample_turns,
    supervised_contrastive_loss,
    token_rewards,
    whiten,
)

# ---------------------------------------------------------------------------------------------------------------------
# Reward training


def test_rrd_on_a_trajectory_of_four_turns():
    # rewards 0.1, -0.2, 0.4, 0.5 of T = 4 turns, L = 160, R = 30
    rewards = torch.tensor([0.1, -0.2, 0.4, 0.5])
    # all four: 160/4 * 0.8 = 32, loss (30 - 32)^2 = 4
    assert predicted_return(rewards, 160).item() == pytest.approx(32)
    assert rrd_loss(rewards, 30, 160).item() == pytest.approx(4, rel=1e-5)
    # turns 1 and 3: 160/2 * (-0.2 + 0.5) = 24, loss 36
    assert rrd_loss(rewards[[1, 3]], 30, 160).item() == pytest.approx(36, rel=1e-5)


def test_a_subsets_estimate_of_the_return_is_unbiased():
    rewards = torch.tensor([0.1, -0.2, 0.4, 0.5, 0.9], dtype=torch.float64)
    for k in range(1, 6):
        estimates = [predicted_return(rewards[list(i)], 160) for i in itertools.combinations(range(5), k)]
        assert torch.stack(estimates).mean().item() == pytest.approx(160 * rewards.mean().item())


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 99))
def test_sampled_turns_are_distinct_and_all_of_them_when_k_is_large(n_turns, k, seed):
    drawn = sample_turns(n_turns, k, np.random.default_rng(seed))
    assert drawn.tolist() == sorted(set(drawn)) and len(drawn) == min(k, n_turns)
    assert drawn.min() >= 0 and drawn.max() < n_turns


def test_every_turn_is_sampled_equally_often():
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([sample_turns(10, 3, rng) for _ in range(4000)]), minlength=10)
    assert np.abs(counts / 1200 - 1).max() < 0.1


def test_li_by_hand():
    # errors -0.5, 0.25 and 0.75: (0.25 + 0.0625 + 0.5625) / 3
    assert li_loss(torch.tensor([0.5, 0.25, -0.25]), torch.tensor([1.0, 0, -1])).item() == pytest.approx(0.875 / 3)


def test_geli_by_hand():
    ge, li = torch.tensor(4.0), torch.tensor(0.125)
    assert geli_loss(ge, li, 0.5).item() == pytest.approx(2.0625)
    assert geli_loss(ge, li, 0.25).item() == pytest.approx(1.09375)  # 0.25 * 4 + 0.75 * 0.125
    # scales 100 and 0.5: 0.25 * 4 / 100 + 0.75 * 0.125 / 0.5
    assert geli_loss(ge, li, 0.25, 100, 0.5).item() == pytest.approx(0.1975)


def test_ircr_on_a_trajectory_of_four_turns():
    # R/L = 32/160 = 0.2; errors -0.1, -0.4, 0.2, 0.3; squares 0.01 + 0.16 + 0.04 + 0.09 = 0.30; mean 0.075
    assert ircr_loss(torch.tensor([0.1, -0.2, 0.4, 0.5]), 32, 160).item() == pytest.approx(0.075, rel=1e-5)


def test_rudder_on_a_trajectory_of_four_turns():
    predictions = torch.tensor([20.0, 10, 30, 25, 40])  # before the first turn and after every turn; R = 38
    # errors 18, 28, 8, 13, -2: last squared 4; mean of 324, 784, 64, 169, 4 is 269; 4 + 0.5 * 269 = 138.5
    assert rudder_loss(predictions, 38, 160).item() == pytest.approx(138.5)
    # differences -10, 20, -5, 15 times T/L = 4/160, and 20/160 for the expected return before the first turn
    rewards = rudder_rewards(predictions, 160, 4)
    assert rewards.tolist() == pytest.approx([-0.125, 0.625, 0.0, 0.5])
    assert predicted_return(rewards, 160).item() == pytest.approx(40)  # the last prediction


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(1, 300))
def test_rudders_rewards_are_on_the_scale_of_the_other_decompositions(predictions, length):
    rewards = rudder_rewards(torch.tensor(predictions, dtype=torch.float64), length, len(predictions) - 1)
    assert predicted_return(rewards, length).item() == pytest.approx(predictions[-1], abs=1e-6)


def test_the_contrastive_loss_by_hand():
    # unit rows a = (1, 0), a' = (1, 0), b = (0, 1); temperature 0.5: similarities 2 (a, a'), 0 (with b)
    hidden, labels = torch.tensor([[3.0, 0], [1, 0], [0, 2]]), torch.tensor([1, 1, 0])
    # a and a' each: -log(e^2 / (e^2 + e^0)) = log(1 + e^-2) = 0.126928; b is alone with its label
    assert supervised_contrastive_loss(hidden, labels, 0.5).item() == pytest.approx(0.126928, abs=1e-5)
    assert supervised_contrastive_loss(hidden, torch.tensor([0, 1, 2]), 0.5).item() == 0
    # weight and temperature 0.3: 0.3 * log(1 + e^(-1/0.3)) = 0.3 * 0.035052
    assert contrastive_term(hidden, np.array([1, 1, 0])).item() == pytest.approx(0.0105157, abs=1e-6)


def test_the_contrastive_loss_pulls_one_label_together():
    torch.manual_seed(0)
    hidden, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) % 3
    optimizer = torch.optim.SGD([hidden], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        supervised_contrastive_loss(hidden, labels, 0.3).backward()
        optimizer.step()
    z = torch.nn.functional.normalize(hidden.detach(), dim=1)
    same = labels[:, None] == labels[None]
    assert (z @ z.T)[same].min() > (z @ z.T)[~same].max()


def test_the_llm_loss_on_a_trajectory_of_two_turns():
    # R = 80, L = 160; shares of 30 and 50 points of 2 turns, so that the turns' rewards should be 60/160 and 100/160
    rewards, shares = torch.tensor([0.5, 0.5]), torch.tensor([60.0, 100.0])
    assert llm_loss(shares / 160, 80.0, 160.0, shares).item() == 0
    # (0.5 - 0.375)^2 = (0.5 - 0.625)^2; the mean reward is R/L
    assert llm_loss(rewards, 80.0, 160.0, shares).item() == pytest.approx(0.015625)
    # both are 0.1 more: (0.225^2 + 0.025^2) / 2 and, of the sum, (0.6 - 0.5)^2
    assert llm_loss(rewards + 0.1, 80.0, 160.0, shares).item() == pytest.approx(0.025625 + 0.01)
    # of the second turn alone: its own error, and that of the return that it predicts
    assert llm_loss(rewards[1:] + 0.1, 80.0, 160.0, shares[1:]).item() == pytest.approx(0.025**2 + 0.01)


def test_equal_shares_are_ircrs_target():
    rewards, shares = torch.tensor([0.1, 0.7, 0.2]), torch.full((3,), 60.0)
    penalty = rrd_loss(rewards, 60.0, 160.0) / 160**2
    assert llm_loss(rewards, 60.0, 160.0, shares) == ircr_loss(rewards, 60.0, 160.0) + penalty


# ---------------------------------------------------------------------------------------------------------------------
# Decompositions


def test_the_table_of_decompositions():
    rows = {name: (row.loss, row.uses_subset, row.head) for name, row in DECOMPOSITIONS.items()}
    assert rows.items() >= {
        "RRD": (rrd_loss, True, None), "IRCR": (ircr_loss, False, None), "RUDDER": (rudder_loss, False, "rudder"),
        "LLM": (llm_loss, True, None),
    }.items()  # fmt: skip


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_a_decompositions_loss_has_gradients_and_its_row_is_whole(name):
    row, rewards = DECOMPOSITIONS[name], torch.tensor([0.1, 0.5, -0.2], requires_grad=True)
    loss = row.loss(rewards, 50.0, 3.0, *([torch.tensor([80.0, 40.0, 30.0])] if row.uses_shares else []))
    loss.backward()
    assert loss.shape == () and loss.isfinite() and rewards.grad.isfinite().all() and rewards.grad.any()
    assert row.target(np.array([80.0, 40.0]), np.array([3.0, 4.0])).shape == (2,) and row.help
    assert row.head is None or row.head in HEADS


def test_each_decompositions_target_is_what_its_loss_regresses_to():
    scores, lengths = np.array([80.0, 40.0]), np.array([160.0, 80.0])
    targets = {name: list(row.target(scores, lengths)) for name, row in DECOMPOSITIONS.items()}
    assert targets.items() >= {"RRD": [80, 40], "IRCR": [0.5, 0.5], "RUDDER": [80, 40], "LLM": [0.5, 0.5]}.items()


# 2 and 4 agent turns; R = 80 and 40; LI targets 1, 0 and 0, 1, 0, 0
TURNS = turn_set(
    trajectory("a", 80.0, ["happiness", "neutral"]),
    trajectory("b", 40.0, ["neutral", "happiness", "neutral", "anger"]),
)


SHARES = {  # in points, of turns 1 and 3, and of 1, 3, 5 and 7
    "a/0": TrajectoryShares("", {"1": 40.0, "3": 40.0}),
    "b/0": TrajectoryShares("", {"1": -5.0, "3": 10.0, "5": 25.0, "7": 10.0}),
}


def test_predicted_returns_by_hand():
    rewards = [0.1, 0.3, 0.2, 0.0, 0.4, 0.2]  # means 0.2 and 0.2, sums 0.4 and 0.8
    assert predicted_returns(TURNS, rewards, 160) == pytest.approx([32, 32])
    assert predicted_returns(TURNS, rewards, "actual") == pytest.approx([0.4, 0.8])
    chosen = np.array([False, True, False, False, True, True])  # means 0.3 and 0.3
    assert predicted_returns(TURNS, rewards, 10, chosen) == pytest.approx([3, 3])
    assert (length_of("actual", 7), length_of(160, 7)) == (7, 160)


@pytest.mark.parametrize(
    ("redist_type", "ep_len", "expected"),
    [
        ("RRD", 160, 400.0),  # of 80 and 40: mean 60, (20^2 + 20^2) / 2
        ("RUDDER", "actual", 400.0),
        ("IRCR", 160, 0.015625),  # of 0.5 and 0.25: 0.125^2
        ("IRCR", "actual", 225.0),  # of 80/2 = 40 and 40/4 = 10: 15^2
        ("LLM", 10, 140 / 9),  # of 8, 8 and -2, 4, 10, 4 by `SHARES`: 264/6 - (32/6)^2
    ],
)
def test_normalized_scales_are_the_variances_of_the_targets(redist_type, ep_len, expected):
    # the second: of LI targets 1, 0, 0, 1, 0, 0: 1/3 * 2/3
    assert loss_scales("normalized", redist_type, ep_len, TURNS.with_shares(SHARES)) == pytest.approx((expected, 2 / 9))
    assert loss_scales("raw", redist_type, ep_len, TURNS) == (1, 1)


def test_targets_that_are_all_the_same_are_not_scaled():
    same = turn_set(trajectory("a", 50.0, ["neutral"]), trajectory("b", 50.0, ["neutral"]))
    assert loss_scales("normalized", "RRD", 160, same) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def test_the_score_is_on_the_last_kept_token_and_kl_on_every_kept_one():
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    logprobs, reference = torch.tensor([[-1.0, -2, -3], [-1, -9, -9]]), torch.tensor([[-1.0, -3, -3], [-2, 0, 0]])
    rewards = token_rewards(torch.tensor([5.0, 7.0]), logprobs, reference, mask, beta=0.1)
    # -0.1 * (0, 1, 0) + (0, 0, 5), and -0.1 * 1 + 7
    assert rewards.tolist() == [[0, pytest.approx(-0.1), 5], [pytest.approx(6.9), 0, 0]]


def test_a_token_is_charged_for_the_kl_of_the_states_that_follow_it():
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0]])
    kl = torch.tensor([[0.5, 1, 2], [1, 3, 9], [4, 9, 9]])
    # to come: (3, 2, 0), (3, 0), (0); their means by place: 2, 1, 0
    assert kl_ahead(kl, mask).tolist() == [[1, 1, 0], [1, -1, 0], [-2, 0, 0]]


def test_gae_by_hand():
    # gamma 1, lambda 0.5, V = (1, 2), r = (0, 4): delta = (0 + 2 - 1, 4 - 2) = (1, 2); A = (1 + 0.5 * 2, 2)
    mask = torch.ones(1, 2)
    advantages, returns = gae(torch.tensor([[0.0, 4]]), torch.tensor([[1.0, 2]]), mask, 1.0, 0.5)
    assert advantages.tolist() == [[2, 2]]
    assert returns.tolist() == [[3, 4]]


@given(st.integers(1, 6), st.floats(0.5, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_equals_its_definition(length, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 1, 8, generator=generator, dtype=torch.float64)
    mask = (torch.arange(8) < length).double()[None]
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    following = [values[0, t + 1] if t + 1 < length else 0.0 for t in range(length)]
    delta = [rewards[0, t] + gamma * following[t] - values[0, t] for t in range(length)]
    for t in range(length):
        expected = sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length))
        assert advantages[0, t].item() == pytest.approx(float(expected))
        assert returns[0, t].item() == pytest.approx(float(expected + values[0, t]))
    assert (advantages[0, length:] == 0).all() and (returns[0, length:] == 0).all()


def test_whitening_looks_at_kept_tokens_only():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    whitened = whiten(torch.tensor([[1.0, 3, 1000], [5, -1000, 0]]), mask, 3, 8 / 3)  # of 1, 3 and 5
    assert whitened.tolist() == [[pytest.approx(-(1.5**0.5)), 0, 0], [pytest.approx(1.5**0.5), 0, 0]]


def test_policy_clipping_by_hand():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2)
    old = torch.full((1, 2), -2.0)
    logprobs = old + torch.log(torch.tensor([[1.5, 0.5]]))
    # advantages 1 and 1: min(1.5, 1.2) and min(0.5, 0.8) -> -(1.2 + 0.5) / 2; only the first is clipped
    policy, _, sums = ppo_loss(logprobs, zeros, old, zeros, torch.ones(1, 2), zeros, mask, 0.2, 0.2)
    assert policy.item() == pytest.approx(-0.85)
    assert sums["policy_clipped"].item() == 1 and sums["ratio"].item() == pytest.approx(2)
    assert sums["approx_kl"].item() == pytest.approx(0.5 * (np.log(1.5) ** 2 + np.log(0.5) ** 2))
    # advantages -1: max(1.5, 1.2) and max(0.5, 0.8) -> (1.5 + 0.8) / 2
    policy, _, _ = ppo_loss(logprobs, zeros, old, zeros, -torch.ones(1, 2), zeros, mask, 0.2, 0.2)
    assert policy.item() == pytest.approx(1.15)
    # of an optimizer step of 8 tokens
    policy, _, _ = ppo_loss(logprobs, zeros, old, zeros, -torch.ones(1, 2), zeros, mask, 0.2, 0.2, tokens=8)
    assert policy.item() == pytest.approx(2.3 / 8)


def test_value_clipping_by_hand():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2)
    values, returns = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    # old values 0, clip 0.2 -> bounded 0.2: errors (0, 1), bounded (0.64, 3.24); 0.5 * mean of the larger
    _, value, sums = ppo_loss(zeros, values, zeros, zeros, zeros, returns, mask, 0.2, 0.2)
    assert value.item() == pytest.approx(0.5 * (0.64 + 3.24) / 2)
    assert sums["value_clipped"].item() == 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_what_is_not_kept_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    tensors = torch.randn(6, 2, 5, generator=generator)
    noise = torch.randn(6, 2, 5, generator=generator) * (1 - mask)

    def everything(logprobs, values, old_logprobs, old_values, reference, _):
        rewards = token_rewards(torch.tensor([1.0, 2.0]), old_logprobs, reference, mask, 0.15)
        advantages, returns = gae(rewards, old_values, mask, 1.0, 0.95)
        kept = advantages[mask.bool()]
        whitened = whiten(advantages, mask, kept.mean().item(), kept.var(unbiased=False).item())
        losses = ppo_loss(logprobs, values, old_logprobs, old_values, whitened, returns, mask, 0.2, 0.2)
        return torch.stack([*losses[:2], *losses[2].values()])

    torch.testing.assert_close(everything(*tensors), everything(*(tensors + noise)), rtol=0, atol=0)


def test_the_kl_controllers_arithmetic():
    found = adapted_beta(0.15, kl=60, n=24, target=6, horizon=10_000)  # far above: the error is cut to 0.2
    assert found == pytest.approx(0.15 * (1 + 0.2 * 24 / 10_000))
    found = adapted_beta(0.15, kl=5.4, n=100, target=6, horizon=10_000)  # 10% below
    assert found == pytest.approx(0.15 * (1 - 0.1 * 100 / 10_000))


def test_running_moments_by_hand():
    moments = RunningMoments()
    assert moments.normalize(torch.tensor([3.0, 3.0])).tolist() == [0, 0] and moments.std == 1
    # of 3, 3, 0 and 6: mean 3, variance 18 / 4
    assert moments.normalize(torch.tensor([0.0, 6.0])).tolist() == pytest.approx([-(2**0.5), 2**0.5])
    assert (moments.count, moments.mean, moments.std) == (4, 3, pytest.approx(4.5**0.5))


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_everything_seen(batches):
    moments = RunningMoments()
    for batch in batches:
        normalized = moments.normalize(torch.tensor(batch, dtype=torch.float64))
    seen = np.concatenate(batches)
    assert moments.mean == pytest.approx(seen.mean(), abs=1e-9)
    if seen.std() > 1e-2:
        assert moments.std == pytest.approx(seen.std())
        assert normalized.numpy() == pytest.approx((np.array(batches[-1]) - seen.mean()) / seen.std(), abs=1e-4)


def test_li_is_over_the_turns_whose_reaction_is_known():
    rewards = torch.tensor([0.5, 1.0, -1.0], requires_grad=True)
    loss = li_loss(rewards, torch.tensor([1.0, torch.nan, 0.0]))
    assert loss.item() == pytest.approx((0.25 + 1) / 2)
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert gradient.tolist() == pytest.approx([-0.5, 0, -1])
    nothing = li_loss(rewards, torch.full((3,), torch.nan))
    (gradient,) = torch.autograd.grad(nothing.nan_to_num(), rewards)  # as stage 2 adds it to GE's
    assert nothing.isnan() and gradient.tolist() == [0, 0, 0]
