"""Turn rewards of a conversation that is going on."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from geli.heads import load_reward_head
from geli.nets.encoder import TurnEncoder, load_encoder_of_head
from geli.run.distributed import frozen_dtype
from models import RewardHead

MAX_LENGTH = 1024  # encoder tokens, as stage 3 has by default


class TurnRewards:
    """A reward head with its encoder. One serves any number of conversations, and any number of threads.

    Args:
        encoder: that the head was trained on. head: in eval mode, on the encoder's device.
        autocast: a function that returns the context manager for the encoder's forward passes.
        name: of the head.
    """

    def __init__(self, encoder: TurnEncoder, head: RewardHead, autocast: Callable, name: str):
        self.encoder, self.head, self.autocast, self.name = encoder, head, autocast, name
        self._lock = threading.Lock()

    def features(self, context: str, reply: str) -> torch.Tensor:
        """(hidden,) features of a reply (without `AI:`) to a state, on the CPU."""
        with self._lock:
            return self.encoder.encode(self.encoder.tokenize([(context, f"AI: {reply}")]), self.autocast)[0]

    @torch.no_grad()
    def rewards(self, features: Sequence[torch.Tensor]) -> list[float]:
        """The reward of each of T replies of one conversation, from their features (T times (hidden,)), in order.

        A sequential head (RUDDER's) takes the conversation to have T agent turns, so each reply changes the rewards of
        those before it a little.
        """
        if not features:
            return []
        with self._lock:
            outputs = self.head(torch.stack(list(features)).to(self.encoder.device)).squeeze(1).float()
            return self.head.rewards(outputs, len(features)).tolist()


def load_rewards(
    head_path: Path, accelerator: Accelerator, lang_model_path: str | None = None, trust_remote_code: bool = False
) -> TurnRewards:
    """Loads a saved head and the encoder that it was trained on, as stage 3 does.

    Args:
        lang_model_path: encoder of a published head, which records none.

    Raises:
        UserError: if one of them cannot be loaded.
    """
    head = load_reward_head(head_path, accelerator.device)
    encoder = load_encoder_of_head(
        head.config, head_path, min(MAX_LENGTH, head.config.max_length), lang_model_path, frozen_dtype(accelerator),
        trust_remote_code,
    )  # fmt: skip
    return TurnRewards(encoder.to(accelerator.device), head, accelerator.autocast, Path(head_path).name)
