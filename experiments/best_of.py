"""Best-of-n: for each prompt, the response with the highest reward of n samples of the reference policy.

It shows what a reward prefers without any training of a policy in between.
"""

from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import spearmanr

from geli.nets.policy import Policy
from geli.nets.prompts import Prompt
from geli.rl.rollout import draw_length, draw_uniforms, rollout
from geli.run.console import progress_bar
from geli.run.files import read_json_or_empty, write_json
from tools.hidden_reward import hidden_reward

BEST_OF = "best-of-"  # with N behind it, the name of what is compared with algorithms that train


@torch.no_grad()
def sample_responses(
    policy: Policy, prompts: Sequence[Prompt], folder: Path, n: int, *, seed: int, batch_size: int,
    min_new_tokens: int, max_new_tokens: int,
) -> list[list[str]]:  # fmt: skip
    """n times a response to each prompt by the reference policy. Sample k is kept as `folder/k.json` and not drawn
    again."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in progress_bar(range(n), desc="sampling", unit="sample"):
        if read_json_or_empty(folder / f"{k}.json"):
            continue
        rng, generator = np.random.default_rng([seed, k]), torch.Generator().manual_seed(1000 * seed + k + 1)
        texts = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            uniforms = draw_uniforms(len(batch), draw_length(rng, min_new_tokens, max_new_tokens), generator)
            with policy.reference():
                texts += rollout(policy, batch, uniforms).texts
        write_json(folder / f"{k}.json", {"texts": texts}, private=True)
    return [read_json_or_empty(folder / f"{k}.json")["texts"] for k in range(n)]


def kl_of_best(rewards: np.ndarray, n: int) -> float:
    """The KL of best-of-n to the reference in nats, in the mean of the prompts: sum over the values of the reward of
    q log(q/p), where p is the chance of the value and q that of being the best of n. Without ties it is about
    ln n - (n - 1)/n (Beirami et al., 2024), and with ties less.

    Args:
        rewards: (k, m) of k samples for each of m prompts, whose shares are taken as chances.
    """
    found = []
    for column in rewards.T:
        p = np.unique(column, return_counts=True)[1] / len(column)
        q = np.diff(p.cumsum() ** n, prepend=0)
        found.append(rel_entr(q, p).sum())
    return float(np.mean(found))


def expected_best(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """(m,) expected values of the sample with the highest reward among n of the k samples of each of m prompts.

    The average over all subsets of n, in closed form: the sample with the i-th lowest reward (from 0) is the best of
    C(i, n - 1) of them. Samples with equal rewards share their chance.

    Args:
        rewards, values: (k, m).
    """
    k = len(rewards)
    weights = np.array([comb(i, n - 1) / comb(k, n) for i in range(k)])
    found = np.empty(rewards.shape[1])
    for column in range(rewards.shape[1]):
        order = np.argsort(rewards[:, column], kind="stable")
        _, tie = np.unique(rewards[order, column], return_inverse=True)
        shared = np.bincount(tie, weights) / np.bincount(tie)
        found[column] = shared[tie] @ values[order, column]
    return found


def best_of(samples: Sequence[Sequence[str]], score: Callable, prompts: Sequence[Prompt]) -> dict:
    """What a reward chooses.

    Args:
        samples: k times responses to m prompts. score: (prompts, responses) -> (m,) rewards.

    Returns:
        `points`: for n = 1, 2, 4, … and k the `kl` of best-of-n and `gold`, the expected hidden reward for each prompt;
        `texts`: the best of all k; `order`: for each prompt the rank correlation of reward and hidden reward among the
        responses to it, None where one of them does not differ; `within`: the share of the reward's variance that is
        among the responses to one prompt, which is all that a policy can learn from (Razin et al., 2025,
        arXiv 2503.15477), 0 of a constant reward.
    """
    k = len(samples)
    rewards = np.array([np.asarray(score(prompts, texts), dtype=float) for texts in samples])
    hidden = np.array([[hidden_reward(text) for text in texts] for texts in samples])
    sizes = sorted({*(2**i for i in range(k.bit_length())), k})
    order = [
        float(spearmanr(ours, truth).statistic) if np.ptp(ours) and np.ptp(truth) else None
        for ours, truth in zip(rewards.T, hidden.T, strict=True)
    ]
    return {
        "points": [
            {"n": n, "kl": kl_of_best(rewards, n), "gold": expected_best(rewards, hidden, n).tolist()} for n in sizes
        ],
        "texts": [samples[best][i] for i, best in enumerate(rewards.argmax(axis=0))],
        "order": order,
        "within": float(rewards.var(axis=0).mean() / max(rewards.var(), 1e-12)),
    }
