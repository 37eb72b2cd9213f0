"""Does it learn? PPO (and RLOO and GRPO) on a task whose optimum is known.

    python benchmarks/known_optimum.py [--algorithms ppo rloo grpo] [--seeds 3] [--picture docs/known_optimum.png]

A response's reward is the share of its words that are in a given half of the vocabulary: 0.5 by chance, 1 at best. The
policy is a small untrained Llama, which says every word about as often. Prints steps and seconds until the mean reward
of the last three steps is 0.9, and the KL to the reference there.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import as_published  # noqa: F401 (puts the repository on the path)
import numpy as np
import torch

from models import load_policy
from ppo import PPO, PPOConfig, Prompt
from runs import format_table, make_accelerator, seed_everything

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


def run_trl(algo: str, model: Path, seed: int, steps: int, until: float | None = None) -> list[dict]:
    """Steps of TRL's trainer, as `run_ppo`."""
    import trl_algorithms

    seed_everything(seed)
    make_accelerator("cpu", "float32")
    policy = load_policy(str(model), 16, 32, torch.float32)
    rows, start = [], time.perf_counter()

    def on_step(step, logged):
        rows.append({**logged, "seconds": time.perf_counter() - start})
        if until and reached(rows, until):
            raise StopIteration

    size = PPO_OPTIONS["batch_size"]
    with contextlib.suppress(StopIteration):
        trl_algorithms.train(
            algo, policy, prompts(np.random.default_rng(seed), 50 * size), share_of_good_words, on_step, steps=steps,
            batch_size=size, learning_rate=PPO_OPTIONS["learning_rate"], seed=seed, generations=8,
            max_new_tokens=RESPONSE, options=["beta=0.005"],
        )  # fmt: skip
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=("ppo", "rloo", "grpo"), default=["ppo"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="at most")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    curves, table = {}, []
    for algo in args.algorithms:
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                model = make_model(Path(folder), seed)
                run = run_ppo if algo == "ppo" else lambda *a, algo=algo, **k: run_trl(algo, *a, **k)
                rows = run(model, seed, args.steps, until=TARGET)
            curves.setdefault(algo, []).append([row["score_mean"] for row in rows])
            table.append(
                {
                    "algorithm": algo, "seed": seed, "steps to 0.9": reached(rows), "seconds": rows[-1]["seconds"],
                    "KL there": float(np.mean([row["kl"] for row in rows[-3:]])), "reward": rows[-1]["score_mean"],
                }
            )  # fmt: skip
            print(table[-1], flush=True)
    print(format_table(table, f"\n{PPO_OPTIONS['batch_size']} responses of {RESPONSE} words a step; 0.5 by chance"))
    if args.picture:
        import plots

        print(f"Written: {plots.curves(curves, TARGET, args.picture)}")


if __name__ == "__main__":
    main()
