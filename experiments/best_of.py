"""Best-of-n: for each prompt, the response with the highest reward of n samples of the reference policy.

It shows what a reward prefers without any training of a policy in between.
"""

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from geli.data.words import count_words
from geli.nets.policy import Policy
from geli.nets.prompts import Prompt
from geli.rl.rollout import distinct, draw_length, draw_uniforms, ended_themselves, rollout
from geli.run.console import progress_bar
from geli.run.files import read_json_or_empty, write_json
from tools.hidden_reward import hidden_reward

BEST_OF = "best-of-"  # with N behind it, the name of what is compared with algorithms that train


@torch.no_grad()
def sample_responses(
    policy: Policy, prompts: Sequence[Prompt], folder: Path, n: int, *, seed: int, batch_size: int,
    min_new_tokens: int, max_new_tokens: int,
) -> list[dict]:  # fmt: skip
    """n samples of a response to each prompt by the reference policy, with `texts` and `ended` (whether it ended with
    the end token). Sample k is kept as `folder/k.json` and not drawn again."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in progress_bar(range(n), desc="sampling", unit="sample"):
        if read_json_or_empty(folder / f"{k}.json"):
            continue
        rng, generator = np.random.default_rng([seed, k]), torch.Generator().manual_seed(1000 * seed + k + 1)
        sample = {"texts": [], "ended": []}
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            uniforms = draw_uniforms(len(batch), draw_length(rng, min_new_tokens, max_new_tokens), generator)
            with policy.reference():
                responses = rollout(policy, batch, uniforms)
            sample["texts"] += responses.texts
            sample["ended"] += ended_themselves(responses, policy.ends).tolist()
        write_json(folder / f"{k}.json", sample)
    return [read_json_or_empty(folder / f"{k}.json") for k in range(n)]


def best_of(samples: Sequence[dict], score: Callable, prompts: Sequence[Prompt]) -> dict:
    """The responses that a reward chooses.

    Args:
        samples: n times the `texts` and `ended` of responses to m prompts. score: (prompts, responses) -> (m,) rewards.

    Returns:
        `texts`, and the measures of `evaluate_policy` of them; `gold`, their hidden rewards; `order`, the rank
        correlation of reward and hidden reward among the n responses to one prompt, in the mean of the prompts where
        both differ. `kl` is the bound log n - (n - 1) / n (Beirami et al., 2024).
    """
    n = len(samples)
    rewards = np.array([np.asarray(score(prompts, sample["texts"]), dtype=float) for sample in samples])
    hidden = np.array([[hidden_reward(text) for text in sample["texts"]] for sample in samples])
    chosen = rewards.argmax(axis=0)
    texts, ended = ([samples[k][key][i] for i, k in enumerate(chosen)] for key in ("texts", "ended"))
    order = [
        spearmanr(rewards[:, i], hidden[:, i]).statistic
        for i in range(len(prompts))
        if np.ptp(rewards[:, i]) and np.ptp(hidden[:, i])
    ]
    return {
        "texts": texts,
        "gold": [hidden_reward(text) for text in texts],
        "order": float(np.mean(order)) if order else None,
        "kl": log(n) - (n - 1) / n,
        "response_words": float(np.mean([count_words(text) for text in texts])),
        "ended_share": float(np.mean(ended)),
        "distinct_2": distinct(texts, 2),
    }
