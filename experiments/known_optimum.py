"""Does it learn? PPO (and RLOO and GRPO) on a task whose optimum is known.

    python experiments/known_optimum.py --algorithms ppo grpo rloo [--seeds 3] [--picture docs/known_optimum.png]

A response's reward is the share of its words that are in a given half of the vocabulary: 0.5 by chance, 1 at best. The
policy is a small untrained Llama, which chooses every word about equally often. Prints steps and seconds until the mean
reward of the last three steps is 0.9, and the KL to the reference there.

The same for all: 64 responses and one optimizer step a step, LoRA, a constant learning rate, and a KL penalty of 0.005
standard deviations of the reward a nat (PPO and GRPO normalize rewards; RLOO does not, so its beta is that many times
the deviation at the start). The learning rate of each is the one of `LEARNING_RATES` that reaches 0.9 in the fewest
steps, in the mean over seeds that are not reported. All else is each one's default: Adafactor, a value head and GAE for
PPO; AdamW and TRL's own for GRPO and RLOO, in groups of 8 responses to a prompt.
"""

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.nets.options import Adapter
from geli.run.errors import run as run_command
from geli.run.options import new_parser, positive_int


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Train a policy on a task whose optimum is known.")
    parser.add_argument("--algorithms", nargs="+", choices=("ppo", "grpo", "rloo"), default=["ppo"], help="what to run")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs of each")
    parser.add_argument("--steps", type=positive_int, default=150, help="of a run, at most")
    parser.add_argument("--picture", type=Path, help="file to draw rewards by step to (default: none)")
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import plots
from geli.nets.policy import load_policy
from geli.nets.pretrained import quiet_transformers
from geli.nets.prompts import Prompt
from geli.rl import trl_algorithms
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from models import PPO, PPOConfig

WORDS = [f"w{i:02d}" for i in range(60)]
GOOD = frozenset(WORDS[: len(WORDS) // 2])
RESPONSE = 16  # tokens
INIT = 0.1  # of weights; larger than usual, because the last layer is frozen and must be able to tell words apart
TARGET = 0.9
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
SEARCH_SEEDS = (100, 101)  # of the search for the learning rate
BETA = 0.005  # standard deviations of the reward a nat
BETAS = {"grpo": BETA, "rloo": BETA * 0.5 / RESPONSE**0.5}  # of a share of words that are good or not by chance
PPO_OPTIONS = dict(
    learning_rate=3e-3, batch_size=64, mini_batch_size=32, gradient_accumulation_steps=1, init_kl_coef=BETA,
    target=12.0, min_new_tokens=RESPONSE, max_new_tokens=RESPONSE,
)  # fmt: skip


def make_model(folder: Path, seed: int) -> Path:
    """Writes a small untrained Llama with a tokenizer of whole words; returns the folder."""
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


def run_ppo(
    model: Path, seed: int, steps: int, score: Callable = share_of_good_words, until: float | None = None, **changes
) -> list[dict]:
    """What each PPO step logged (score_mean, kl, ...), with the seconds since the start.

    Args:
        model: folder. until: the run ends when the mean score of three steps reaches it. changes: of `PPO_OPTIONS`.
    """
    seed_everything(seed)
    policy = load_policy(str(model), Adapter(16, 32), torch.float32)
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


def run_trl(algo: str, model: Path, seed: int, steps: int, until: float | None, learning_rate: float) -> list[dict]:
    """Steps of TRL's trainer, as `run_ppo`."""
    seed_everything(seed)
    make_accelerator("cpu", "float32")
    policy = load_policy(str(model), Adapter(16, 32), torch.float32)
    rows, start = [], time.perf_counter()

    def on_step(step, logged):
        rows.append({**logged, "seconds": time.perf_counter() - start})
        if until and reached(rows, until):
            raise StopIteration

    size = PPO_OPTIONS["batch_size"]
    with contextlib.suppress(StopIteration):
        trl_algorithms.train(
            algo, policy, prompts(np.random.default_rng(seed), 50 * size), share_of_good_words, on_step, steps=steps,
            batch_size=size, learning_rate=learning_rate, seed=seed, generations=8,
            max_new_tokens=RESPONSE, options=[f"beta={BETAS[algo]}"],
        )  # fmt: skip
    return rows


def run(algo: str, seed: int, steps: int, learning_rate: float) -> list[dict]:
    """At most `steps` steps of one of the algorithms, until `TARGET`."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), seed)
        if algo == "ppo":
            whole = PPO_OPTIONS["batch_size"]  # one optimizer step a batch, as TRL's trainers take
            return run_ppo(model, seed, steps, until=TARGET, learning_rate=learning_rate, mini_batch_size=whole)
        return run_trl(algo, model, seed, steps, TARGET, learning_rate)


def best_learning_rate(algo: str, steps: int) -> float:
    """The one of `LEARNING_RATES` with the fewest steps to `TARGET`, in the mean over `SEARCH_SEEDS`; a run that does
    not reach it counts as `steps`. Prints what it finds."""
    means = {}
    for rate in LEARNING_RATES:
        found = [reached(run(algo, seed, steps, rate)) for seed in SEARCH_SEEDS]
        means[rate] = float(np.mean([count or steps for count in found]))
        print(f"{algo}, learning rate {rate:g}: steps to {TARGET} {found}", flush=True)
    best = min(means, key=means.get)
    print(f"{algo}: learning rate {best:g}")
    return best


def main(options) -> None:
    """Runs the algorithms, and prints and draws how they learned."""
    quiet_transformers()
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warn each other
    curves, table = {}, []
    for algo in options.algorithms:
        rate = best_learning_rate(algo, options.steps)
        for seed in range(options.seeds):
            rows = run(algo, seed, options.steps, rate)
            curves.setdefault(f"{algo}, {rate:g}", []).append([row["score_mean"] for row in rows])
            table.append(
                {
                    "algorithm": algo, "learning rate": rate, "seed": seed, "steps to 0.9": reached(rows),
                    "seconds": rows[-1]["seconds"], "KL there": float(np.mean([row["kl"] for row in rows[-3:]])),
                    "reward": rows[-1]["score_mean"],
                }
            )  # fmt: skip
            print(table[-1], flush=True)
    print(format_table(table, f"\n{PPO_OPTIONS['batch_size']} responses of {RESPONSE} words a step; 0.5 by chance"))
    if options.picture:
        print(f"Written: {plots.curves(curves, TARGET, options.picture)}")


if __name__ == "__main__":
    run_command(partial(main, OPTIONS))
