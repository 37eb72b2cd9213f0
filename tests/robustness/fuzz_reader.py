"""Hostile data: mutates conversations, and checks what the reader of CANDOR's folders makes of each.

    python tests/robustness/fuzz_reader.py --inputs 10000 --seed 0 [--data FOLDER]

A mutated conversation must load or be dropped with a reason. Anything else is counted as a crash, a hang, or a wrong
value, and makes the exit code 1. A value is wrong where any of these does not hold:

- a second reader, `second_reader.py`, comes to the same conversation, or drops it too;
- a line of the transcript that a mutation left alone is a turn, with that line's cells;
- a mutation that changes nothing of what was said, shown or answered changes nothing of the conversation;
- read through the cache it is the same, both times; and what is in range by `Conversation`'s documentation is.
"""

import argparse
import csv
import dataclasses
import faulthandler
import io
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from second_reader import FILES, PROBABILITIES, READ, TRANSCRIPT, Refused, reference, reference_seconds

import data_utils
from geli.data import candor
from geli.data.candor import FACES, FEATURES_FILE, MOST_WORDS, SURVEY_FILE, Conversation, Dropped
from geli.data.questions import QUESTIONS
from geli.run.errors import UserError
from tools import sample_candor

LIMIT = 10  # seconds a conversation
BATCH = 50  # conversations that are read as a corpus too, through the cache


@dataclasses.dataclass
class Case:
    """A conversation: content of each file, its folder's name, and what happens to the folder once it is written."""

    files: dict[str, bytes]
    name: str
    then: Callable[[Path], object] = lambda folder: None

    def write(self, parent: Path) -> Path:
        folder = parent / self.name
        for file, content in self.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        self.then(folder)
        return folder


def rows_of(content: bytes) -> list[list[str]]:
    """The rows of a sound file, header first."""
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def csv_of(rows: list[list[str]], quotes: str = "needed", end: str = "\n") -> bytes:
    """The file of these rows, with quotes where `needed`, around `all` cells or around `none`."""

    def shown(cell: str) -> str:  # csv.writer leaves a line end that is not its own without quotes
        bare = quotes == "none" or (quotes == "needed" and not set(cell) & set('",\r\n'))
        return cell if bare else '"' + cell.replace('"', '""') + '"'

    return "".join(",".join(map(shown, row)) + end for row in rows).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Changes: of a content, function(rng, content, content of that file in another conversation) -> content; of a table,
# function(rng, rows, header first) -> rows; of a folder, function(rng, folder), once it is written;
# of a case, function(rng, case, another conversation's case)

MARK = "\ufeff".encode()  # byte order mark
NASTY = b'""""\n\r,,;\t\0\\\'-+.eE019 \xff\xc3\xef\xbb\xbf'
ENCODINGS = "utf-16 utf-16-le utf-16-be utf-32 utf-7 latin-1 cp1252 cp037 shift_jis".split()
ENDS = [end.encode() for end in ("\n", "\r", "\r\n", "\n\n", "\n\r", "\x0b", "\x0c", "\x1e", "\x85", "\u2028")]


def cut(rng, content: bytes, cuts: int = 1) -> list[bytes]:
    """The content in parts, cut anywhere."""
    places = sorted(rng.randrange(len(content) + 1) for _ in range(cuts))
    return [content[a:b] for a, b in itertools.pairwise([0, *places, len(content)])]


def span(rng, content: bytes) -> list[bytes]:
    """What is before a span, the span, mostly a short one, and what is behind it."""
    start = rng.randrange(len(content) + 1)
    stop = start + int(rng.paretovariate(0.6))
    return [content[:start], content[start:stop], content[stop:]]


def one_cell_of_two(rng, content, other):
    lines = [line.split(b",") for line in content.split(b"\n")]
    first, column = rng.randrange(len(lines)), rng.randrange(len(lines[0]))
    last = min(first + rng.choice((1, 1, 2, rng.randrange(len(lines)))), len(lines) - 1)
    if column < min(len(lines[first]), len(lines[last])):
        lines[first][column] = b'"' + lines[first][column]
        lines[last][column] += b'"'
    return b"\n".join(map(b",".join, lines))


HOSTILE_CELLS = [
    "", " ", "NaN", "nan", "inf", "-inf", "Infinity", "-1", "-0.0", "1e308", "1e999", "-1e308", "1e-320", "9" * 400,
    "1_0", "\uff17", "0x1F", "1,5", "True", "None", "NA", "null", "#N/A", "often", "=1+1", "7 ", "+7", ".5", "5.", "1e",
    '"', '""', 'a "b" c', '"a', 'b"', "a\nb", "a\r\nb", "a,b", ",", "\n", "\\", "\\n", "'", "\ufeff", "\u202e",
    "\x1b[2J", "\x00", "\u2028", "\U0001f642", "e\u0301" * 50, "x" * 200_000, "0 days 00:00:01", "0 days 00:99:00",
    "-1 days +23:59:59", "1 days", "00:01", "0 days 00:00:01.5", "99999999 days 00:00:00", "P0DT0H1M7S", "1 h", "5 min",
    "NaT", "now",
]  # fmt: skip
OWN = []  # in place of values: those that the column has


def edit(change=lambda rng, rows: rows, quotes=("needed",), ends=("\n",)):
    """A change of a table as one of the file's content."""
    return lambda rng, content, other: csv_of(change(rng, rows_of(content)), rng.choice(quotes), rng.choice(ends))


def cells(columns, *kinds, times=(1, 3, 1000), where=slice(1, None), quotes=("needed",)):
    """Puts values of one of the kinds in some cells of these columns (empty: of all). A value is a text, with {} for
    what the cell held, or function(cell)."""

    def change(rng, rows):
        places = [(row, i) for row in rows[where] for i, name in enumerate(rows[0]) if name in columns or not columns]
        values = rng.choice(kinds) or [row[i] for row, i in places]
        for row, i in rng.sample(places, min(rng.choice(times), len(places))):
            value = rng.choice(values)
            row[i] = value(row[i]) if callable(value) else value.replace("{}", row[i])
        return rows

    return edit(change, quotes)


def rows_by(change):
    """change(rng, row) in place of one row, or of all."""

    def changed(rng, rows):
        chosen = rng.choice((range(1, len(rows)), [rng.randrange(1, len(rows))]))
        return [change(rng, row) if i in chosen else row for i, row in enumerate(rows)]

    return edit(changed)


def turned(rows):
    """Rows of columns, columns of rows."""
    return list(zip(*rows, strict=True))


def column_twice(rng, rows):
    columns, read = turned(rows), {*itertools.chain(*READ.values())}
    name, *cells = rng.choice([column for column in columns if column[0] in read])
    columns.insert(rng.randrange(len(columns) + 1), (name, *rng.choice((cells, rng.sample(cells, len(cells))))))
    return turned(columns)


def more_columns(rng, rows):
    columns = turned(rows)
    for n in range(rng.choice((1, 5, 60))):
        value = rng.choice(("", "1", "x y", "a,b", 'say "so"', "a\nb", "\ufeff", "nan", "é"))
        columns.insert(rng.randrange(len(columns) + 1), (f"more {n}", *[value] * (len(rows) - 1)))
    return turned(columns)


NO_FILES = {  # what lies where a file should be: function(path)
    "links: to itself": lambda path: path.symlink_to(path.name),
    "links: to nothing": lambda path: path.symlink_to("nothing"),
    "links: to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "links: to a folder": lambda path: path.symlink_to("."),
    "no files: a FIFO": os.mkfifo,
    "no files: a socket": lambda path: os.mknod(path, stat.S_IFSOCK),
    "no files: a folder": lambda path: path.mkdir(),
    "no files: a terabyte of nothing": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "no files: nothing": lambda path: None,
}


def instead(path: Path, make) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def links_elsewhere(rng, folder):
    elsewhere = folder.parent.parent / "elsewhere" / folder.name
    for entry in (FEATURES_FILE, rng.choice((SURVEY_FILE, "transcription"))):
        os.renames(folder / entry, elsewhere / entry)
        (folder / entry).symlink_to(elsewhere / entry)


def odd_names(rng, case, other):
    header, *rows = rows_of(case.files[TRANSCRIPT])
    odd = ("NA", "null", "nan", "0", "1e5", "inf", "a,b", 'a"b', "a\nb", "\u202e", "None", "-", "u" * 500)
    names = dict(zip({row[header.index("speaker")]: 0 for row in rows}, rng.sample(odd, 2), strict=False))
    for file, content in case.files.items():
        case.files[file] = csv_of([[names.get(cell, cell) for cell in row] for row in rows_of(content)])


# ---------------------------------------------------------------------------------------------------------------------
# The mutations: name -> change

ANY, TALK, SHOWN, RATED = [], [TRANSCRIPT], [FEATURES_FILE], [SURVEY_FILE]  # ANY: one of the three
CONTENTS = {  # name: (files, change); those of bytes are done one to three times
    "bytes: flip": (ANY, lambda rng, x, y:
        (int.from_bytes(x) ^ 1 << rng.randrange(8 * len(x) or 1)).to_bytes(len(x) or 1)),
    "bytes: insert": (ANY, lambda rng, x, y: bytes([rng.choice((*NASTY, *rng.randbytes(40)))]).join(cut(rng, x))),
    "bytes: delete": (ANY, lambda rng, x, y: b"".join(span(rng, x)[::2])),
    "bytes: duplicate": (ANY, lambda rng, x, y: (lambda a, b, c: a + b + b + c)(*span(rng, x))),
    "bytes: splice from another conversation": (ANY, lambda rng, x, y: span(rng, y)[1].join(span(rng, x)[::2])),
    "bytes: swap two spans": (ANY, lambda rng, x, y: (lambda a, b, c, d, e: a + d + c + b + e)(*cut(rng, x, 4))),
    "bytes: truncate": (ANY, lambda rng, x, y: cut(rng, x)[0]),
    "bytes: cut off the front": (ANY, lambda rng, x, y: cut(rng, x)[1]),
    "bytes: random bytes": (ANY, lambda rng, x, y: rng.randbytes(int(rng.paretovariate(0.5)) % 5000)),
    "bytes: another file of the conversation": (ANY, lambda rng, x, y: y),
    "bytes: NUL bytes": (ANY, lambda rng, x, y: bytes(rng.choice((1, 1, 2, 4096))).join(cut(rng, x))),
    "encodings: another one": (ANY, lambda rng, x, y:
        x.decode().replace("e", "é", rng.choice((0, 3))).encode(rng.choice(ENCODINGS), "replace")),
    "encodings: several byte order marks, or misplaced ones": (ANY, lambda rng, x, y:
        rng.choice((MARK * 2 + x, MARK.join(cut(rng, x)), x + MARK))),
    "encodings: lines that end in many ways": (ANY, lambda rng, x, y:
        re.sub(b"\r\n|\r|\n", lambda end: rng.choice([end[0]] * 60 + ENDS), x)),
    "quotes: stray ones": (ANY, lambda rng, x, y: re.sub(  # at ends of cells
        rb"(?<=[,\n])|(?=[,\r\n])", lambda end: rng.choice([b""] * x.count(b",") + [b'"', b'""']), x)),
    "quotes: two that make one cell of two places in a column": (ANY, one_cell_of_two),
    "quotes: all of one kind gone, or others in their place": (ANY, lambda rng, x, y:
        csv_of(rows_of(x), "all").replace(*rng.choice(((b'"', b"'"), (b'"', b"", 1), (b',"', b", "))))),
    "cells: hostile ones": (ANY, cells([], HOSTILE_CELLS, times=(1, 1, 3, 10), quotes=("needed", "all"))),
    "cells: hostile ones without quotes": (ANY, cells([], HOSTILE_CELLS, times=(1, 1, 3), quotes=("none",))),
    "cells: of 10 MB":
        (ANY, cells([], [partial(lambda x, cell: x * 2_000_000, x * 5) for x in 'x1 ",\n'], times=(1,))),
    "cells: a column shifted by one": (ANY, rows_by(lambda rng, row:
        [*row[: (i := rng.randrange(len(row)))], rng.choice(("", row[i])), *row[i:]][: len(row) + rng.randrange(2)])),
    "columns: one missing": (ANY, edit(lambda rng, t: turned(rng.sample(turned(t), len(t[0]) - 1)))),
    "columns: one twice": (ANY, edit(column_twice)),
    "columns: names changed": (ANY, cells([], OWN, [str.upper, "{} ", "", "\ufeff{}"], times=(1,), where=slice(1))),
    "columns: a header alone, or none": (ANY, edit(lambda rng, t: rng.choice((t[:1], t[1:], [[]])))),
    "rows: cut short, or with too many cells": (ANY, rows_by(lambda rng, row:
        rng.choice((row[: rng.randrange(len(row))], row + [rng.choice(HOSTILE_CELLS)] * rng.choice((1, 2, 100)))))),
    "rows: dropped, doubled or shuffled": (ANY, edit(lambda rng, t: [t[0], *(
        row for row in rng.sample(t[1:], len(t) - 1) for _ in range(rng.choice([0, 2] + [1] * 8)))])),
    "rows: ids of turns that are none, and rows out of order":
        (TALK, cells(["turn_id"], ["", "x", "nan", "inf", "-1", "1e3", "0", "9" * 30])),
    "rows: 20,000 of them": (ANY, edit(lambda rng, t: t + [  # of as many people, or of the same
        [f"{cell}-{n}" if name == who else cell for name, cell in zip(t[0], row, strict=True)]
        for who in rng.sample(("user_id", ""), 1) for n in range(20_000 // len(t)) for row in t[1:]])),
    "speakers: one, three, nobody, or somebody else":
        (TALK, cells(["speaker"],
            OWN, ["one"], ["third", "{}x", str.upper, "\ufeff{}", "NA", "null"], ["", " ", "\t{} "])),
    "times: negative, reversed, not finite, far away": (TALK, cells(["start", "stop"], OWN, ["-{}"],
        ["nan", "inf", "-inf", "", "soon", "1e400", "00:01:07"], ["1e300", "9e99", "1e5"], times=(1, 3, 10))),
    "times: of faces": (SHOWN, cells(["timedelta"], [
        "", "nan", "inf", "-5", "1e300", "0 days", "0 days 00:61:00", "0 days 00:00:61", "x", "0 days 0:0:1",
        "0 days 00:00:01.123456789", "-1 days +23:59:59", "99999999999 days 00:00:00", "1 day, 0:00:01", "00:00:04",
        "1:02", "0 days 00:01:077"])),
    "words: counts that are none":
        (TALK, cells(["n_words"], ["", "nan", "-3", "1e7", "1e400", "six", "5.5", "1_0", "0"])),
    "faces: lost, or no probabilities": (SHOWN, cells(PROBABILITIES,
        [""], ["", "nan", "x"], ["-1", "2", "1e300", "-1e300", "inf", "1.0000001", "-0.0"], ["1e16"])),
    "faces: even ties": (SHOWN, cells(PROBABILITIES, ["0.7", "0.3", "0.1", "0", "0", "0"], times=(10_000,))),
    "survey: somebody twice, missing, or nobody": (RATED, lambda rng, x, y: rng.choice((
        edit(lambda rng, t: [t[0], *rng.choices(t[1:], k=rng.randrange(4))]),
        edit(lambda rng, t: [*t, [f" {cell} " for cell in rng.choice(t[1:])]]),
        cells(["user_id"], OWN, ["", "nobody", " "])))(rng, x, y)),
    "survey: answers that are none": (RATED, cells(QUESTIONS, [
        "", "often", "700", "-1", "1e1", "nan", "inf", "1_0", "\uff17", "0x7", "True", "7,5", "7.5", " 7 ", "١"])),

    "quotes: that belong to what was said": (TALK, cells(["utterance"],
        ["{}, you know", '"{}"', 'so "{}", I say', ", {}", "é {}", "{}\n{}", '{} 5" tall'])),

    "neutral: byte order mark": (FILES, lambda rng, x, y: MARK + x.removeprefix(MARK)),
    "neutral: other line ends": (FILES, edit(ends=("\r\n", "\r"))),
    "neutral: everything in quotes": (FILES, edit(quotes=("all",))),
    "neutral: no last line end, or several": (FILES, lambda rng, x, y:
        x.rstrip(b"\r\n") + rng.choice((b"", b"\n\n\r\n", b"\r\n"))),
    "neutral: more columns": (FILES, edit(more_columns)),
    "neutral: columns in another order": (FILES, edit(lambda rng, t: turned(rng.sample(turned(t), len(t[0]))))),
    "neutral: rows in another order": (FILES, edit(lambda rng, t: t[:1] + rng.sample(t[1:], len(t) - 1))),
    "neutral: times of faces in seconds, or without days": (SHOWN, cells(["timedelta"], [lambda x: x.split()[-1],
        *(partial(lambda digits, x: f"{reference_seconds(x):.{digits}f}", digits) for digits in (0, 1, 6))])),
    "neutral: spaces around names and utterances":
        (FILES, cells(["speaker", "user_id", "utterance"], [" {}", "\t {}", "{}  ", " {} "])),
    "neutral: frames and answers of others": ([FEATURES_FILE, SURVEY_FILE], lambda rng, x, y:
        csv_of(rows_of(x) + rows_of(y)[1:] * (rows_of(x)[0] == rows_of(y)[0]))),
}  # fmt: skip
FOLDERS = {
    **{name: partial(lambda make, rng, folder: instead(folder / rng.choice(FILES), make), make)
       for name, make in NO_FILES.items()},
    "links: two in a circle": lambda rng, folder: (
        instead(folder / TRANSCRIPT, lambda path: path.symlink_to("../" + SURVEY_FILE)),
        instead(folder / SURVEY_FILE, lambda path: path.symlink_to(TRANSCRIPT))),
    "links: the folder of transcripts in a circle, or a file": lambda rng, folder: instead(folder / "transcription",
        rng.choice((lambda x: x.symlink_to(".."), lambda x: x.symlink_to(x.name), lambda x: x.write_text("hello")))),
    "names: folders in folders": lambda rng, folder: [os.renames(folder / file, folder / ("d/" * depth) / file)
        for depth in rng.sample((1, 5, 90), 1) for file in FILES],
    "neutral: links to files and folders elsewhere": links_elsewhere,
    "neutral: files that nobody reads": lambda rng, folder: (
        os.mkfifo(folder / "metadata.json"), os.mkfifo(folder / "transcription" / "transcript_audiophile.csv"),
        (folder / "processed").symlink_to(".")),
}  # fmt: skip
ODD_NAMES = "a\nb", "\udcff\udcfe", "\x1b[2J", "a..", "~", "-rf", "a,b", 'a"b', "\u202e", "x" * 200, "CON", "%s{0}", " "
CASES = {
    "bytes: files in each other's place": lambda rng, case, other: case.files.update(
        dict(zip(FILES, rng.sample(list(case.files.values()), 3), strict=True))),
    "speakers: names that look like something else, everywhere": odd_names,
    "names: of the folder": lambda rng, case, other:
        vars(case).update(name=f"{rng.choice(ODD_NAMES)}{case.name}"[:200]),
}  # fmt: skip
MUTATIONS = [*CONTENTS, *FOLDERS, *CASES]
SLOW = {"cells: of 10 MB": 0.2, "rows: 20,000 of them": 0.1}  # how often, where the others are drawn once


def mutate(name: str, rng, case: Case, other: Case) -> None:
    if name in CASES:
        CASES[name](rng, case, other)
    elif name in FOLDERS:
        case.then = partial(FOLDERS[name], rng)
    else:
        files, change = CONTENTS[name]
        for file in files or rng.choices(FILES, (6, 2, 2)):
            for _ in range(rng.choice((1, 1, 2, 3)) if name.startswith("bytes") else 1):
                case.files[file] = change(rng, case.files[file], other.files[file])


SHAPES = {  # that conversations come in, so that mutations meet more than one, and how often
    "quotes: that belong to what was said": 0.4, "neutral: other line ends": 0.1, "neutral: everything in quotes": 0.1,
    "neutral: more columns": 0.1, "neutral: byte order mark": 0.1,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with what was read: functions that say it in words, or return an empty text


def lost_line(before: bytes, after: bytes, base: Conversation, found: Conversation) -> str:
    """A line of the transcript that is as it was, but is no turn with its cells."""
    (header, *lines), (new_header, *new_lines) = (
        re.split("\r\n|\r|\n", content.decode("utf-8", "replace").removeprefix("\ufeff")) for content in (before, after)
    )
    if header != new_header:
        return ""
    (names,), turn_of = csv.reader([header]), {}
    turns = {(turn.turn_id, turn.utterance): turn[:6] for turn in base.turns}
    for line in lines:
        row = dict(zip(names, next(csv.reader([line]), []), strict=False))
        if len(row) == len(names) and (row["turn_id"], row["utterance"].strip()) in turns:
            turn_of[line] = turns[row["turn_id"], row["utterance"].strip()]
    wanted = Counter(turn_of[line] for line in new_lines if line in turn_of)
    lost = wanted - Counter(turn[:6] for turn in found.turns)
    return f"a line that was left alone is no turn: {next(iter(lost))}" if lost else ""


def out_of_range(c: Conversation) -> str:
    for turn in c.turns:
        sound = (
            0 <= turn.start <= turn.stop < math.inf and turn.utterance.strip() == turn.utterance != ""
            and 0 <= turn.n_words <= MOST_WORDS and 0 <= turn.affect < len(FACES) and 0 <= turn.happy_share <= 1
            and [type(value) for value in turn[:8]] == [str, str, float, float, str, int, int, float]
        )  # fmt: skip
        if not sound:
            return f"out of range: {turn}"
    if len(set(c.speakers)) != 2 or {turn.speaker for turn in c.turns} != set(c.speakers):
        return f"speakers: {c.speakers}"
    return "" if set(c.answers) <= set(c.speakers) else "answers of others"


def difference(found: Conversation, expected: Conversation) -> str:
    parts = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(expected, f.name)]
    turns = [(a, b) for a, b in zip(found.turns, expected.turns, strict=False) if a != b][:1]
    return f"{parts} differ, {len(found.turns)} and {len(expected.turns)} turns, {turns}" if parts else ""


def through_the_cache(data: Path, cache: Path, found: dict[str, object]) -> str:
    """What differs from what was `found` when the folders are read as a corpus, twice, through a cache."""
    for _ in range(2):
        try:
            corpus = data_utils.read_corpus(data, "overall_affect", cache=cache)
        except UserError as error:
            usable = any(isinstance(c, Conversation) and c.questions for c in found.values())
            return f"no corpus: {error}" if usable else ""
        got = {**{c.id: c for c in corpus.conversations}, **corpus.dropped}
        for name in sorted({*got, *found}, key=ascii):
            if got.get(name) != found.get(name):
                return f"{name!a}: {str(found.get(name))[:200]} became {str(got.get(name))[:200]} in the corpus"
        printed = corpus.describe().encode()  # can be printed
        if len(printed.splitlines()) > 20 + len(corpus.dropped) + len(corpus.off_scale()):
            return "a line of the summary is broken"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Running


class TimedOut(BaseException):
    """Reading took longer than `LIMIT`."""


def read(folder: Path) -> tuple[str, object]:
    """(`loaded`, the conversation), (`dropped`, reason), (`crash`, exception) or (`hang`, None), within `LIMIT`."""

    def stop(*_):
        raise TimedOut

    faulthandler.dump_traceback_later(10 * LIMIT, exit=True)  # where no signal gets through
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        return "loaded", candor.read_conversation(folder)
    except Dropped as reason:
        return "dropped", str(reason)
    except TimedOut:
        return "hang", None
    except Exception as error:
        return "crash", error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def judge(name: str, before: Case, after: Case, plain: Path, data: Path) -> tuple[str, object, str]:
    """(outcome, what was read of `after` in `data`, what is wrong with it)."""
    (sound, base), (kind, found) = read(before.write(plain)), read(folder := after.write(data))
    if {"crash", "hang"} & {sound, kind}:
        return kind if kind in ("crash", "hang") else sound, found, f"{base!r:.250} {found!r:.250}"
    if sound == "dropped":
        return "wrong", found, f"not even mutated: {base}"
    try:
        expected = reference(folder)
    except Refused as reason:
        expected = reason
    same = kind == "loaded" and dataclasses.replace(found, id=base.id) == base
    if (kind == "dropped") != isinstance(expected, Refused):
        wrong = f"{kind}, other than by the second reader: {found if kind == 'dropped' else expected}"
    elif name.startswith("neutral") and not same:
        wrong = f"changed by what changes nothing: {found}"
    elif kind == "dropped":
        return kind, found, "" if found and found.isprintable() else f"no reason in one line: {found!a}"
    else:
        lines = before.files[TRANSCRIPT], after.files[TRANSCRIPT]
        wrong = difference(found, expected) or lost_line(*lines, base, found) or out_of_range(found)
    return "wrong" if wrong else "unchanged" if same else "changed", found, wrong


@dataclasses.dataclass
class Result:
    """Outcomes by mutation, reasons of what was dropped, and what failed, in words."""

    outcomes: dict[str, Counter]
    reasons: Counter
    failures: list[str]


def bases_of(folder: Path, most: int = 100) -> list[Case]:
    """Sound conversations of a corpus to mutate, spread over it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    chosen = names[:: max(1, len(names) // most)][:most]
    cases = [Case({file: (folder / name / file).read_bytes() for file in FILES}, name) for name in chosen]
    return [case for case in cases if len(rows_of(case.files[TRANSCRIPT])) > 3]


def fuzz(corpora: list[list[Case]], inputs: range, seed: int, progress: bool = False) -> Result:
    """Mutates conversations of the corpora in turn; input i is the same in every run with the same seed."""
    result = Result({name: Counter() for name in MUTATIONS}, Counter(), [])
    for batch in (inputs[k : k + BATCH] for k in range(0, len(inputs), BATCH)):
        with tempfile.TemporaryDirectory() as temporary:
            data, plain, cache = (Path(temporary) / name for name in ("data", "plain", "cache"))
            read_so_far = {}
            for i in batch:
                rng = random.Random(f"{seed} {i}")
                case, other = (Case({**x.files}, f"{x.name}-{i}") for x in rng.sample(corpora[i % len(corpora)], 2))
                drawn = rng.choices(MUTATIONS, [SLOW.get(name, 1) for name in MUTATIONS])[0]
                name = drawn if i >= len(corpora) * len(MUTATIONS) else MUTATIONS[i // len(corpora)]
                for shape in rng.sample(list(SHAPES), len(SHAPES)):
                    if rng.random() < SHAPES[shape]:
                        mutate(shape, rng, case, other)
                before = dataclasses.replace(case, files=dict(case.files))
                mutate(name, rng, case, other)
                outcome, found, wrong = judge(name, before, case, plain, data)
                result.outcomes[name][outcome] += 1
                if outcome == "dropped":
                    result.reasons[re.sub(r"line \d+: ", "", found)[:90]] += 1
                if wrong:
                    result.failures.append(f"input {i}, {name}: {outcome}: {wrong[:600]}")
                if outcome in ("crash", "hang"):
                    shutil.rmtree(data / case.name)
                else:
                    read_so_far[case.name] = found
            if wrong := through_the_cache(data, cache, read_so_far):
                result.outcomes.setdefault("the corpus and its cache", Counter())["wrong"] += 1
                result.failures.append(f"inputs {batch}: {wrong}")
        if progress and batch.stop % (20 * BATCH) == 0:
            print(f"{batch.stop:,} inputs …", file=sys.stderr, flush=True)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The report


OUTCOMES = ("unchanged", "changed", "dropped", "crash", "hang", "wrong")


def table_of(outcomes: dict[str, Counter], each: bool) -> str:
    """A Markdown table, a row a kind of mutation (each: a mutation)."""
    rows = {}
    for name, counts in outcomes.items():
        rows.setdefault(name if each else name.split(":")[0], Counter()).update(counts)
    rows["all"] = sum(rows.values(), Counter())
    lines = ["| mutation | inputs | loaded unchanged | loaded, changed | dropped | crash | hang | wrong value |"]
    lines.append("|---" * 8 + "|")
    for name, counts in rows.items():
        numbers = [counts.total(), *(counts[outcome] for outcome in OUTCOMES)]
        lines += ["| " + " | ".join([name, *(f"{number:,}" for number in numbers)]) + " |"] * bool(counts)
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="how many mutated conversations")
    parser.add_argument("--seed", type=int, default=0, help="seed: the same inputs every time")
    parser.add_argument("--data", type=Path, help="a corpus in CANDOR's layout, mutated as often as the sample")
    parser.add_argument("--only", type=int, metavar="I", help="input I alone")
    parser.add_argument("--each", action="store_true", help="a row a mutation, not a kind of mutation")
    args = parser.parse_args()
    limit = 12 * 2**30  # bytes of memory, so that a file without end fails here and harms nobody
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        sample_candor.write_corpus(Path(folder) / "sample", conversations=40, n_turns=14, seed=args.seed)
        corpora = [bases_of(Path(folder) / "sample"), *([bases_of(args.data)] if args.data else [])]
    inputs = range(args.inputs) if args.only is None else range(args.only, args.only + 1)
    result = fuzz(corpora, inputs, args.seed, progress=True)
    print(table_of(result.outcomes, args.each))
    print("\nReasons of what was dropped")
    for reason, n in result.reasons.most_common():
        print(f"{n:7,}  {reason}")
    for failure in result.failures[:40]:
        print(failure)
    print(f"\n{len(result.failures):,} crashes, hangs or wrong values")
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main())
