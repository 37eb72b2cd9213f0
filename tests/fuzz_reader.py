"""Hostile data: mutates conversations, and checks what the reader of CANDOR's folders makes of each.

    python tests/fuzz_reader.py --inputs 10000 --seed 0 [--data FOLDER]

A mutated conversation must load or be dropped with a reason. Anything else is counted as a crash, a hang, or a wrong
value, and makes the exit code 1. A value is wrong where any of these does not hold:

- a second reader, written here plainly after DESIGN.md, comes to the same conversation, or drops it too;
- a line of the transcript that a mutation left alone is a turn, with that line's cells;
- a mutation that changes nothing of what was said, shown or answered changes nothing of the conversation;
- read through the cache it is the same, both times; and what is in range by `Conversation`'s documentation is.
"""

import argparse
import csv
import dataclasses
import faulthandler
import io
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data_utils
from cli import REWARD_CLASSES, UserError
from data_utils import ANSWER_LIMITS, FACES, FEATURES_FILE, MIN_WORDS, MOST_WORDS, SURVEY_FILE, Conversation, Dropped

TRANSCRIPT = "transcription/transcript_cliffhanger.csv"
FILES = (TRANSCRIPT, FEATURES_FILE, SURVEY_FILE)
PROBABILITIES = [f"prob_face_{face}" for face in FACES]
LIMIT = 10  # seconds a conversation
BATCH = 50  # conversations that are read as a corpus too, through the cache


@dataclasses.dataclass
class Case:
    """A conversation as it will lie on disk: content of each file, its folder's name, and what is done to the folder
    when the files are there."""

    files: dict[str, bytes]
    name: str
    on_disk: list[Callable[[Path], None]] = dataclasses.field(default_factory=list)

    def text(self, file: str) -> str:
        return self.files[file].decode("utf-8-sig")

    def rows(self, file: str) -> list[list[str]]:
        return list(csv.reader(io.StringIO(self.text(file), newline="")))

    def write(self, file: str, rows: list[list[str]], end: str = "\n", all_quoted: bool = False) -> None:
        def shown(cell: str) -> str:  # csv.writer leaves a line end that is not its own without quotes
            return '"' + cell.replace('"', '""') + '"' if all_quoted or set(cell) & set('",\r\n') else cell

        self.files[file] = "".join(",".join(map(shown, row)) + end for row in rows).encode()

    def edit(self, file: str, change: Callable[[list[str], list[list[str]]], object], **how) -> None:
        """change(header, rows) in place."""
        header, *rows = self.rows(file)
        change(header, rows)
        self.write(file, [header, *rows], **how)


# ---------------------------------------------------------------------------------------------------------------------
# Mutations: name -> function(rng, case, other), `other` being another conversation's case

MUTATIONS: dict[str, Callable] = {}


def mutation(name: str):
    def register(function):
        MUTATIONS[name] = function
        return function

    return register


def some_file(rng) -> str:
    return rng.choices(FILES, (6, 2, 2))[0]


NASTY = b'""""\n\r,,;\t\0\\\'-+.eE019 \xff\xc3\xef\xbb\xbf'


def bytewise(name: str):
    """A mutation of a file's bytes, done one to three times: function(rng, content, other content) -> content."""

    def register(function):
        @mutation(f"bytes: {name}")
        def mutate(rng, case, other):
            file = some_file(rng)
            for _ in range(rng.choice((1, 1, 2, 3))):
                case.files[file] = function(rng, case.files[file], other.files[file])

        return function

    return register


def span(rng, content: bytes) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + int(rng.paretovariate(0.6)))


@bytewise("flip")
def _(rng, content, other):
    at = rng.randrange(max(1, len(content)))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :] if content else content


@bytewise("insert")
def _(rng, content, other):
    at = rng.randrange(len(content) + 1)
    return content[:at] + bytes(rng.choice((rng.randrange(256), rng.choice(NASTY))) for _ in range(1)) + content[at:]


@bytewise("delete")
def _(rng, content, other):
    start, stop = span(rng, content)
    return content[:start] + content[stop:]


@bytewise("duplicate")
def _(rng, content, other):
    start, stop = span(rng, content)
    return content[:stop] + content[start:stop] + content[stop:]


@bytewise("splice from another conversation")
def _(rng, content, other):
    (a, b), (start, stop) = span(rng, content), span(rng, other)
    return content[:a] + other[start:stop] + content[b:]


@bytewise("swap two spans")
def _(rng, content, other):
    a, b, c, d = sorted(rng.randrange(len(content) + 1) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


@bytewise("truncate")
def _(rng, content, other):
    return content[: rng.randrange(len(content) + 1)]


@bytewise("cut off the front")
def _(rng, content, other):
    return content[rng.randrange(len(content) + 1) :]


@bytewise("random bytes")
def _(rng, content, other):
    return rng.randbytes(int(rng.paretovariate(0.5)) % 5000)


@bytewise("another file of the conversation")
def _(rng, content, other):
    return other


@mutation("bytes: files in each other's place")
def _(rng, case, other):
    a, b = rng.sample(FILES, 2)
    case.files[a], case.files[b] = case.files[b], case.files[a]


@bytewise("NUL bytes")
def _(rng, content, other):
    at = rng.randrange(len(content) + 1)
    return content[:at] + bytes(rng.choice((1, 1, 2, 4096))) + content[at:]


ENCODINGS = "utf-16 utf-16-le utf-16-be utf-32 utf-7 latin-1 cp1252 cp037 shift_jis".split()


@mutation("encodings: another one")
def _(rng, case, other):
    file = some_file(rng)
    accents = case.text(file).replace("e", "é", 3) if rng.random() < 0.5 else case.text(file)
    case.files[file] = accents.encode(rng.choice(ENCODINGS), "replace")


@mutation("encodings: several byte order marks, or misplaced ones")
def _(rng, case, other):
    file = some_file(rng)
    content, mark = case.files[file], "\ufeff".encode()
    at = rng.randrange(len(content))
    case.files[file] = rng.choice((mark * 2 + content, content[:at] + mark + content[at:], content + mark))


@mutation("encodings: lines that end in many ways")
def _(rng, case, other):
    file = some_file(rng)
    ends = ("\n", "\r", "\r\n", "\n\n", "\n\r", "\x0b", "\x0c", "\x1e", "\x85", "\u2028")
    odd = rng.choice((0.02, 0.5))
    lines = case.text(file).split("\n")
    case.files[file] = "".join(x + (rng.choice(ends) if rng.random() < odd else "\n") for x in lines).encode()


@mutation("quotes: stray ones")
def _(rng, case, other):
    file = some_file(rng)
    content = case.files[file]
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        ends = [m.start() for m in re.finditer(rb"(?<=[,\n])|(?=[,\r\n])", content)] or [0]
        at = rng.choice(ends) if rng.random() < 0.8 else rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice((b'"', b'"', b'"', b'""')) + content[at:]
    case.files[file] = content


@mutation("quotes: two that make one cell of two places in a column")
def _(rng, case, other):
    file = rng.choices(FILES, (4, 1, 3))[0]
    lines = [line.split(b",") for line in case.files[file].split(b"\n")]
    first, last = sorted(rng.sample(range(1, len(lines)), 2)) if len(lines) > 2 else (0, 0)
    if rng.random() < 0.6:
        last = min(first + rng.choice((1, 1, 2)), len(lines) - 1)
    column = rng.randrange(len(lines[0]))
    if column < min(len(lines[first]), len(lines[last])):
        lines[first][column] = b'"' + lines[first][column]
        lines[last][column] += b'"'
    case.files[file] = b"\n".join(b",".join(line) for line in lines)


@mutation("quotes: all of one kind gone, or others in their place")
def _(rng, case, other):
    file = some_file(rng)
    case.edit(file, lambda header, rows: None, all_quoted=True)
    content = case.files[file]
    case.files[file] = rng.choice(
        (content.replace(b'"', b"'"), content.replace(b'"', b"", 1), content.replace(b',"', b", "))
    )


HOSTILE_CELLS = [
    "", " ", "NaN", "nan", "inf", "-inf", "Infinity", "-1", "-0.0", "1e308", "1e999", "-1e308", "1e-320", "9" * 400,
    "1_0", "\uff17", "0x1F", "1,5", "True", "None", "NA", "null", "#N/A", "often", "=1+1", "7 ", "+7", ".5", "5.", "1e",
    '"', '""', 'a "b" c', '"a', 'b"', "a\nb", "a\r\nb", "a,b", ",", "\n", "\\", "\\n", "'", "\ufeff", "\u202e",
    "\x1b[2J", "\x00", "\u2028", "\U0001f642", "e\u0301" * 50, "x" * 200_000, "0 days 00:00:01", "0 days 00:99:00",
    "-1 days +23:59:59", "1 days", "00:01", "0 days 00:00:01.5", "99999999 days 00:00:00", "P0DT0H1M7S", "1 h", "5 min",
    "NaT", "now",
]  # fmt: skip


@mutation("cells: hostile ones")
def _(rng, case, other):
    def change(header, rows):
        wanted = [i for i, name in enumerate(header) if name != "feature"] or [0]
        for _ in range(rng.choice((1, 1, 3, 10))):
            if rows:
                rng.choice(rows)[rng.choice(wanted)] = rng.choice(HOSTILE_CELLS)

    case.edit(some_file(rng), change, all_quoted=rng.random() < 0.5)


@mutation("cells: hostile ones without quotes")
def _(rng, case, other):
    file = some_file(rng)
    rows = case.rows(file)
    for _ in range(rng.choice((1, 1, 3))):
        row = rng.choice(rows)
        if row:
            row[rng.randrange(len(row))] = rng.choice(HOSTILE_CELLS)
    case.files[file] = "\n".join(map(",".join, rows)).encode()


@mutation("cells: of 10 MB")
def _(rng, case, other):
    if rng.random() < 0.8:  # they take long to write
        return MUTATIONS["cells: hostile ones"](rng, case, other)
    large = rng.choice(("x", "1", "word ", '"', "\n", ",")) * 2_000_000 * rng.choice((1, 5))

    def change(header, rows):
        rng.choice(rows)[rng.randrange(len(header))] = large

    case.edit(some_file(rng), change)


@mutation("cells: a column shifted by one")
def _(rng, case, other):
    def change(header, rows):
        for row in rows if rng.random() < 0.3 else [rng.choice(rows)]:
            at = rng.randrange(len(header))
            row[at:at] = [row[at] if rng.random() < 0.5 else ""]
            if rng.random() < 0.5:
                row.pop()

    case.edit(some_file(rng), change)


@mutation("columns: one missing")
def _(rng, case, other):
    def change(header, rows):
        at = rng.randrange(len(header))
        for row in (header, *rows):
            del row[at]

    case.edit(some_file(rng), change)


@mutation("columns: one twice")
def _(rng, case, other):
    file = some_file(rng)

    def change(header, rows):
        used = [i for i, name in enumerate(header) if name in USED[file]]
        a, b = rng.choice(used), rng.randrange(len(header) + 1)
        values = [row[a] for row in rows]
        if rng.random() < 0.7:
            rng.shuffle(values)
        header.insert(b, header[a])
        for row, value in zip(rows, values, strict=True):
            row.insert(b, value)

    case.edit(file, change)


@mutation("columns: names changed")
def _(rng, case, other):
    def change(header, rows):
        at = rng.randrange(len(header))
        header[at] = rng.choice((header[at].upper(), header[at] + " ", "", rng.choice(header), "\ufeff" + header[at]))

    case.edit(some_file(rng), change)


@mutation("columns: a header alone, or none")
def _(rng, case, other):
    file = some_file(rng)
    rows = case.rows(file)
    case.write(file, rng.choice((rows[:1], rows[1:], [[]])))


@mutation("rows: cut short, or with too many cells")
def _(rng, case, other):
    def change(header, rows):
        row = rng.choice(rows)
        if rng.random() < 0.5:
            del row[rng.randrange(len(row)) :]
        else:
            row += [rng.choice(HOSTILE_CELLS)] * rng.choice((1, 2, 100))

    case.edit(some_file(rng), change)


@mutation("rows: dropped, doubled or shuffled")
def _(rng, case, other):
    def change(header, rows):
        if rng.random() < 0.3:
            rng.shuffle(rows)
        for _ in range(rng.choice((1, 3))):
            if rows:
                at = rng.randrange(len(rows))
                rows[at : at + 1] = [rows[at]] * rng.choice((0, 2)) if rng.random() < 0.9 else []

    case.edit(some_file(rng), change)


@mutation("rows: ids of turns that are none, and rows out of order")
def _(rng, case, other):
    def change(header, rows):
        at = header.index("turn_id")
        for _ in range(rng.choice((1, 2))):
            rng.choice(rows)[at] = rng.choice(("", "x", "nan", "inf", "-1", "1e3", "0", "9" * 30))
        if rng.random() < 0.5:
            rng.shuffle(rows)

    case.edit(TRANSCRIPT, change)


@mutation("rows: 20,000 of them")
def _(rng, case, other):
    if rng.random() < 0.9:
        return MUTATIONS["rows: dropped, doubled or shuffled"](rng, case, other)
    file = rng.choice((TRANSCRIPT, FEATURES_FILE))

    def change(header, rows):
        who = header.index("speaker" if file == TRANSCRIPT else "user_id")
        new = [list(row) for row in rows * (20_000 // len(rows) + 1)]
        if file == FEATURES_FILE and rng.random() < 0.7:
            for i, row in enumerate(new[len(rows) :]):
                row[who] = f"somebody {i}"
        rows[:] = new

    case.edit(file, change)


@mutation("speakers: one, three, nobody, or somebody else")
def _(rng, case, other):
    def change(header, rows):
        at = header.index("speaker")
        names = sorted({row[at] for row in rows})
        kind = rng.randrange(6)
        for row in rows:
            if kind == 0:
                row[at] = names[0]
            elif kind == 1 and rng.random() < 0.2:
                row[at] = rng.choice(("third", row[at] + "x", row[at].upper(), "\ufeff" + row[at]))
            elif kind == 2 and rng.random() < 0.3:
                row[at] = rng.choice(("", " "))
            elif kind == 3:
                row[at] = rng.choice((" ", "", "\t")) + row[at] + " "
            elif kind == 4:
                row[at] = rng.choice(names)
            elif kind == 5:
                row[at] = dict(zip(names, ("NA", "null"), strict=False)).get(row[at], row[at])

    case.edit(TRANSCRIPT, change)


@mutation("speakers: names that look like something else, everywhere")
def _(rng, case, other):
    header, *rows = case.rows(TRANSCRIPT)
    names = list(dict.fromkeys(row[header.index("speaker")] for row in rows))
    odd = rng.sample(
        ("NA", "null", "nan", "0", "1e5", "inf", "a,b", 'a"b', "a\nb", "\u202e", "None", "-", "u" * 500), 2
    )
    table = dict(zip(names, odd, strict=False))
    for file in FILES:
        rows = [[table.get(cell, cell) for cell in row] for row in case.rows(file)]
        case.write(file, rows)


@mutation("times: negative, reversed, not finite, far away")
def _(rng, case, other):
    def change(header, rows):
        start, stop = header.index("start"), header.index("stop")
        for row in rng.sample(rows, rng.randrange(1, len(rows) + 1)):
            kind = rng.randrange(5)
            if kind == 0:
                row[start], row[stop] = row[stop], row[start]
            elif kind == 1:
                row[start] = f"-{row[start]}"
            elif kind == 2:
                row[rng.choice((start, stop))] = rng.choice(("nan", "inf", "-inf", "", "soon", "1e400", "00:01:07"))
            elif kind == 3:
                row[stop] = rng.choice(("1e300", "9e99", "1e5"))
            else:
                row[start] = row[stop]

    case.edit(TRANSCRIPT, change)


@mutation("times: of faces")
def _(rng, case, other):
    odd = (
        "",
        "nan",
        "inf",
        "-5",
        "1e300",
        "0 days",
        "0 days 00:61:00",
        "0 days 00:00:61",
        "x",
        "0 days 00:00:01.123456789",
    )
    odd += (
        "0 days 0:0:1",
        "-1 days +23:59:59",
        "99999999999 days 00:00:00",
        "1 day, 0:00:01",
        "00:00:04",
        "1:02",
        "0 days 00:01:077",
    )

    def change(header, rows):
        at = header.index("timedelta")
        for row in rng.sample(rows, rng.randrange(1, len(rows) + 1)):
            row[at] = rng.choice(odd)

    case.edit(FEATURES_FILE, change)


@mutation("words: counts that are none")
def _(rng, case, other):
    def change(header, rows):
        for row in rng.sample(rows, rng.randrange(1, len(rows) + 1)):
            row[header.index("n_words")] = rng.choice(("", "nan", "-3", "1e7", "1e400", "six", "5.5", "1_0", "0"))

    case.edit(TRANSCRIPT, change)


@mutation("faces: lost, or no probabilities")
def _(rng, case, other):
    odd = rng.choice((("",), ("", "nan", "x"), ("-1", "2", "1e300", "-1e300", "inf", "1.0000001", "-0.0"), ("1e16",)))

    def change(header, rows):
        for row in rng.sample(rows, rng.choice((1, 3, len(rows)))):
            row[header.index(rng.choice(PROBABILITIES))] = rng.choice(odd)

    case.edit(FEATURES_FILE, change)


@mutation("faces: even ties")
def _(rng, case, other):
    def change(header, rows):
        first = header.index(PROBABILITIES[0])
        for row in rows:
            order = rng.sample(("0.7", "0.3", "0.1", "0.1", "0", "0", "0", "0"), 8)
            row[first : first + 8] = order

    case.edit(FEATURES_FILE, change)


@mutation("survey: somebody twice, missing, or nobody")
def _(rng, case, other):
    def change(header, rows):
        row = rng.choice(rows)
        kind = rng.randrange(5)
        if kind == 0:
            rows.append(list(row))
        elif kind == 1:
            rows.append([f" {row[0]} ", *rng.choice(rows)[1:]])
        elif kind == 2:
            rows.remove(row)
        elif kind == 3:
            row[header.index("user_id")] = rng.choice(("", "nobody", " "))
        else:
            rows.clear()

    case.edit(SURVEY_FILE, change)


@mutation("survey: answers that are none")
def _(rng, case, other):
    odd = ("", "often", "700", "-1", "1e1", "nan", "inf", "1_0", "\uff17", "0x7", "True", "7,5", "7.5", " 7 ", "١")

    def change(header, rows):
        for row in rows:
            for i, name in enumerate(header):
                if name != "user_id" and rng.random() < 0.5:
                    row[i] = rng.choice(odd)

    case.edit(SURVEY_FILE, change)


def put(case: Case, file: str, make: Callable[[Path], object]) -> None:
    """Puts something else where a file should be."""

    def do(folder):
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    case.on_disk.append(do)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may be no longer than some 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


NO_FILES = {
    "links: to itself": lambda path: path.symlink_to(path.name),
    "links: to nothing": lambda path: path.symlink_to("nothing"),
    "links: to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "links: to a folder": lambda path: path.symlink_to("."),
    "no files: a FIFO": os.mkfifo,
    "no files: a socket": _socket,
    "no files: a folder": lambda path: path.mkdir(),
    "no files: a terabyte of nothing": _sparse,
    "no files: nothing": lambda path: None,
}
for name, make in NO_FILES.items():
    MUTATIONS[name] = lambda rng, case, other, make=make: put(case, some_file(rng), make)


@mutation("links: two in a circle")
def _(rng, case, other):
    put(case, TRANSCRIPT, lambda path: path.symlink_to("../" + SURVEY_FILE))
    put(case, SURVEY_FILE, lambda path: path.symlink_to(TRANSCRIPT))


@mutation("links: the folder of transcripts in a circle, or a file")
def _(rng, case, other):
    kind = rng.randrange(3)

    def do(folder):
        shutil.rmtree(folder / "transcription", ignore_errors=True)
        if kind == 2:
            (folder / "transcription").write_text("hello")
        else:
            (folder / "transcription").symlink_to(("..", "transcription")[kind])

    case.on_disk.append(do)


ODD_NAMES = (
    "a\nb",
    "\udcff\udcfe",
    "\x1b[2J",
    "a..",
    "~",
    "-rf",
    "a,b",
    'a"b',
    "\u202e",
    "x" * 200,
    "CON",
    "%s{0}",
    " ",
)


@mutation("names: of the folder")
def _(rng, case, other):
    case.name = f"{rng.choice(ODD_NAMES)}{case.name}"[:200]


@mutation("names: folders in folders")
def _(rng, case, other):
    depth = rng.choice((1, 5, 90))

    def do(folder):
        deep = folder.joinpath(*["d"] * depth)
        deep.mkdir(parents=True)
        for file in FILES:
            os.rename(folder / file, deep / Path(file).name)

    case.on_disk.append(do)


# What changes nothing


def neutral(name: str):
    return mutation(f"neutral: {name}")


@neutral("byte order mark")
def _(rng, case, other):
    for file in FILES:
        case.files[file] = "\ufeff".encode() + case.text(file).encode()


@neutral("other line ends")
def _(rng, case, other):
    end = rng.choice(("\r\n", "\r"))
    for file in FILES:
        case.edit(file, lambda header, rows: None, end=end)


@neutral("everything in quotes")
def _(rng, case, other):
    for file in FILES:
        case.edit(file, lambda header, rows: None, all_quoted=True)


@neutral("no last line end, or several")
def _(rng, case, other):
    for file in FILES:
        case.files[file] = case.files[file].rstrip(b"\r\n") + rng.choice((b"", b"\n\n\r\n", b"\r\n"))


@neutral("more columns")
def _(rng, case, other):
    def change(header, rows):
        for n in range(rng.choice((1, 5, 60))):
            at = rng.randrange(len(header) + 1)
            header.insert(at, f"more {n}")
            value = rng.choice(("", "1", "x y", "a,b", 'say "so"', "a\nb", "\ufeff", "nan", "é"))
            for row in rows:
                row.insert(at, value)

    for file in FILES:
        case.edit(file, change)


@neutral("columns in another order")
def _(rng, case, other):
    for file in FILES:
        rows = case.rows(file)
        order = rng.sample(range(len(rows[0])), len(rows[0]))
        case.write(file, [[row[i] for i in order] for row in rows])


@neutral("rows in another order")
def _(rng, case, other):
    for file in FILES:
        case.edit(file, lambda header, rows: rng.shuffle(rows))


@neutral("times of faces in seconds, or without days")
def _(rng, case, other):
    decimals = rng.choice((None, 0, 1, 6))

    def change(header, rows):
        at = header.index("timedelta")
        for row in rows:
            second = reference_seconds(row[at])
            row[at] = row[at].split()[-1] if decimals is None else f"{second:.{decimals}f}"

    case.edit(FEATURES_FILE, change)


@neutral("spaces around names and utterances")
def _(rng, case, other):
    def change(header, rows):
        for row in rows:
            for name in {"speaker", "user_id", "utterance"} & set(header):
                at = header.index(name)
                row[at] = rng.choice(("", " ", "\t ")) + row[at] + rng.choice(("", "  "))

    for file in FILES:
        case.edit(file, change)


@neutral("frames and answers of others")
def _(rng, case, other):
    for file in (FEATURES_FILE, SURVEY_FILE):
        header, *more = other.rows(file)
        if header == case.rows(file)[0]:
            case.edit(file, lambda _, rows, more=more: rows.extend(more))


@neutral("links to files and folders elsewhere")
def _(rng, case, other):
    def do(folder):
        elsewhere = folder.parent.parent / "elsewhere" / folder.name
        elsewhere.mkdir(parents=True)
        for entry in (FEATURES_FILE, rng.choice((SURVEY_FILE, "transcription"))):
            os.rename(folder / entry, elsewhere / entry)
            (folder / entry).symlink_to(elsewhere / entry)

    case.on_disk.append(do)


@neutral("files that nobody reads")
def _(rng, case, other):
    def do(folder):
        os.mkfifo(folder / "metadata.json")
        (folder / "processed").symlink_to(".")
        os.mkfifo(folder / "transcription" / "transcript_audiophile.csv")

    case.on_disk.append(do)


# Shapes that conversations come in, so that mutations meet more than one


WORDINGS = ("{}, you know", '"{}"', 'so "{}", I say', ", {}", "é {}", "{}\n{}", '{} 5" tall')


def in_some_shape(rng, case: Case, other: Case) -> None:
    if rng.random() < 0.4:  # utterances that need quotes

        def change(header, rows):
            for row in rng.sample(rows, rng.randrange(1, len(rows) + 1)):
                at = header.index("utterance")
                row[at] = rng.choice(WORDINGS).format(row[at], row[at])

        case.edit(TRANSCRIPT, change)
    for name in rng.sample(("byte order mark", "other line ends", "everything in quotes", "more columns"), 4):
        if rng.random() < 0.1:
            MUTATIONS[f"neutral: {name}"](rng, case, other)


# ---------------------------------------------------------------------------------------------------------------------
# The second reader: as slow and plain as can be

CELL = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n][^,\r\n]*)?)(,|\r\n|\r|\n|\Z)')
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
TIME = re.compile(r"(?:(\d{1,5}) days?,? )?(\d{1,2}):([0-5]\d):([0-5]\d(?:\.\d{1,9})?)", re.ASCII)
USED = {
    TRANSCRIPT: ["turn_id", "speaker", "start", "stop", "utterance", "n_words"],
    FEATURES_FILE: ["user_id", "timedelta", *PROBABILITIES],
    SURVEY_FILE: ["user_id", *REWARD_CLASSES],
}
OPTIONAL = {"n_words", *REWARD_CLASSES}


class Refused(Exception):
    """The second reader drops it too."""


def reference_table(path: Path, used: list[str], ids: set[str] = frozenset()) -> list[dict[str, str]]:
    """Rows of the used columns; a row with a cell of several lines, one of which has an id for a cell, is refused."""
    if not path.is_file() or path.stat().st_size > data_utils.MOST_BYTES:
        raise Refused("no file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("not UTF-8") from None
    if "\0" in text:
        raise Refused("NUL")
    text, rows, row, at = text.removeprefix("\ufeff"), [], [], 0
    while at < len(text) or row:
        found = CELL.match(text, at)
        if not found:
            raise Refused("quotes")
        quoted, plain, end = found.groups()
        blank = not row and quoted is None and not plain and end != ","
        row.append(quoted.replace('""', '"') if quoted is not None else plain or "")
        at = found.end()
        if end != ",":
            rows += [] if blank else [row]
            row = []
    if not rows:
        raise Refused("empty")
    header = rows.pop(0)
    if any(header.count(name) != 1 for name in used if name not in OPTIONAL or name in header):
        raise Refused("columns")
    if any(len(row) != len(header) for row in rows):
        raise Refused("cells")
    if "speaker" in used:
        ids = {row[header.index("speaker")].strip() for row in rows} - {""}
    for row in rows:
        for cell in row:
            lines = re.split("[\r\n]+", cell)
            if len(lines) > 1 and any(part.strip(' "') in ids for line in lines for part in line.split(",")):
                raise Refused("rows in a cell")
    return [{name: row[header.index(name)] for name in used if name in header} for row in rows]


def reference_number(cell: str) -> float:
    value = float(cell) if NUMBER.fullmatch(cell := cell.strip()) else math.nan
    return value if math.isfinite(value) else math.nan


def reference_seconds(cell: str) -> float:
    found = TIME.fullmatch(cell.strip())
    if not found:
        return reference_number(cell)
    days, hours, minutes, seconds = found.groups(default="0")
    return int(days) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def reference(folder: Path) -> Conversation:
    """What the reader must make of a folder.

    Raises:
        Refused: where it must drop it.
    """
    if not folder.name.isprintable():
        raise Refused("name")
    turns, skipped = [], Counter()
    for row in reference_table(folder / TRANSCRIPT, USED[TRANSCRIPT]):
        start, stop = reference_number(row["start"]), reference_number(row["stop"])
        said, speaker = row["utterance"].strip(), row["speaker"].strip()
        if not said:
            skipped["empty utterance"] += 1
        elif not speaker:
            skipped["no speaker"] += 1
        elif math.isnan(start) or math.isnan(stop):
            skipped["start or stop is not a number"] += 1
        elif stop < start or start < 0:
            skipped["starts before 0 or stops before it starts"] += 1
        elif len(said) > data_utils.MOST_CHARACTERS:
            skipped[f"utterance of more than {data_utils.MOST_CHARACTERS:,} characters"] += 1
        else:
            words = reference_number(row.get("n_words", ""))
            words = int(words) if 0 <= words <= MOST_WORDS else len(said.split())
            turns.append((row["turn_id"], speaker, start, stop, said, words))
    ids = [reference_number(turn[0]) for turn in turns]
    known = [i for i in ids if not math.isnan(i)]
    if len(known) == len(ids):
        turns = [turns[i] for i in sorted(range(len(turns)), key=lambda i: ids[i])]
    elif known != sorted(known):
        raise Refused("order")
    speakers = tuple(dict.fromkeys(turn[1] for turn in turns))
    if len(speakers) != 2:
        raise Refused("speakers")

    frames = {speaker: [] for speaker in speakers}
    for row in reference_table(folder / FEATURES_FILE, USED[FEATURES_FILE], set(speakers)):
        user, second = row["user_id"].strip(), reference_seconds(row["timedelta"])
        shown = [reference_number(row[name]) for name in PROBABILITIES]
        if user in frames and not math.isnan(second) and all(0 <= p <= 1 + 1e-6 for p in shown):
            frames[user].append((second, shown))
    if not any(frames.values()):
        raise Refused("faces")
    whole = [reference_turn(turn, frames[speakers[turn[1] == speakers[0]]]) for turn in turns]

    answers, questions = {}, frozenset()
    for row in reference_table(folder / SURVEY_FILE, USED[SURVEY_FILE], set(speakers)):
        user = row.pop("user_id").strip()
        if user and user in answers:
            raise Refused("twice")
        answers[user] = {}
        for question, cell in row.items():
            low, high = ANSWER_LIMITS[REWARD_CLASSES[question]]
            value = reference_number(cell)
            if low <= value <= high:
                answers[user][question] = value
    header = next(csv.reader(io.StringIO((folder / SURVEY_FILE).read_text("utf-8-sig"), newline="")), [])
    questions = frozenset(header) & frozenset(REWARD_CLASSES)
    answers = {user: answers[user] for user in speakers if user in answers}
    return Conversation(folder.name, speakers, tuple(whole), answers, questions, skipped)


def reference_turn(turn: tuple, frames: list) -> data_utils.Turn:
    """A turn with its listener's affect, by looking at every frame."""
    shown = [p for second, p in frames if turn[2] <= second <= turn[3]]
    if not shown or turn[5] < MIN_WORDS:
        return data_utils.Turn(*turn, data_utils.NEUTRAL, 0.0)
    classes = Counter(max(range(8), key=p.__getitem__) for p in shown)
    sums = [sum(round(p[face] * 1e12) for p in shown) for face in range(8)]
    affect = max(range(8), key=lambda face: (classes[face], sums[face]))
    return data_utils.Turn(*turn, affect, classes[data_utils.HAPPINESS] / len(shown))


# ---------------------------------------------------------------------------------------------------------------------
# Running


class TimedOut(BaseException):
    """Reading took longer than `LIMIT`."""


def _timed_out(*_):
    raise TimedOut


def lines_of(content: bytes) -> list[str]:
    return re.split("\r\n|\r|\n", content.decode("utf-8", "replace").removeprefix("\ufeff"))


def lost_line(before: Case, after: Case, base: Conversation, loaded: Conversation) -> str:
    """A line of the transcript that is as it was, but is no turn with its cells; empty if there is none."""
    header, *lines = lines_of(before.files[TRANSCRIPT])
    new_header, *new_lines = lines_of(after.files[TRANSCRIPT])
    if header != new_header:
        return ""
    turn_of = {}
    (names,), sound = csv.reader([header]), Counter(turn[:6] for turn in base.turns)
    for line in lines:
        cells = next(csv.reader([line]), [])
        if len(cells) == len(names):
            row = dict(zip(names, cells, strict=True))
            for turn in sound:
                if turn[0] == row["turn_id"] and turn[4] == row["utterance"].strip():
                    turn_of[line] = turn
    wanted = Counter(turn_of[line] for line in new_lines if line in turn_of)
    lost = wanted - Counter(turn[:6] for turn in loaded.turns)
    return f"a line that was left alone is no turn: {next(iter(lost))}" if lost else ""


def out_of_range(c: Conversation) -> str:
    for turn in c.turns:
        sound = (
            0 <= turn.start <= turn.stop < math.inf
            and turn.speaker in c.speakers
            and turn.utterance.strip() == turn.utterance != ""
            and 0 <= turn.n_words <= MOST_WORDS
            and 0 <= turn.affect < len(FACES)
            and 0 <= turn.happy_share <= 1
            and [type(value) for value in turn] == [str, str, float, float, str, int, int, float]
        )
        if not sound:
            return f"out of range: {turn}"
    if len(set(c.speakers)) != 2 or {turn.speaker for turn in c.turns} != set(c.speakers):
        return f"speakers: {c.speakers}"
    if not set(c.answers) <= set(c.speakers):
        return "answers of others"
    return ""


def write_case(case: Case, parent: Path) -> Path:
    folder = parent / case.name
    for file, content in case.files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    for do in case.on_disk:
        do(folder)
    return folder


def read(folder: Path) -> tuple[str, object]:
    """(`loaded`, the conversation), (`dropped`, reason), (`crash`, exception) or (`hang`, None), within `LIMIT`."""
    faulthandler.dump_traceback_later(10 * LIMIT, exit=True)  # where no signal gets through
    before = signal.signal(signal.SIGALRM, _timed_out)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        return "loaded", data_utils.read_conversation(folder)
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


def judge(name: str, before: Case, after: Case, base: Conversation, folder: Path) -> tuple[str, object, str]:
    """(outcome, what was read, why it is wrong)."""
    kind, found = read(folder)
    if kind in ("crash", "hang"):
        return kind, found, f"{type(found).__name__}: {found}"
    try:
        expected = reference(folder)
    except Refused as reason:
        expected, why = None, reason
    if kind == "dropped":
        if expected is not None:
            return "wrong", found, f"dropped although it is sound: {found}"
        if name.startswith("neutral"):
            return "wrong", found, f"dropped for a change that changes nothing: {found}"
        return "dropped", found, "" if found and found.isprintable() else "no reason in one line"
    if expected is None:
        return "wrong", found, f"loaded although it is not sound: {why}"
    if found != expected:
        parts = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(expected, f.name)]
        turns = [(a, b) for a, b in zip(found.turns, expected.turns, strict=False) if a != b][:1]
        return "wrong", found, f"{parts} differ, {len(found.turns)} and {len(expected.turns)} turns, {turns}"
    same = dataclasses.replace(found, id=base.id) == base
    if name.startswith("neutral") and not same:
        return "wrong", found, "changed by what changes nothing"
    lost = lost_line(before, after, base, found) or out_of_range(found)
    return ("wrong" if lost else "unchanged" if same else "changed"), found, lost


def through_the_cache(data: Path, cache: Path, found: dict[str, object]) -> str:
    """Reads a batch as a corpus, twice, through a cache: why that is not what was `found`, or empty."""
    usable = {name: c for name, c in found.items() if isinstance(c, Conversation)}
    for _ in range(2):
        try:
            corpus = data_utils.read_corpus(data, "overall_affect", cache=cache)
        except UserError as error:
            return "" if not any(c.questions for c in usable.values()) else f"no corpus: {error}"
        got = {**{c.id: c for c in corpus.conversations}, **corpus.dropped}
        if got != found:
            first = next(name for name in sorted({*got, *found}, key=ascii) if got.get(name) != found.get(name))
            return f"{first!a}: {str(found.get(first))[:200]} became {str(got.get(first))[:200]} in the corpus"
        printed = corpus.describe()
        printed.encode()  # can be printed
        if len(printed.splitlines()) > 20 + len(corpus.dropped):
            return "a line of the summary is broken"
    return ""


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
    return [case for case in cases if len(case.rows(TRANSCRIPT)) > 3]


def reason_class(reason: str) -> str:
    file = next((Path(file).name for file in FILES if Path(file).name in reason), "")
    return f"{file} {re.sub(r'^[^:]*: ', '', re.sub(r'line [0-9]+: ', '', reason)) if file else reason}".strip()[:90]


def fuzz(corpora: list[list[Case]], inputs: range, seed: int, progress: bool = False) -> Result:
    """Mutates conversations of the corpora in turn; input i is the same in every run with the same seed."""
    result = Result({name: Counter() for name in MUTATIONS}, Counter(), [])
    names = list(MUTATIONS)
    for first in range(inputs.start, inputs.stop, BATCH):
        with tempfile.TemporaryDirectory() as temporary:
            data, plain, batch = Path(temporary) / "data", Path(temporary) / "plain", {}
            for i in range(first, min(first + BATCH, inputs.stop)):
                rng = random.Random(f"{seed} {i}")
                case, other = (Case(dict(one.files), one.name) for one in rng.sample(corpora[i % len(corpora)], 2))
                case.name = f"{case.name}-{i}"
                name = names[i // len(corpora) % len(names)] if i < len(names) * len(corpora) else rng.choice(names)
                in_some_shape(rng, case, other)
                before = Case(dict(case.files), case.name)
                kind, base = read(write_case(before, plain))
                MUTATIONS[name](rng, case, other)
                folder = write_case(case, data)
                if kind == "loaded":
                    outcome, found, why = judge(name, before, case, base, folder)
                else:
                    outcome, found, why = "wrong" if kind == "dropped" else kind, base, f"not even mutated: {base}"
                result.outcomes[name][outcome] += 1
                if outcome == "dropped":
                    result.reasons[reason_class(found)] += 1
                if why:
                    result.failures.append(f"input {i}, {name}: {outcome}: {why[:600]}")
                if outcome == "hang":
                    shutil.rmtree(folder)
                else:
                    batch[case.name] = found
            if not any("crash" in counts or "hang" in counts for counts in result.outcomes.values()):
                why = through_the_cache(data, Path(temporary) / "cache", batch)
                if why:
                    result.outcomes.setdefault("the corpus and its cache", Counter())["wrong"] += 1
                    result.failures.append(f"inputs {first} to {first + BATCH}: {why}")
        if progress and first // BATCH % 20 == 19:
            print(f"{first + BATCH:,} inputs …", file=sys.stderr, flush=True)
    return result


COLUMNS = ("unchanged", "changed", "dropped", "crash", "hang", "wrong")


def table_of(outcomes: dict[str, Counter], each: bool) -> str:
    """A Markdown table, a row a kind of mutation (each: a mutation)."""
    rows = {}
    for name, counts in outcomes.items():
        rows.setdefault(name if each else name.split(":")[0], Counter()).update(counts)
    rows = {name: counts for name, counts in rows.items() if counts}
    rows["all"] = sum(rows.values(), Counter())
    lines = ["| mutation | inputs | loaded unchanged | loaded, changed | dropped | crash | hang | wrong value |"]
    lines.append("|---" * 8 + "|")
    for name, counts in rows.items():
        cells = [name, counts.total(), *(counts[column] for column in COLUMNS)]
        lines.append("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in cells) + " |")
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
    import sample_candor

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
