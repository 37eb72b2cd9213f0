"""Measures a policy on held-out prompts, whichever algorithm trained it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from geli.data.words import count_words
from geli.nets.policy import Policy
from geli.nets.prompts import Prompt
from geli.rl.rollout import distinct, draw_length, draw_uniforms, ended_themselves, logprobs_and_values, rollout
from geli.run.console import progress_bar
from geli.run.distributed import gather_parts, local_part
from geli.statistics import mean_interval

LEAST_KL = 0.2  # nats a response


class Evaluation(NamedTuple):
    """A policy's responses to n held-out prompts.

    Attributes:
        metrics: `reward` with its 95% interval over conversations (`reward_low`, `reward_high`) and its standard
            deviation over responses (`reward_std`), `gold` and `gold_std`, `kl` in nats a response, `response_words`,
            `ended_share` of the responses that end with the end token, `empty_share`, `distinct_1`, `distinct_2`.
        texts: (n,) responses in the order of the prompts.
        rewards: (n,) of each; None where no reward was measured.
    """

    metrics: dict[str, float]
    texts: list[str]
    rewards: list[float] | None


class Comparison:
    """What is measured of the reference, the tuned policy and people on the same held-out prompts.

    Args:
        evaluate: policy -> `Evaluation`. prompts: the held-out prompts.

    Attributes:
        metrics: of the reference `before`, of the tuned policy `after`, their difference in reward `gain` with its
            `efficiency` (and `gold_efficiency`), and of the `human` answers, where measured.
        texts: responses of `base` and `tuned`. rewards: of the reference's responses and the human answers.
    """

    def __init__(self, evaluate: Callable, prompts: Sequence[Prompt]):
        self.evaluate, self.prompts = evaluate, prompts
        self.metrics: dict[str, dict] = {}
        self.texts: dict[str, list[str]] = {}
        self.rewards: list[float] = []

    def reference(self, policy: Policy) -> None:
        """Measures the reference policy."""
        with policy.reference():
            self.metrics["before"], self.texts["base"], rewards = self.evaluate(policy)
        self.rewards += rewards or []

    def human(self, score: Callable, gold: Callable | None, accelerator: Accelerator) -> None:
        """Measures the human answers."""
        answers = [prompt.human for prompt in self.prompts]
        rewards = score_together(score, self.prompts, answers, accelerator).tolist()
        self.rewards += rewards
        self.metrics["human"] = reward_with_interval(rewards, self.prompts)
        if gold:
            self.metrics["human"]["gold"] = gold(self.prompts, answers).mean().item()

    def tuned(self, policy: Policy) -> None:
        """Measures the tuned policy, after the reference."""
        self.metrics["after"], self.texts["tuned"], rewards = self.evaluate(policy)
        if rewards:
            before, after = self.metrics["before"], self.metrics["after"]
            gain = reward_with_interval(np.subtract(rewards, self.rewards[: len(rewards)]), self.prompts)
            for name in ("reward", "gold"):
                if name in after:
                    paid = efficiency(after[name] - before[name], before[f"{name}_std"], after["kl"])
                    gain["efficiency" if name == "reward" else "gold_efficiency"] = paid
            self.metrics["gain"] = gain


@torch.no_grad()
def evaluate_policy(
    policy: Policy, score: Callable | None, prompts: Sequence[Prompt], accelerator: Accelerator, *, seed: int,
    batch_size: int, mini_batch_size: int, min_new_tokens: int, max_new_tokens: int, gold: Callable | None = None,
) -> Evaluation:  # fmt: skip
    """Samples a response to every prompt and measures reward, KL to the reference policy, length and diversity.

    All random numbers come from `seed`. Two policies are therefore compared on the same prompts, length limits and
    draws, and an evaluation does not change the training that follows it.

    Args:
        score: (prompts, responses) -> (n,) rewards, or None to measure no reward.
        prompts: the same in every process. batch_size: prompts that are generated together, in all processes.
        mini_batch_size: responses in a forward pass. min_new_tokens, max_new_tokens: range of a batch's length limit.
        gold: as `score`, a reward that is not trained on.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    texts, kls, ended = [], [], []
    for first in progress_bar(range(0, len(prompts), batch_size), desc="answering held-out prompts", unit="batch"):
        batch = prompts[first : first + batch_size]
        uniforms = draw_uniforms(len(batch), draw_length(rng, min_new_tokens, max_new_tokens), generator)
        mine, my_uniforms = local_part(batch, accelerator), local_part(uniforms, accelerator)
        my_texts, my_kls, my_ended = [], [], []
        if len(mine):
            my_texts, my_kls, my_ended = _sample(policy, mine, my_uniforms, mini_batch_size)
        elif policy.is_sharded:  # a sharded policy needs every process in each forward pass
            _sample(policy, batch[:1], uniforms[:1], mini_batch_size)
        texts += gather_parts(my_texts, accelerator)
        kls += gather_parts(my_kls, accelerator)
        ended += gather_parts(my_ended, accelerator)
    metrics, rewards = {}, None
    if score:
        rewards = score_together(score, prompts, texts, accelerator).tolist()
        metrics |= {**reward_with_interval(rewards, prompts), "reward_std": float(np.std(rewards))}
    if gold:
        found = gold(prompts, texts)
        metrics |= {"gold": found.mean().item(), "gold_std": found.std(unbiased=False).item()}
    metrics |= {
        "kl": float(np.mean(kls)),
        "response_words": float(np.mean([count_words(text) for text in texts])),
        "ended_share": float(np.mean(ended)),
        "empty_share": float(np.mean([not text for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }
    return Evaluation(metrics, texts, rewards)


def _sample(
    policy: Policy, prompts: Sequence[Prompt], uniforms: torch.Tensor, mini_batch_size: int
) -> tuple[list[str], list[float], list[bool]]:
    """A response to each prompt, the KL of the policy's token distributions from the reference's summed over it, in
    nats, and whether it ends with the end token."""
    sampled = rollout(policy, prompts, uniforms)
    kl = logprobs_and_values(policy, sampled, mini_batch_size)["kl"].sum(dim=1)
    return sampled.texts, kl.tolist(), ended_themselves(sampled, policy.ends).tolist()


def efficiency(gain: float, std: float, kl: float) -> float | None:
    """What a policy gained for the KL that it spent: `gain` / (`std` sqrt(2 `kl`)), where `std` is the standard
    deviation of the reference's rewards. Of all policies with this KL, the best one's is 1 if they are normal (see
    docs/method.md). None below `LEAST_KL`, where it is a ratio of two small numbers."""
    return gain / (std * (2 * kl) ** 0.5) if kl >= LEAST_KL and std > 0 else None


def reward_with_interval(rewards: Sequence[float], prompts: Sequence[Prompt]) -> dict[str, float | None]:
    """The mean of rewards (n,), or of differences, and its 95% interval over the prompts' conversations; None for the
    interval of one conversation."""
    found = mean_interval(rewards, [prompt.name.partition("/")[0] for prompt in prompts])
    names = ("reward", "reward_low", "reward_high")
    return {name: None if np.isnan(number) else number for name, number in zip(names, found, strict=True)}


def score_together(
    score: Callable, prompts: Sequence[Prompt], responses: Sequence[str], accelerator: Accelerator
) -> torch.Tensor:
    """(n,) rewards of `responses` to `prompts`; each process computes its part."""
    mine = score(local_part(prompts, accelerator), local_part(responses, accelerator)).tolist()
    return torch.tensor(gather_parts(mine, accelerator))
