"""The PPO loop on a small Llama: what must hold exactly, and that it learns."""

import copy

import numpy as np
import pytest
import torch
from conftest import small_model
from known_optimum import GOOD, make_model, prompts, reached, run_ppo, share_of_good_words

from models import load_policy
from ppo import PPO, PPOConfig, Rollout, cut_responses, diagnose
from runs import make_accelerator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("optimum") / "llama", seed=0)


def make_ppo(model, score=share_of_good_words, **changes) -> PPO:
    torch.manual_seed(0)
    options = dict(batch_size=8, mini_batch_size=4, accumulation_steps=1, min_new_tokens=12, max_new_tokens=12)
    accelerator = make_accelerator("cpu", "float32")
    return PPO(load_policy(str(model), 4, 8, torch.float32), score, PPOConfig(**{**options, **changes}), accelerator, 0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def some_prompts(n=8, seed=0):
    return prompts(np.random.default_rng(seed), n)


def uniforms(n=8, length=12, seed=3):
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(ppo: PPO) -> PPO:
    """With an adapter and values that are not zero any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in ppo.policy.trainable():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return ppo


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "blenderbot"])
def test_the_first_minibatchs_ratio_is_1(kind, sample, tmp_path):
    """Rollout and update have the same numerics, and no dropout."""
    ppo = shaken(make_ppo(small_model(kind, tmp_path / kind, sample)))
    rollout = ppo.rollout(some_prompts(), uniforms())
    old = ppo.look(rollout)
    for chosen in (np.array([6, 1, 3, 0]), np.array([2])):  # other neighbours, other padding
        logprobs, values, _ = ppo.policy(*rollout.rows(chosen))
        ratio = (logprobs - old["logprobs"][chosen]).exp()
        assert (ratio - 1).abs().max() < 1e-5
        torch.testing.assert_close(values, old["values"][chosen], atol=1e-5, rtol=1e-4)
    assert not any(module.training for module in ppo.policy.modules())


def test_kl_is_0_at_the_start_and_the_reference_stays_where_it_is(model):
    ppo = make_ppo(model)
    rollout = ppo.rollout(some_prompts(), uniforms())
    old = ppo.look(rollout)
    torch.testing.assert_close(old["logprobs"], old["ref_logprobs"], atol=5e-6, rtol=0)
    exact = ppo.look(rollout._replace(states=None))
    assert torch.equal(exact["logprobs"], exact["ref_logprobs"])
    shaken(ppo)
    again = ppo.look(rollout._replace(states=None))
    assert torch.equal(again["ref_logprobs"], old["ref_logprobs"])
    assert not torch.allclose(again["logprobs"], old["logprobs"])


def test_the_kl_estimate_is_unbiased(model):
    """Mean over samples of log pi - log pi_ref of the first token is the exact KL, summed over the vocabulary."""
    ppo = shaken(make_ppo(model))
    prompt = some_prompts(1)
    query = ppo.policy.tokenize([prompt[0].text])
    tokens = torch.arange(ppo.policy.model.config.vocab_size)[:, None]
    everything = (*(x.expand(len(tokens), -1) for x in query), tokens, torch.ones(len(tokens), 1))
    with torch.no_grad():
        log_p = ppo.policy(*everything)[0][:, 0]
        with ppo.policy.reference():
            log_q = ppo.policy(*everything)[0][:, 0]
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    torch.manual_seed(0)
    rollout = ppo.rollout(prompt * 4000, uniforms(4000, 1))
    old = ppo.look(rollout)
    samples = (old["logprobs"] - old["ref_logprobs"])[:, 0]
    assert exact > 0.05
    assert samples.mean().item() == pytest.approx(exact, abs=4 * samples.std().item() / 4000**0.5)


def test_a_response_does_not_depend_on_who_else_is_in_the_batch(model):
    ppo = shaken(make_ppo(model))
    whole = ppo.rollout(some_prompts(), uniforms()).texts
    part = ppo.rollout(some_prompts()[5:2:-1], uniforms()[[5, 4, 3]]).texts
    assert part == whole[5:2:-1] and len(set(whole)) > 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "blenderbot"])
def test_what_a_response_was_drawn_from_is_what_a_forward_pass_gives(kind, sample, tmp_path):
    ppo = shaken(make_ppo(small_model(kind, tmp_path / kind, sample)))
    rollout = ppo.rollout(some_prompts(), uniforms())
    assert rollout.states is not None
    drawn, passed = ppo.look(rollout), ppo.look(rollout._replace(states=None))
    for name in drawn:
        torch.testing.assert_close(drawn[name], passed[name], atol=5e-6, rtol=1e-5)


def test_accumulated_gradients_are_those_of_one_large_batch(model):
    gradients = []
    for mini_batch, accumulation in ((8, 1), (2, 4), (3, 3)):
        ppo = shaken(make_ppo(model, mini_batch_size=mini_batch, accumulation_steps=accumulation))
        rollout = ppo.rollout(some_prompts(), uniforms())
        rollout.mask[2, 3:] = 0  # responses of different lengths
        old = {name: value + 0.1 * rollout.mask for name, value in ppo.look(rollout).items()}
        generator = torch.Generator().manual_seed(1)
        advantages, returns = torch.randn(2, *rollout.mask.shape, generator=generator) * rollout.mask
        seen = {}
        ppo.optimizer.step = lambda ppo=ppo, seen=seen: seen.update(
            gradient=torch.cat([p.grad.flatten() for p in ppo.policy.trainable() if p.grad is not None])
        )
        ppo._optimizer_step(rollout, old, advantages, returns, np.arange(8))
        gradients.append(seen["gradient"])
    assert gradients[0].abs().sum() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_what_is_behind_the_cut_has_no_part_in_an_update(model):
    changes = []
    for noise in (False, True):
        ppo = shaken(make_ppo(model))
        torch.manual_seed(3)
        rollout = ppo.rollout(some_prompts(), uniforms())
        rollout.mask[:, 5:] = 0
        rollout.mask[1, 1:] = 0
        if noise:  # other tokens behind the cut, and in the padding of the prompts
            behind = rollout.mask == 0
            rollout.response[behind] = torch.randint(4, 60, (int(behind.sum()),))
            padding = rollout.query_mask == 0
            rollout.query[padding] = torch.randint(4, 60, (int(padding.sum()),))
        old = ppo.look(rollout)
        advantages = returns = rollout.mask * 0.5
        ppo.rng = np.random.default_rng(0)
        ppo.update(rollout, old, advantages, returns, 8)
        changes.append(torch.cat([p.detach().flatten() for p in ppo.policy.trainable()]))
    torch.testing.assert_close(*changes, atol=1e-6, rtol=1e-5)


def test_a_response_that_is_empty_after_cutting_carries_its_score_on_its_first_token(model):
    from models import token_rewards

    response = torch.tensor([[2, 7, 7], [7, 7, 2]])  # 2 is the end token
    kept, texts = cut_responses(response, lambda rows: ["x" * sum(t > 3 for t in row) for row in rows], end=2)
    assert kept.tolist() == [1, 3] and texts == ["", "xx"]
    mask = (torch.arange(3) < kept[:, None]).float()
    rewards = token_rewards(torch.tensor([5.0, 7.0]), torch.zeros(2, 3), torch.zeros(2, 3), mask, 0.1)
    assert rewards.tolist() == [[5, 0, 0], [0, 0, 7]]
    assert share_of_good_words(None, [""]).item() == 0


def test_generation_stops_when_every_response_has_reached_a_marker(model):
    ppo = make_ppo(model)
    calls = []

    def texts(tokens):
        calls.append(len(tokens[0]) if len(tokens) else 0)
        return ["AI:" if len(row) >= 3 else "" for row in tokens]

    ppo._texts = texts
    query = ppo.policy.tokenize([prompt.text for prompt in some_prompts()])
    assert (
        ppo.policy.generate(*query, uniforms(), ppo._reached_a_marker)[0].shape[1] == 4
    )  # looked at every fourth token
    assert ppo.policy.generate(*query, uniforms())[0].shape[1] == 12


def test_padding_that_a_minibatch_does_not_need_is_left_out():
    query_mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    rollout = Rollout(torch.arange(9).view(3, 3), query_mask, torch.zeros(3, 2), torch.ones(3, 2), ["", "", ""])
    assert rollout.rows([0, 1])[0].tolist() == [[1, 2], [4, 5]]
    assert rollout.rows([2])[0].tolist() == [[6, 7, 8]]


def test_it_reaches_90_percent_of_a_known_optimum_with_bounded_kl(model):
    rows = run_ppo(model, seed=0, steps=90, until=0.9)
    assert reached(rows, 0.9)
    # no policy gets there for less than 16 * (0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5)) = 5.9 nats
    assert 5 < np.mean([row["kl"] for row in rows[-3:]]) < 40


def test_with_a_large_beta_it_stays_at_the_reference(model):
    rows = run_ppo(model, seed=0, steps=25, beta=20.0)
    assert np.mean([row["kl"] for row in rows[-5:]]) < 0.5
    assert np.mean([row["score_mean"] for row in rows[-5:]]) < 0.6


def test_with_a_random_reward_it_does_not_drift(model):
    rng = torch.Generator().manual_seed(0)
    rows = run_ppo(model, seed=0, steps=25, score=lambda _, responses: torch.rand(len(responses), generator=rng))
    assert np.mean([row["kl"] for row in rows[-5:]]) < 3  # with the real reward it is above 10 by then
    assert rows[-1]["entropy"] > 0.8 * rows[0]["entropy"]


def test_the_same_seed_gives_the_same_steps(model):
    first, second = (run_ppo(model, seed=3, steps=3) for _ in range(2))
    timed = [key for key in first[0] if key.startswith("seconds")]
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


FINE = dict(
    kl=4.0, entropy=3.0, cut_at_length_share=0.3, score_std=0.2, score_mean=0.1, value_loss=1.0, explained_variance=0.2
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(kl=100.0), "KL runs away: 100.0 nats a response"),
        (dict(entropy=0.1), "entropy collapses: 0.10 nats a token, 3.00 at the start"),
        (dict(cut_at_length_share=1.0), "all responses are cut at their length limit"),
        (dict(score_std=0.0), "scores are saturated"),
        (dict(score_mean=-0.99), "scores are saturated"),
        (dict(explained_variance=-2.0), "the value loss does not fall"),
    ],
)
def test_a_run_that_goes_wrong_says_so(change, said):
    good = [dict(FINE) for _ in range(30)]
    assert diagnose(good, PPOConfig()) == []
    assert diagnose(good[:5], PPOConfig()) == []
    bad = copy.deepcopy(good)
    for row in bad[8:]:
        row.update(change)
    (found,) = diagnose(bad, PPOConfig())
    assert found.startswith(said)


def test_half_of_the_words_are_good():
    assert len(GOOD) == 30
    assert share_of_good_words(None, ["w00 w59", "w01", "w45"]).tolist() == [0.5, 1, 0]
