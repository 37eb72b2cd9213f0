"""Transcripts with times and speakers' names, as meeting programs write them, and turns made from them.

Read are WebVTT (Zoom, Teams, Google Meet), SubRip (.srt) and SubViewer (.sbv, Google Meet) files. A file is told by its
content. docs/your-own-data.md shows the forms and says what happens to cues that are incomplete or contradictory.
Libraries for subtitles skip cues whose times they cannot read, and say nothing; here every line is read, counted or
refused.
"""

import html
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from geli.data.candor import MOST_BYTES, Dropped
from geli.data.words import count_words
from geli.run.errors import one_line

ENDINGS = (".vtt", ".srt", ".sbv")
WORDS_PER_SECOND = 2.5  # of speech whose end is not known
SET_BACK = 60.0  # seconds; a cue that begins so long before an earlier one shows that the clock was set back
NO_NAME, GIVEN, NO_TIMES, NO_END = (  # what is counted
    "cues of an unknown speaker, left out",
    "cues without a speaker's name, given to who spoke last",
    "lines of text without times, left out",
    "cues without an end after their start, estimated",
)
# byte-order marks and marks of the direction of writing, which nobody says
MARKS = dict.fromkeys(map(ord, "\ufeff\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"))


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
        names: a name as it stands in the transcript -> the person. What `fold_name` folds, and an addition in
            parentheses, such as Teams' "(Guest)", make no difference.

    Raises:
        Dropped: if it cannot be read, its clock was set back, someone else speaks, or half of it has no name or times.
    """
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise Dropped(f"{path.name}: larger than {MOST_BYTES >> 20} MiB")
        lines = re.split(r"\r*\n|\r", content.decode())  # not str.splitlines: U+2028 stands within cues
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
    cues, without_times = _cues(lines)
    notes, others, utterances = Counter({NO_TIMES: len(without_times)}), Counter(), []
    people = dict.fromkeys(map(fold_name, UNNAMED)) | {fold_name(name): person for name, person in names.items()}
    left_out = sum(map(len, without_times))  # characters
    for name, start, stop, text in _spoken(cues, people, notes):
        known = _known(name, people)
        if known is None:
            others[one_line(name)] += 1
        elif people[known] is None:
            notes[NO_NAME] += 1
            left_out += len(text)
        else:
            utterances.append(Utterance(people[known], start, stop, text))
    if others:
        name, number = others.most_common(1)[0]
        raise Dropped(f"{name!r} speaks ({number} cues), expected only {' and '.join(names)}")
    if not utterances and not left_out:
        raise Dropped("nothing is said (no cue with a name, times and text)")
    if left_out >= sum(len(said.text) for said in utterances):
        raise Dropped("half of the text or more has no times or no speaker's name, so it is not known who speaks when")
    return Transcript(sorted(utterances, key=lambda utterance: utterance.start), +notes)


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

_TIME = r"(?:(\d{1,2}):)?(\d{1,3}):([0-5]?\d)(?:[.,](\d+))?"  # Teams pads nothing; minutes may go on after 59
_SETTING = r"(?:(?:align|line|position|region|size|vertical):|[XY][12]:)\S*"  # of WebVTT, of SubRip
_ARROW_LINE = re.compile(rf"\s*{_TIME}\s*-->\s*(?:{_TIME})?(?:\s+{_SETTING})*\s*", re.ASCII)
_COMMA_LINE = re.compile(rf"\s*{_TIME},(?:{_TIME})?\s*", re.ASCII)  # SubViewer
# a line that was meant for times: nothing but digits and signs, or hours and fractions at its beginning
_LIKE_TIMES = re.compile(r"(?=[\W\d]*\Z).*?\d:\d+(?::|[.,]\d).*|\W*\d+:\d+:\d+[.,]\d.*")
_HEADER = re.compile(r"\s*(WEBVTT\b|(Kind|Language|Region|X-TIMESTAMP-MAP)[:=])")  # of WebVTT
_COMMENT = re.compile(r"\s*(NOTE|STYLE|REGION)\b")  # how WebVTT's other blocks begin
_IDENTIFIER = re.compile(r"\s*(?=\S*\d)\S+\s*")  # in the line above a cue's times
_NUMBER = re.compile(r"\s*\d{1,9}\s*", re.ASCII)  # the same, where no empty line parts it from the text before
_UUID = re.compile(r"\s*[\da-f]{8}-[\da-f]{4}-\S+\s*", re.IGNORECASE)  # Teams' identifiers


def _cues(lines: Sequence[str]) -> tuple[list[Cue], list[str]]:
    """The cues of a file, in its order, and the lines of text that have no times.

    Raises:
        Dropped: for a line of times that cannot be read, or a clock that was set back.
    """
    numbered = [(number, line.translate(MARKS)) for number, line in enumerate(lines, start=1)]
    if not any(line.strip() for _, line in numbered[1::2]):
        numbered = numbered[::2]  # doubled line ends
    times = [_times(line, number) for number, line in numbered] + [None]
    cues: list[Cue] = []
    lost: list[str] = []
    place, next_number = "between cues", ""
    for i, (number, line) in enumerate(numbered):
        above_times = times[i + 1] is not None
        if times[i]:
            cues.append(Cue(number, *times[i], []))
            place = "cue"
        elif not line.strip():
            # Google Meet separates two speakers of a cue by a dash and an empty line
            if place != "cue" or [text.strip() for text in cues[-1].lines[-1:]] != ["-"]:
                place = "between cues"
        elif place == "cue" and not (
            (above_times and _NUMBER.fullmatch(line)) or line.strip() == next_number or _UUID.fullmatch(line)
        ):
            cues[-1].lines.extend(filter(str.strip, line.splitlines()))
        elif place == "between cues" and _COMMENT.match(line):
            place = "comment"
        elif place != "comment" and not _HEADER.match(line):
            if not (above_times and _IDENTIFIER.fullmatch(line)):
                lost.append(line)
            place = "no cue"
            if _NUMBER.fullmatch(line):
                next_number = str(int(line) + 1)
    _check_clock(cues)
    return cues, lost


def _times(line: str, number: int) -> tuple[float, float | None] | None:
    """Start and end in a line of times, None for another line.

    Raises:
        Dropped: for a line that was meant to be one.
    """
    found = (_ARROW_LINE if "-->" in line else _COMMA_LINE).fullmatch(line)
    if found:
        return _seconds(*found.groups()[:4]), _seconds(*found.groups()[4:])
    if "-->" in line or _LIKE_TIMES.fullmatch(line):
        raise Dropped(f"line {number}: no times that can be read in {one_line(line)[:60]!r}")
    return None


def _check_clock(cues: Sequence[Cue]) -> None:
    latest = 0.0
    for cue in cues:
        if cue.start < latest - SET_BACK:
            raise Dropped(
                f"line {cue.number}: begins at {cue.start:.0f} s, after a cue that begins at {latest:.0f} s: the clock "
                "was set back, so these are not the times of one recording"
            )
        latest = max(latest, cue.start)


def _seconds(hours: str | None, minutes: str | None, seconds: str | None, fraction: str | None) -> float | None:
    """Seconds of a time; None if there is none."""
    if minutes is None:
        return None
    return float(f"{(int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)}.{fraction or 0}")  # rounded once


def _spoken(
    cues: Sequence[Cue], people: Mapping[str, str | None], notes: Counter
) -> Iterator[tuple[str, float, float, str]]:
    """(name, start, stop, text) of all that is said. People in one cue share its time by their numbers of words.

    What has no name belongs to who spoke last: some programs write names only where the speaker changes. An end that is
    missing or before the start is estimated from the number of words, and is not after the next start.
    """
    split, starts, last = _splitter(cues, people), sorted(cue.start for cue in cues), ""
    for cue in cues:
        parts = []
        for name, text in split(cue.lines):
            if text and name is None and people.get(_known(last, people) or ""):
                notes[GIVEN] += 1
            last = last if name is None else name
            if text:
                parts.append((last, text, count_words(text)))
        total, stop = sum(words for *_, words in parts), cue.stop
        if stop is None or stop < cue.start:
            notes[NO_END] += 1
            later = bisect_right(starts, cue.start)
            stop = min([cue.start + total / WORDS_PER_SECOND, *starts[later : later + 1]])
        before = 0
        for name, text, words in parts:
            start, end = (cue.start + (stop - cue.start) * count / total for count in (before, before + words))
            yield name, start, end, text
            before += words


# ---------------------------------------------------------------------------------------------------------------------
# Who speaks

UNNAMED = ("", "Unknown", "Unknown Speaker", "Unidentified Speaker")  # what stands for a name that is not known
MOST_WORDS_OF_A_NAME = 5
LONGEST_PREFIX = 200  # characters in which a name and its colon are looked for
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<[\d:.]+>|\{\\[^{}]*\}")  # of WebVTT and SubRip, times of karaoke, of SubStation
_VOICE = re.compile(r"<v(?:\.[^\s<>]*)?(?:\s+([^<>\n]*))?>")
_IN_PARENTHESES = re.compile(r"\s*\(([^()]+)\)\s*")
_ADDITION = re.compile(r"\([^()]*\)$")
_COLON = re.compile("[:\uff1a]")  # the second is full-width
_ALIKE = str.maketrans(dict.fromkeys("‘’‛ʼ′`´", "'") | dict.fromkeys("‐‑‒–—―−", "-"))

NamedTexts = list[tuple[str | None, str]]  # (name as it stands there, None where there is none; text in one line)


@lru_cache(maxsize=1024)
def fold_name(name: str) -> str:
    """A name in the form in which names are compared.

    Case, spaces, tags, characters that cannot be seen, the forms of apostrophes, dashes, accents and wide letters, and
    whether a character is written as WebVTT does (`&amp;`) make no difference.
    """
    plain = html.unescape(_TAG.sub("", name)).translate(_ALIKE)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", plain).casefold())
    return "".join(c for c in folded if not c.isspace() and unicodedata.category(c) != "Cf")


def _known(name: str, people: Mapping[str, str | None]) -> str | None:
    """The key in `people` of a name, with or without an addition as in `Ana (Guest)`; None if it is not there."""
    folded = fold_name(name)
    return next((key for key in (folded, _ADDITION.sub("", folded)) if key in people), None)


def _splitter(cues: Sequence[Cue], people: Mapping[str, str | None]) -> Callable[[Sequence[str]], NamedTexts]:
    """The function that splits a cue's lines into names and texts, by the form in which the file gives names."""
    if any(_VOICE.search(line) for cue in cues for line in cue.lines):
        return _by_voice_tags  # Teams
    first = [_IN_PARENTHESES.fullmatch(cue.lines[0]) for cue in cues if cue.lines]
    names = [found[1] for found in first if found]
    if 2 * len(names) >= len(cues) > 0 or any(_known(name, people) for name in names):
        return _by_parentheses  # Google Meet's WebVTT
    return partial(_by_prefixes, people=people)  # Zoom, Google Meet's SubViewer


def _plain(text: str) -> str:
    """A text in one line, without tags."""
    return " ".join(html.unescape(_TAG.sub("", text)).translate(MARKS).replace("\0", " ").split())


def _by_voice_tags(lines: Sequence[str]) -> NamedTexts:
    """`<v Ana>Hello</v>`"""
    before, *rest = _VOICE.split("\n".join(lines))
    if broken := next((line for line in lines if re.search(r"<v\b", _VOICE.sub("", line))), None):
        raise Dropped(f"no name that can be read in {one_line(broken)[:60]!r}")
    named = zip(rest[::2], rest[1::2], strict=True)
    return [(None, _plain(before)), *((name or "", _plain(text)) for name, text in named)]


def _by_parentheses(lines: Sequence[str]) -> NamedTexts:
    """`(Ana)` in a line of its own, first or behind a line with a dash."""
    parts, expected = [(None, "")], True
    for line in lines:
        name = _IN_PARENTHESES.fullmatch(line) if expected else None
        expected = line.strip() == "-"
        if name:
            parts.append((name[1], ""))
        elif not expected:
            parts[-1] = _continued(parts[-1], _plain(line))
    return parts


def _by_prefixes(lines: Sequence[str], people: Mapping[str, str | None]) -> NamedTexts:
    """`Ana: Hello`. Only the first line may begin with a name that is not in `people`."""
    parts = [(None, "")]
    for i, line in enumerate(lines):
        line = _plain(line).removeprefix("- ")  # subtitles mark two speakers of a cue by dashes
        named = _split_prefix(line, people, any_name=i == 0)
        if named:
            parts.append(named)
        else:
            parts[-1] = _continued(parts[-1], line)
    return parts


def _continued(part: tuple[str | None, str], line: str) -> tuple[str | None, str]:
    return part[0], f"{part[1]} {line}".strip()


def _split_prefix(line: str, people: Mapping[str, str | None], any_name: bool) -> tuple[str, str] | None:
    """Name and text of a line that begins with a name. A known name may have colons itself.

    Args:
        any_name: whether it may be one that is not in `people`.
    """
    colons = [found.start() for found in _COLON.finditer(line, 0, LONGEST_PREFIX)]
    for colon in reversed(colons):
        if _known(line[:colon], people):
            return line[:colon], line[colon + 1 :].strip()
    if not colons or not any_name:
        return None
    name, colon, text = line[: colons[0]].strip(), line[colons[0]], line[colons[0] + 1 :]
    is_name = name and count_words(name) <= MOST_WORDS_OF_A_NAME and not name[0].islower()
    return (name, text.strip()) if is_name and (colon != ":" or text[:1].strip() == "") else None
