"""A trained reward as a function that other trainers call."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from geli.heads import find_head, load_reward_head, saved_heads
from geli.nets.encoder import load_encoder_of_head
from geli.nets.forms import Message, Turns, read_completion, read_messages, read_prompt, trajectory_of
from geli.nets.prompts import Prompt
from geli.rl.rollout import RewardScorer, first_turn
from geli.run.distributed import uses_bfloat16
from geli.run.errors import UserError


class GELIReward:
    """The reward of a saved head, computed as stage 3 does: `rewards = GELIReward("RUN")(prompts, completions)`.

    TRL's GRPOTrainer and RLOOTrainer take it as a reward function, and `train_rl_GELI.py --reward_function` takes a
    module's variable that holds one. It may be called from several threads.

    Args:
        path: run name (under `output_dir`), path of a `reward1_` file, or folder with one such file in it.
        output_dir: folder of the runs.
        device: auto (this process' GPU if there is one), cpu, cuda or mps. dtype: of forward passes: float32, bfloat16,
            or auto: as stage 3.
        context_turns: turns of chat messages that are read before a response; None: as the head was trained.
        max_length: encoder tokens of a turn, lowered to what the head was trained with.
        cache_size: scores that are kept (32 bytes of hash each, no text); 0 for none.
        lang_model_path: encoder of a published head, which records none.
        trust_remote_code: run code that the encoder's folder brings along.

    Attributes:
        head: the `models.RewardHead`. name: of its file.

    Raises:
        UserError: if there is no such head, or it cannot be loaded.
    """

    def __init__(
        self, path: str | Path, *, output_dir: str | Path = ".", device: str = "auto", dtype: str = "auto",
        context_turns: int | None = None, max_length: int = 1024, cache_size: int = 1 << 16,
        lang_model_path: str | None = None, trust_remote_code: bool = False,
    ):  # fmt: skip
        path = find_head_in(path, output_dir)
        half, device = uses_bfloat16(device, dtype, cpu_dtype="float32"), local_device(device)
        self.head = load_reward_head(path, device)
        encoder = load_encoder_of_head(
            self.head.config, path, min(max_length, self.head.config.max_length), lang_model_path,
            torch.bfloat16 if half and device.type == "cuda" else torch.float32, trust_remote_code,
        )  # fmt: skip
        autocast = partial(torch.autocast, device.type, torch.bfloat16) if half else nullcontext
        self.scorer = RewardScorer(encoder.to(device).eval(), self.head, autocast)
        self.path, self.name = path, path.name
        self.context_turns = context_turns or self.head.config.context_turns
        self.cache_size = cache_size
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._cache_lock, self._model_lock = threading.Lock(), threading.Lock()

    @classmethod
    def from_pretrained(cls, folder_or_run: str | Path, **options) -> "GELIReward":
        """The same as `GELIReward(folder_or_run, **options)`."""
        return cls(folder_or_run, **options)

    def __call__(self, prompts: Sequence, completions: Sequence, *_, **__) -> list[float]:
        """The rewards of n completions.

        Args:
            prompts: n texts or lists of chat messages (see `geli.nets.forms.read_prompt`), or `Prompt`s of stage 3.
            completions: n texts or lists of chat messages. What follows a turn (`User:` or `AI:`) is cut off, as stage
                3 does. Further columns are ignored.

        Raises:
            UserError: if there are not as many prompts as completions, or one has another form.
        """
        if len(prompts) != len(completions):
            raise UserError(f"expected a completion to each prompt, found {len(prompts)} and {len(completions)}")
        return self.score(
            [self.read(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        )

    def read(self, prompt, completion) -> tuple[Prompt, str]:
        """The state and the response of a prompt and a completion. Responses to `Prompt`s are cut already."""
        response = read_completion(completion)
        if isinstance(prompt, Prompt):
            return prompt, response
        return read_prompt(prompt, self.context_turns), first_turn(response)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The rewards of n (state, response without `AI:`). Equal pairs are scored once."""
        keys = list(map(self._key, pairs))
        with self._cache_lock:
            found = {key: self._cache[key] for key in keys if key in self._cache}
            for key in found:
                self._cache.move_to_end(key)
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
        if new:
            with self._model_lock:
                found |= zip(new, self.scorer(*zip(*new.values(), strict=True)).tolist(), strict=True)
            with self._cache_lock:
                self._cache |= {key: found[key] for key in new}
                while len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def turn_rewards(self, conversations: Sequence[Sequence[Message]]) -> list[list[float]]:
        """The reward of each of the assistant's messages, in order, of n conversations of chat messages."""
        return self.score_turns(list(map(read_messages, conversations)))

    def score_turns(self, conversations: Sequence[Turns]) -> list[list[float]]:
        """The reward of each of the agent's turns, in order, of n conversations.

        A sequential head (RUDDER's) takes each to be whole, so its rewards are those of stage 2.
        """
        trajectories = [trajectory_of(turns, self.context_turns) for turns in conversations]
        if self.head.sequential:
            return [self._sequential_rewards(pairs) if pairs else [] for pairs in trajectories]
        pairs = [pair for trajectory in trajectories for pair in trajectory]
        rewards = iter(self.score([(Prompt("", context, ""), said.removeprefix("AI: ")) for context, said in pairs]))
        return [[next(rewards) for _ in trajectory] for trajectory in trajectories]

    @torch.no_grad()
    def _sequential_rewards(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        with self._model_lock:
            features = self.scorer.encode(pairs).to(self.scorer.encoder.device)
            return self.head.rewards(self.head(features).squeeze(1).float(), len(pairs)).tolist()

    def _key(self, pair: tuple[Prompt, str]) -> bytes:
        """A hash of all that a reward depends on."""
        prompt, response = pair
        seen = (prompt.trajectory[: prompt.position], len(prompt.trajectory)) if self.head.sequential else ()
        text = repr((prompt.context, response, *seen)).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=32).digest()


def find_head_in(path: str | Path, output_dir: str | Path) -> Path:
    """The file of a head: as `geli.heads.find_head`, or the only head in the folder `path`.

    Raises:
        UserError: if there is none, or several.
    """
    folder = Path(path)
    if not folder.is_dir():
        return find_head(str(path), output_dir)
    heads = saved_heads(folder, ".")
    if len(heads) != 1:
        names = ", ".join(sorted(head.name for head in heads)) or "none"
        raise UserError(f"{folder}: expected one reward head in this folder, found {names}; give the path of a file")
    return heads[0]


def local_device(device: str) -> torch.device:
    """The device that `device` means in this process, one of those that `accelerate launch` may have started."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if device in ("auto", "mps") and torch.backends.mps.is_available() else "cpu")
