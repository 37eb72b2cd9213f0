"""Small conversations in CANDOR's layout, which tests of the reader share."""

import numpy as np
import pandas as pd

from geli.data.candor import FACES
from tools.writer import write_conversation

HAPPY, NEUTRAL, SAD, ANGRY = (FACES.index(name) for name in ("happiness", "neutral", "sadness", "anger"))
WORDS = "one two three four five six"


def frames(*shares):
    """(m, 8) probabilities from dicts of face -> probability."""
    return np.array([[share.get(face, 0.0) for face in FACES] for share in shares])


def write(folder, turns=None, faces=(), answers=None):
    """A conversation of u (who speaks first) and v with four turns, unless told otherwise."""
    turns = turns or [
        ("u", 0, 3, f"a {WORDS}"),
        ("v", 3, 6, f"b {WORDS}"),
        ("u", 6, 9, f"c {WORDS}"),
        ("v", 9, 12, "d"),
    ]
    answers = (
        {"u": {"overall_affect": 7, "conversationalist": 80}, "v": {"overall_affect": 4}}
        if answers is None
        else answers
    )
    write_conversation(folder, list(turns), list(faces), answers)
    return folder


FACELESS = {  # what becomes of the file of faces -> why there are no faces
    "missing": (lambda path: path.unlink(), "no such file"),
    "zero bytes": (lambda path: path.write_bytes(b""), "nothing in it"),
    "header only": (lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"), "no frame with a face"),
    "all lost": (lambda path: path.write_text(path.read_text().replace("0.", "-0.")), "no frame with a face"),
}


def lose_faces(folder, kind="missing"):
    """Leaves a conversation without faces."""
    FACELESS[kind][0](folder / "audio_video_features.csv")
    return folder


def edit(folder, change, name="transcription/transcript_cliffhanger.csv"):
    path = folder / name
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
