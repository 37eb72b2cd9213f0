"""Stage 1's cost: one epoch of ours against the published procedure, at equal batch size and learning rate.

    python benchmarks/stage1.py [--conversations 2] [--seeds 3]

Work: every agent turn of both flips of conversations of 160 turns, about 590 real tokens a turn, batches of 32, AdamW
on encoder and head. Peer: turns in random batches, each padded to 1,024 tokens, through encoder and decoder. Prints
seconds an epoch, their ratio, and the validation L_LI that each ends with, over seeds.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import as_published
import numpy as np
from encoding import corpus_and_encoder, new_head

from geli.report import evaluate
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.training import train_steps
from models import head_rewards, predicted_returns
from train_reward_LI_only import LITraining, LITrainingOptions

BATCH, LEARNING_RATE = 32, 3e-4


def published_epoch(encoder, head, training, seed: int) -> None:
    """As published: random batches, padded, the whole model."""
    as_published.train_stage_1(encoder, head, training, BATCH, LEARNING_RATE, seed)


def our_epoch(encoder, head, training, seed: int) -> None:
    """The training loop of stage 1, tokenising included, in bfloat16 where the hardware computes in it, as with
    `--dtype auto`."""
    options = LITrainingOptions(epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE)
    accelerator = make_accelerator("cpu", "auto")
    stage = LITraining(encoder, head, training, None, options, accelerator, seed, save=lambda: None)
    train_steps(stage, stage.steps, "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2, help="training conversations; one more validates")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    seed_everything(0)
    with tempfile.TemporaryDirectory() as temporary:
        encoder, training, validation = corpus_and_encoder(Path(temporary) / "candor", args.conversations)
    procedures = {"as published": published_epoch, "ours": our_epoch}
    seconds, losses = {name: [] for name in procedures}, {name: [] for name in procedures}
    for seed in range(args.seeds):
        for name, run in procedures.items():  # in turn, so that a slow minute hits both
            seed_everything(seed)
            mine, head = copy.deepcopy(encoder), new_head("RRD")
            head.init_constant(float(training.targets.mean()))
            start = time.perf_counter()
            run(mine, head, training, seed)
            seconds[name].append(time.perf_counter() - start)
            features = mine.eval().encode(mine.tokenize(validation.texts))
            rewards = head_rewards(head, features)
            returns = predicted_returns(validation, rewards, 160, None)
            losses[name].append(evaluate(validation, rewards, returns)["li_loss"])
    rows = [
        {
            "stage 1, one epoch": name,
            "seconds": float(np.median(seconds[name])),
            "times faster": float(np.median(seconds["as published"]) / np.median(seconds[name])),
            "validation L_LI": f"{np.mean(losses[name]):.4f} ± {np.std(losses[name]) / len(losses[name]) ** 0.5:.4f}",
        }
        for name in procedures
    ]
    print(f"{len(training)} turns, batches of {BATCH}, {args.seeds} seeds")
    print(format_table(rows))


if __name__ == "__main__":
    main()
