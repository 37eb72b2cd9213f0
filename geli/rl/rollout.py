"""Rollouts of stage 3: sample responses, and cut them to one turn.

The functions take the policy as an argument, so this module loads without transformers.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from geli.nets.batching import grouped_by_length
from geli.nets.options import DONE_EVERY
from geli.nets.prompts import Prompt

if TYPE_CHECKING:
    from geli.nets.policy import Policy

MARKERS = re.compile("User:|AI:")  # start of the next turn: a response is cut before it
# The last tokens of a response that are searched for a marker: those since the last check, and 8 for a marker that
# began before it.
MARKER_TOKENS = 8 + DONE_EVERY


class Rollout(NamedTuple):
    """Responses to a batch of n prompts.

    Attributes:
        query, query_mask: (n, Q) padded prompts, as `Policy.tokenize` returns them.
        response: (n, R) token ids. mask: (n, R) float, 1 on the tokens that are kept.
        texts: the n responses, cut and stripped.
        states: (n, R, hidden) the states that the tokens were sampled from, in float32; None where the policy computes
            in lower precision. trunk: (n, Q + R, hidden) as `Policy.trunk` returns it; None where it is to be computed.
    """

    query: torch.Tensor
    query_mask: torch.Tensor
    response: torch.Tensor
    mask: torch.Tensor
    texts: list[str]
    states: torch.Tensor | None = None
    trunk: torch.Tensor | None = None

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each prompt with its response."""
        return (self.query_mask.sum(dim=1) + self.mask.sum(dim=1).long()).cpu().numpy()

    def rows(self, chosen) -> tuple[torch.Tensor, ...]:
        """The policy's inputs for the responses `chosen`, without the query columns that hold only padding."""
        mask = self.query_mask[chosen]
        used = mask.any(dim=0)
        return self.query[chosen][:, used], mask[:, used], self.response[chosen], self.mask[chosen]


def draw_length(rng: np.random.Generator, min_new_tokens: int, max_new_tokens: int) -> int:
    """The maximal number of new tokens for a batch, uniform in [min_new_tokens, max_new_tokens]."""
    return int(rng.integers(min_new_tokens, max_new_tokens + 1))


def draw_uniforms(n: int, limit: int, generator: torch.Generator) -> torch.Tensor:
    """(n, limit) float64 random numbers in [0, 1), which select the tokens of n responses."""
    return torch.rand(n, limit, generator=generator, dtype=torch.float64)


def rollout(policy: "Policy", prompts: Sequence[Prompt], uniforms: torch.Tensor, copies: int = 1) -> Rollout:
    """Samples a response to each prompt and cuts it (see `cut_responses`).

    Args:
        prompts: n prompts. uniforms: (n, most new tokens), see `draw_uniforms`; row i alone determines response i.
        copies: how many times in a row each prompt stands in `prompts`, so that it is read once.
    """

    def texts_of(tokens) -> list[str]:
        return policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    query, query_mask = policy.tokenize(prompts)
    response, states, trunk = policy.generate(
        query, query_mask, uniforms, lambda so_far: reached_marker(so_far, texts_of), copies
    )
    kept, texts = cut_responses(response, texts_of, policy.ends)
    mask = (torch.arange(int(kept.max()), device=response.device) < kept[:, None].to(response.device)).float()
    width = mask.shape[1]
    # In lower precision, generation and a full forward pass round differently; the states are then computed again.
    again = states.dtype != torch.float32
    states, trunk = (None, None) if again else (states[:, :width], trunk)
    return Rollout(query, query_mask, response[:, :width], mask, texts, states, trunk)


def reached_marker(response: torch.Tensor, texts_of: Callable) -> torch.Tensor:
    """(n,) bool: whether the ends of the responses so far (n, R) contain a marker; what follows would be cut off.

    Args:
        texts_of: rows of token ids -> their texts, without special tokens.
    """
    return torch.tensor([bool(MARKERS.search(text)) for text in texts_of(response[:, -MARKER_TOKENS:])])


def cut_responses(response: torch.Tensor, texts_of: Callable, ends: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
    """The number of tokens to keep of each response, and its text.

    A response ends with its first end token, which is kept, because the policy chose it, but is not part of the text;
    or before the first `User:` or `AI:`. At least one token is kept: a response that is empty after cutting is scored
    as empty text, and gets its score on its first token.

    Args:
        response: (n, R) ids. texts_of: rows of token ids -> their texts, without special tokens. ends: the end tokens.

    Returns:
        (n,) numbers of tokens, and n texts.
    """
    places = torch.arange(1, response.shape[1] + 1, device=response.device)
    is_end = torch.isin(response, torch.tensor(ends, device=response.device))
    kept = torch.where(is_end, places, response.shape[1]).min(dim=1).values.cpu()
    said = kept - is_end.any(dim=1).long().cpu()  # an end token need not be a special one, which texts leave out
    rows = [row[:n] for row, n in zip(response.tolist(), said.tolist(), strict=True)]
    texts = texts_of(rows)
    for i, text in enumerate(texts):
        marker = MARKERS.search(text)
        if marker:  # keep the longest prefix of tokens whose text ends before the marker
            prefixes = texts_of([rows[i][:n] for n in range(len(rows[i]) + 1)])
            kept[i] = max([1, *(n for n, prefix in enumerate(prefixes) if len(prefix) <= marker.start())])
            text = text[: marker.start()]
        texts[i] = text.strip()
    return kept, texts


def first_turn(text: str) -> str:
    """A response that was not cut while it was sampled, cut before the first `User:` or `AI:`, and stripped."""
    return MARKERS.split(text, maxsplit=1)[0].strip()


def ended_themselves(batch: Rollout, ends: Sequence[int]) -> torch.Tensor:
    """(n,) bool: whether the last kept token of each response is an end token."""
    last = batch.mask.sum(dim=1).long() - 1
    return torch.isin(batch.response[torch.arange(len(last)), last], torch.tensor(ends, device=batch.response.device))


def minibatches(policy: "Policy", lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Splits this process' responses into minibatches of similar lengths (see `grouped_by_length`), of at most `size`.

    With a sharded policy, every process gets as many minibatches as the process with the most responses, because all
    take part in each forward pass; the extra minibatches are empty.

    Args:
        lengths: (n,) tokens of each prompt with its response.

    Returns:
        Indices of each minibatch.
    """
    if not policy.is_sharded:
        return grouped_by_length(lengths, policy.device, size)
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + size] for first in range(0, policy.largest(len(order)), size)]


@torch.no_grad()
def logprobs_and_values(policy: "Policy", rollout: Rollout, mini_batch_size: int) -> dict[str, torch.Tensor]:
    """Evaluates the sampled tokens under the policy and under the reference policy.

    Returns:
        `logprobs`, `values`, `entropies` of the policy and `ref_logprobs` of the reference: (n, R) float32, in nats
        (values: normalized rewards), 0 on tokens that are not kept; `kl` (n, R), of the next token's whole distribution
        from the reference's; the policy's `states` and the reference's `ref_states` (n, R, hidden); and `trunk`, where
        the policy has one (see `Policy.trunk`).
    """
    columns, parts = defaultdict(list), minibatches(policy, rollout.lengths, mini_batch_size)
    for part in parts:
        inputs = rollout.rows(part)
        trunk = policy.trunk(*inputs) if rollout.trunk is None else rollout.trunk[part]
        states = policy.states(*inputs, trunk) if rollout.states is None else rollout.states[part]
        with policy.reference():
            ref_states = policy.states(*inputs, trunk)
        outputs = policy.logprobs_from_hidden(states, *inputs[2:], ref_states)
        found = dict(zip(("logprobs", "values", "entropies", "ref_logprobs", "kl"), outputs, strict=True))
        if trunk is not None:
            room = rollout.query.shape[1] + rollout.response.shape[1] - trunk.shape[1]
            found["trunk"] = torch.nn.functional.pad(trunk, (0, 0, 0, room))
        for name, value in {**found, "states": states, "ref_states": ref_states}.items():
            columns[name].append(value)
    places = np.argsort(np.concatenate(parts))
    return {name: torch.cat(values)[places] for name, values in columns.items()}


class RandomScorer:
    """Random rewards in [-1, 1), drawn from `generator`: a control, from which the policy should learn nothing."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """(n,) random rewards."""
        return torch.rand(len(responses), generator=self.generator) * 2 - 1


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al., 2016): distinct n-grams of words, divided by all n-grams of `texts`; 0 without n-grams."""
    grams = Counter()
    for text in texts:
        words = text.split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(grams) / max(sum(grams.values()), 1)
