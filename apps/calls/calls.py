"""A recorded call, as a conversation in CANDOR's layout.

A call is a folder with `ratings.csv`, a transcript, and a video of each person, named after the person; or one video
with `tiles.csv`, which says where in its picture each person is.
"""

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apps.calls.speech import transcribe
from apps.calls.transcripts import ENDINGS, MARKS, Utterance, fold_name, make_turns, read_transcript
from apps.calls.video import Tile
from geli.data.candor import MOST_BYTES, Dropped, read_conversation
from geli.data.questions import QUESTIONS
from geli.data.writer import write_conversation_of_frames
from geli.run.files import atomic_folder

RATINGS_FILE, TILES_FILE = "ratings.csv", "tiles.csv"
VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi")
NOT_IN_NAMES = set(',;:"/\\')  # of people, which stand in CSV files and are names of videos
LONGEST_NAME = 100  # characters


@dataclass(frozen=True)
class Call:
    """What is in a call's folder.

    Attributes:
        folder: its name becomes the conversation's id.
        answers: person -> question of `QUESTIONS` -> answer, of both people.
        names: name in the transcript -> person.
        transcript: its file, if there is one.
        videos: file -> person -> part of the picture (None: all of it).
    """

    folder: Path
    answers: dict[str, dict[str, float]]
    names: dict[str, str]
    transcript: Path | None
    videos: dict[Path, dict[str, Tile | None]]


def read_call(folder: Path, no_video: bool = False) -> Call:
    """Reads the small files of a call's folder.

    Args:
        no_video: do not look for videos.

    Raises:
        Dropped: if something is missing or contradictory.
    """
    answers, names = _read_ratings(folder / RATINGS_FILE)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    transcripts = [path for path in files if path.suffix.lower() in ENDINGS]
    if len(transcripts) > 1:
        raise Dropped(f"more than one transcript: {', '.join(path.name for path in transcripts)}; keep one")
    videos = [] if no_video else [path for path in files if path.suffix.lower() in VIDEO_ENDINGS]
    if not videos and not no_video:
        raise Dropped(f"no video ({', '.join(VIDEO_ENDINGS)}) in it; --no_video does without")
    has_tiles = (folder / TILES_FILE).is_file()
    places = _read_tiles(folder / TILES_FILE, videos, answers) if has_tiles and videos else _by_person(videos, answers)
    return Call(folder, answers, names, transcripts[0] if transcripts else None, places)


def turns_of_call(call: Call, whisper_model: str) -> tuple[list[Utterance], Counter]:
    """The turns of a call, and how many cues of its transcript were left out or completed, by reason.

    Args:
        whisper_model: of faster-whisper, for a call without a transcript.

    Raises:
        Dropped: if there is nothing to read, or only one person speaks.
    """
    if call.transcript:
        utterances, notes = read_transcript(call.transcript, call.names)
    else:
        alone = {next(iter(tiles)): video for video, tiles in call.videos.items() if len(tiles) == 1}
        if set(alone) != set(call.answers):
            raise Dropped(f"no transcript ({', '.join(ENDINGS)}), and no video of each person to transcribe")
        utterances, notes = transcribe(alone, whisper_model), Counter()
    turns = make_turns(utterances)
    if silent := [person for person in call.answers if all(turn.speaker != person for turn in turns)]:
        raise Dropped(f"{' and '.join(silent)} says nothing in the transcript")
    return turns, notes


def write_call(path: Path, call: Call, turns: Sequence[Utterance], faces: Mapping[str, np.ndarray]) -> None:
    """Writes a call to the folder `path`, which appears whole or not at all.

    Args:
        faces: person -> (seconds, 8) probabilities, NaN in seconds without a face; {} if no videos were read, for which
            no file of faces is written.

    Raises:
        Dropped: if no face was found, or the conversation could not be read again.
    """
    with atomic_folder(path, private=True) as temporary:
        frames = _frames(call, turns, faces) if faces else None
        write_conversation_of_frames(temporary, turns, frames, call.answers)
        read_conversation(temporary)


def seconds_of(turns: Sequence[Utterance]) -> int:
    """How many seconds of faces belong to the turns."""
    return int(turns[-1].stop) + 1


def _frames(call: Call, turns: Sequence[Utterance], faces: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Person -> of each second the probabilities, or None without a face. A person without a video has none."""
    if all(np.isnan(found).all() for found in faces.values()):
        raise Dropped("no face was found in any second of its videos; --no_video does without")
    frames = {}
    for person in call.answers:
        found = faces.get(person, np.full((seconds_of(turns), 1), np.nan))
        rounded = np.clip(found.astype(np.float64).round(6), 0, 1)
        frames[person] = [None if np.isnan(row).any() else row.tolist() for row in rounded]
    return frames


# ---------------------------------------------------------------------------------------------------------------------
# The files of a call


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a small CSV file with stripped cells; the first column must be `person`.

    Raises:
        Dropped: if it is not such a file, or has not one row for each of two people.
    """
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise Dropped(f"{path.name}: larger than {MOST_BYTES >> 20} MiB")
        lines = io.StringIO(content.decode().translate(MARKS), newline="")
        rows = [list(map(str.strip, row)) for row in csv.reader(lines, strict=True)]
        header, *rows = filter(any, rows)  # Excel writes rows of empty cells, and empty cells behind others
    except FileNotFoundError:
        raise Dropped(f"{path.name}: no such file") from None
    except (OSError, UnicodeError, csv.Error, ValueError):
        raise Dropped(f"{path.name}: not a readable CSV file (UTF-8, with commas)") from None
    while not header[-1]:
        header.pop()
    rows = [row[: len(header)] + list(filter(None, row[len(header) :])) for row in rows]
    if "person" not in header or len(set(header)) < len(header):
        found = ", ".join(header)[:200]
        raise Dropped(f"{path.name}: expected a column person and each column once, with commas, found {found}")
    if any(len(row) != len(header) for row in rows):
        raise Dropped(f"{path.name}: a row has more or fewer cells than the header")
    table = [dict(zip(header, row, strict=True)) for row in rows]
    people = [_person(row["person"], path) for row in table]
    if len(people) != 2 or fold_name(people[0]) == fold_name(people[1]):
        raise Dropped(f"{path.name}: expected one row for each of two people, found {', '.join(people) or 'none'}")
    return [row | {"person": person} for row, person in zip(table, people, strict=True)]


def _person(name: str, path: Path) -> str:
    """A person's name, if it can be one."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or NOT_IN_NAMES & set(name):
        raise Dropped(
            f"{path.name}: {name[:60]!r} cannot be a person's name (empty, too long, or with one of ,;:\"/\\)"
        )
    return name


def _read_ratings(path: Path) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Person -> question -> answer; and name in the transcript -> person."""
    rows = _read_table(path)
    if not (questions := [name for name in rows[0] if name in QUESTIONS]):
        raise Dropped(f"{path.name}: no question of CANDOR's survey in it (such as overall_affect)")
    answers = {}
    for row in rows:
        given = {question: row[question] for question in questions if row[question]}
        answers[row["person"]] = {question: _answer(question, cell, path) for question, cell in given.items()}
    if not any(answers.values()):
        raise Dropped(f"{path.name}: nobody answered anything")
    names = {row.get("name") or row["person"]: row["person"] for row in rows}
    if len(set(map(fold_name, names))) < 2:
        raise Dropped(f"{path.name}: both people have the name {next(iter(names))[:60]!r}")
    return answers, names


def _answer(question: str, cell: str, path: Path) -> float:
    try:
        answer = float(cell)
    except ValueError:
        answer = float("nan")
    if not QUESTIONS[question].accepts(answer):
        low, high = QUESTIONS[question].limits
        raise Dropped(f"{path.name}: {question} is {cell[:40]!r}, expected a number from {low} to {high}")
    return answer


def _read_tiles(path: Path, videos: Sequence[Path], people: Mapping[str, object]) -> dict[Path, dict[str, Tile | None]]:
    """The one video -> person -> tile."""
    if len(videos) > 1:
        raise Dropped(f"{path.name} is for one video with both people, found {', '.join(v.name for v in videos)}")
    known, tiles = {fold_name(person): person for person in people}, {}
    for row in _read_table(path):
        try:
            tile = Tile(*(int(row[name]) for name in Tile._fields))
        except (KeyError, ValueError):
            raise Dropped(f"{path.name}: expected whole numbers in the columns {', '.join(Tile._fields)}") from None
        if min(tile) < 0 or 0 in (tile.width, tile.height):
            raise Dropped(f"{path.name}: a tile begins outside of the picture, or is empty")
        tiles[known.get(fold_name(row["person"]), row["person"])] = tile
    if set(tiles) != set(people):
        raise Dropped(f"{path.name} has {' and '.join(tiles)}, {RATINGS_FILE} has {' and '.join(people)}")
    return {videos[0]: tiles}


def _by_person(videos: Sequence[Path], people: Mapping[str, object]) -> dict[Path, dict[str, Tile | None]]:
    """Video -> the person after whom it is named -> the whole picture."""
    known = {fold_name(person): person for person in people}
    places = {}
    for video in videos:
        person = known.pop(fold_name(video.stem), None)
        if person is None:
            raise Dropped(f"{video.name}: expected one video of each of {' and '.join(people)}, or {TILES_FILE}")
        places[video] = {person: None}
    return places
