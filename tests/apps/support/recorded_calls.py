"""Recorded calls of two people with real faces, in which it is known who speaks and smiles when."""

import os
import random
from pathlib import Path

from face_clips import MAN, SIZE, WOMAN, write_video

PEOPLE = {"ana": (WOMAN, "sadness"), "ben": (MAN, "neutral")}  # person -> clip, and the face that is no smile
NAMES = {"ana": "Ana Silva", "ben": "Ben"}  # as the transcript has them
WORDS = "I think that we could go and see it because it was really nice there".split()


def write_call(
    folder: Path, unit: int = 20, repeat: int = 1, seed: int = 0, size: tuple[int, int] = SIZE, videos: bool = True
) -> dict[str, list[bool]]:
    """Writes a call of `unit` seconds, repeated; returns person -> whether that person smiles in each second."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    smiles = {person: [rng.random() < 0.4 for _ in range((unit + 2) // 3)] for person in PEOPLE}
    smiles = {person: [smile for smile in parts for _ in range(3)][:unit] for person, parts in smiles.items()}
    for person, (clip, other) in PEOPLE.items() if videos else ():
        faces = ["happiness" if smile else other for smile in smiles[person]]
        write_video(folder / f"{person}.mp4", (clip, faces), repeat=repeat, size=size)
    (folder / "zoom.transcript.vtt").write_text(transcript(unit * repeat, rng))
    rows = ["person,name,overall_affect,i_like_you", "ana,Ana Silva,8,7", "ben,,5,"]
    (folder / "ratings.csv").write_text("\n".join([*rows, ""]))
    return {person: seconds * repeat for person, seconds in smiles.items()}


def transcript(seconds: int, rng: random.Random) -> str:
    """What both say in turn until the end, as Zoom writes it."""
    cues, start = ["WEBVTT\n"], 0.0
    while start + 8 < seconds:
        stop = start + rng.uniform(3, 7)
        person = list(NAMES.values())[len(cues) % 2]
        text = " ".join(rng.choices(WORDS, k=8))
        cues.append(f"{len(cues)}\n{_time(start)} --> {_time(stop)}\n{person}: {text}\n")
        start = stop + rng.uniform(0.1, 1)
    person = list(NAMES.values())[len(cues) % 2]
    cues.append(f"{len(cues)}\n{_time(start)} --> {_time(seconds - 0.5)}\n{person}: bye, it was nice to talk to you\n")
    return "\n".join(cues)


def _time(seconds: float) -> str:
    return f"{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{seconds % 60:06.3f}"


def die(*_) -> None:
    """Ends a worker process as a kill does."""
    os._exit(1)
