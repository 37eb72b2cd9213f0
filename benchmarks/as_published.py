"""The published reward training, re-stated plainly as a peer for the benchmarks: what it does, not its code.

Every drawn turn is padded to 1,024 tokens and goes through BART's encoder and decoder; K = 160 turns are drawn *with*
replacement in every epoch and for both flips, and encoded again although the encoder is frozen; faces are found by
filtering the whole table of a conversation's features for every turn.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

PADDED_TOKENS = 1024
K = 160


def read_conversation(folder: Path):
    """Both speakers' faces for every turn of a conversation: [(turn_id, speaker, listener's affect)]."""
    import pandas as pd

    from data_utils import FACES

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
    import torch

    output = model(**inputs)  # encoder and decoder
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    last = ((inputs["input_ids"] == end) * positions).argmax(dim=1)
    return output.encoder_last_hidden_state[torch.arange(len(last)), last]
