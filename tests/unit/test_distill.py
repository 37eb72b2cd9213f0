"""Best-of-n distilled."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from experiments.known_optimum import make_model, prompts, share_of_good_words
from geli.distill import Distillation, chance_of_best
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.rl.rollout import logprobs_and_values
from geli.run.distributed import make_accelerator
from models import PPO_PRESETS


def test_the_chance_of_being_best_by_hand():
    # of two drawn from two with replacement, the better one is the best in 3 of 4 draws
    assert chance_of_best(torch.tensor([[0.0, 1.0], [5.0, 5.0]])).tolist() == [[0.5, 1.5], [1, 1]]
    three = chance_of_best(torch.tensor([[3.0, 1.0, 3.0]]))  # 1: 1/27 of the draws; the others share the rest
    assert three.tolist()[0] == pytest.approx([13 / 9, 1 / 9, 13 / 9])


@pytest.fixture
def loop(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    policy = load_policy(str(make_model(tmp_path / "llama", seed=0)), Adapter(4, 8, 1), torch.float32)
    settings = replace(
        PPO_PRESETS["small"], batch_size=32, num_generations=8, mini_batch_size=32, gradient_accumulation_steps=1,
        min_new_tokens=8, max_new_tokens=8,
    )  # fmt: skip
    return Distillation(policy, share_of_good_words, settings, make_accelerator("cpu", "float32"), 0)


def some_prompts(rng_seed):
    return [p._replace(name=str(i)) for i, p in enumerate(prompts(np.random.default_rng(rng_seed), 4))]


def test_what_the_reward_likes_gets_likelier(loop):
    first, texts = loop.step(some_prompts(0), update=False)
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["effective_share"] == pytest.approx(1, abs=1e-4)
    assert first["score_mean"] == pytest.approx(share_of_good_words(None, texts).mean().item(), abs=1e-5)
    _, batch, _ = loop._respond(some_prompts(1))
    weights = chance_of_best(share_of_good_words(None, batch.texts).view(-1, 8)).flatten()
    old = logprobs_and_values(loop.policy, batch, 32)
    for _ in range(5):
        loop._update(batch, partial(loop._losses, batch, old, weights), 32)
    new = logprobs_and_values(loop.policy, batch._replace(states=None), 32)
    change = (new["logprobs"] - old["logprobs"]).sum(dim=1)
    assert change[weights > 1].mean() > 0.05 > 0 > change[weights < 0.5].mean()


def test_with_equal_weights_the_loss_is_the_exact_kl_of_the_reference(loop):
    _, batch, _ = loop._respond(some_prompts(2))
    old, part = logprobs_and_values(loop.policy, batch, 32), np.arange(32)
    adapter = [p for name, p in loop.policy.named_parameters() if p.requires_grad and "value_head" not in name]
    with torch.no_grad():
        for p in adapter:
            p.add_(0.05)
    ones = torch.ones(32)
    exact = loop._losses(batch, old, ones, part, 1.0)[0]
    states = loop.policy.states(*batch.rows(part))
    kl = loop.policy.logprobs_from_hidden(old["ref_states"], batch.response, batch.mask, states)[-1].sum()
    assert exact.item() == pytest.approx(kl.item(), rel=1e-5) and kl > 0


def test_with_equal_scores_nothing_is_learned(loop):
    loop.score = lambda prompts, texts: torch.zeros(len(texts))
    logged, texts = loop.step(some_prompts(0))
    assert logged["gradient_norm"] == pytest.approx(0, abs=1e-6) and len(texts) == 32
