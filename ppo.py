"""Stage 3's loop: PPO on rewards from a reward head, with a KL penalty to the reference policy.

One step, in order: 1 prompts, 2 generate, 3 cut, 4 log-probabilities and values, 5 score, 6 rewards and advantages,
7 update, 8 adapt beta. `PPO.step` is that list; each entry is a method.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cli import UserError
from models import (
    DONE_EVERY,
    MAX_NEW_TOKENS,
    AdaptiveKL,
    Policy,
    RunningMoments,
    TurnEncoder,
    gae,
    ppo_loss,
    token_rewards,
    whiten,
)
from runs import gather_shares, share, sum_gradients
from states import Trained

MARKERS = re.compile("User:|AI:")  # where a response stops being one turn
MARKER_TOKENS = 8 + DONE_EVERY  # of a response's end hold any marker that has come since the last look


class Prompt(NamedTuple):
    """A state of a real conversation.

    Attributes:
        text: the policy's input. context: what the reward's encoder sees. human: what the human answered.
        trajectory: (context, response) of all agent turns of that trajectory (one tuple, shared by its prompts).
        position: which of them this is; rewards that look back see those before it.
        name: conversation/flip/turn_id.
    """

    text: str
    context: str
    human: str
    trajectory: tuple[tuple[str, str], ...] = ()
    position: int = 0
    name: str = ""


class NotFinite(Exception):
    """A score, loss or gradient is not finite; what is, in words. Nothing of this optimizer step was applied."""


@dataclass(frozen=True)
class PPOConfig:
    """PPO's settings; defaults are the published ones (DESIGN.md section 4)."""

    learning_rate: float = 1.4e-5
    batch_size: int = 24
    mini_batch_size: int = 4
    accumulation_steps: int = 2
    ppo_epochs: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    beta: float = 0.15
    target_kl_response: float = 6.0
    horizon: float = 10_000
    target_kl: float = 1.0
    min_new_tokens: int = 32
    max_new_tokens: int = MAX_NEW_TOKENS


class Rollout(NamedTuple):
    """Responses to a batch of prompts: (n, Q) padded queries, (n, R) responses, `mask` 1 on kept tokens; `states`
    (n, R, hidden) that they were drawn from, where these have the update's numerics."""

    query: torch.Tensor
    query_mask: torch.Tensor
    response: torch.Tensor
    mask: torch.Tensor
    texts: list[str]
    states: torch.Tensor | None = None

    def rows(self, chosen) -> tuple[torch.Tensor, ...]:
        """The model's inputs for some of the responses; columns of their queries that are all padding are left out."""
        mask = self.query_mask[chosen]
        used = mask.any(dim=0)
        return self.query[chosen][:, used], mask[:, used], self.response[chosen], self.mask[chosen]


class RewardScorer:
    """Scores responses by a reward head on its own encoder: (prompts, responses) -> (n,) float32."""

    def __init__(self, encoder: TurnEncoder, head, autocast):
        self.encoder, self.head, self.autocast = encoder, head, autocast
        self._seen: dict[tuple[str, str], torch.Tensor] = {}  # features of real turns, which come again and again

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """Rewards of `responses` (without `AI:`) to `prompts`; of a sequential head (RUDDER's) given the agent turns
        before them."""
        pairs = [(prompt.context, f"AI: {response}") for prompt, response in zip(prompts, responses, strict=True)]
        features = self._encode(pairs)
        if self.head.sequential:
            rewards = self._given_the_turns_before(prompts, features)
        else:
            rewards = self.head(features.to(self.encoder.device)).squeeze(1)
        return rewards.float().cpu()

    def _encode(self, pairs) -> torch.Tensor:
        return self.encoder.encode(self.encoder.tokenize(pairs), self.autocast)

    def _given_the_turns_before(self, prompts: Sequence[Prompt], features: torch.Tensor) -> torch.Tensor:
        needed = {pair for prompt in prompts for pair in prompt.trajectory[: prompt.position]}
        new = sorted(needed - self._seen.keys())
        self._seen |= dict(zip(new, self._encode(new), strict=True))
        lengths = [prompt.position + 1 for prompt in prompts]
        turns = torch.zeros(len(prompts), max(lengths), features.shape[1])
        for row, (prompt, feature) in enumerate(zip(prompts, features, strict=True)):
            for t, pair in enumerate(prompt.trajectory[: prompt.position]):
                turns[row, t] = self._seen[pair]
            turns[row, prompt.position] = feature  # what is behind it does not matter: the head looks back only
        rewards = self.head(turns.to(self.encoder.device)).squeeze(2)
        return rewards[torch.arange(len(prompts)), torch.tensor(lengths) - 1]


class RandomScorer:
    """Random rewards in [-1, 1): a control, from which nothing should be learned. Drawn with `generator`."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """(n,)."""
        return torch.rand(len(responses), generator=self.generator) * 2 - 1


def cut_responses(response: torch.Tensor, texts_of: Callable, end: int) -> tuple[torch.Tensor, list[str]]:
    """How many tokens of each response are kept, and its text.

    A response ends with the first end token, which is kept (ending was the policy's choice) but is not text, or before
    the first `User:` or `AI:`. At least one token is kept: a response that is empty after cutting carries its score on
    its first token, and is scored as empty text.

    Args:
        response: (n, R) ids. texts_of: lists of ids -> their texts, without special tokens. end: the end token.

    Returns:
        (n,) tokens kept, and n texts.
    """
    ended = response == end
    places = torch.arange(1, response.shape[1] + 1, device=response.device)
    kept = torch.where(ended, places, response.shape[1]).min(dim=1).values.cpu()
    rows = [row[:n] for row, n in zip(response.tolist(), kept.tolist(), strict=True)]
    texts = texts_of(rows)
    for i, text in enumerate(texts):
        marker = MARKERS.search(text)
        if marker:  # the most tokens whose text stays before it
            prefixes = texts_of([rows[i][:n] for n in range(len(rows[i]) + 1)])
            kept[i] = max([1, *(n for n, prefix in enumerate(prefixes) if len(prefix) <= marker.start())])
            text = text[: marker.start()]
        texts[i] = text.strip()
    return kept, texts


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al., 2016): different n-grams of words over all of them; 0 when there are none."""
    grams = Counter()
    for text in texts:
        words = text.split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(grams) / max(sum(grams.values()), 1)


class PPO:
    """The loop's state: policy, optimizer, KL controller, running moments of the score, and the random state.

    Args:
        policy: what is trained. score: (prompts, responses) -> (n,) rewards, or
            None to generate only. config: settings.
        accelerator: `accelerate.Accelerator`. seed: of lengths, minibatches and sampling.
    """

    def __init__(self, policy: Policy, score: Callable | None, config: PPOConfig, accelerator, seed: int):
        from transformers.optimization import Adafactor

        self.policy, self.score, self.config, self.accelerator = policy, score, config, accelerator
        self.optimizer = Adafactor(
            policy.trainable(),
            lr=config.learning_rate,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
        if config.batch_size < accelerator.num_processes:
            raise UserError(
                f"--batch_size {config.batch_size}: expected at least one prompt for each of "
                f"{accelerator.num_processes} processes"
            )
        self.kl = AdaptiveKL(config.beta, config.target_kl_response, config.horizon)
        self.moments = RunningMoments()
        self.rng, self.sampling = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self._seconds: dict[str, float] = {}

    def state_dict(self) -> dict:
        """What a state of the loop consists of, but for its generators `rng` and `sampling`."""
        return {
            "policy": Trained(self.policy).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "beta": self.kl.beta,
            "moments": vars(self.moments).copy(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Puts a state back."""
        Trained(self.policy).load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl.beta = state["beta"]
        vars(self.moments).update(state["moments"])

    def step(self, prompts: Sequence[Prompt], update: bool = True) -> tuple[dict[str, float], list[str]]:
        """One PPO step on a batch of prompts; returns what is logged, and the responses.

        Args:
            prompts: n prompts, the same in every process; each rolls out and learns from its share.
            update: False rolls out and scores only.

        Raises:
            NotFinite: if a score, a loss or a gradient is not finite.
        """
        self._seconds = {}
        limit, mine = self.draw_length(), share(prompts, self.accelerator)
        with self._timed("generate"):
            rollout = self.rollout(mine, share(self.draw_uniforms(len(prompts), limit), self.accelerator))
        with self._timed("forward"):
            old = self.look(rollout)
        with self._timed("score"):
            scores = self.score(mine, rollout.texts)
            human = self.score(mine, [prompt.human for prompt in mine])
            all_scores = torch.tensor(gather_shares(scores.tolist(), self.accelerator))
            if not all_scores.isfinite().all():
                raise NotFinite("the score of a response")
            normalized = share(self.moments.normalize(all_scores), self.accelerator)
        mask, lengths = rollout.mask, rollout.mask.sum(dim=1)
        rewards = token_rewards(normalized.to(mask.device), old["logprobs"], old["ref_logprobs"], mask, self.kl.beta)
        advantages, returns = gae(rewards, old["values"], mask, self.config.gamma, self.config.lam)
        error = (returns - old["values"]) * mask
        total = self._sum(
            {
                "responses": torch.tensor(float(len(mine))),
                "tokens": mask.sum(),
                "human": human.sum(),
                "kl": ((old["logprobs"] - old["ref_logprobs"]) * mask).sum(),
                "entropy": (old["entropies"] * mask).sum(),
                "value": (old["values"] * mask).sum(),
                "return": (returns * mask).sum(),
                "return_squared": (returns**2 * mask).sum(),
                "error": error.sum(),
                "error_squared": (error**2).sum(),
                "advantage": (advantages * mask).sum(),
                "advantage_squared": (advantages**2 * mask).sum(),
                "ended": _ended(rollout, self.policy.end).sum(),
                "at_length": (lengths == limit).sum(),
            }
        )
        if not np.isfinite(list(total.values())).all():
            raise NotFinite("the policy's output")
        n, tokens = total["responses"], total["tokens"]
        texts = gather_shares(rollout.texts, self.accelerator)
        kl, returned = total["kl"] / n, _variance(total, "return", tokens)
        logged = {
            "score_mean": all_scores.mean().item(),
            "score_std": all_scores.std(unbiased=False).item(),
            "human_score_mean": total["human"] / n,
            "kl": kl,
            "beta": self.kl.beta,
            "entropy": total["entropy"] / tokens,
            "value_mean": total["value"] / tokens,
            "explained_variance": 1 - _variance(total, "error", tokens) / returned if returned > 0 else 0.0,
            "response_length_mean": tokens / n,
            "ended_share": total["ended"] / n,
            "cut_at_length_share": total["at_length"] / n,
            "empty_share": float(np.mean([not text for text in texts])),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
        }
        if update:
            advantages = whiten(advantages, mask, total["advantage"] / tokens, _variance(total, "advantage", tokens))
            with self._timed("update"):
                logged |= self.update(rollout, old, advantages, returns, len(prompts))
            self.kl.update(kl, len(prompts))
        return {**logged, **{f"seconds_{name}": value for name, value in self._seconds.items()}}, texts

    def _sum(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums over all processes, in one message."""
        stacked = torch.stack([value.detach().double().to(self.accelerator.device) for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))

    def score_together(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """(n,) scores, of which every process computes its share."""
        mine = self.score(share(prompts, self.accelerator), share(responses, self.accelerator)).tolist()
        return torch.tensor(gather_shares(mine, self.accelerator))

    def draw_uniforms(self, n: int, limit: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """(n, limit) random numbers that choose the tokens of n responses, the same in every process."""
        return torch.rand(n, limit, generator=generator or self.sampling, dtype=torch.float64)

    def draw_length(self) -> int:
        """The batch's limit of new tokens."""
        return int(self.rng.integers(self.config.min_new_tokens, self.config.max_new_tokens + 1))

    def rollout(self, prompts: Sequence[Prompt], uniforms: torch.Tensor) -> Rollout:
        """Samples a response to every prompt, by its row of `uniforms` (n, most tokens), and cuts it."""
        query, query_mask = self.policy.tokenize([prompt.text for prompt in prompts])
        response, states = self.policy.generate(query, query_mask, uniforms, self._reached_a_marker)
        kept, texts = cut_responses(response, self._texts, self.policy.end)
        mask = (torch.arange(int(kept.max()), device=response.device) < kept[:, None].to(response.device)).float()
        width = mask.shape[1]
        # in lower precision one token at a time rounds otherwise than all at once: then they are computed again
        states = states[:, :width] if states.dtype == torch.float32 else None
        return Rollout(query, query_mask, response[:, :width], mask, texts, states)

    def _texts(self, tokens) -> list[str]:
        return self.policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _reached_a_marker(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) whether the next speaker has begun in the responses so far (n, R): what follows would be cut off."""
        return torch.tensor([bool(MARKERS.search(text)) for text in self._texts(tokens[:, -MARKER_TOKENS:])])

    def _minibatches(self, n: int) -> range:
        """Where the minibatches of this process' n responses begin; of a policy that is spread as many as any process
        has, the last ones empty."""
        return range(0, self.policy.agree(n) if self.policy.agree else n, self.config.mini_batch_size)

    @torch.no_grad()
    def look(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Log-probabilities, values and entropies under the policy as it is, and the reference's log-probabilities."""
        columns = defaultdict(list)
        size = self.config.mini_batch_size
        for first in self._minibatches(len(rollout.texts)):
            inputs = rollout.rows(slice(first, first + size))
            if rollout.states is None:
                seen = self.policy(*inputs)
            else:
                seen = self.policy.read(rollout.states[first : first + size], *inputs[2:])
            for name, value in zip(("logprobs", "values", "entropies"), seen, strict=True):
                columns[name].append(value)
            with self.policy.reference():
                columns["ref_logprobs"].append(self.policy(*inputs)[0])
        return {name: torch.cat(parts) for name, parts in columns.items()}

    def update(self, rollout: Rollout, old: dict, advantages, returns, n: int) -> dict[str, float]:
        """PPO epochs over a batch in minibatches; stops early when the policy has moved too far.

        Args:
            rollout, old, advantages, returns: of this process' share of the batch. n: responses of all processes.
        """
        config = self.config
        totals: Counter = Counter()
        group_size = config.mini_batch_size * config.accumulation_steps
        stopped = False
        for _ in range(config.ppo_epochs):
            order = self.rng.permutation(n)  # the same in every process
            for first in range(0, n, group_size):
                group = order[first : first + group_size]
                sums = self._optimizer_step(rollout, old, advantages, returns, group)
                totals.update(sums)
                totals["optimizer_steps"] += 1
                stopped = sums["approx_kl"] / sums["tokens"] > 1.5 * config.target_kl
                if stopped:
                    break
            if stopped:
                break
        per_token = {name: totals[name] / totals["tokens"] for name in ("approx_kl", "policy_clipped", "value_clipped")}
        steps = totals["optimizer_steps"]
        return {
            "approx_kl": per_token["approx_kl"],
            "policy_clip_fraction": per_token["policy_clipped"],
            "value_clip_fraction": per_token["value_clipped"],
            "ratio_mean": totals["ratio"] / totals["tokens"],
            "policy_loss": totals["policy_loss"] / steps,
            "value_loss": totals["value_loss"] / steps,
            "gradient_norm": totals["gradient_norm"] / steps,
            "optimizer_steps": float(steps),
            "stopped_early": float(stopped),
        }

    def _optimizer_step(self, rollout, old, advantages, returns, group) -> dict[str, float]:
        """One optimizer step over the responses `group` (numbered over all processes), a minibatch at a time."""
        config, device = self.config, rollout.mask.device
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = group[group % processes == rank] // processes
        tokens = self._sum({"tokens": rollout.mask[mine].sum()})["tokens"]
        names = ("approx_kl", "policy_clipped", "value_clipped", "ratio", "policy_loss", "value_loss")
        sums = {name: torch.zeros((), device=device) for name in names}
        for first in self._minibatches(len(mine)):
            part = mine[first : first + config.mini_batch_size]
            logprobs, values, _ = self.policy(*rollout.rows(part))
            policy_loss, value_loss, found = ppo_loss(
                logprobs, values, old["logprobs"][part], old["values"][part], advantages[part], returns[part],
                rollout.mask[part], config.clip, config.value_clip, tokens,
            )  # fmt: skip
            self.accelerator.backward(policy_loss + config.value_coefficient * value_loss)
            for name, value in {**found, "policy_loss": policy_loss, "value_loss": value_loss}.items():
                sums[name] = sums[name] + value.detach()
        sums = {**self._sum(sums), "tokens": tokens}
        sums["gradient_norm"] = sum_gradients(self.policy.trainable(), self.accelerator)
        if not np.isfinite(list(sums.values())).all():
            self.optimizer.zero_grad()
            raise NotFinite("the loss or its gradient")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # what was asked for may still be computed
        self._seconds[phase] = time.perf_counter() - start

    @torch.no_grad()
    def evaluate(self, prompts: Sequence[Prompt], seed: int) -> tuple[dict[str, float], list[str]]:
        """Mean reward (without a scorer: none) and KL on held-out prompts, sampled with random numbers of its own, so
        that two policies are compared on the same prompts, lengths and draws, and training goes on as if it had not
        happened."""
        texts, kls = [], []
        rng, sampling = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        size = self.config.batch_size
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            limit = int(rng.integers(self.config.min_new_tokens, self.config.max_new_tokens + 1))
            uniforms = self.draw_uniforms(len(part), limit, sampling)
            mine = share(part, self.accelerator)
            found, kl = [], []
            if not mine and self.policy.agree:  # all take part: with a prompt that does not count
                self.look(self.rollout(part[:1], uniforms[:1]))
            if mine:
                rollout = self.rollout(mine, share(uniforms, self.accelerator))
                seen = self.look(rollout)
                kl = ((seen["logprobs"] - seen["ref_logprobs"]) * rollout.mask).sum(dim=1).tolist()
                found = rollout.texts
            texts += gather_shares(found, self.accelerator)
            kls += gather_shares(kl, self.accelerator)
        metrics = {}
        if self.score:
            scores = self.score_together(prompts, texts)
            metrics["reward"] = scores.mean().item()
            metrics["reward_standard_error"] = scores.std(unbiased=False).item() / len(scores) ** 0.5
        metrics |= {
            "kl": float(np.mean(kls)),
            "response_words": float(np.mean([len(text.split()) for text in texts])),
            "empty_share": float(np.mean([not text for text in texts])),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
        }
        return metrics, texts


def diagnose(steps: Sequence[dict[str, float]], config: PPOConfig, window: int = 20) -> list[str]:
    """What is going wrong, in words, from what the last steps logged; empty when nothing is.

    Args:
        steps: what `PPO.step` returned, in order. config: of the loop. window: steps that are looked at.
    """
    if len(steps) < window:
        return []
    last, first = steps[-window:], steps[: max(3, window // 4)]

    def mean(rows, name):
        return float(np.mean([row[name] for row in rows if name in row] or [np.nan]))

    found = []
    kl = mean(last[-window // 4 :], "kl")
    if kl > 5 * config.target_kl_response:
        found.append(
            f"KL runs away: {kl:.1f} nats a response, the target is {config.target_kl_response:g}: so far from the "
            "reference the reward is not to be trusted; lower --learning_rate"
        )
    entropy, before = mean(last[-window // 4 :], "entropy"), mean(first, "entropy")
    if entropy < 0.2 * before:
        found.append(
            f"entropy collapses: {entropy:.2f} nats a token, {before:.2f} at the start: the policy says few things; "
            "lower --learning_rate, or stop earlier"
        )
    if mean(last, "cut_at_length_share") > 0.98:
        found.append(
            "all responses are cut at their length limit: the policy never ends a turn; its model may lack an end "
            "token, or was not trained to use it"
        )
    spread = mean(last, "score_std")
    if spread < 1e-3 or abs(mean(last, "score_mean")) > 0.98:
        found.append(
            f"scores are saturated: mean {mean(last, 'score_mean'):.3f}, standard deviation {spread:.4f}: there is "
            "nothing left to learn from them"
        )
    losses = [row["value_loss"] for row in last if "value_loss" in row]
    if len(losses) == window and mean(last, "explained_variance") < -0.5:
        early, late = np.mean(losses[: window // 2]), np.mean(losses[window // 2 :])
        if late >= early:
            found.append(
                f"the value loss does not fall ({early:.3f}, then {late:.3f}) and values predict worse than a "
                "constant: advantages are noise; lower --learning_rate"
            )
    return found


def _variance(total: dict[str, float], name: str, n: float) -> float:
    """Variance of n numbers from the sums of them and of their squares."""
    return max(total[f"{name}_squared"] / n - (total[name] / n) ** 2, 0.0)


def _ended(rollout: Rollout, end: int) -> torch.Tensor:
    """(n,) whether each response ended by itself: its last kept token is the end token."""
    last = rollout.mask.sum(dim=1).long() - 1
    return rollout.response[torch.arange(len(last)), last] == end
