"""Best-of-n distilled: the policy is taught which of n responses of the reference policy a reward likes best."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from geli.nets.prompts import Prompt
from geli.rl.rollout import Rollout, ended_themselves, logprobs_and_values
from geli.run.distributed import gather_parts, local_part
from geli.run.gradients import NotFinite
from models import PPO


def chance_of_best(scores: torch.Tensor) -> torch.Tensor:
    """n times the chance of each of n responses to a prompt to be the best of n that are drawn from them with
    replacement: by ranks, (r^n - (r - 1)^n) / n^n. Ties share theirs. The mean is 1.

    The best response alone would throw n - 1 of n samples away; this is the same target (best-of-n's distribution)
    estimated from all of them (Sessa et al., 2024, BOND).

    Args:
        scores: (m, n) of n responses to each of m prompts.
    """
    n = scores.shape[1]
    below = (scores[:, None, :] < scores[:, :, None]).sum(dim=2).double()
    tied = (scores[:, None, :] == scores[:, :, None]).sum(dim=2)
    return (n * (((below + tied) / n) ** n - (below / n) ** n) / tied).float()


class Distillation(PPO):
    """Teaches the policy best-of-n of the reference (RAFT, Dong et al., 2023), n being `num_generations`.

    Each step samples fresh responses of the reference, so that nothing is learned by heart. The loss is the
    cross-entropy sum_y w(y) (-log pi(y)), with w from `chance_of_best`. Its part with w = 1, E_ref[-log pi], is
    computed as the exact KL of the reference's token distributions from the policy's, which has no sampling noise.

    The policy itself gives no responses in training. What is logged of it is estimated from the reference's responses,
    weighted by pi / pi_ref.
    """

    def step(self, prompts: Sequence[Prompt], update: bool = True) -> tuple[dict[str, float], list[str]]:
        """One step on a batch of prompts. As `PPO.step`; the responses are the reference's."""
        self._seconds = {}
        with self._timed("generate"), self.policy.reference():
            mine, batch, limit = self._respond(prompts)
            batch = batch._replace(states=None)  # they are the reference's
        with self._timed("forward"):
            old = logprobs_and_values(self.policy, batch, self.config.mini_batch_size)
        with self._timed("score"):
            scores, _ = self._score(mine, batch.texts)
            human = self._score_human_answers(prompts)
        texts = gather_parts(batch.texts, self.accelerator)
        logged = {**self._statistics(batch, old, scores, limit), "human_score_mean": human}
        if update:
            weights = local_part(chance_of_best(scores.view(-1, self.group)), self.accelerator).flatten()
            losses = partial(self._losses, batch, old, weights.to(batch.mask.device))
            with self._timed("update"):
                found = self._update(batch, losses, len(texts))
            logged |= {name: found[name] for name in ("policy_loss", "gradient_norm", "optimizer_steps")}
        return {**logged, **{f"seconds_{name}": value for name, value in self._seconds.items()}}, texts

    def _losses(self, batch: Rollout, old: dict, weights: torch.Tensor, part: np.ndarray, tokens: float):
        """The loss of the responses `part`, whose `weights` (n,) have the mean 1."""
        inputs = batch.rows(part)
        states = self.policy.states(*inputs, old["trunk"][part] if "trunk" in old else None)
        *_, logprobs, kl = self.policy.logprobs_from_hidden(old["ref_states"][part], *inputs[2:], states)
        loss = (kl.sum() - ((weights[part] - 1)[:, None] * logprobs).sum()) / tokens
        return loss, {"policy_loss": loss}

    def _statistics(self, batch: Rollout, old: dict, scores: torch.Tensor, limit: int) -> dict[str, float]:
        """What is logged of the policy. KL (in nats a response) and mean score are weighted by pi / pi_ref;
        `effective_share` is how large a sample of its own they are worth, as a share of the batch."""
        log_ratio = ((old["logprobs"] - old["ref_logprobs"]) * batch.mask).sum(dim=1)
        rows = zip(
            log_ratio.tolist(), batch.mask.sum(dim=1).tolist(), ended_themselves(batch, self.policy.ends).tolist(),
            strict=True,
        )  # fmt: skip
        log_ratio, lengths, ended = np.array(gather_parts(list(rows), self.accelerator)).T
        if not np.isfinite(log_ratio).all():
            raise NotFinite("the policy's output")
        ratio = np.exp(log_ratio - log_ratio.max())
        weights = ratio / ratio.sum()
        return {
            "score_mean": float(weights @ scores.numpy()),
            "score_std": scores.std(unbiased=False).item(),
            "kl": max(float(weights @ log_ratio), 0.0),
            "effective_share": float(1 / (weights @ weights) / len(weights)),
            "response_length_mean": float(weights @ lengths),
            "ended_share": float(weights @ ended),
            "cut_at_length_share": float(weights @ (lengths == limit)),
        }
