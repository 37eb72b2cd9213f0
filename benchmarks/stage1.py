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
import torch
from encoding import corpus_and_encoder, new_head

from data_utils import shuffled_batches
from evaluation import evaluate, head_rewards
from models import li_loss
from runs import format_table, make_accelerator, seed_everything

BATCH, LEARNING_RATE = 32, 3e-4


def epoch(encoder, head, training, batches, features_of) -> float:
    """Seconds of one epoch of LI training over `batches`."""
    optimizer = torch.optim.AdamW([*encoder.trainable(), *head.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    encoder.train()
    head.train()
    start = time.perf_counter()
    for batch in batches:
        loss = li_loss(head(features_of(batch)).squeeze(1), torch.from_numpy(training.targets[batch]))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def published_epoch(encoder, head, training, seed: int) -> float:
    """As published: random batches, padded, the whole model."""
    order = np.random.default_rng(seed).permutation(len(training))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

    def features(batch):
        inputs = as_published.padded(encoder.tokenizer, [training.texts[i] for i in batch])
        return as_published.features(encoder.model, inputs, encoder.tokenizer.eos_token_id)

    return epoch(encoder, head, training, batches, features)


def our_epoch(encoder, head, training, seed: int) -> float:
    """Ours: batches of similar lengths, the encoder alone, tokenised once (which is counted), in bfloat16 where the
    hardware computes in it, as `--dtype auto` has it."""
    autocast = make_accelerator("cpu", "auto").autocast
    start = time.perf_counter()
    pairs = encoder.tokenize(training.texts)
    tokenising = time.perf_counter() - start
    lengths = np.array([len(pair.ids) for pair in pairs])
    batches = shuffled_batches(lengths, BATCH, np.random.default_rng(seed))
    return tokenising + epoch(
        encoder,
        head,
        training,
        batches,
        lambda batch: encoder.encode_with_gradients([pairs[i] for i in batch], autocast),
    )


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
            head.start_at(float(training.targets.mean()))
            seconds[name].append(run(mine, head, training, seed))
            features = mine.eval().encode(mine.tokenize(validation.texts))
            losses[name].append(evaluate(validation, head_rewards(head, features), 160)["li_loss"])
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
