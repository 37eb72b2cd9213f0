"""CANDOR's files of one conversation: transcript, faces and survey, read strictly.

A conversation is loaded as its files say, or dropped with a reason. The files are data of others, so anything can be
in them: a value that is missing or out of range is left out, and a file that could be misread drops the conversation.
"""

import csv
import io
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from geli.data.questions import QUESTIONS
from geli.data.words import count_words

READER_VERSION = 4  # part of the cache's key: raise it when the same files are read differently

TRANSCRIPTS = ("cliffhanger", "audiophile", "backbiter")

FACES = ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")  # alphabetical
HAPPINESS, NEUTRAL, SURPRISE = FACES.index("happiness"), FACES.index("neutral"), FACES.index("surprise")
NEGATIVE = tuple(FACES.index(name) for name in ("anger", "contempt", "disgust", "fear", "sadness"))
AFFECT_GROUPS = {"neg": NEGATIVE, "pos": (HAPPINESS,), "neut": (NEUTRAL,), "sup": (SURPRISE,)}

MIN_WORDS = 6  # a turn of fewer words is too short to read a face from, and counts as neutral
MOST_WORDS = 1_000_000  # of a turn; larger counts are invalid
MOST_CHARACTERS = 100_000  # of an utterance; a whole call of half an hour has fewer
MOST_BYTES = 2**26  # of a file; CANDOR's have a few million
FEATURES_FILE = "audio_video_features.csv"
SURVEY_FILE = "survey.csv"


class Dropped(Exception):
    """A conversation that cannot be used; the message is the reason."""


class Missing(Dropped):
    """A file that is not there, or that has nothing in it."""


class Turn(NamedTuple):
    """One turn.

    Attributes:
        turn_id: as in the transcript.
        speaker: user id of who speaks.
        start, stop: seconds from the beginning of the call, start <= stop.
        utterance: what was said, stripped, never empty.
        n_words: the transcript's word count, or `count_words` where it has none.
        affect: index into `FACES` of the *listener's* face during the turn; neutral without frames or words enough.
        happy_share: share of the listener's frames that are happy, in [0, 1]; 0 without frames or words enough.
        reaction: of a chat, the listener's to the message: 1 pleased, -1 displeased; None: not known.
        rating: of a chat, somebody's judgement of this turn alone, to measure rewards by; nothing trains on it.
    """

    turn_id: str
    speaker: str
    start: float
    stop: float
    utterance: str
    n_words: int
    affect: int
    happy_share: float
    reaction: int | None = None
    rating: float | None = None


@dataclass(frozen=True)
class Conversation:
    """A video call or a chat of two people.

    Attributes:
        id: name of its folder; of a chat its id, or its file and line.
        speakers: user ids, first the one who speaks first.
        turns: in the order of their ids.
        answers: user id -> question -> answer; missing answers are left out.
        questions: the columns of the survey that are in `QUESTIONS`.
        skipped_turns: reason -> number of transcript rows that are not turns.
        off_scale: question -> answers of the speakers that are outside its limits, which are left out of `answers`.
        no_faces: why neither speaker's face is known in any second of a turn; empty if one is.
        unseen: indices of the turns without a frame of the listener's face.
    """

    id: str
    speakers: tuple[str, str]
    turns: tuple[Turn, ...]
    answers: dict[str, dict[str, float]]
    questions: frozenset[str]
    skipped_turns: Counter = field(default_factory=Counter)
    off_scale: dict[str, list[float]] = field(default_factory=dict)
    no_faces: str = ""
    unseen: tuple[int, ...] = field(default=(), compare=False)


def affect_of_turns(start, stop, n_words, seconds, probabilities) -> tuple[np.ndarray, np.ndarray]:
    """The listener's affect during each turn.

    The class of a frame is its most probable face. The affect of a turn is the most frequent class of the frames with
    start <= second <= stop; of equally frequent ones, that of larger mean probability. A turn without frames, or of
    fewer than `MIN_WORDS` words, is neutral.

    Args:
        start, stop: (n,) seconds. n_words: (n,) words of each turn.
        seconds: (m,) times of the listener's frames, ascending. probabilities: (m, 8), ordered as `FACES`, in [0, 1].

    Returns:
        (n,) indices into `FACES`, and (n,) the share of frames that are happy (0 without frames or words enough).
    """
    first, end = _frames_within(start, stop, seconds)
    classes = probabilities.argmax(axis=1) if len(seconds) else np.zeros(0, dtype=int)
    counts = _window_sums(np.eye(len(FACES))[classes], first, end)
    # sums compare as means do, since all are of the same frames; integers, so that rounding cannot decide a tie
    sums = _window_sums(np.rint(probabilities * 1e12).astype(np.int64), first, end)
    tied = counts == counts.max(axis=1, keepdims=True)
    affect = np.where(tied, sums, -1).argmax(axis=1)
    frames = end - first
    readable = (frames > 0) & (np.asarray(n_words) >= MIN_WORDS)
    share = np.where(readable, counts[:, HAPPINESS] / np.maximum(frames, 1), 0.0)
    return np.where(readable, affect, NEUTRAL), share


def _frames_within(start, stop, seconds) -> tuple[np.ndarray, np.ndarray]:
    """(n,) indices of the first frame of each turn, and of the first one behind it."""
    return np.searchsorted(seconds, start, side="left"), np.searchsorted(seconds, stop, side="right")


def _window_sums(values: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(n, k) sums of values[first:end] over each window, from one running sum."""
    running = np.concatenate([np.zeros((1, len(FACES)), dtype=values.dtype), np.cumsum(values, axis=0)])
    return running[end] - running[first]


def read_conversation(folder: Path, transcript: str = "cliffhanger") -> Conversation:
    """Reads one conversation's folder, with one of the `TRANSCRIPTS`. Faces may be missing (see
    `Conversation.no_faces`); raises `Dropped` if anything else is, or if something is unreadable or contradictory."""
    turns, speakers, skipped = read_turns(folder, transcript)
    faces, no_faces = _read_faces(folder / FEATURES_FILE, speakers)
    answers, off_scale, questions = _read_survey(folder / SURVEY_FILE, speakers)

    who = np.array([speakers.index(turn.speaker) for turn in turns])
    start, stop, n_words = (np.array([getattr(turn, name) for turn in turns]) for name in ("start", "stop", "n_words"))
    if not no_faces:
        no_faces = _two_clocks(start, stop, n_words, np.concatenate([seconds for seconds, _ in faces.values()]))
        faces = dict.fromkeys(speakers, _NO_FRAMES) if no_faces else faces
    affect, share, unseen = np.full(len(turns), NEUTRAL), np.zeros(len(turns)), np.zeros(len(turns), dtype=bool)
    for i, listener in enumerate(speakers[::-1]):
        rows = np.flatnonzero(who == i)
        affect[rows], share[rows] = affect_of_turns(start[rows], stop[rows], n_words[rows], *faces[listener])
        first, end = _frames_within(start[rows], stop[rows], faces[listener][0])
        unseen[rows] = first == end
    seen = zip(turns, affect.tolist(), share.tolist(), strict=True)
    turns = tuple(turn._replace(affect=face, happy_share=happy) for turn, face, happy in seen)
    return Conversation(
        folder.name, speakers, turns, answers, questions, skipped, off_scale, no_faces,
        unseen=tuple(np.flatnonzero(unseen).tolist()),
    )  # fmt: skip


# Of two clocks that agree, one rarely ends this many times later than the other; of milliseconds, frame numbers and
# seconds it does. Nobody takes so many seconds for a word, but in a chat a turn may last until the next one.
_TIMES_LATER, _SECONDS_A_WORD, _SLACK = 5, 3.0, 60.0


def _two_clocks(start: np.ndarray, stop: np.ndarray, n_words: np.ndarray, seconds: np.ndarray) -> str:
    """Why the times of turns (n,) and of frames (m,) cannot be of one clock that counts seconds; empty if they can."""
    said, shown = max(1.0, float(stop.max())), max(1.0, float(seconds.max()))
    slow = np.median((stop - start) / np.maximum(n_words, 1)) > _SECONDS_A_WORD
    if shown > _TIMES_LATER * said + _SLACK or (said > _TIMES_LATER * shown + _SLACK and slow):
        later, other = ("its", "the transcript's") if shown > said else ("the transcript's", "its")
        factor = 10 ** round(abs(math.log10(shown / said)))
        return (
            f"{FEATURES_FILE}: {later} times end about {factor:,} times as late as {other}: expected seconds from the "
            "beginning of the call in both"
        )
    seconds = np.sort(seconds)
    first, end = _frames_within(start, stop, seconds)
    return "" if (end > first).any() else f"{FEATURES_FILE}: no frame with a face during a turn"


def read_turns(folder: Path, transcript: str = "cliffhanger") -> tuple[list[Turn], tuple[str, str], Counter]:
    """The turns in a conversation's folder, with neutral affects; its speakers, first the one who speaks first; and
    how many rows of the transcript were skipped, by reason. Faces and survey are not read. Raises `Dropped` if the
    transcript is missing or unreadable, or has not two speakers."""
    if not folder.name.isprintable():  # such an id could neither be printed nor written to every file
        raise Dropped("the folder's name has characters that cannot be printed")
    turns, skipped = _read_transcript(folder / "transcription" / f"transcript_{transcript}.csv")
    speakers = tuple(dict.fromkeys(turn.speaker for turn in turns))
    if len(speakers) != 2:
        raise Dropped(f"2 speakers are expected, {len(speakers)} found in the transcript")
    return turns, speakers, skipped


def conversation_or_reason(folder: Path, transcript: str) -> Conversation | str:
    """The conversation in a folder, or the reason why it is dropped."""
    try:
        return read_conversation(folder, transcript)
    except Dropped as reason:
        return str(reason)


def _read_bytes(path: Path) -> bytes:
    """The content of a regular file of at most `MOST_BYTES` of UTF-8 text without NUL bytes; its byte order mark is cut
    off. Raises `Missing` if there is none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO blocks, and /dev/zero has no end
            raise Dropped(f"{path.name}: not a file")
        if status.st_size > MOST_BYTES:
            raise Dropped(f"{path.name}: larger than {MOST_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise Missing(f"{path.name}: no such file") from None
    except OSError as error:
        raise Dropped(f"{path.name}: cannot be read ({(error.strerror or 'input/output error').lower()})") from None
    try:
        content.decode()
    except UnicodeError:
        raise Dropped(f"{path.name}: not a readable CSV file (no UTF-8 text)") from None
    if b"\0" in content:
        raise Dropped(f"{path.name}: not a readable CSV file (NUL bytes; UTF-8 is expected)")
    return content


def _read_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file, header first, of one length, in which quotes stand around whole cells only. Raises
    `Missing` if there is no row."""
    csv.field_size_limit(MOST_BYTES)  # a column that is not used may have cells of any length
    reader = csv.reader(io.StringIO(_read_bytes(path).decode(), newline=""), strict=True)
    rows = []
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]):
                than = "more" if len(row) > len(rows[0]) else "fewer"
                raise Dropped(f"{path.name}: line {reader.line_num}: {than} cells than the header")
    except csv.Error as error:
        raise Dropped(f"{path.name}: not a readable CSV file (line {reader.line_num}: {error})") from None
    if not rows:
        raise Missing(f"{path.name}: not a readable CSV file (nothing in it)")
    return rows


def _read_csv(
    path: Path, required: Sequence[str], optional: Iterable[str] = (), ids: Iterable[str] = (), id_column: str = ""
) -> dict[str, list[str]]:
    """The required and optional columns of a CSV file: name -> cells.

    Two stray quotes can turn several rows into one cell and still leave a valid table. Therefore a file is refused in
    which a cell of several lines has a user id between commas.

    Args:
        ids: user ids, stripped. id_column: a column with more of them.

    Raises:
        Dropped: if a required column is missing, one of the columns is there twice, or the file is not valid CSV.
    """
    header, *rows = _read_rows(path)
    places = {name: header.index(name) for name in (*required, *optional) if name in header}
    if missing := [name for name in required if name not in places]:
        raise Dropped(f"{path.name}: no column {', '.join(missing)}")
    if twice := [name for name in places if header.count(name) > 1]:
        raise Dropped(f"{path.name}: more than one column {', '.join(twice)}")
    columns = {name: [row[i] for row in rows] for name, i in places.items()}
    known = {*ids, *map(str.strip, columns.get(id_column, ()))} - {""}
    long_cells = (cell for row in rows for cell in row if "\n" in cell or "\r" in cell)
    if any(part[0].strip(' "') in known for cell in long_cells for part in re.finditer(r"[^,\r\n]+", cell)):
        raise Dropped(f"{path.name}: a cell has a row in it (a stray quote?)")
    return columns


def _number(cell: str) -> float:
    """The finite number in a cell, else NaN."""
    try:
        value = float(cell) if cell.isascii() and "_" not in cell else math.nan  # Python accepts 1_000; CSV does not
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _read_transcript(path: Path) -> tuple[list[Turn], Counter]:
    """The turns in the order of their ids, with neutral affects, and how many rows were skipped, by reason."""
    names = ("turn_id", "speaker", "start", "stop", "utterance")
    columns = _read_csv(path, names, ("n_words",), id_column="speaker")
    words = columns.get("n_words") or [""] * len(columns["speaker"])
    turns, skipped = [], Counter()
    for turn_id, speaker, start, stop, utterance, n in zip(*(columns[name] for name in names), words, strict=True):
        speaker, utterance = speaker.strip(), utterance.strip()
        start, stop, n = _number(start), _number(stop), _number(n)
        if not utterance:
            skipped["empty utterance"] += 1
        elif not speaker:
            skipped["no speaker"] += 1
        elif math.isnan(start + stop):
            skipped["start or stop is not a number"] += 1
        elif not 0 <= start <= stop:
            skipped["starts before 0 or stops before it starts"] += 1
        elif len(utterance) > MOST_CHARACTERS:
            skipped[f"utterance of more than {MOST_CHARACTERS:,} characters"] += 1
        else:
            n_words = int(n) if 0 <= n <= MOST_WORDS else count_words(utterance)
            turns.append(Turn(turn_id, speaker, start, stop, utterance, n_words, affect=NEUTRAL, happy_share=0.0))
    if not turns:
        raise Dropped("the transcript has no usable turn")
    order = np.array([_number(turn.turn_id) for turn in turns])
    known = order[~np.isnan(order)]
    if len(known) == len(order):
        turns = [turns[i] for i in np.argsort(order, kind="stable")]
    elif (np.diff(known) < 0).any():
        raise Dropped("the transcript's rows are out of order, and not every turn_id is a number")
    return turns, skipped


_Frames = tuple[np.ndarray, np.ndarray]  # (m,) ascending seconds, (m, 8) face probabilities
_NO_FRAMES: _Frames = (np.zeros(0), np.zeros((0, len(FACES))))


def _read_faces(path: Path, speakers: tuple[str, str]) -> tuple[dict[str, _Frames], str]:
    """Speaker -> the frames without an invalid value; and why neither speaker has one, empty if one has."""
    try:
        users, times, probabilities = _fast_faces(path) or _careful_faces(path, speakers)
    except Missing as reason:
        return dict.fromkeys(speakers, _NO_FRAMES), str(reason)
    users = _map_distinct(users, lambda text: {name: i for i, name in enumerate(speakers)}.get(text.strip(), -1))
    seconds = _map_distinct(times, _seconds)
    valid = (probabilities >= 0) & (probabilities <= 1 + 1e-6)  # False for NaN; a little more than 1 is rounding
    valid = np.isfinite(seconds) & valid.all(axis=1)
    faces = {}
    for i, speaker in enumerate(speakers):
        rows = np.flatnonzero(valid & (users == i))
        rows = rows[np.argsort(seconds[rows], kind="stable")]
        faces[speaker] = (seconds[rows], probabilities[rows])
    found = any(len(seconds) for seconds, _ in faces.values())
    return faces, "" if found else f"{FEATURES_FILE}: no frame with a face of either speaker"


_PROBABILITIES = tuple(f"prob_face_{face}" for face in FACES)


def _fast_faces(path: Path) -> tuple[pa.Array, pa.Array, np.ndarray] | None:
    """Users (m,) and times (m,) as text and probabilities (m, 8), read by pyarrow; None for a file that is not plain
    and regular, which `_careful_faces` reads or refuses."""
    columns = ["user_id", "timedelta", *_PROBABILITIES]
    types = {"user_id": pa.string(), "timedelta": pa.string(), **dict.fromkeys(_PROBABILITIES, pa.float64())}
    try:
        content = _read_bytes(path)
        header = content[: content.find(b"\n")].rstrip(b"\r").split(b",")
        if b'"' in content or any(header.count(name.encode()) != 1 for name in columns):
            return None  # pyarrow accepts misplaced quotes and columns that are there twice
        table = arrow_csv.read_csv(
            pa.py_buffer(content),
            read_options=arrow_csv.ReadOptions(use_threads=False),
            parse_options=arrow_csv.ParseOptions(quote_char=False),
            convert_options=arrow_csv.ConvertOptions(column_types=types, include_columns=columns),
        )
    except (pa.ArrowException, Dropped):
        return None
    if not len(table):
        return None
    probabilities = np.column_stack([table[name].to_numpy() for name in _PROBABILITIES])
    return table["user_id"].combine_chunks(), table["timedelta"].combine_chunks(), probabilities


def _careful_faces(path: Path, speakers: Iterable[str] = ()) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """As `_fast_faces`, of any file that can be read."""
    columns = _read_csv(path, ("user_id", "timedelta", *_PROBABILITIES), ids=speakers)
    probabilities = np.array([[_number(cell) for cell in columns[name]] for name in _PROBABILITIES]).T
    return pa.array(columns["user_id"], pa.string()), pa.array(columns["timedelta"], pa.string()), probabilities


def _map_distinct(column: pa.Array, function: Callable[[str], float]) -> np.ndarray:
    """(m,) `function` of each cell, called once for each distinct cell (both speakers have a row for every second)."""
    encoded = column.dictionary_encode()
    return np.array([function(cell) for cell in encoded.dictionary.to_pylist()])[encoded.indices.to_numpy()]


_TIME = re.compile(r"(?:(\d{1,5}) days?,? )?(\d{1,2}):([0-5]\d):([0-5]\d)(?:\.(\d{1,9}))?", re.ASCII)


def _seconds(cell: str) -> float:
    """Seconds of a time such as `0 days 00:01:07` or `67.0`; NaN for anything else."""
    cell = cell.strip()
    time = _TIME.fullmatch(cell)
    if not time:
        return _number(cell)
    days, hours, minutes, seconds, fraction = time.groups(default="0")
    whole = ((int(days) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)
    return (whole * 10**9 + int(fraction.ljust(9, "0"))) / 10**9  # of integers, so it is rounded once


def _read_survey(
    path: Path, speakers: tuple[str, str]
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]], frozenset[str]]:
    """Speaker -> question -> answer, of the speakers who have a row; question -> the speakers' answers that are outside
    its limits; and the survey's questions."""
    columns = _read_csv(path, ("user_id",), QUESTIONS, ids=speakers)
    users = [user.strip() for user in columns.pop("user_id")]
    if any(n > 1 for user, n in Counter(users).items() if user):
        raise Dropped(f"{path.name}: more than one row of a user")
    rows = {user: users.index(user) for user in speakers if user in users}
    answers: dict[str, dict[str, float]] = {user: {} for user in rows}
    off_scale: dict[str, list[float]] = {}
    for question, cells in sorted(columns.items()):
        for user, row in rows.items():
            value = _number(cells[row])
            if QUESTIONS[question].accepts(value):
                answers[user][question] = value
            elif not math.isnan(value):
                off_scale.setdefault(question, []).append(value)
    return answers, off_scale, frozenset(columns)
