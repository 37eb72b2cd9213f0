"""A saved reward head with its encoder, as one thing: text in, rewards out."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from geli.data.messages import Message, Turns, read_messages
from geli.heads import find_head, load_encoder_of_head, load_reward_head, score_as
from geli.nets.encoder import TurnEncoder
from geli.nets.forms import read_completion, read_prompt, trajectory_of
from geli.nets.prompts import Prompt
from geli.nets.templates import OwnTemplate
from geli.rl.rollout import first_turn
from geli.run.distributed import local_device, uses_bfloat16
from geli.run.errors import UserError
from models import RewardHead

Pair = tuple[Prompt, str]  # a state, and a response to it without `AI:`
MOST_HISTORY = 1 << 16  # turns whose features are kept for a sequential head; 4 KiB each at a width of 1,024


class GELIReward:
    """The reward of a saved head. Stage 3, the evaluation, and every program that needs rewards use it.

        reward = GELIReward.load("RUN")
        reward.score(prompts, responses)  # (n,) rewards
        reward.turn_rewards(conversation)  # a reward for each of the assistant's messages

    TRL's GRPOTrainer and RLOOTrainer take it as a reward function, and `train_rl_GELI.py --reward_function` takes a
    module's variable that holds one. Several threads may use it.

    Args:
        encoder: that the head was trained on, in eval mode. head: in eval mode, on the encoder's device.
        autocast: a function that returns the context manager of the encoder's forward passes.
        path: of the head's file.
        context_turns: turns that are read before a response; None: as the head was trained.
        cache_size: scores that are kept (32 bytes of hash each, no text); 0: every response is computed.

    Attributes:
        name: of the head's file.
        template: the `OwnTemplate` that prompts are written by; None: those in wide use are recognised.
    """

    template: OwnTemplate | None = None

    def __init__(
        self, encoder: TurnEncoder, head: RewardHead, *, autocast: Callable = nullcontext, path: Path = Path("reward"),
        context_turns: int | None = None, cache_size: int = 0,
    ):  # fmt: skip
        self.encoder, self.head, self.autocast, self.path, self.name = encoder, head, autocast, path, path.name
        self.context_turns = context_turns or head.config.context_turns
        self.cache_size = cache_size
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._history: dict[tuple[str, str], torch.Tensor] = {}  # features; many prompts share the same earlier turns
        self._cache_lock, self._model_lock = threading.Lock(), threading.RLock()

    @classmethod
    def load(
        cls, run_or_path: str | Path, *, output_dir: str | Path = ".", device: str = "auto", dtype: str = "auto",
        context_turns: int | None = None, max_length: int = 1024, cache_size: int = 1 << 16,
        lang_model_path: str | None = None, trust_remote_code: bool = False, ensemble: str = "mean",
        spread_penalty: float = 1.0,
    ) -> "GELIReward":  # fmt: skip
        """Loads a head and the encoder that it was trained on.

        Args:
            run_or_path: run name (under `output_dir`), path of a `reward1_` file, or folder with one such file in it.
            output_dir: folder of the runs.
            device: auto (this process' GPU if there is one), cpu, cuda or mps.
            dtype: of forward passes: float32, bfloat16, or auto: bfloat16 on a GPU that computes in it.
            max_length: encoder tokens of a turn, lowered to what the head was trained with.
            lang_model_path: encoder of a published head, which records none.
            trust_remote_code: run code that the encoder's folder brings along.
            ensemble: how several heads in one file score: `mean`, `lower` (the mean less `spread_penalty` standard
                deviations) or `weights` (one head, of the mean of their weights).

        Raises:
            UserError: if there is no such head, or it cannot be loaded.
        """
        path = find_head(str(run_or_path), output_dir)
        half, device = uses_bfloat16(device, dtype, cpu_dtype="float32"), local_device(device)
        head = score_as(load_reward_head(path), path, ensemble, spread_penalty).to(device)
        encoder = load_encoder_of_head(
            head.config, path, min(max_length, head.config.max_length), lang_model_path,
            torch.bfloat16 if half and device.type == "cuda" else torch.float32, trust_remote_code,
        )  # fmt: skip
        autocast = partial(torch.autocast, device.type, torch.bfloat16) if half else nullcontext
        return cls(
            encoder.to(device).eval(), head, autocast=autocast, path=path, context_turns=context_turns,
            cache_size=cache_size,
        )  # fmt: skip

    from_pretrained = load  # the name that users of transformers expect

    # Responses

    def __call__(self, prompts: Sequence, completions: Sequence, *_, **__) -> list[float]:
        """`score` as TRL's trainers call it; further columns are ignored."""
        return self.score(prompts, completions).tolist()

    def score(self, prompts: Sequence, responses: Sequence) -> torch.Tensor:
        """(n,) float32 rewards of n responses, on the CPU.

        Args:
            prompts: n `Prompt`s of stage 3, texts, or lists of chat messages (see `geli.nets.forms.read_prompt`).
            responses: n texts or lists of chat messages. What follows a turn (`User:` or `AI:`) is cut off, as stage 3
                does; responses to `Prompt`s are cut already. Thoughts (up to `</think>`) are left out.

        Raises:
            UserError: if there are not as many prompts as responses, or one has another form or a chat template's
                markup left in it.
        """
        return torch.tensor(self.score_pairs(self._read_all(prompts, responses)))

    def spread(self, prompts: Sequence, responses: Sequence) -> torch.Tensor:
        """(n,) float32 standard deviations of the rewards of an ensemble's heads: the error bars of `score`, which has
        the same arguments. Raises a `UserError` if there is only one head."""
        if self.head.config.members == 1:
            raise UserError(f"{self.path}: one head has no spread: train several with train_reward_GELI.py --heads K")
        return self._compute(self._read_all(prompts, responses), lambda features: self.head.each(features).std(dim=0))

    def _read_all(self, prompts: Sequence, responses: Sequence) -> list[Pair]:
        if len(prompts) != len(responses):
            raise UserError(f"expected a completion to each prompt, found {len(prompts)} and {len(responses)}")
        return list(map(self.read, prompts, responses))

    def read(self, prompt, response) -> Pair:
        """The state and the response of a prompt and a response in any form that `score` takes."""
        response = read_completion(response, prompt)
        if isinstance(prompt, Prompt):
            return prompt, response
        return read_prompt(prompt, self.context_turns, self.template), first_turn(response)

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """The rewards of n states and responses. With a cache, equal pairs are computed once."""
        if not self.cache_size:
            return self._compute(pairs).tolist()
        keys = list(map(self._key, pairs))
        with self._cache_lock:
            found = {key: self._cache[key] for key in keys if key in self._cache}
            for key in found:
                self._cache.move_to_end(key)
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
        if new:
            found |= zip(new, self._compute(list(new.values())).tolist(), strict=True)
            with self._cache_lock:
                self._cache |= {key: found[key] for key in new}
                while len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
        return [found[key] for key in keys]

    # Conversations

    def turn_rewards(self, conversation: Sequence[Message]) -> list[float]:
        """The reward of each of the assistant's messages in a conversation of chat messages, in order."""
        return self.score_turns([read_messages(conversation)])[0]

    def score_turns(self, conversations: Sequence[Turns]) -> list[list[float]]:
        """The reward of each of the agent's turns, in order, of n conversations.

        A sequential head (RUDDER's) takes each to be whole, so its rewards are those of stage 2.
        """
        trajectories = [trajectory_of(turns, self.context_turns) for turns in conversations]
        if self.head.sequential:
            return [self.rewards(self.features(pairs)) for pairs in trajectories]
        pairs = [pair for trajectory in trajectories for pair in trajectory]
        pairs = [(Prompt("", context, ""), response.removeprefix("AI: ")) for context, response in pairs]
        rewards = iter(self.score_pairs(pairs))
        return [[next(rewards) for _ in trajectory] for trajectory in trajectories]

    def features(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """(n, hidden) features of n turns (context, `AI: ` + response), on the CPU."""
        with self._model_lock:
            return self.encoder.encode(self.encoder.tokenize(pairs), self.autocast)

    @torch.no_grad()
    def rewards(self, features: torch.Tensor | Sequence[torch.Tensor]) -> list[float]:
        """The rewards of the T agent turns of one conversation, in order, from their features (T, hidden).

        A sequential head takes the conversation to have T agent turns, so each further turn changes the rewards of
        those before it a little.
        """
        if not len(features):
            return []
        with self._model_lock:
            outputs = self.head(torch.stack(list(features)).to(self.encoder.device)).squeeze(1).float()
            return self.head.rewards(outputs, len(features)).tolist()

    # What scores are computed by

    @torch.no_grad()
    def _compute(self, pairs: Sequence[Pair], of_features: Callable | None = None) -> torch.Tensor:
        """(n,) rewards of states and responses, or what `of_features` (n, hidden) -> (n, 1) gives in their place; a
        sequential head also sees the agent turns before each state."""
        with self._model_lock:
            features = self.features([(prompt.context, f"AI: {response}") for prompt, response in pairs])
            if self.head.sequential:
                rewards = self._as_last_turns([prompt for prompt, _ in pairs], features)
            else:
                rewards = (of_features or self.head)(features.to(self.encoder.device)).squeeze(1)
            return rewards.float().cpu()

    def _as_last_turns(self, prompts: Sequence[Prompt], features: torch.Tensor) -> torch.Tensor:
        """(n,) rewards of responses with `features` (n, hidden), each the last turn of its own trajectory."""
        needed = {pair for prompt in prompts for pair in prompt.trajectory[: prompt.position]}
        if len(self._history) + len(needed) > MOST_HISTORY:
            self._history = {}
        new = sorted(needed - self._history.keys())
        self._history |= dict(zip(new, self.features(new), strict=True))
        longest = max((prompt.position + 1 for prompt in prompts), default=1)  # a process may have no prompt
        turns = torch.zeros(len(prompts), longest, features.shape[1])
        for row, (prompt, feature) in enumerate(zip(prompts, features, strict=True)):
            for t, pair in enumerate(prompt.trajectory[: prompt.position]):
                turns[row, t] = self._history[pair]
            turns[row, prompt.position] = feature  # later positions stay 0: the head does not look ahead
        outputs = self.head(turns.to(self.encoder.device)).squeeze(2)
        n_turns = torch.tensor([[float(len(prompt.trajectory))] for prompt in prompts], device=outputs.device)
        rewards = self.head.rewards(outputs, n_turns.reshape(-1, 1))
        return rewards[torch.arange(len(prompts)), torch.tensor([p.position for p in prompts], dtype=torch.long)]

    def _key(self, pair: Pair) -> bytes:
        """A hash of all that a reward depends on."""
        prompt, response = pair
        seen = (prompt.trajectory[: prompt.position], len(prompt.trajectory)) if self.head.sequential else ()
        text = repr((prompt.context, response, *seen)).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=32).digest()
