"""Mutated transcripts are read, every line of theirs in the result or counted, or refused with a reason.

GELI_TRANSCRIPTS sets how many are made.
"""

import itertools
import os
import random
import re

import pytest

from apps.calls.transcripts import NO_NAME, NO_TIMES, read_transcript
from geli.data.candor import Dropped

NAMES = {"Ana Silva": "ana", "Ben": "ben"}
NUMBER = int(os.environ.get("GELI_TRANSCRIPTS", "200"))
WORDS = ["".join(letters) for letters in itertools.product("bdfé", "aeiou", "klmn", "aeiou")]  # each is said once
TEAMS = "c8b1a6f0-0000-4d7e-9a1b-0000000000{:02d}/12-0"

# form -> (first line, identifier of a cue, arrow, how a name and the text are written, lines between cues)
FORMS = {
    "zoom": ("WEBVTT\n", "{}", "{} --> {}", "{}: {}", 1),
    "teams": ("WEBVTT\n", TEAMS, "{} --> {}", "<v {}>{}</v>", 1),
    "meet": ("WEBVTT\n", None, "{} --> {}", "({})\n{}", 1),
    "sbv": (None, None, "{},{}", "{}: {}", 1),
    "srt": (None, "{}", "{} --> {}", "<b>{}:</b> {}", 1),
    "tight srt": (None, "{}", "{} --> {}", "{}: {}", 0),
    "tight vtt": ("WEBVTT\n", None, "{} --> {}", "{}: {}", 0),
}


def transcript(rng, form):
    """The lines of a sound transcript of 6 to 10 cues."""
    header, identifier, arrow, said, empty = FORMS[form]
    lines, words = [header] if header else [], iter(rng.sample(WORDS, 80))
    for i in range(rng.randint(6, 10)):
        text = "\n".join(" ".join(itertools.islice(words, 3)) for _ in range(rng.randint(1, 2)))
        name = rng.choice(list(NAMES))
        start, stop = (f"00:00:{3 * i + more:02d}.500" for more in (0, 2))
        lines += [identifier.format(i + 1)] if identifier else []
        lines += [arrow.format(start, stop), said.format(name, text), *[""] * empty]
    return "\n".join(lines).split("\n")


class Cut(str):
    """A line that was cut short: what is left of times or a number can look like speech."""


def drop(rng, lines, i):
    del lines[i]


def double(rng, lines, i):
    lines.insert(i, lines[i])


def swap(rng, lines, i):
    lines[i : i + 2] = lines[i : i + 2][::-1]


def cut(rng, lines, i):
    lines[i] = Cut(lines[i][: rng.randrange(len(lines[i]) + 1)])


def end(rng, lines, i):
    cut(rng, lines, i)
    del lines[i + 1 :]


def empty(rng, lines, i):
    lines.insert(i, "")


MUTATIONS = (drop, double, swap, cut, end, empty)
ENCODINGS = ["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"]
LINE_ENDS = ["\n"] * 4 + ["\r\n", "\r\r\n", "\r", "\n\n"]


def mutated(rng, form):
    """(lines, content, number of mutations) of a transcript with one to three mutations."""
    lines, number = transcript(rng, form), rng.randint(1, 3)
    for _ in range(number):
        rng.choice(MUTATIONS)(rng, lines, rng.randrange(len(lines)))
        lines = lines or [""]
    text = rng.choice(["", "", "", "\ufeff"]) + rng.choice(LINE_ENDS).join(lines)
    return lines, text.encode(rng.choice(ENCODINGS), errors="replace"), number


@pytest.mark.parametrize("form", FORMS)
def test_mutated_transcripts_lose_no_line_without_counting_it(form, tmp_path):
    rng, path, read = random.Random(form), tmp_path / "t.vtt", 0
    for _ in range(-(-NUMBER // len(FORMS))):
        lines, content, number = mutated(rng, form)
        path.write_bytes(content)
        try:
            utterances, notes = read_transcript(path, NAMES)
        except Dropped as reason:
            assert str(reason).startswith("t.vtt: ") and "\n" not in str(reason)
            continue
        read += 1
        left = " ".join(line for line in lines if isinstance(line, Cut))
        said = " ".join(utterance.text for utterance in utterances).split()
        missing = [line for line in lines if {*re.findall(r"\S+", spoken(line))} - {*said}]
        assert len(missing) <= notes[NO_TIMES] + 3 * notes[NO_NAME], (missing, notes, lines)  # lines of a cue
        alien = re.compile(r"[\d<>]|--|WEBVTT" if number == 1 else "[<>]|--|WEBVTT")  # a number may be said
        assert not [word for word in said if alien.search(word) and word not in left], (said, lines)
        assert all(0 <= utterance.start <= utterance.stop < 60 for utterance in utterances)
    assert read


def spoken(line):
    """The words of a line that are said: neither name nor tag, and no piece of an identifier or of times."""
    if re.search(r"\d|^WEBV|^WEB?$|^W$", line):
        return ""
    return re.sub(r"<[^<>]*>|^\([^()]*\)$|^(Ana Silva|Ben):", "", line.replace("<b>", ""))
