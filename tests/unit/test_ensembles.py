"""Ensembles of reward heads, and heads that do not follow the surface of texts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from geli.heads import load_reward_head, save_reward_head, score_as
from geli.reward import GELIReward
from geli.run.errors import UserError
from models import HEADS, Head, RewardEnsemble, RewardHead, RewardHeadConfig, new_reward_head, surface_correlations

CONFIG = RewardHeadConfig(
    head="small_model_shrink", hidden=16, encoder="lang_model_x", encoder_is_folder=True, max_length=512,
    context_turns=20, stage=2, reward_class="overall_affect", redist_type="RRD", members=3,
)  # fmt: skip
FEATURES = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def two_lines(monkeypatch):
    """Two linear heads of one feature: 2 x and 4 x + 1."""
    monkeypatch.setitem(HEADS, "linear", Head(lambda hidden: torch.nn.Sequential(torch.nn.Linear(hidden, 1)), ""))
    ensemble = RewardEnsemble(replace(CONFIG, head="linear", hidden=1, members=2))
    with torch.no_grad():
        for p, value in zip(ensemble.parameters(), (2.0, 0.0, 4.0, 1.0), strict=True):
            p.fill_(value)
    return ensemble


def saved(folder, **changes):
    """An ensemble, and its file."""
    torch.manual_seed(0)
    head = new_reward_head(replace(CONFIG, **changes))
    save_reward_head(head, folder / "reward1_x")
    return head.eval(), folder / "reward1_x"


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_what_an_ensemble_of_two_lines_scores_by_hand(two_lines, tmp_path):
    x = torch.tensor([[1.0], [-0.5]])  # rewards of the heads: 2 and 5; -1 and -1
    assert two_lines(x).flatten().tolist() == [3.5, -1]
    # of 2 and 5 the standard deviation is sqrt((1.5^2 + 1.5^2) / (2 - 1)) = 2.12132; half of it is taken off
    lower = score_as(two_lines, tmp_path, "lower", 0.5)
    assert lower(x).flatten().tolist() == pytest.approx([3.5 - 1.06066, -1], abs=1e-5)
    weights = score_as(two_lines, tmp_path, "weights")
    assert type(weights) is RewardHead and [p.item() for p in weights.parameters()] == [3, 0.5]
    assert weights(x).flatten().tolist() == [3.5, -1]  # of lines the mean of weights is the mean of rewards
    assert weights.config == replace(two_lines.config, members=1)


def test_the_mean_of_weights_is_not_the_mean_of_rewards_behind_a_relu(tmp_path):
    head, _ = saved(tmp_path)
    weights = score_as(head, tmp_path, "weights")
    first = torch.stack([member.layers[0].weight for member in head.members]).mean(dim=0)
    assert torch.equal(weights.layers[0].weight, first) and not weights.training
    assert (weights(FEATURES) - head(FEATURES)).abs().max() > 1e-3


def test_what_one_head_or_another_start_cannot_do_is_refused(tmp_path):
    one, path = saved(tmp_path, members=1)
    assert score_as(one, path) is one
    for how in ("lower", "weights"):
        with pytest.raises(UserError, match=f"--ensemble {how}: .*reward1_x is one head: train several"):
            score_as(one, path, how)
    with pytest.raises(UserError, match="ensemble median: expected one of mean, lower, weights"):
        score_as(one, path, "median")
    with pytest.raises(UserError, match="reward1_x started from different weights"):
        score_as(saved(tmp_path, li=False)[0], path, "weights")
    with pytest.raises(UserError, match="one head has no spread"):
        GELIReward(None, one, path=path).spread([], [])


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_an_ensemble_is_one_file_and_comes_back_as_it_was(tmp_path):
    head, path = saved(tmp_path, decorrelate=0.5)
    again = load_reward_head(path)
    assert again.config == head.config and not again.training and torch.equal(again(FEATURES), head(FEATURES))
    each = again.each(FEATURES)
    assert each.shape == (3, 9, 1) and not torch.equal(each[0], each[1])
    torch.testing.assert_close(again(FEATURES), each.mean(dim=0))
    with safe_open(path, "pt") as file:
        assert {name.split(".layers")[0] for name in file.keys()} == {"heads.0", "heads.1", "heads.2"}  # noqa: SIM118


def test_the_file_of_one_head_does_not_mention_ensembles(tmp_path):
    with safe_open(saved(tmp_path, members=1)[1], "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert not config.keys() & {"members", "decorrelate"}
    assert config.keys() > {"head", "encoder", "li", "ep_len", "sentiment_model"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 2}, "its tensors are"),
        ({"members": 1 << 30}, "it has 12 tensors, too few for"),  # refused before so many are made
        ({"members": 0}, "members: expected at least 1"),
        ({"stage": 1}, "members: expected 1 of stage 1 or a sequential head, found 3"),
        ({"head": "rudder"}, "members: expected 1 of stage 1 or a sequential head, found 3"),
    ],
)
def test_an_ensemble_that_does_not_fit_its_configuration_is_refused(tmp_path, changes, message):
    config = {"format": "geli-reward-head-1", **CONFIG.__dict__, **changes}
    save_file(RewardEnsemble(CONFIG).state_dict(), tmp_path / "reward1_odd", {"config": json.dumps(config)})
    with pytest.raises(UserError, match="does not fit its own configuration") as error:
        load_reward_head(tmp_path / "reward1_odd")
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Length and punctuation


def test_correlations_with_the_surface_by_hand():
    # 0, 0, 1 and 0, 1, 1: deviations (-1, -1, 2) / 3 and (-2, 1, 1) / 3, so 3 / sqrt(6 * 6) = 0.5
    surface = torch.tensor([[0.0, 7, 3], [1, 7, 2], [1, 7, 2]])  # the second is the same in all turns
    found = surface_correlations(torch.tensor([0.0, 0, 1]), surface)
    assert found.tolist() == pytest.approx([0.5, 0, -0.5])
    for rewards in ([0.3], [0.3, 0.3, 0.3]):  # of one turn, or of equal rewards
        rewards = torch.tensor(rewards, requires_grad=True)
        surface_correlations(rewards, surface[: len(rewards)]).square().sum().backward()
        assert rewards.grad.isfinite().all()


def test_correlations_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(50, 4))
    found = surface_correlations(torch.tensor(values[:, 0]), torch.tensor(values[:, 1:]))
    assert found.tolist() == pytest.approx(np.corrcoef(values.T)[0, 1:])


@pytest.mark.parametrize("weight", [0, 30])
def test_the_penalty_removes_a_planted_length_bias_and_keeps_the_rest(weight):
    """Targets are a turn's quality and its length, both features of a linear head, in batches of 50 turns."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.randn(2000, 2, generator=generator)
    turns[:, 1] += 0.3 * turns[:, 0]  # better turns are a little longer
    head = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for batch in turns.repeat(3, 1).split(50):
        rewards = head(batch).squeeze(1)
        loss = (rewards - batch.sum(dim=1)).square().mean()
        (loss + weight * surface_correlations(rewards, batch[:, 1:]).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        rewards = head(turns).squeeze(1)
    quality, length = (np.corrcoef(part, rewards)[0, 1] for part in (turns[:, 0] - 0.3 * turns[:, 1], turns[:, 1]))
    if weight:
        assert abs(length) < 0.1 and quality > 0.95
    else:
        assert length > 0.8
