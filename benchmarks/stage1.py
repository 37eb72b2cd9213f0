"""Stage 1's cost: one epoch of ours against the published procedure, at equal batch size and learning rate.

    python benchmarks/stage1.py [--conversations 2] [--seeds 3] [--encoder FOLDER --data_dir FOLDER]

Work: every agent turn of both trajectories of conversations of 160 turns, about 590 real tokens a turn, batches of 32,
AdamW on encoder and head; with --encoder and --data_dir, that encoder and the first conversations of that corpus. Peer:
turns in random batches, each padded to 1,024 tokens, through encoder and decoder (`as_published.py`; not with
--encoder). Ours is the training code of `train_reward_LI_only.py`, with its tokenization. Limit: forward and backward
passes alone, over as many tokens in batches of rows of the mean length, without padding. Prints seconds an epoch, their
ratios, and the validation L_LI that each ends with, over seeds.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import as_published
import numpy as np
import torch
from encoding import corpus_and_encoder, new_head, token_lengths

from data_utils import TurnSet, read_corpus, split
from geli.nets.encoder import TurnEncoder, load_encoder
from geli.report.rewards import evaluate
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.training import train_steps
from models import RewardHead, head_rewards, predicted_returns
from train_reward_LI_only import LITraining, LITrainingOptions

BATCH, LEARNING_RATE = 32, 3e-4


def published_epoch(encoder: TurnEncoder, head: RewardHead, training: TurnSet, seed: int) -> None:
    """One epoch as published."""
    as_published.train_stage_1(encoder, head, training, BATCH, LEARNING_RATE, seed)


def our_epoch(encoder: TurnEncoder, head: RewardHead, training: TurnSet, seed: int) -> None:
    """One epoch as `train_reward_LI_only.py` trains, in bfloat16 where the hardware computes in it (`--dtype auto`)."""
    options = LITrainingOptions(batch_size=BATCH, epochs=1, learning_rate=LEARNING_RATE)
    accelerator = make_accelerator("cpu", "auto")
    stage = LITraining(encoder, head, training, None, options, accelerator, seed, save=lambda: None)
    train_steps(stage, stage.steps, "")


def bare_epoch(encoder: TurnEncoder, head: RewardHead, training: TurnSet, _) -> None:
    """Forward and backward passes over as many tokens, and nothing else."""
    lengths, autocast = token_lengths(encoder, training), make_accelerator("cpu", "auto").autocast
    batch = torch.full((BATCH, round(lengths.mean())), 5)
    encoder.train()
    for _ in range(round(lengths.sum() / batch.numel())):
        with autocast():
            rewards = head(encoder(batch, torch.ones_like(batch)).float())
        rewards.square().mean().backward()


def validation_loss(encoder: TurnEncoder, head: RewardHead, validation: TurnSet) -> float:
    """L_LI on the validation turns."""
    rewards = head_rewards(head, encoder.encode(encoder.tokenize(validation.texts)))
    returns = predicted_returns(validation, rewards, as_published.LENGTH)
    return evaluate(validation, rewards, returns)["li_loss"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2, help="training conversations")
    parser.add_argument("--seeds", type=int, default=3, help="epochs of each procedure")
    parser.add_argument("--encoder", help="folder of another encoder, with --data_dir")
    parser.add_argument("--data_dir", help="its corpus, in CANDOR's layout; two turns of context")
    args = parser.parse_args()
    if bool(args.encoder) != bool(args.data_dir):
        parser.error("give --encoder and --data_dir together")
    seed_everything(0)
    procedures = {"as published": published_epoch, "ours": our_epoch, "passes alone": bare_epoch}
    if args.encoder:
        corpus = read_corpus(args.data_dir, "overall_affect")
        encoder, parts = load_encoder(args.encoder), split(corpus, args.conversations)
        training, validation = (TurnSet.from_trajectories(part, 2) for part in parts)
        del procedures["as published"]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            encoder, training, validation = corpus_and_encoder(Path(temporary) / "candor", args.conversations)
    seconds, losses = {name: [] for name in procedures}, {name: [] for name in procedures}
    for seed in range(args.seeds):
        for name, run in procedures.items():  # alternately, so that a slow minute affects both
            seed_everything(seed)
            trained, head = copy.deepcopy(encoder), new_head(stage=1, hidden=encoder.hidden_size)
            head.init_constant(float(training.targets.mean()))
            start = time.perf_counter()
            run(trained, head, training, seed)
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(validation_loss(trained, head, validation))
    rows = [
        {
            "stage 1, one epoch": name,
            "seconds": float(np.median(seconds[name])),
            "passes alone/this": float(np.median(seconds["passes alone"]) / np.median(seconds[name])),
            "validation L_LI": ""
            if procedures[name] is bare_epoch
            else f"{np.mean(losses[name]):.4f} ± {np.std(losses[name]) / len(losses[name]) ** 0.5:.4f}",
        }
        for name in procedures
    ]
    print(f"{len(training)} turns of {token_lengths(encoder, training).mean():.0f} tokens, batches of {BATCH}, "
          f"{args.seeds} seeds")  # fmt: skip
    print(format_table(rows))
    if not args.encoder:
        print(f"times faster: {np.median(seconds['as published']) / np.median(seconds['ours']):.1f}")


if __name__ == "__main__":
    main()
