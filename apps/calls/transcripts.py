"""Transcripts with times and speakers' names, as meeting programs write them, and turns made from them.

Read are WebVTT (Zoom, Teams, Google Meet), SubRip (.srt) and SubViewer (.sbv, Google Meet) files. A file is told by its
content. docs/your-own-data.md shows the forms and says what happens to cues that are incomplete or contradictory.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from geli.data.candor import MOST_BYTES, Dropped
from geli.run.errors import one_line

ENDINGS = (".vtt", ".srt", ".sbv")
WORDS_PER_SECOND = 2.5  # of speech whose end is not known
SET_BACK = 60.0  # seconds; a cue that begins so long before an earlier one shows that the clock was set back
UNNAMED = {"", "unknown", "unknown speaker", "unidentified speaker"}  # what stands for a name that is not known
NO_NAME, NO_TIMES, NO_END = (  # what is counted
    "cues without a speaker's name, left out",
    "blocks of text without times, left out",
    "cues without an end after their start, estimated",
)


class Utterance(NamedTuple):
    """What one person said: the person, seconds from the beginning of the call (start <= stop), and the text."""

    speaker: str
    start: float
    stop: float
    text: str


class Transcript(NamedTuple):
    """The utterances in the order in which they begin, and how many cues were left out or completed, by reason."""

    utterances: list[Utterance]
    notes: Counter


class Cue(NamedTuple):
    """A piece of a file: number of its first line, times in seconds (stop may be missing), and the lines below them."""

    number: int
    start: float
    stop: float | None
    lines: list[str]


def read_transcript(path: Path, names: Mapping[str, str]) -> Transcript:
    """Reads a transcript of two people.

    Args:
        names: a name as it stands in the transcript -> the person. Case, spaces and an addition in parentheses, such as
            Teams' "(Guest)", make no difference.

    Raises:
        Dropped: if it cannot be read, its clock was set back, someone else speaks, or most cues have no name.
    """
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise Dropped(f"{path.name}: larger than {MOST_BYTES >> 20} MiB")
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeError:
        raise Dropped(f"{path.name}: no UTF-8 text") from None
    except OSError as error:
        raise Dropped(f"{path.name}: cannot be read ({(error.strerror or 'input/output error').lower()})") from None
    try:
        return parse_transcript(lines, names)
    except Dropped as reason:
        raise Dropped(f"{path.name}: {reason}") from None


def parse_transcript(lines: Sequence[str], names: Mapping[str, str]) -> Transcript:
    """As `read_transcript`, of a file's lines."""
    notes, others, utterances = Counter(), Counter(), []
    people = {_key(name): person for name, person in names.items()}
    for name, start, stop, text in _spoken(_cues(lines, notes), names, notes):
        person = people.get(_key(name)) or people.get(_key(_without_addition(name)))
        if person:
            utterances.append(Utterance(person, start, stop, text))
        elif _key(name) in UNNAMED:
            notes[NO_NAME] += 1
        else:
            others[one_line(name)] += 1
    if others:
        name, number = others.most_common(1)[0]
        raise Dropped(f"{name!r} speaks ({number} cues), expected only {' and '.join(names)}")
    if notes[NO_NAME] > len(utterances):
        raise Dropped("most cues have no speaker's name, so it is not known who speaks")
    if not utterances:
        raise Dropped("nothing is said (no cue with a name, times and text)")
    return Transcript(sorted(utterances, key=lambda utterance: utterance.start), notes)


def make_turns(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Turns by the rule of CANDOR's cliffhanger transcript: a turn ends where the other one begins to speak.

    Consecutive utterances of one person are one turn. So what is said during the other's utterance begins a turn, and
    the rest of that utterance's text stays in the turn that it interrupts.

    Args:
        utterances: in the order in which they begin.
    """
    turns: list[Utterance] = []
    for said in utterances:
        if turns and turns[-1].speaker == said.speaker:
            last = turns[-1]
            turns[-1] = last._replace(stop=max(last.stop, said.stop), text=f"{last.text} {said.text}")
            continue
        if turns:
            turns[-1] = turns[-1]._replace(stop=min(turns[-1].stop, said.start))
        turns.append(said)
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# Cues and their times

_TIME = r"(?:(\d{1,2}):)?([0-5]?\d):([0-5]\d)(?:[.,](\d{1,3}))?"
_ARROW_LINE = re.compile(rf"\s*{_TIME}\s*-->\s*(?:{_TIME}(?:\s.*)?)?", re.ASCII)  # WebVTT may have settings behind
_COMMA_LINE = re.compile(rf"\s*{_TIME},(?:{_TIME})?\s*", re.ASCII)  # SubViewer
_NO_CUE = re.compile(r"\s*(WEBVTT|NOTE|STYLE|REGION)\b")  # how WebVTT's other blocks begin


def _cues(lines: Sequence[str], notes: Counter) -> list[Cue]:
    """The cues of a file, in the order in which they begin. Counts blocks of text without times.

    Raises:
        Dropped: for a line of times that cannot be read, or a clock that was set back.
    """
    cues: list[Cue] = []
    inside = False  # whether the line belongs to the last cue
    for number, line in enumerate(lines, start=1):
        times = _ARROW_LINE.fullmatch(line) or _COMMA_LINE.fullmatch(line)
        if times:
            cues.append(Cue(number, _seconds(*times.groups()[:4]), _seconds(*times.groups()[4:]), []))
            inside = True
        elif "-->" in line:
            raise Dropped(f"line {number}: no times that can be read in {one_line(line)[:60]!r}")
        elif not line.strip():
            # Google Meet separates two speakers of a cue by a dash and an empty line
            inside = inside and [text.strip() for text in cues[-1].lines[-1:]] == ["-"]
        elif inside:
            cues[-1].lines.append(line)
        elif cues and _is_lost(lines, number):
            notes[NO_TIMES] += 1
    latest = 0.0
    for cue in cues:
        if cue.start < latest - SET_BACK:
            raise Dropped(
                f"line {cue.number}: begins at {cue.start:.0f} s, after a cue that begins at {latest:.0f} s: the clock "
                "was set back, so these are not the times of one recording"
            )
        latest = max(latest, cue.start)
    return sorted(cues, key=lambda cue: cue.start)


def _is_lost(lines: Sequence[str], number: int) -> bool:
    """Whether a line outside of cues begins a block that is neither a comment nor a cue's identifier."""
    following = lines[number] if number < len(lines) else ""
    begins = not lines[number - 2].strip()
    return begins and not (_NO_CUE.match(lines[number - 1]) or "-->" in following or _COMMA_LINE.fullmatch(following))


def _seconds(hours: str | None, minutes: str | None, seconds: str | None, fraction: str | None) -> float | None:
    """Seconds of a time; None if there is none."""
    if minutes is None:
        return None
    whole = (int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)
    return (whole * 1000 + int((fraction or "0").ljust(3, "0"))) / 1000  # of integers, so it is rounded once


def _spoken(cues: Sequence[Cue], names: Mapping[str, str], notes: Counter) -> Iterator[tuple[str, float, float, str]]:
    """(name, start, stop, text) of all that is said. People in one cue share its time by their numbers of words.

    An end that is missing or before the start is estimated from the number of words, and is not after the next start.
    """
    split = _splitter(cues, names)
    for i, cue in enumerate(cues):
        parts = [(name, _plain(text)) for name, text in split(cue.lines)]
        parts = [(name, text, len(text.split())) for name, text in parts if text]
        total, stop = sum(words for *_, words in parts), cue.stop
        if stop is None or stop < cue.start:
            notes[NO_END] += 1
            following = next((later.start for later in cues[i + 1 :] if later.start > cue.start), float("inf"))
            stop = min(cue.start + total / WORDS_PER_SECOND, following)
        before = 0
        for name, text, words in parts:
            start, end = (cue.start + (stop - cue.start) * count / total for count in (before, before + words))
            yield name, start, end, text
            before += words


def _plain(text: str) -> str:
    """A text in one line, without tags."""
    return " ".join(html.unescape(_TAG.sub("", text)).replace("\0", " ").split())


# ---------------------------------------------------------------------------------------------------------------------
# Who speaks

_VOICE = re.compile(r"<v(?:\.[^\s>]*)?(?:\s+([^>]*))?>")
_IN_PARENTHESES = re.compile(r"\s*\(([^()]+)\)\s*")
_PREFIX = re.compile(r"\s*([^:]+?)\s*:(?:\s+(.*)|\s*)")
_TAG = re.compile(r"<[^<>]*>")
MOST_WORDS_OF_A_NAME = 5

NamedTexts = list[tuple[str, str]]  # (name as it stands there, text); the name is empty where there is none


def _splitter(cues: Sequence[Cue], names: Mapping[str, str]) -> Callable[[Sequence[str]], NamedTexts]:
    """The function that splits a cue's lines into names and texts, by the form in which the file gives names."""
    if any(_VOICE.search(line) for cue in cues for line in cue.lines):
        return _by_voice_tags  # Teams
    if 2 * sum(bool(cue.lines and _IN_PARENTHESES.fullmatch(cue.lines[0])) for cue in cues) >= len(cues) > 0:
        return _by_parentheses  # Google Meet's WebVTT
    return partial(_by_prefixes, names={_key(name) for name in names})  # Zoom, Google Meet's SubViewer


def _by_voice_tags(lines: Sequence[str]) -> NamedTexts:
    """`<v Ana>Hello</v>`"""
    before, *rest = _VOICE.split("\n".join(lines))
    return [
        ("", before),
        *((html.unescape(name or ""), text) for name, text in zip(rest[::2], rest[1::2], strict=True)),
    ]


def _by_parentheses(lines: Sequence[str]) -> NamedTexts:
    """`(Ana)` in a line of its own, first or behind a line with a dash."""
    parts, expected = [("", "")], True
    for line in lines:
        name = _IN_PARENTHESES.fullmatch(line) if expected else None
        if name:
            parts.append((name[1], ""))
        elif line.strip() != "-":
            parts[-1] = (parts[-1][0], f"{parts[-1][1]}\n{line}")
        expected = line.strip() == "-"
    return parts


def _by_prefixes(lines: Sequence[str], names: set[str]) -> NamedTexts:
    """`Ana: Hello`. Only the first line may begin with a name that is not in `names`."""
    parts = [("", "")]
    for i, line in enumerate(lines):
        line = line.removeprefix("- ")  # subtitles mark two speakers of a cue by dashes
        prefix = _PREFIX.fullmatch(line)
        known = bool(prefix) and bool({_key(prefix[1]), _key(_without_addition(prefix[1]))} & names)
        if known or (prefix and i == 0 and _looks_like_a_name(prefix[1])):
            parts.append((prefix[1], prefix[2] or ""))
        else:
            parts[-1] = (parts[-1][0], f"{parts[-1][1]}\n{line}")
    return parts


def _looks_like_a_name(text: str) -> bool:
    return len(text.split()) <= MOST_WORDS_OF_A_NAME and not text[0].islower()


def _key(name: str) -> str:
    """A name in the form in which names are compared."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def _without_addition(name: str) -> str:
    """`Ana (Guest)` without the parentheses."""
    return re.sub(r"\s*\([^()]*\)\s*$", "", name)
