"""The published reward training, re-stated plainly as a peer for the benchmarks: what it does, not its code.

Every drawn turn is padded to 1,024 tokens and goes through BART's encoder and decoder; K = 160 turns are drawn *with*
replacement in every epoch and for both flips, and encoded again although the encoder is frozen; faces are found by
filtering the whole table of a conversation's features for every turn.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import numpy as np
import pandas as pd
import torch

from geli.data.candor import FACES
from models import geli_loss, li_loss, rrd_loss

PADDED_TOKENS = 1024
K = 160


def read_conversation(folder: Path):
    """Both speakers' faces for every turn of a conversation: [(turn_id, speaker, listener's affect)]."""
    transcript = pd.read_csv(folder / "transcription" / "transcript_cliffhanger.csv")
    features = pd.read_csv(folder / "audio_video_features.csv")
    features["timedelta"] = pd.to_timedelta(features["timedelta"])
    pd.read_csv(folder / "survey.csv")
    speakers = list(dict.fromkeys(transcript["speaker"]))
    columns = [f"prob_face_{face}" for face in FACES]
    found = []
    for _, turn in transcript.iterrows():
        listener = speakers[1 - speakers.index(turn["speaker"])]
        seconds = features["timedelta"].dt.total_seconds()
        mine = features[(features["user_id"] == listener) & (seconds >= turn["start"]) & (seconds <= turn["stop"])]
        faces = mine[columns].dropna()
        if len(faces) and turn["n_words"] > 5:
            classes = faces.idxmax(axis=1)
            counts = classes.value_counts()
            best = counts[counts == counts.max()].index
            affect = FACES[columns.index(faces[best].mean().idxmax())]
        else:
            affect = "neutral"
        found.append((str(turn["turn_id"]), turn["speaker"], affect))
    return found


def padded(tokenizer, texts, device="cpu"):
    """(n, 1024) inputs of (context, response) pairs, as the tokenizer pads and cuts them."""
    contexts, responses = zip(*texts, strict=True)
    inputs = tokenizer(
        list(contexts), list(responses), padding="max_length", truncation="longest_first", max_length=PADDED_TOKENS,
        return_tensors="pt",
    )  # fmt: skip
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def features(model, inputs, end: int):
    """(n, hidden) last hidden states of the encoder at the last end token, from a pass through the whole model."""
    output = model(**inputs)  # encoder and decoder
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    last = ((inputs["input_ids"] == end) * positions).argmax(dim=1)
    return output.encoder_last_hidden_state[torch.arange(len(last)), last]


def encode(encoder, texts, with_gradients: bool = False):
    """(n, hidden) features of (context, response) pairs, every pair padded, through the whole model."""
    parts = []
    for first in range(0, len(texts), 32):
        with torch.set_grad_enabled(with_gradients):
            inputs = padded(encoder.tokenizer, texts[first : first + 32])
            parts.append(features(encoder.model, inputs, encoder.tokenizer.eos_token_id))
    return torch.cat(parts)


def _optimizer(parameters, learning_rate: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)


def _update(loss, optimizer, schedule) -> None:
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def train_stage_1(encoder, head, turns, batch_size: int, learning_rate: float, seed: int) -> None:
    """One epoch of LI training on random batches of turns."""
    order = np.random.default_rng(seed).permutation(len(turns))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    optimizer, schedule = _optimizer([*encoder.trainable(), *head.parameters()], learning_rate, len(batches))
    encoder.train()
    head.train()
    for batch in batches:
        rewards = head(encode(encoder, [turns.texts[i] for i in batch], with_gradients=True)).squeeze(1)
        _update(li_loss(rewards, torch.from_numpy(turns.targets[batch])), optimizer, schedule)


def train_stage_2(encoder, head, turns, epochs: int, length: float, learning_rate: float, validate) -> float:
    """RRD with LI, one trajectory a step, K turns drawn with replacement and encoded when they are needed. Returns the
    lowest of the losses that `validate(head)` gives after each epoch."""
    rng, best = np.random.default_rng(0), np.inf
    optimizer, schedule = _optimizer(head.parameters(), learning_rate, epochs * len(turns.trajectories))
    for _ in range(epochs):
        head.train()
        for i in range(len(turns.trajectories)):
            place = turns.turns_of(i)
            drawn = rng.integers(place.start, place.stop, K)
            rewards = head(encode(encoder, [turns.texts[turn] for turn in drawn])).squeeze(1)
            li = li_loss(rewards, torch.from_numpy(turns.targets[drawn]))
            _update(geli_loss(rrd_loss(rewards, turns.scores[i], length), li, 0.5), optimizer, schedule)
        best = min(best, validate(head))
    return best
