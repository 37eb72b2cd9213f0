"""Rated chats: JSONL files with a conversation a line, read strictly, one line at a time.

docs/rated-chats.md says what a line may hold. As with CANDOR's files, a chat is read as its line says, or dropped with
a reason.
"""

import codecs
import gzip
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from geli.data.candor import MOST_BYTES, MOST_CHARACTERS, NEUTRAL, Conversation, Dropped, Turn
from geli.data.messages import ROLES, utterances
from geli.data.questions import QUESTIONS
from geli.data.words import count_words
from geli.run.errors import UserError, one_line

Range = tuple[float, float]  # the lowest and the highest rating

FORMAT = "rated-chats"  # of a line that states the range of the ratings behind it
RATING = "overall_affect"  # the question that a rating without one answers
REACTIONS = {1: 1, -1: -1, **dict.fromkeys("👍❤🙂😀😄😊😍🎉👏", 1), **dict.fromkeys("👎🙁☹😞😢😠😡", -1)}
_VARIANTS = re.compile("[\U0001f3fb-\U0001f3ff\ufe0e\ufe0f]")  # colours of skin, and styles of an emoji
WORDS_PER_SECOND, PAUSE = 2.5, 0.5  # where times are not known
NO_FACES = "chats have none; --li_signal reaction reads thumbs, sentiment and hindsight the next message"
MAGIC = {  # first bytes of files that are no JSONL -> what they are
    codecs.BOM_UTF16_LE: "UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "gzip under a name without .gz",
    b"PAR1": "Parquet: write its rows as JSON, as with pandas",
    b"version https://git-lfs.": "a pointer to it: run git lfs pull in its folder",
}


def chat_files(path: Path) -> list[Path]:
    """The JSONL files that a path names: itself, or those in the folder; [] of a folder without one.

    Raises:
        UserError: if there are folders beside them, which could be conversations, too.
    """
    if path.is_file():
        return [path]
    found = sorted(file for end in ("jsonl", "jsonl.gz") for file in path.glob(f"[!.]*.{end}") if file.is_file())
    if found and (folder := next((entry for entry in path.glob("[!.]*") if entry.is_dir()), None)):
        raise UserError(f"{path}: expected JSONL files, or a folder for each conversation, found {found[0].name} and "
                        f"{folder.name}/")  # fmt: skip
    return found


class ChatFiles:
    """The chats of JSONL files, one a line. Of several with one id, all but the first are dropped.

    Args:
        paths: of the files; those that end with .gz are unpacked as they are read.
        rating_range: of ratings that no line before them states the range of. rated: whether ratings are read, and
            chats dropped that have none or in which one side alone speaks.

    Raises:
        UserError: if a file begins in another form than JSONL.
    """

    def __init__(self, paths: Sequence[Path], rating_range: Range | None = None, rated: bool = True):
        self.paths, self.rated = paths, rated
        self.rating_range = _checked(rating_range, "--rating_range") if rating_range else None
        for path in paths:
            first = next((line for _, line in _lines(path)), b"")
            if isinstance(first, bytes) and (form := _other_form(first, path)):
                raise UserError(f"{path}: expected JSONL in UTF-8, one conversation a line, found {form}")

    def chats(
        self, recall: Callable[[str, bytes], Conversation | None] = lambda *_: None
    ) -> Iterator[tuple[str, Conversation | str]]:
        """(`file:line`, the chat or why it is dropped), in order.

        Args:
            recall: (`file:line`, all that the chat is read from) -> the chat, if it has been read before.

        Raises:
            UserError: if the range of a rating is not stated, or in two ways.
        """
        ids = set()
        for path in self.paths:
            scale = self.rating_range
            for place, line in _lines(path):
                try:
                    chat = recall(place, b"%r %b" % (scale, line)) if isinstance(line, bytes) else None
                    if chat is None:
                        content = _load(line)
                        if isinstance(content, dict) and content.get("format") == FORMAT:
                            scale = self._stated(content, place)
                            continue
                        chat = _chat(content, place, scale, self.rated)
                    if chat.id in ids:
                        raise Dropped("an id that a conversation before it has")
                    ids.add(chat.id)
                except Dropped as reason:
                    chat = str(reason)
                yield place, chat

    def _stated(self, header: dict, place: str) -> Range:
        """The range that a line states."""
        stated, given = _checked(header.get("rating_range"), f"{place}: rating_range"), self.rating_range
        if given not in (None, stated):
            raise UserError(f"--rating_range: {given[0]:g} to {given[1]:g}, but {place} states {stated[0]:g} to "
                            f"{stated[1]:g}")  # fmt: skip
        return stated


def _checked(found, where: str) -> Range:
    if not (isinstance(found, Sequence) and len(found) == 2 and all(map(_is_number, found)) and found[0] < found[1]):
        raise UserError(f"{where}: expected the lowest and the highest rating, found {found!r}"[:200])
    return float(found[0]), float(found[1])


def _is_number(value) -> bool:
    """Whether a JSON value is a finite number; those beyond a float's range are none."""
    return type(value) in (int, float) and abs(value) < 1e300


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def open_chats(path: Path, mode: str = "rb"):
    """A file of chats, which is compressed if its name ends with .gz."""
    return (gzip.open if path.suffix == ".gz" else open)(path, mode)


def _lines(path: Path) -> Iterator[tuple[str, bytes | Dropped]]:
    """(`file:line`, line) of a file's lines with something in them, without a byte order mark."""
    number = 0
    with open_chats(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if len(line) > MOST_BYTES:
                    yield f"{path.name}:{number}", Dropped(f"larger than {MOST_BYTES >> 20} MiB")
                elif line := line.removeprefix(codecs.BOM_UTF8).strip():
                    yield f"{path.name}:{number}", line
        except (OSError, EOFError, zlib.error) as error:  # what is behind it cannot be unpacked
            yield f"{path.name}:{number + 1}", Dropped(f"cannot be read ({one_line(str(error))})")


def _constant(name: str):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def _load(line: bytes | Dropped):
    if isinstance(line, Dropped):
        raise line
    try:
        return _DECODER.decode(line.decode())
    except UnicodeError:
        raise Dropped("text that is not valid Unicode") from None
    except (ValueError, RecursionError):
        raise Dropped("not JSON") from None


def _other_form(first: bytes, path: Path) -> str:
    """The form of a file that is not JSONL, by its first line; empty for one that may be."""
    for start, form in MAGIC.items():
        if first.startswith(start):
            return form
    try:
        content = _load(first)
    except Dropped:
        alone = first in (b"[", b"{") and path.stat().st_size > len(first)
        return "JSON over several lines: write each conversation in a line of its own, as with jq -c" if alone else ""
    if isinstance(content, dict) and "conversations" in content:
        return "ShareGPT's form (conversations of from and value): rename them to messages of role and content"
    nested = isinstance(content, list) and content and not (isinstance(content[0], dict) and "role" in content[0])
    return "an array of conversations: write each in a line of its own, as with jq -c .[]" if nested else ""


# ---------------------------------------------------------------------------------------------------------------------
# A chat


def _chat(content, place: str, scale: Range | None, rated: bool) -> Conversation:
    """The chat that a line holds: a list of messages, or an object with one."""
    chat = content if isinstance(content, dict) else {"messages": content}
    if chat.get("messages") is None:
        raise Dropped(f"no messages, but {one_line(', '.join(chat))[:80]}")
    name = chat.get("id")
    name = str(name) if (isinstance(name, str) and name) or type(name) is int else place
    turns, skipped = _turns(chat["messages"])
    speakers = tuple(dict.fromkeys(turn.speaker for turn in turns))
    try:
        "".join((name, *speakers, *(turn.utterance for turn in turns))).encode()
    except UnicodeError:
        raise Dropped("text that is not valid Unicode") from None
    if not "".join((name, *speakers)).isprintable():
        raise Dropped("an id or a name with characters that cannot be printed")
    with_roles = set(speakers) <= ROLES.keys()
    if len(speakers) != 2 and (rated or not with_roles or not turns):
        raise Dropped(f"2 speakers are expected, {len(speakers)} found: {', '.join(speakers)}"[:200])
    answers = _answers(chat, speakers, place, scale) if rated else {}
    if rated and not answers:
        raise Dropped("no rating")
    asked = frozenset(question for given in answers.values() for question in given)
    unseen = tuple(range(len(turns)))
    return Conversation(name, speakers, turns, answers, asked, skipped, no_faces=NO_FACES, unseen=unseen)


def _turns(messages) -> tuple[tuple[Turn, ...], Counter]:
    """The turns of chat messages, and how many are none, by reason."""
    said, times, skipped = [], [], Counter()
    try:
        for message, place, role, text in utterances(messages, names=True):
            if not text:
                skipped["empty utterance"] += 1
            elif len(text) > MOST_CHARACTERS:
                skipped[f"utterance of more than {MOST_CHARACTERS:,} characters"] += 1
            else:
                times.append(_seconds(message.get("time"), place))
                if (rating := message.get("turn_rating")) is not None and not _is_number(rating):
                    raise Dropped(f"message {place}: turn_rating {rating!r}: expected a number"[:200])
                shown = _reaction(message.get("reaction"), place), None if rating is None else float(rating)
                said.append((str(place), role, text, count_words(text), *shown))
    except UserError as error:
        raise Dropped(str(error)) from None
    lasts = [n_words / WORDS_PER_SECOND for _, _, _, n_words, *_ in said]
    if None in times:
        times = [0.0, *itertools.accumulate(seconds + PAUSE for seconds in lasts)][: len(said)]
    starts = [time - times[0] for time in times]
    turns, of_each = [], zip(said, starts, lasts, [*starts[1:], math.inf], strict=False)
    for (place, role, text, n_words, *shown), start, seconds, following in of_each:
        if following < start:
            raise Dropped(f"message {place}: the next message's time is before its own")
        turns.append(Turn(place, role, start, min(start + seconds, following), text, n_words, NEUTRAL, 0.0, *shown))
    return tuple(turns), skipped


def _seconds(time, place: int) -> float | None:
    """A time in seconds; None for none."""
    if isinstance(time, str):
        try:
            moment = datetime.fromisoformat(time)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            time = time.strip() or "an empty text"
    if time is not None and not (_is_number(time) and abs(time) < 1e12):
        raise Dropped(f"message {place}: time {time!r}: expected seconds, or a time such as 2026-01-31T12:00:00"[:200])
    return None if time is None else float(time)


def _reaction(found, place: int) -> int | None:
    """1 for a pleased reaction, -1 for a displeased one; None for none."""
    if found is None:
        return None
    key = _VARIANTS.sub("", found) if isinstance(found, str) else found if _is_number(found) else None
    if key not in REACTIONS:
        known = " ".join(map(str, REACTIONS))
        raise Dropped(f"message {place}: reaction {found!r}: expected one of {known}"[:200])
    return REACTIONS[key]


def _answers(chat: dict, speakers: Sequence[str], place: str, scale: Range | None) -> dict[str, dict[str, float]]:
    """Speaker -> question -> answer, such that its points are 0 to 100 over the range. What is not by name is of the
    user, and what is not by question answers `RATING`."""
    given = [chat[key] for key in ("rating", "ratings") if chat.get(key) is not None]
    if len(given) > 1:
        raise Dropped("both rating and ratings")
    given = given[0] if given else {}
    by_name = given if isinstance(given, dict) and any(name in given for name in speakers) else {"user": given}
    answers = {}
    for name in (name for name in speakers if by_name.get(name) is not None):
        by_question = by_name[name] if isinstance(by_name[name], dict) else {RATING: by_name[name]}
        values = {q: _mean(by_question[q], place, scale) for q in sorted(QUESTIONS.keys() & by_question)}
        answers[name] = {q: value / QUESTIONS[q].points for q, value in values.items() if value is not None}
        if by_question and not values:
            raise Dropped(f"ratings of {', '.join(by_question)}: expected a speaker's name, or one of "
                          f"{', '.join(QUESTIONS)}"[:300])  # fmt: skip
    if given and not answers:
        raise Dropped("a rating of nobody who speaks: expected ratings by name, or roles of user and assistant")
    return {name: of_name for name, of_name in answers.items() if of_name}


def _mean(ratings, place: str, scale: Range | None) -> float | None:
    """The mean of one or several people's ratings in points, 0 to 100 over the range; None for none."""
    ratings = ratings if isinstance(ratings, list) else [] if ratings is None else [ratings]
    if not ratings:
        return None
    if scale is None:
        raise UserError(f"{place}: the range of its rating is not stated: give --rating_range LO HI, or begin the file "
                        f'with {{"format": "{FORMAT}", "rating_range": [LO, HI]}}')  # fmt: skip
    low, high = scale
    if not all(_is_number(rating) and low <= rating <= high for rating in ratings):
        raise Dropped(f"rating {ratings!r}: expected numbers from {low:g} to {high:g}"[:200])
    return 100 * (math.fsum(ratings) / len(ratings) - low) / (high - low)
