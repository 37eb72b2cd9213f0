"""Measuring a reward head with intervals, against scikit-learn and scipy on every resample.

    python benchmarks/evaluate_heads.py [--conversations 1656] [--repetitions 1000]

Work: features of conversations of CANDOR's size (320 turns, bart-large's width) that are already encoded; a head's
rewards and returns, all metrics, and their bootstrap intervals over conversations. Peer: the same three rank metrics by
scikit-learn and scipy on resampled turns, timed on a few resamples and scaled. Prints seconds, the ratio, and the peak
memory beyond the features.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import numpy as np
import psutil
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from geli.report.metrics import HeldOut, estimates, metrics, spearman
from geli.run.console import format_table
from geli.statistics import resample
from models import (
    RewardHead,
    RewardHeadConfig,
    head_rewards,
    predicted_return,
)

TURNS, WIDTH, PEER_RESAMPLES = 320, 1024, 5


def made_up(conversations: int) -> tuple[torch.Tensor, HeldOut, np.ndarray]:
    """Features (N, WIDTH) of turns whose first feature makes listeners smile, what they are measured against, and
    hidden rewards (N,)."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    features = torch.randn(conversations * TURNS, WIDTH, generator=generator)
    truth = features[:, 0].numpy().astype(np.float64)
    of_trajectory = np.repeat(np.arange(conversations), 2)
    happy = rng.normal(size=len(truth)) + truth > 1
    scores = 50 + 200 * truth.reshape(2 * conversations, -1).mean(axis=1) + rng.normal(0, 10, 2 * conversations)
    of_turn = np.repeat(of_trajectory, TURNS // 2)
    return features, HeldOut(conversations, of_turn, of_trajectory, happy, ~happy, scores), truth


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=1656)
    parser.add_argument("--repetitions", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    head = RewardHead(RewardHeadConfig("small_model_shrink", WIDTH, "facebook/bart-large", False, 1024, 20, 2, None))
    features, data, truth = made_up(args.conversations)
    process, started = psutil.Process(), time.perf_counter()
    before = process.memory_info().rss
    rewards = head_rewards(head, features).astype(np.float64)
    returns = np.array([predicted_return(part, 160.0) for part in rewards.reshape(2 * args.conversations, -1)])
    scored = time.perf_counter()
    of_head = metrics(data, rewards, returns, float(data.scores.mean()))
    of_head["truth_correlation"] = spearman(rewards, truth, data.of_turn)
    found = estimates(data, of_head, args.repetitions)
    measured = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before

    turns = np.arange(len(rewards)).reshape(args.conversations, TURNS)
    weights = resample(args.conversations, PEER_RESAMPLES)
    begun = time.perf_counter()
    for drawn in weights:
        rows = np.repeat(turns, drawn, axis=0).ravel()
        roc_auc_score(data.happy[rows], rewards[rows])
        average_precision_score(data.happy[rows], rewards[rows])
        spearmanr(rewards[rows], truth[rows])
    peer = (time.perf_counter() - begun) / PEER_RESAMPLES * args.repetitions
    rows = [
        {"work": f"rewards of {len(rewards):,} turns", "seconds": scored - started},
        {"work": f"7 metrics, {args.repetitions:,} resamples", "seconds": measured - scored},
        {"work": "3 of them by scikit-learn and scipy", "seconds": peer},
    ]
    print(format_table(rows))
    print(f"ratio {peer / (measured - scored):.1f}; peak memory {peak / 2**20:,.0f} MiB beyond the features")
    print("; ".join(f"{name} {estimate}" for name, estimate in found.items()))


if __name__ == "__main__":
    main()
