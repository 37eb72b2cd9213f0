"""Writes a conversation in CANDOR's layout."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from geli.data.candor import FACES, FEATURES_FILE, SURVEY_FILE, TRANSCRIPTS
from geli.data.questions import QUESTIONS
from geli.data.words import count_words

TRANSCRIPT_COLUMNS = (
    "turn_id speaker start stop utterance interval delta questions end_question overlap n_words".split()
)
BACKCHANNEL_COLUMNS = "backchannel backchannel_count backchannel_speaker backchannel_start backchannel_stop".split()


def write_conversation_of_frames(
    folder: Path, turns: Sequence[tuple[str, float, float, str]],
    frames: Mapping[str, Sequence[Sequence[float] | None]] | None, answers: Mapping[str, Mapping[str, float]],
) -> None:  # fmt: skip
    """Writes transcripts, faces and survey of one conversation.

    Args:
        folder: the conversation's folder; its name is the conversation's id.
        turns: (user id, start, stop, utterance), in order, seconds.
        frames: user id -> for second 0, 1, … the eight probabilities in the order of `FACES`; None where the face was
            lost (empty cells). None: nothing is known of faces, and their file is not written.
        answers: user id -> question of `QUESTIONS` -> answer; questions left out are empty cells.

    Raises a ValueError for anything but eight probabilities, a question that CANDOR does not have, or an answer out of
    the question's range.
    """
    _check(frames or {}, answers)
    (folder / "transcription").mkdir(parents=True, exist_ok=True)
    rows = list(_transcript_rows(turns))
    for name in TRANSCRIPTS:  # the three differ in how they cut speech into turns, which is given here
        more = BACKCHANNEL_COLUMNS if name == "backbiter" else []
        padded = [row + [""] * len(more) for row in rows]
        _write(folder / "transcription" / f"transcript_{name}.csv", TRANSCRIPT_COLUMNS + more, padded)

    if frames is not None:
        columns = ["user_id", "timedelta", *(f"prob_face_{face}" for face in FACES)]
        rows = [
            [user, _timedelta(second), *([""] * len(FACES) if frame is None else frame)]
            for user, shown in frames.items()
            for second, frame in enumerate(shown)
        ]
        _write(folder / FEATURES_FILE, columns, rows)

    survey = [[user, *(given.get(question, "") for question in QUESTIONS)] for user, given in answers.items()]
    _write(folder / SURVEY_FILE, ["user_id", *QUESTIONS], survey)


def _check(frames: Mapping[str, Sequence[Sequence[float] | None]], answers: Mapping[str, Mapping[str, float]]) -> None:
    for frame in (frame for shown in frames.values() for frame in shown if frame is not None):
        if len(frame) != len(FACES) or not all(0 <= probability <= 1 for probability in frame):
            raise ValueError(f"face probabilities {list(frame)}, expected {len(FACES)} numbers from 0 to 1")
    for question, answer in (item for given in answers.values() for item in given.items()):
        if question not in QUESTIONS:
            raise ValueError(f"survey question {question!r}, expected one of {', '.join(QUESTIONS)}")
        if not QUESTIONS[question].accepts(answer):
            low, high = QUESTIONS[question].limits
            raise ValueError(f"{question}: answer {answer!r}, expected {low} to {high}")


def _transcript_rows(turns):
    previous_stop = 0.0
    for i, (user, start, stop, text) in enumerate(turns):
        interval = round(start - previous_stop, 2) if i else ""
        questions = text.count("?")
        yield [
            i, user, round(start, 2), round(stop, 2), text, interval, round(stop - start, 2), questions,
            text.endswith("?"), False, count_words(text),
        ]  # fmt: skip
        previous_stop = stop


def _timedelta(second: int) -> str:
    return f"0 days {second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # conversations


def _write(path: Path, columns: list[str], rows) -> None:
    with open(path, "w", newline="", encoding="utf-8", opener=_for_its_owner) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
