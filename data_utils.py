"""CANDOR on disk -> conversations -> trajectories: reading, aligning faces with turns, splits, and the encoder's text.

A *conversation* is a video call of two people. It gives two *trajectories*: in each one person is the user, who rates,
and the other is the agent, whose turns are the actions. Every turn is therefore an agent turn in exactly one of the
two, and its listener is the speaker of the other turns; that is why a turn's affect is found once, when it is read.
"""

import csv
import hashlib
import io
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import REWARD_CLASSES, UserError, one_line

FACES = ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")  # alphabetical
HAPPINESS, NEUTRAL, SURPRISE = FACES.index("happiness"), FACES.index("neutral"), FACES.index("surprise")
NEGATIVE = tuple(FACES.index(name) for name in ("anger", "contempt", "disgust", "fear", "sadness"))
AFFECT_GROUPS = {"neg": NEGATIVE, "pos": (HAPPINESS,), "neut": (NEUTRAL,), "sup": (SURPRISE,)}

MOST_WORDS = 1_000_000  # a count above is no count
MOST_CHARACTERS = 100_000  # of an utterance; a call of half an hour has fewer
MOST_BYTES = 2**26  # of a file; CANDOR's have a few million
MIN_WORDS = 6  # a turn of fewer words is too short to read a face from: it counts as neutral
ANSWER_LIMITS = {10: (0, 10), 1: (0, 100)}  # points per unit of the answer -> the answers that are believed

FEATURES_FILE = "audio_video_features.csv"
SURVEY_FILE = "survey.csv"


class Dropped(Exception):
    """A conversation that cannot be used; the message is the reason."""


class Turn(NamedTuple):
    """One turn.

    Attributes:
        turn_id: as in the transcript.
        speaker: user id of who speaks.
        start, stop: seconds from the beginning of the call, start <= stop.
        utterance: what was said, stripped, never empty.
        n_words: the transcript's word count.
        affect: index into `FACES` of the *listener's* face during the turn.
        happy_share: share of the listener's frames that are happy, in [0, 1]; 0 where the affect is neutral by rule.
    """

    turn_id: str
    speaker: str
    start: float
    stop: float
    utterance: str
    n_words: int
    affect: int
    happy_share: float


@dataclass(frozen=True)
class Conversation:
    """One call. `speakers` are the first speaker of the transcript and the other; `answers` are user id -> question ->
    answer, with missing answers left out; `skipped_turns` counts transcript rows that are no turns, by reason."""

    id: str
    speakers: tuple[str, str]
    turns: tuple[Turn, ...]
    answers: dict[str, dict[str, float]]
    questions: frozenset[str]
    skipped_turns: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Trajectory:
    """One side of a conversation.

    Attributes:
        conversation: where it comes from.
        flip: False when the first speaker of the transcript is the user (who rates), True when the other is.
        user, agent: user ids.
        score: R, the user's rating in points, about 0 to 100.
        answer: the rating as it stands in the survey.
        agent_turns: indices into `conversation.turns`, ascending, at least one.
    """

    conversation: Conversation
    flip: bool
    user: str
    agent: str
    score: float
    answer: float
    agent_turns: tuple[int, ...]

    @property
    def key(self) -> str:
        """A name for the trajectory that is the same on every machine."""
        return f"{self.conversation.id}/{int(self.flip)}"

    def turn_name(self, place: int) -> str:
        """A name for its agent turn number `place`."""
        return f"{self.key}/{self.conversation.turns[self.agent_turns[place]].turn_id}"

    def affects(self) -> np.ndarray:
        """(T,) the listener's affect at each agent turn, as indices into `FACES`."""
        return np.array([self.conversation.turns[i].affect for i in self.agent_turns])

    def happy_shares(self) -> np.ndarray:
        """(T,) the share of the listener's frames that are happy at each agent turn."""
        return np.array([self.conversation.turns[i].happy_share for i in self.agent_turns])


# ---------------------------------------------------------------------------------------------------------------------
# Faces and turns


def affect_of_turns(start, stop, n_words, seconds, probabilities) -> tuple[np.ndarray, np.ndarray]:
    """The listener's affect during each turn (DESIGN.md section 3).

    A frame's class is its most probable face; a turn's affect is the most frequent class of the frames with
    start <= second <= stop, ties to the class of larger mean probability; neutral without frames or below six words.

    Args:
        start, stop: (n,) seconds. n_words: (n,) words of each turn.
        seconds: (m,) times of the listener's frames, ascending. probabilities: (m, 8), ordered as `FACES`, in [0, 1].

    Returns:
        (n,) indices into `FACES`, and (n,) the share of frames that are happy (0 where neutral by rule).
    """
    first = np.searchsorted(seconds, start, side="left")
    end = np.searchsorted(seconds, stop, side="right")
    classes = probabilities.argmax(axis=1) if len(seconds) else np.zeros(0, dtype=int)
    counts = _window_sums(np.eye(len(FACES))[classes], first, end)
    # sums order a turn's classes as means do: one divisor for all; of integers, so that rounding decides no tie
    means = _window_sums(np.rint(probabilities * 1e12).astype(np.int64), first, end)
    tied = counts == counts.max(axis=1, keepdims=True)
    affect = np.where(tied, means, -1).argmax(axis=1)
    frames = end - first
    readable = (frames > 0) & (np.asarray(n_words) >= MIN_WORDS)
    share = np.where(readable, counts[:, HAPPINESS] / np.maximum(frames, 1), 0.0)
    return np.where(readable, affect, NEUTRAL), share


def _window_sums(values: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(n, k) sums of values[first:end] over each window, from one running sum."""
    running = np.concatenate([np.zeros((1, len(FACES)), dtype=values.dtype), np.cumsum(values, axis=0)])
    return running[end] - running[first]


class Reactions(NamedTuple):
    """How the user took each agent turn: what an LI signal gives.

    Attributes:
        polarity: (n,) 1 pleased, -1 displeased, 0 neither. strength: (n,) how pleased, in [0, 1].
        labels: (n,) a class of reaction, for the contrastive loss.
    """

    polarity: np.ndarray
    strength: np.ndarray
    labels: np.ndarray


def face_reactions(affects: np.ndarray, happy_shares: np.ndarray) -> Reactions:
    """From the listener's face: affects (n,) as indices into `FACES`, and the share of happy frames (n,)."""
    affects = np.asarray(affects)
    polarity = (affects == HAPPINESS).astype(int) - np.isin(affects, NEGATIVE)
    return Reactions(polarity, np.asarray(happy_shares, dtype=np.float64), affects)


NEUTRAL_SENTIMENT = 0.05  # nearer to 0 than this is neither positive nor negative


def sentiment_reactions(sentiments: np.ndarray) -> Reactions:
    """From the sentiment (n,), in [-1, 1], of the user's next turn (the paper's language-sentiment baseline)."""
    polarity = (sentiments > NEUTRAL_SENTIMENT).astype(int) - (sentiments < -NEUTRAL_SENTIMENT)
    return Reactions(polarity, np.maximum(sentiments, 0.0), polarity + 1)


def li_targets(reactions: Reactions, reaction_type: str = "class", negative_affect: str = "zero") -> np.ndarray:
    """f_t of the LI loss: what the user's reaction says an agent turn is worth (DESIGN.md section 3).

    Args:
        reactions: of n turns.
        reaction_type: `class`: pleased 1, all else 0; `mean`: how pleased (of faces, the share of happy frames).
        negative_affect: `negative` gives displeased reactions -1; `zero` leaves them at 0 or their strength.

    Returns:
        (n,) float32 targets in [-1, 1].
    """
    targets = reactions.strength if reaction_type == "mean" else reactions.polarity == 1
    if negative_affect == "negative":
        targets = np.where(reactions.polarity == -1, -1.0, targets)
    return targets.astype(np.float32)


def next_user_utterance(conversation: "Conversation", index: int, user: str) -> str:
    """What `user` says first after turn `index`; empty when nothing follows."""
    return next((turn.utterance for turn in conversation.turns[index + 1 :] if turn.speaker == user), "")


def turn_text(conversation: Conversation, index: int, user: str, context_turns: int) -> tuple[str, str]:
    """The state and the action of turn `index` as text: the last `context_turns` turns before it, each
    ` User: ...` or ` AI: ...`, joined by spaces; and `AI: ` + the turn itself."""
    before = conversation.turns[max(0, index - context_turns) : index]
    context = " ".join(f" {'User' if turn.speaker == user else 'AI'}: {turn.utterance}" for turn in before)
    return context, f"AI: {conversation.turns[index].utterance}"


def told(text: tuple[str, str], answer: float) -> tuple[str, str]:
    """A (context, response) with the user's answer appended, for `--curriculum`; cut like any other text."""
    context, response = text
    return context, f"{response} User's rating: {answer:g}"


def told_share(curriculum: bool, exposure: bool, epoch: int, epochs: int) -> float:
    """The probability that a training turn shows the user's answer in `epoch` (1 to `epochs`): with
    `--curriculum_exposure` falling linearly from 1 to 0, with `--curriculum` alone always."""
    if exposure:
        return 1.0 - (epoch - 1) / max(epochs - 1, 1)
    return float(curriculum)


INSTRUCTION = (
    "You are AI, in a casual social conversation with a User. Be polite, kind and honest, do not swear, and answer in "
    "under 100 words."
)


def prompt_text(context: str) -> str:
    """What the policy sees in stage 3: the instruction, the last turns, and ` AI:` for it to go on from."""
    return f"{INSTRUCTION}{context} AI:"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_conversation(folder: Path, transcript: str = "cliffhanger") -> Conversation:
    """Reads one conversation's folder, whatever lies in it.

    Raises:
        Dropped: with the reason, when something is missing, unreadable or contradicts itself.
    """
    if not folder.name.isprintable():  # such an id could be neither written to a file nor shown
        raise Dropped("the folder's name has characters that cannot be printed")
    turns, skipped = _read_transcript(folder / "transcription" / f"transcript_{transcript}.csv")
    speakers = tuple(dict.fromkeys(turn.speaker for turn in turns))
    if len(speakers) != 2:
        raise Dropped(f"2 speakers are expected, {len(speakers)} found in the transcript")
    faces = _read_faces(folder / FEATURES_FILE, speakers)
    if not any(len(seconds) for seconds, _ in faces.values()):
        raise Dropped(f"{FEATURES_FILE}: no frame with a face of either speaker")
    answers, questions = _read_survey(folder / SURVEY_FILE, speakers)

    who = np.array([speakers.index(turn.speaker) for turn in turns])
    start, stop, n_words = (np.array([getattr(turn, name) for turn in turns]) for name in ("start", "stop", "n_words"))
    affect, share = np.full(len(turns), NEUTRAL), np.zeros(len(turns))
    for i, listener in enumerate(speakers[::-1]):
        rows = np.flatnonzero(who == i)
        affect[rows], share[rows] = affect_of_turns(start[rows], stop[rows], n_words[rows], *faces[listener])
    return Conversation(
        id=folder.name,
        speakers=speakers,
        turns=tuple(
            Turn(*turn[:-2], *face) for turn, *face in zip(turns, affect.tolist(), share.tolist(), strict=True)
        ),
        answers={user: answers[user] for user in speakers if user in answers},
        questions=questions,
        skipped_turns=skipped,
    )


def _read_bytes(path: Path) -> bytes:
    """A file of UTF-8 text, without byte order mark and without NUL.

    Raises:
        Dropped: if it is anything else. A FIFO would keep whoever opens it waiting, and /dev/zero has no end.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise Dropped(f"{path.name}: not a file")
        if about.st_size > MOST_BYTES:
            raise Dropped(f"{path.name}: larger than {MOST_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES).removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise Dropped(f"{path.name}: no such file") from None
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
    """The rows of a CSV file, header first: strictly, quotes around whole cells only and all rows of one length.

    Raises:
        Dropped: if it is no such file.
    """
    csv.field_size_limit(MOST_BYTES)  # cells that nobody reads may be of any length
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
        raise Dropped(f"{path.name}: not a readable CSV file (nothing in it)")
    return rows


def _read_csv(
    path: Path, required: Sequence[str], optional: Iterable[str] = (), ids: Iterable[str] = (), id_column: str = ""
) -> dict[str, list[str]]:
    """The wanted columns of a CSV file, cell by cell.

    Two quotes too many can make one cell of several rows and leave a table that looks right; therefore a cell of
    several lines must not have somebody's id between two commas.

    Args:
        ids: of people, stripped; those in `id_column` count too.

    Raises:
        Dropped: if a required column is missing, a wanted one is there twice, or the file is no CSV.
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
    """The finite number in a cell; NaN where there is none."""
    try:
        value = float(cell) if cell.isascii() and "_" not in cell else math.nan  # Python's 1_000 is no number here
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _read_transcript(path: Path) -> tuple[list[Turn], Counter]:
    """The rows that are turns, in the order of their ids, neutral as long as no face was read; and how many were
    skipped, by reason.

    Raises:
        Dropped: if there are none, or no table.
    """
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
            n_words = int(n) if 0 <= n <= MOST_WORDS else len(utterance.split())
            turns.append(Turn(turn_id, speaker, start, stop, utterance, n_words, NEUTRAL, 0.0))
    if not turns:
        raise Dropped("the transcript has no usable turn")
    order = np.array([_number(turn.turn_id) for turn in turns])
    known = order[~np.isnan(order)]
    if len(known) == len(order):
        turns = [turns[i] for i in np.argsort(order, kind="stable")]
    elif (np.diff(known) < 0).any():
        raise Dropped("the transcript's rows are out of order, and not every turn_id is a number")
    return turns, skipped


def _read_faces(path: Path, speakers: tuple[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each speaker (m,) seconds ascending and (m, 8) face probabilities, of the frames with no empty cell."""
    names = [f"prob_face_{face}" for face in FACES]
    users, times, probabilities = _fast_faces(path, names) or _careful_faces(path, names, speakers)
    seconds = _seconds(times)
    sound = (probabilities >= 0) & (probabilities <= 1 + 1e-6)  # which NaN is not, and rounding may be
    whole = np.isfinite(seconds) & sound.all(axis=1)
    faces = {}
    for speaker in speakers:
        rows = np.flatnonzero(whole & (users == speaker))
        rows = rows[np.argsort(seconds[rows], kind="stable")]
        faces[speaker] = (seconds[rows], probabilities[rows])
    return faces


def _fast_faces(path: Path, names: list[str]):
    """The columns of a sound file: users (m,), times (m,) as text, probabilities (m, 8), by pyarrow. None for a file
    that is not quite regular, of which `_careful_faces` says what it is."""
    import pyarrow as pa
    from pyarrow import csv

    columns = ["user_id", "timedelta", *names]
    types = {"user_id": pa.string(), "timedelta": pa.string(), **dict.fromkeys(names, pa.float64())}
    try:
        content = _read_bytes(path)
        header = content[: content.find(b"\n")].rstrip(b"\r").split(b",")
        if b'"' in content or any(header.count(name.encode()) != 1 for name in columns):
            return None  # pyarrow forgives misplaced quotes and columns that are there twice
        table = csv.read_csv(
            pa.py_buffer(content),
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(quote_char=False),
            convert_options=csv.ConvertOptions(column_types=types, include_columns=columns),
        )
    except (pa.ArrowException, Dropped):
        return None
    if not len(table):
        return None
    users = table["user_id"].combine_chunks().dictionary_encode()
    known = np.array([user.strip() for user in users.dictionary.to_pylist()], dtype=object)
    probabilities = np.column_stack([table[name].to_numpy() for name in names])
    return known[users.indices.to_numpy()], table["timedelta"].to_pandas(), probabilities


def _careful_faces(path: Path, names: list[str], speakers: Iterable[str] = ()):
    """As `_fast_faces`, of any file that can be read at all.

    Raises:
        Dropped: of others.
    """
    columns = _read_csv(path, ("user_id", "timedelta", *names), ids=speakers)
    probabilities = np.array([[_number(cell) for cell in columns[name]] for name in names]).T
    users = np.array([user.strip() for user in columns["user_id"]], dtype=object)
    return users, np.array(columns["timedelta"], dtype=object), probabilities


_TIME = re.compile(r"(\d{1,5} days?,? )?\d{1,2}:[0-5]\d:[0-5]\d(\.\d{1,9})?", re.ASCII)


def _seconds(column) -> np.ndarray:
    """(m,) seconds of `0 days 00:01:07` or `67.0`; NaN where it is neither."""
    import pandas as pd

    codes, texts = pd.factorize(column)  # both speakers have a row for every second: half as many to parse
    texts = [text.strip() for text in texts]
    seconds = np.array([_number(text) for text in texts], dtype=float)
    other = [i for i in np.flatnonzero(np.isnan(seconds)) if _TIME.fullmatch(texts[i])]  # pandas reads 00:99 too
    if other:
        seconds[other] = pd.to_timedelta([texts[i] for i in other]).total_seconds()
    return seconds[codes]


def _read_survey(path: Path, speakers: tuple[str, str]) -> tuple[dict[str, dict[str, float]], frozenset[str]]:
    """User id -> question -> answer (answers that are no number, or outside the scale, left out), and the questions."""
    columns = _read_csv(path, ("user_id",), REWARD_CLASSES, ids=speakers)
    users = [user.strip() for user in columns.pop("user_id")]
    if any(n > 1 for user, n in Counter(users).items() if user):
        raise Dropped(f"{path.name}: more than one row of a user")
    answers: dict[str, dict[str, float]] = {user: {} for user in users}
    for question, cells in sorted(columns.items()):
        low, high = ANSWER_LIMITS[REWARD_CLASSES[question]]
        for user, value in zip(users, map(_number, cells), strict=True):
            if low <= value <= high:
                answers[user][question] = value
    return answers, frozenset(columns)


# ---------------------------------------------------------------------------------------------------------------------
# The corpus: what was read, what was dropped, and the splits


@dataclass
class Corpus:
    """All usable conversations of a folder, and what was dropped.

    Attributes:
        conversations: in the order of the hash of their ids.
        dropped: conversation id -> reason.
        dropped_trajectories: `id/flip` -> reason.
        trajectories: conversation id -> its usable trajectories for `reward_class`.
    """

    conversations: list[Conversation]
    dropped: dict[str, str]
    dropped_trajectories: dict[str, str]
    trajectories: dict[str, list[Trajectory]]

    def counts(self) -> dict:
        """Counts for a run's JSON file: numbers and reasons, no ids."""
        skipped = sum((c.skipped_turns for c in self.conversations), Counter())
        return {
            "conversations": len(self.conversations),
            "trajectories": sum(map(len, self.trajectories.values())),
            "turns": sum(len(c.turns) for c in self.conversations),
            "dropped_conversations": len(self.dropped),
            "dropped_conversations_by_reason": _by_count(self.dropped.values()),
            "dropped_trajectories": len(self.dropped_trajectories),
            "dropped_trajectories_by_reason": _by_count(self.dropped_trajectories.values()),
            "skipped_transcript_rows": dict(sorted(skipped.items())),
        }

    def numbers(self) -> dict[str, int]:
        """The counts that may go to wandb: no reasons, which could quote a file."""
        return {name: value for name, value in self.counts().items() if isinstance(value, int)}

    def describe(self) -> str:
        """The summary that a run prints first: counts, and every dropped conversation with its reason."""
        counts = self.counts()
        lines = [
            f"Read {counts['conversations']:,} conversations, {counts['trajectories']:,} trajectories, "
            f"{counts['turns']:,} turns."
        ]
        if self.dropped:
            lines.append(f"Dropped {len(self.dropped):,} of {len(self.dropped) + len(self.conversations):,} folders:")
            lines += [f"  {one_line(f'{_shown(name)}: {reason}')}" for name, reason in sorted(self.dropped.items())]
        for reason, number in counts["dropped_trajectories_by_reason"].items():
            lines.append(f"Dropped {number:,} trajectories: {reason}.")
        for reason, number in counts["skipped_transcript_rows"].items():
            lines.append(f"Skipped {number:,} transcript rows: {reason}.")
        return "\n".join(lines)


def _by_count(reasons: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0])))


def read_corpus(
    data_dir: str | Path, reward_class: str, transcript: str = "cliffhanger", cache: str | Path | None = None
) -> Corpus:
    """Reads every conversation folder below `data_dir`, in an order that does not depend on the file system.

    Args:
        cache: a folder that keeps what was read (see `cache.ConversationCache`); None for none.

    Raises:
        UserError: if there is no folder, nothing usable in it, or nobody was asked `reward_class`.
    """
    data_dir = Path(data_dir)
    folders, dropped = _folders(data_dir)
    conversations = []
    for folder, found in zip(folders, _read_all(folders, data_dir, transcript, cache), strict=True):
        if isinstance(found, Conversation):
            conversations.append(found)
        else:
            dropped[folder.name] = found
    if not conversations:
        raise UserError(_nothing_usable(data_dir, dropped, transcript))

    asked = frozenset().union(*(c.questions for c in conversations))
    if reward_class not in asked:
        raise UserError(
            f"--reward_class {reward_class}: no survey.csv under {data_dir} has that column; "
            f"present: {', '.join(sorted(asked)) or 'none of the known questions'}"
        )
    trajectories, dropped_trajectories = {}, {}
    for conversation in conversations:
        trajectories[conversation.id] = []
        for flip in (False, True):
            try:
                trajectories[conversation.id].append(make_trajectory(conversation, flip, reward_class))
            except Dropped as reason:
                dropped_trajectories[f"{conversation.id}/{int(flip)}"] = str(reason)
    if not any(trajectories.values()):
        raise UserError(f"--reward_class {reward_class}: no survey.csv under {data_dir} has an answer to it")
    return Corpus(conversations, dropped, dropped_trajectories, trajectories)


def _read_all(folders: list[Path], data_dir: Path, transcript: str, cache) -> list[Conversation | str]:
    """Of each folder its conversation, or the reason why it was dropped."""
    from cache import ConversationCache

    kept = ConversationCache(cache, data_dir, transcript) if cache else None
    found = {folder: kept.get(folder) for folder in folders} if kept else dict.fromkeys(folders)
    missing = [folder for folder, conversation in found.items() if conversation is None]
    signatures = {folder: kept.signature(folder) for folder in missing} if kept else {}
    found |= zip(missing, _read_many(missing, transcript), strict=True)
    usable = [folder for folder in folders if isinstance(found[folder], Conversation)]
    if kept and (any(folder in signatures for folder in usable) or kept.has_more_than(usable)):
        kept.write({folder: (signatures.get(folder), found[folder]) for folder in usable})
    return list(found.values())


PARALLEL_FROM = 100  # folders; below that, starting processes takes longer than reading


def _read_many(folders: list[Path], transcript: str) -> Iterable[Conversation | str]:
    """Reads folders, many of them in as many processes as there are cores."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from runs import available_cores, progress_bar

    read = partial(_read_or_reason, transcript=transcript)
    bar = partial(progress_bar, total=len(folders), desc="reading conversations", unit="conversation")
    if len(folders) < PARALLEL_FROM or available_cores() == 1:
        yield from bar(map(read, folders))
        return
    # spawned, because forking a process that has started threads can hang
    with ProcessPoolExecutor(available_cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from bar(pool.map(read, folders, chunksize=16))


def _read_or_reason(folder: Path, transcript: str) -> Conversation | str:
    try:
        return read_conversation(folder, transcript)
    except Dropped as reason:
        return str(reason)


def _folders(data_dir: Path) -> tuple[list[Path], dict[str, str]]:
    """The conversations' folders in the order of their hash; and the names of links to one of them, with the reason
    why they are dropped: a conversation that is there twice could be trained on and held out.

    Raises:
        UserError: if `data_dir` is no folder.
    """
    listed = _list(data_dir)
    entries = [path for path in listed if os.path.isdir(path) or not os.path.exists(path)]  # broken links are named too
    folders, same, names = [], {}, {}
    for path in sorted(entries, key=lambda path: (path.is_symlink(), split_key(path.name))):
        try:
            about = path.stat()
            first = names.setdefault((about.st_dev, about.st_ino), path.name)
        except OSError:
            first = path.name
        if first == path.name:
            folders.append(path)
        else:
            same[path.name] = f"a link to another conversation's folder, {_shown(first)}"
    return sorted(folders, key=lambda path: split_key(path.name)), same


def _shown(name: str) -> str:
    """A folder's name in one line that can be printed."""
    return name if name.isprintable() else ascii(name)


def _list(data_dir: Path) -> list[Path]:
    try:
        return [data_dir / name for name in os.listdir(data_dir) if not name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"--data_dir {data_dir}: {error.strerror.lower()}; expected a folder with one folder a conversation "
            f"({_HOW_TO_GET_DATA})"
        ) from None


_HOW_TO_GET_DATA = (
    "candor/README.md says how to get CANDOR; `python sample_candor.py OUT` or `casino_to_candor.py` makes data to try"
)


def _nothing_usable(data_dir: Path, dropped: dict[str, str], transcript: str) -> str:
    if not dropped:
        found = "found no folder in it"
    else:
        examples = "; ".join(f"{reason} ({n})" for reason, n in list(_by_count(dropped.values()).items())[:3])
        found = f"found {len(dropped)} folders, none usable: {examples}"
    return (
        f"--data_dir {data_dir}: expected <conversation>/transcription/transcript_{transcript}.csv, {FEATURES_FILE} "
        f"and {SURVEY_FILE}, {found}; {_HOW_TO_GET_DATA}"
    )


def make_trajectory(conversation: Conversation, flip: bool, reward_class: str) -> Trajectory:
    """The trajectory in which the transcript's first speaker (flip: the other one) is the user, who rates.

    Raises:
        Dropped: if the user did not answer `reward_class`.
    """
    user, agent = conversation.speakers[::-1] if flip else conversation.speakers
    answers = conversation.answers.get(user)
    if answers is None:
        raise Dropped("the user has no survey row")
    if reward_class not in answers:
        raise Dropped(f"no usable answer to {reward_class}")
    answer = answers[reward_class]
    turns = tuple(i for i, turn in enumerate(conversation.turns) if turn.speaker == agent)
    return Trajectory(conversation, flip, user, agent, REWARD_CLASSES[reward_class] * answer, answer, turns)


def fingerprint(trajectories: Iterable[Trajectory]) -> str:
    """A hash of everything that is read of these trajectories."""
    found, seen = hashlib.blake2b(digest_size=16), set()
    for t in trajectories:
        found.update(repr((t.conversation.id, t.flip, t.score)).encode("utf-8", "surrogateescape"))
        if t.conversation.id not in seen:
            seen.add(t.conversation.id)
            found.update(repr(t.conversation.turns).encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def split_key(conversation_id: str) -> str:
    """The hash that orders conversations: the same on every machine, whatever the folder's order."""
    return hashlib.sha256(conversation_id.encode("utf-8", "surrogateescape")).hexdigest()


def split(
    corpus: Corpus, train_size: int, all_others: bool = False, seen: frozenset[str] = frozenset()
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Training and validation trajectories.

    Validation is the last 50 conversations in hash order (of fewer than 500, a tenth, at least one). Which these are
    does not depend on the reward class, so an encoder trained for one class has not seen another's validation set.
    Training is the first `train_size` of the others that have a trajectory. With `all_others` validation is every
    conversation behind those that is not `seen` (trained on by an earlier stage): many more, where training takes few.
    """
    ordered = corpus.conversations
    held_out = 50 if len(ordered) >= 500 else max(1, len(ordered) // 10)
    usable = [place for place, c in enumerate(ordered[:-held_out]) if corpus.trajectories[c.id]]
    training = [ordered[place].id for place in usable[:train_size]]
    first = usable[:train_size][-1] + 1 if all_others and training else len(ordered) - held_out
    validation = [c.id for c in ordered[first:] if not (all_others and c.id in seen)]
    return (
        [t for i in training for t in corpus.trajectories[i]],
        [t for i in validation for t in corpus.trajectories[i]],
    )


@dataclass(frozen=True)
class TurnSet:
    """All agent turns of some trajectories, one after the other.

    Attributes:
        trajectories: n trajectories.
        offsets: (n + 1,) turns of trajectory i are offsets[i]:offsets[i + 1].
        texts: (N,) pairs (context, response).
        affects: (N,) indices into `FACES`. targets: (N,) float32 f_t of the LI loss.
        labels: (N,) the class of the user's reaction that the targets come from.
        scores: (n,) R in points.
    """

    trajectories: list[Trajectory]
    offsets: np.ndarray
    texts: list[tuple[str, str]]
    affects: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(
        cls,
        trajectories: list[Trajectory],
        context_turns: int,
        reaction_type: str = "class",
        negative_affect: str = "zero",
        sentiment: Callable[[list[str]], np.ndarray] | None = None,
    ):
        """Collects the turns of `trajectories`; the options are those of the command line.

        Args:
            sentiment: utterances (n) -> sentiments (n,) in [-1, 1], where LI's signal is that of the user's next turn;
                None where it is the face.
        """
        lengths = [len(t.agent_turns) for t in trajectories]
        affects = np.concatenate([t.affects() for t in trajectories] or [np.zeros(0, dtype=int)])
        if sentiment is None:
            shares = np.concatenate([t.happy_shares() for t in trajectories] or [np.zeros(0)])
            reactions = face_reactions(affects, shares)
        else:
            following = [next_user_utterance(t.conversation, i, t.user) for t in trajectories for i in t.agent_turns]
            said = np.array([bool(text) for text in following])  # nobody reacts to a last turn
            reactions = sentiment_reactions(np.where(said, np.asarray(sentiment(following), dtype=np.float64), 0.0))
        return cls(
            trajectories=trajectories,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(int),
            texts=[turn_text(t.conversation, i, t.user, context_turns) for t in trajectories for i in t.agent_turns],
            affects=affects,
            targets=li_targets(reactions, reaction_type, negative_affect),
            labels=reactions.labels,
            scores=np.array([t.score for t in trajectories]),
        )

    def told_texts(self) -> list[tuple[str, str]]:
        """The texts with each trajectory's answer appended, for `--curriculum`."""
        answers = np.repeat([t.answer for t in self.trajectories], np.diff(self.offsets))
        return [told(text, answer) for text, answer in zip(self.texts, answers, strict=True)]

    def ids(self, turns: Iterable[int]) -> list[str]:
        """`conversation/flip/turn_id` of these turns (indices into the arrays over turns)."""
        whose = [
            (i, turn - self.offsets[i]) for turn in turns for i in [np.searchsorted(self.offsets, turn, "right") - 1]
        ]
        return [self.trajectories[i].turn_name(place) for i, place in whose]

    def turns_of(self, i: int) -> slice:
        """Where trajectory i's turns are in the arrays over turns."""
        return slice(self.offsets[i], self.offsets[i + 1])

    def __len__(self) -> int:
        return len(self.texts)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def shuffled_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 50
) -> list[np.ndarray]:
    """Indices in random batches of similar lengths: shuffled, cut into pools of `pool` batches, sorted by length within
    a pool, cut into batches, and the batches shuffled. Every index is in exactly one batch."""
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * pool):
        part = order[start : start + batch_size * pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def token_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Indices in batches of similar lengths, longest first, each of at most `tokens_per_batch` padded tokens (or one
    item, if that one is longer)."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches
