"""A second reader of CANDOR's folders, as slow and plain as can be, that shares no code with the first one
but the counting of words: `fuzz_reader.py` and `test_hostile_data.py` compare the two."""

import itertools
import math
import os
import re
import statistics
from collections import Counter
from pathlib import Path

from geli.data import candor
from geli.data.candor import FACES, FEATURES_FILE, MIN_WORDS, MOST_WORDS, SURVEY_FILE, Conversation
from geli.data.questions import QUESTIONS
from geli.data.words import count_words

TRANSCRIPT = "transcription/transcript_cliffhanger.csv"
FILES = (TRANSCRIPT, FEATURES_FILE, SURVEY_FILE)
PROBABILITIES = [f"prob_face_{face}" for face in FACES]
READ = {
    TRANSCRIPT: ["turn_id", "speaker", "start", "stop", "utterance", "n_words"],
    FEATURES_FILE: ["user_id", "timedelta", *PROBABILITIES],
    SURVEY_FILE: ["user_id", *QUESTIONS],
}  # fmt: skip
CELL = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n][^,\r\n]*)?)(,|\r\n|\r|\n|\Z)')
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
TIME = re.compile(r"(?:(\d{1,5}) days?,? )?(\d{1,2}):([0-5]\d):([0-5]\d(?:\.\d{1,9})?)", re.ASCII)
OPTIONAL = {"n_words", *QUESTIONS}


class Refused(Exception):
    """The second reader drops it too."""


class Nothing(Refused):
    """There is nothing in the file."""


def need(holds: object, what: str) -> None:
    if not holds:
        raise Refused(what)


def reference_table(folder: Path, file: str, ids: set[str] = frozenset()) -> tuple[list[str], list[dict]]:
    """The columns that are read, and their rows; a cell of several lines that has an id between commas is refused."""
    path, names = folder / file, READ[file]
    need(path.is_file() and path.stat().st_size <= candor.MOST_BYTES, "a file")
    text = path.read_bytes().decode(errors="surrogateescape").removeprefix("\ufeff")
    need(not re.search("[\0\udc80-\udcff]", text), "UTF-8 without NUL")
    rows, row, at = [], [], 0
    while at < len(text) or row:
        found = CELL.match(text, at)
        need(found, "quotes around cells")
        quoted, plain, end = found.groups()
        row.append(plain or "" if quoted is None else quoted.replace('""', '"'))
        at = found.end()
        if end != ",":
            rows += [row] if row != [""] or quoted is not None else []
            row = []
    if not rows:
        raise Nothing
    header = rows.pop(0)
    need(all(header.count(name) == 1 for name in names if name not in OPTIONAL or name in header), "columns")
    need(all(len(row) == len(header) for row in rows), "as many cells")
    if file == TRANSCRIPT:
        ids = {row[header.index("speaker")].strip() for row in rows} - {""}
    for cell in itertools.chain(*rows):
        if set(cell) & set("\r\n"):
            need(not any(part.strip(' "') in ids for part in re.split("[\r\n,]", cell)), "no rows in a cell")
    names = [name for name in names if name in header]
    return names, [{name: row[header.index(name)] for name in names} for row in rows]


def reference_number(cell: str) -> float:
    value = float(cell) if NUMBER.fullmatch(cell := cell.strip(" \t\n\r\v\f")) else math.nan
    return value if math.isfinite(value) else math.nan


def reference_seconds(cell: str) -> float:
    found = TIME.fullmatch(cell.strip())
    if not found:
        return reference_number(cell.strip())
    days, hours, minutes, seconds = found.groups(default="0")
    return int(days) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def reference(folder: Path) -> Conversation:
    """What the reader must make of a folder, or `Refused` where it must drop it."""
    need(folder.name.isprintable(), "a name")
    turns, skipped = [], Counter()
    for row in reference_table(folder, TRANSCRIPT)[1]:
        start, stop = reference_number(row["start"]), reference_number(row["stop"])
        said, speaker = row["utterance"].strip(), row["speaker"].strip()
        problems = {
            "empty utterance": not said,
            "no speaker": not speaker,
            "start or stop is not a number": math.isnan(start) or math.isnan(stop),
            "starts before 0 or stops before it starts": stop < start or start < 0,
            f"utterance of more than {candor.MOST_CHARACTERS:,} characters": len(said) > candor.MOST_CHARACTERS,
        }
        if any(problems.values()):
            skipped[next(reason for reason, holds in problems.items() if holds)] += 1
            continue
        words = reference_number(row.get("n_words", ""))
        words = int(words) if 0 <= words <= MOST_WORDS else count_words(said)
        turns.append((row["turn_id"], speaker, start, stop, said, words))
    ids = [reference_number(turn[0]) for turn in turns]
    known = [i for i in ids if not math.isnan(i)]
    if len(known) == len(ids):
        turns = [turns[i] for i in sorted(range(len(turns)), key=ids.__getitem__)]
    else:
        need(known == sorted(known), "order")
    speakers = tuple(dict.fromkeys(turn[1] for turn in turns))
    need(len(speakers) == 2, "two speakers")

    frames, (rows, no_faces) = {speaker: [] for speaker in speakers}, reference_faces(folder, set(speakers))
    for row in rows:
        user, second = row["user_id"].strip(), reference_seconds(row["timedelta"])
        shown = [reference_number(row[name]) for name in PROBABILITIES]
        if user in frames and not math.isnan(second) and all(0 <= p <= 1 + 1e-6 for p in shown):
            frames[user].append((second, shown))
    no_faces = "" if any(frames.values()) else f"{FEATURES_FILE}: {no_faces}"
    seconds = [second for both in frames.values() for second, _ in both]
    if not no_faces and (no_faces := reference_clocks(turns, seconds)):
        frames = {speaker: [] for speaker in speakers}
    of_listeners = [frames[speakers[turn[1] == speakers[0]]] for turn in turns]
    unseen = [i for i, turn in enumerate(turns) if not any(turn[2] <= t <= turn[3] for t, _ in of_listeners[i])]
    turns = tuple(map(reference_turn, turns, of_listeners))

    (_, *questions), rows = reference_table(folder, SURVEY_FILE, set(speakers))
    users = [row["user_id"].strip() for row in rows]
    need(all(users.count(user) == 1 for user in users if user), "one row a user")
    answers, off_scale = {}, {}
    for speaker, row in ((speaker, rows[users.index(speaker)]) for speaker in speakers if speaker in users):
        given = {q: reference_number(row[q]) for q in questions if not math.isnan(reference_number(row[q]))}
        answers[speaker] = {q: value for q, value in given.items() if 0 <= value <= highest_answer(q)}
        for q in given.keys() - answers[speaker].keys():
            off_scale[q] = [*off_scale.get(q, []), given[q]]
    questions = frozenset(questions)
    return Conversation(
        folder.name, speakers, turns, answers, questions, skipped, off_scale, no_faces, tuple(unseen)
    )  # fmt: skip


def highest_answer(question: str) -> int:
    """By the published rule: two questions are answered from 0 to 100, the others to 10 at most."""
    return 100 if question in ("conversationalist", "good_for_advice") else 10


def reference_faces(folder: Path, ids: set[str]) -> tuple[list[dict], str]:
    """The rows of faces, and why there is no frame if none of them is one."""
    try:
        os.stat(folder / FEATURES_FILE)
        return reference_table(folder, FEATURES_FILE, ids)[1], "no frame with a face of either speaker"
    except FileNotFoundError:
        return [], "no such file"
    except Nothing:
        return [], "not a readable CSV file (nothing in it)"
    except OSError as error:
        raise Refused(str(error)) from None


def reference_clocks(turns: list[tuple], seconds: list[float]) -> str:
    """Why the frames' seconds cannot be of the transcript's clock."""
    said, shown = max(1.0, *(turn[3] for turn in turns)), max(1.0, *seconds)
    slow = statistics.median((turn[3] - turn[2]) / max(turn[5], 1) for turn in turns) > 3
    if shown > 5 * said + 60 or (said > 5 * shown + 60 and slow):
        later, other = ("its", "the transcript's") if shown > said else ("the transcript's", "its")
        factor = 10 ** round(abs(math.log10(shown / said)))
        return (
            f"{FEATURES_FILE}: {later} times end about {factor:,} times as late as {other}: expected seconds from the "
            "beginning of the call in both"
        )
    during = any(turn[2] <= second <= turn[3] for turn in turns for second in seconds)
    return "" if during else f"{FEATURES_FILE}: no frame with a face during a turn"


def reference_turn(turn: tuple, frames: list) -> candor.Turn:
    """A turn with its listener's affect, by looking at every frame."""
    shown = [p for second, p in frames if turn[2] <= second <= turn[3]]
    if not shown or turn[5] < MIN_WORDS:
        return candor.Turn(*turn, candor.NEUTRAL, 0.0)
    classes = Counter(max(range(8), key=p.__getitem__) for p in shown)
    sums = [sum(round(p[face] * 1e12) for p in shown) for face in range(8)]
    affect = max(range(8), key=lambda face: (classes[face], sums[face]))
    return candor.Turn(*turn, affect, classes[candor.HAPPINESS] / len(shown))
