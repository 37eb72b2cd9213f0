"""Policies to talk to: checkpoints of stage 3 and reward heads made by hand from small models; one of letters."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from apps.chat.talk import Talk
from geli.heads import encoder_reference, save_reward_head
from geli.nets.encoder import load_encoder
from geli.nets.policy import load_policy
from models import RewardHead, RewardHeadConfig

HEADS = "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160"


def write_head(folder: Path, encoder: Path, head: str = "default", **config) -> Path:
    """An untrained reward head on a small encoder; returns its file."""
    torch.manual_seed(0)
    hidden = load_encoder(str(encoder)).hidden_size
    settings = dict(max_length=256, context_turns=4, stage=2, reward_class="how_enjoyable", redist_type="RRD") | config
    folder.mkdir(parents=True, exist_ok=True)
    config = RewardHeadConfig(head=head, hidden=hidden, **encoder_reference(encoder, folder), **settings)
    save_reward_head(RewardHead(config), folder / f"reward1_{head}")
    return folder / f"reward1_{head}"


def write_checkpoint(out: Path, base: Path, head: Path | None = None, prompt_format: str = "raw") -> Path:
    """A checkpoint whose adapter changes the policy, beside the record of its run; returns its folder."""
    torch.manual_seed(0)
    policy = load_policy(str(base.resolve()), 4, 8, torch.float32, prompt_format=prompt_format)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = out / "rlmf_weights" / "GELI_llama_2"
    policy.limit_responses(12)
    policy.save(folder)
    arguments = {"context_turns": 3, "train": True}
    record = {"stage": 3, "arguments": arguments, "reward_head": head and str(head)}
    (out / "rlmf_weights" / "GELI_llama.json").write_text(json.dumps(record))
    return folder


class LetterPolicy:
    """Stands in for a `Policy`: a token is a letter, `|` is the end token, and each reply is the next of a script.

    Attributes:
        prompts: that it has read. adapter: whether it is on.
    """

    device, end, prompt_format, max_new_tokens = torch.device("cpu"), ord("|"), "raw", 128

    def __init__(self, *replies: str):
        self.replies, self.prompts, self.adapter = list(replies), [], True
        self.tokenizer = SimpleNamespace(
            batch_decode=lambda rows, skip_special_tokens: ["".join(map(chr, row)).replace("|", "") for row in rows]
        )

    def tokenize(self, prompts):
        """Remembers the prompt."""
        self.prompts += prompts
        return torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)

    def decoder(self, query, query_mask, room):
        """Has the letters of the next reply as its state."""
        self.room = room
        letters = iter(self.replies.pop(0))
        return SimpleNamespace(state=letters, read=lambda token: None)

    def sample(self, states, uniforms):
        """The next letter; a dot without the adapter."""
        letter = next(states)
        return torch.tensor([ord(letter if self.adapter or letter == "|" else ".")])

    @contextmanager
    def reference(self):
        """Without the adapter."""
        self.adapter = False
        yield
        self.adapter = True


class ManualClock:
    """A clock that a test sets."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def say(talk: Talk, text: str) -> str:
    """Says something; returns the reply."""
    talk.say(text)
    return [*talk.reply()][-1]
