"""Batches of items of similar lengths, so that little of a batch is padding."""

import numpy as np


def shuffled_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 50
) -> list[np.ndarray]:
    """Random batches of similar lengths, as arrays of indices; every index is in exactly one batch.

    Shuffles, cuts into pools of `pool` batches, sorts each pool by length, cuts it into batches, shuffles the batches.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * pool):
        part = order[start : start + batch_size * pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def token_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Batches of similar lengths, longest first, as arrays of indices.

    Each has at most `tokens_per_batch` tokens with padding, or a single item that is longer.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches
