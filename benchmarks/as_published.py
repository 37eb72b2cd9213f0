"""The published reward training, re-stated plainly as a peer for the benchmarks: what it does, not its code.

Faces are found by filtering the whole table of a conversation's features for every turn. Every turn that training draws
is padded to 1,024 tokens and goes through BART's encoder and decoder. In stage 2, K = 160 turns of each trajectory are
drawn *with* replacement in every epoch, and encoded again although the encoder is frozen.

The model, the head, the loss and the metrics are this project's, so that only the procedures differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import numpy as np
import pandas as pd
import torch

from data_utils import TurnSet
from geli.data.candor import FACES
from geli.nets.encoder import TurnEncoder
from geli.report.rewards import evaluate
from models import (
    RewardHead,
    head_rewards,
    li_loss,
    predicted_returns,
    rrd_loss,
)

PADDED_TOKENS = 1024
K, LENGTH = 160, 160  # turns a draw; L of the return
ENCODED_AT_ONCE = 32  # turns, where no gradients are needed


def read_conversation(folder: Path) -> list[tuple[str, str, str]]:
    """(turn_id, speaker, listener's affect) of every turn of a conversation."""
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
        during = (features["user_id"] == listener) & (seconds >= turn["start"]) & (seconds <= turn["stop"])
        faces = features[during][columns].dropna()
        if len(faces) and turn["n_words"] > 5:
            classes = faces.idxmax(axis=1)
            counts = classes.value_counts()
            best = counts[counts == counts.max()].index
            affect = FACES[columns.index(faces[best].mean().idxmax())]
        else:
            affect = "neutral"
        found.append((str(turn["turn_id"]), turn["speaker"], affect))
    return found


def encode(encoder: TurnEncoder, texts: list[tuple[str, str]]) -> torch.Tensor:
    """(n, hidden) last hidden states of the encoder at the last end token, from a pass of padded (context, response)
    pairs through encoder and decoder."""
    contexts, responses = zip(*texts, strict=True)
    inputs = encoder.tokenizer(
        list(contexts), list(responses), padding="max_length", truncation="longest_first", max_length=PADDED_TOKENS,
        return_tensors="pt",
    )  # fmt: skip
    ids = inputs["input_ids"]
    output = encoder.model(input_ids=ids, attention_mask=inputs["attention_mask"])
    last = ((ids == encoder.tokenizer.eos_token_id) * torch.arange(ids.shape[1])).argmax(dim=1)
    return output.encoder_last_hidden_state[torch.arange(len(last)), last]


def train_stage_1(
    encoder: TurnEncoder, head: RewardHead, training: TurnSet, batch_size: int, learning_rate: float, seed: int
) -> None:
    """One epoch of LI training of encoder and head on random batches of turns."""
    order = np.random.default_rng(seed).permutation(len(training))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    optimizer = torch.optim.AdamW([*encoder.trainable(), *head.parameters()], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    encoder.train()
    head.train()
    for batch in batches:
        rewards = head(encode(encoder, [training.texts[i] for i in batch])).squeeze(1)
        li_loss(rewards, torch.from_numpy(training.targets[batch])).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_stage_2(
    encoder: TurnEncoder, head: RewardHead, training: TurnSet, validation: TurnSet, epochs: int, learning_rate: float
) -> float:
    """RRD and LI training of the head, lambda = 0.5, one optimizer step a conversation (both of its trajectories);
    returns the lowest validation L_GE of an epoch."""
    rng = np.random.default_rng(0)
    pairs = np.arange(len(training.trajectories)).reshape(-1, 2)  # the two trajectories of each conversation
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * len(pairs))
    losses = []
    for _ in range(epochs):
        head.train()
        for pair in rng.permutation(pairs):
            for i in pair:
                place = training.turns_of(i)
                drawn = rng.integers(place.start, place.stop, K)
                rewards = head(_encode_frozen(encoder, [training.texts[turn] for turn in drawn])).squeeze(1)
                li = li_loss(rewards, torch.from_numpy(training.targets[drawn]))
                loss = 0.5 * rrd_loss(rewards, training.scores[i], LENGTH) + 0.5 * li
                (loss / len(pair)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        rewards = head_rewards(head, _encode_frozen(encoder, validation.texts))
        returns = predicted_returns(validation, rewards, LENGTH)
        losses.append(evaluate(validation, rewards, returns)["ge_loss"])
    return min(losses)


@torch.no_grad()
def _encode_frozen(encoder: TurnEncoder, texts: list[tuple[str, str]]) -> torch.Tensor:
    """(n, hidden) features of a frozen encoder, in eval mode."""
    encoder.eval()
    starts = range(0, len(texts), ENCODED_AT_ONCE)
    return torch.cat([encode(encoder, texts[first : first + ENCODED_AT_ONCE]) for first in starts])
