"""Writes the conversations of made and converted corpora in CANDOR's layout."""

from pathlib import Path

from geli.data.candor import FACES
from geli.data.writer import write_conversation_of_frames

FACE_SHARE = 0.72  # probability that a frame gives its class; the rest is spread over the other seven


def write_conversation(
    folder: Path,
    turns: list[tuple[str, float, float, str]],
    faces: list[tuple[str, float, float, str]] | None,
    answers: dict[str, dict[str, float]],
    lost: set[tuple[str, int]] = frozenset(),
) -> None:
    """Writes a conversation whose speakers' faces are given as spans of one class.

    Args:
        folder, turns, answers: as of `write_conversation_of_frames`.
        faces: (user id, start, stop, face class of `FACES`): that face from start to stop; neutral at all other times.
            None: nothing is known of faces, and their file is not written.
        lost: (user id, second) of frames whose face was lost: empty cells.

    Raises:
        ValueError: for a face class or a question that CANDOR does not have, or an answer out of the question's range.
    """
    for *_, face in faces or ():
        if face not in FACES:
            raise ValueError(f"face class {face!r}, expected one of {', '.join(FACES)}")
    if faces is None:
        write_conversation_of_frames(folder, turns, None, answers)
        return
    seconds = range(int(turns[-1][2]) + 1 if turns else 0)
    frames = {}
    for user in dict.fromkeys([*answers, *(turn[0] for turn in turns)]):
        spans = [span for span in faces if span[0] == user]
        shown = (next((face for _, start, stop, face in spans if start <= s <= stop), "neutral") for s in seconds)
        frames[user] = [
            None if (user, second) in lost else _frame(face) for second, face in zip(seconds, shown, strict=True)
        ]
    write_conversation_of_frames(folder, turns, frames, answers)


def _frame(face: str) -> list[float]:
    rest = round((1 - FACE_SHARE) / (len(FACES) - 1), 4)
    return [FACE_SHARE if name == face else rest for name in FACES]
