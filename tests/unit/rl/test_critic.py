"""The ridge critic."""

import torch

from geli.rl.critic import RidgeCritic


def some_states(n=400, length=6, hidden=5):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, length, hidden, generator=generator)
    kept = torch.randint(1, length + 1, (n,), generator=generator)
    return states, (torch.arange(length) < kept[:, None]).float()


def test_it_learns_what_the_sum_of_states_says():
    """The score is the sum of the first entry over the response: the best prediction is the sum so far."""
    states, mask = some_states()
    scores = (states[..., 0] * mask).sum(dim=1)
    critic = RidgeCritic()
    assert not critic.values(states, mask).any()
    for _ in range(20):
        critic.update(states, mask, scores, lambda x: x)
    values, last = critic.values(states, mask), mask.sum(dim=1).long() - 1
    found = values[torch.arange(len(last)), last]
    assert torch.corrcoef(torch.stack([found, scores]))[0, 1] > 0.9 and not values[mask == 0].any()  # last state: 0.5


def test_states_behind_the_cut_do_not_matter():
    states, mask = some_states()
    scores = states[:, 0, 0]
    values = []
    for noise in (0, 9):
        critic = RidgeCritic()
        critic.update(states + noise * (1 - mask[..., None]), mask, scores, lambda x: x)
        values.append(critic.values(states + noise * (1 - mask[..., None]), mask))
    assert torch.equal(*values) and values[0].any()
