"""Does it learn? PPO (and RLOO and GRPO) on a task whose optimum is known.

    python benchmarks/known_optimum.py [--algorithms ppo rloo grpo] [--seeds 3] [--picture docs/known_optimum.png]

A response's reward is the share of its words that are in a given half of the vocabulary: 0.5 by chance, 1 at best. The
policy is a small untrained Llama, which says every word about as often. Prints steps and seconds until the mean reward
of the last three steps is 0.9, and the KL to the reference there.
"""

import time
from pathlib import Path

import numpy as np
import torch

from models import load_policy
from ppo import PPO, PPOConfig, Prompt
from runs import make_accelerator, seed_everything

WORDS = [f"w{i:02d}" for i in range(60)]
GOOD = frozenset(WORDS[: len(WORDS) // 2])
RESPONSE = 16  # tokens
INIT = 0.1  # larger than usual: the last layer is frozen, and has to be able to say one word and not another
TARGET = 0.9
PPO_OPTIONS = dict(
    learning_rate=3e-3, batch_size=64, mini_batch_size=32, accumulation_steps=1, beta=0.005, target_kl_response=12.0,
    min_new_tokens=RESPONSE, max_new_tokens=RESPONSE,
)  # fmt: skip


def make_model(folder: Path, seed: int) -> Path:
    """A small Llama that knows nothing yet, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, pad_token_id=1, eos_token_id=2, initializer_range=INIT,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def share_of_good_words(_, responses) -> torch.Tensor:
    """(n,) share of each response's words that are in `GOOD`; 0 of an empty one."""
    shares = [sum(word in GOOD for word in text.split()) / max(len(text.split()), 1) for text in responses]
    return torch.tensor(shares, dtype=torch.float32)


def prompts(rng: np.random.Generator, n: int) -> list[Prompt]:
    """Prompts of a few random words."""
    return [Prompt(" ".join(rng.choice(WORDS, rng.integers(2, 8))), "", "") for _ in range(n)]


def run_ppo(model: Path, seed: int, steps: int, score=share_of_good_words, until: float | None = None, **changes):
    """PPO steps (until the mean of three is `until`): [{score_mean, kl, seconds, ...}]."""
    seed_everything(seed)
    policy = load_policy(str(model), 16, 32, torch.float32)
    ppo = PPO(policy, score, PPOConfig(**{**PPO_OPTIONS, **changes}), make_accelerator("cpu", "float32"), seed)
    rng, rows, start = np.random.default_rng(seed), [], time.perf_counter()
    for _ in range(steps):
        logged, _ = ppo.step(prompts(rng, ppo.config.batch_size))
        rows.append({**logged, "seconds": time.perf_counter() - start})
        if until and reached(rows, until):
            break
    return rows


def reached(rows: list[dict], target: float = TARGET) -> int | None:
    """The first step at which the mean reward of the last three is `target`; None if it never is."""
    scores = np.array([row["score_mean"] for row in rows])
    means = np.convolve(scores, np.ones(3) / 3, "valid")
    return int(np.argmax(means >= target)) + 3 if len(means) and means.max() >= target else None
