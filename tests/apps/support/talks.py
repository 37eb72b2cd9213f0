"""Policies to talk to: a checkpoint of stage 3 made by hand from a small model; a policy of letters."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from apps.chat.talk import Talk
from geli.data.messages import INSTRUCTION
from geli.nets.options import Adapter
from geli.nets.policy import load_policy

HEADS = "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160"


def write_checkpoint(out: Path, base: Path, head: Path | None = None, prompt_format: str = "raw") -> Path:
    """A checkpoint whose adapter changes the policy, beside the record of its run; returns its folder."""
    torch.manual_seed(0)
    policy = load_policy(str(base.resolve()), Adapter(4, 8), torch.float32, prompt_format=prompt_format)
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

    device, ends, prompt_format, max_new_tokens = torch.device("cpu"), (ord("|"),), "raw", 128
    format = SimpleNamespace(instruction=INSTRUCTION)

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
