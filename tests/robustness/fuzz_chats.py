"""Hostile rated chats: mutates a line of a file, and compares what the reader makes of the file with a second reader.

    python tests/robustness/fuzz_chats.py --inputs 2000 --seed 0

The second reader, `plain`, is as simple as can be and shares no code with the first one but the counting of words and
what is markup or thought. Any difference, a crash, and more than `LIMIT` seconds a file make the exit code 1.
"""

import argparse
import copy
import itertools
import json
import math
import random
import signal
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from geli.data.chats import REACTIONS, ChatFiles
from geli.data.messages import INSTRUCTION, MARKUP, spoken
from geli.data.questions import QUESTIONS
from geli.data.words import count_words
from geli.run.errors import UserError
from tools.sample_chats import chats

LIMIT = 10  # seconds a file
LOW, HIGH = 1, 5


class Refused(Exception):
    """The second reader drops it too."""


def need(holds: object) -> None:
    if not holds:
        raise Refused


def number(value) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and -1e300 < value < 1e300


def reaction_of(value):
    if isinstance(value, str):
        bare = "".join(c for c in value if c not in "\ufe0e\ufe0f" and not "\U0001f3fb" <= c <= "\U0001f3ff")
        need(bare in [key for key in REACTIONS if isinstance(key, str)])
        return REACTIONS[bare]
    need(number(value) and value in (1, -1))
    return int(value)


def seconds_of(value) -> float:
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
            time = time if time.tzinfo else time.replace(tzinfo=UTC)
            return (time - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
        except (ValueError, OverflowError):
            raise Refused from None
    need(number(value) and abs(value) < 1e12)
    return float(value)


def plain(line: bytes, place: str) -> tuple:
    """(id, speakers, turns, points) that a line says. Raises `Refused`."""
    try:
        chat = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused from None
    need(not any(math.isnan(v) for v in leaves(chat) if isinstance(v, float)) and b"Infinity" not in bare(line))
    chat = {"messages": chat} if not isinstance(chat, dict) else chat
    need(isinstance(chat.get("messages"), list))
    name, turns, times = chat.get("id"), [], []
    good = (isinstance(name, str) and name != "") or (isinstance(name, int) and not isinstance(name, bool))
    name = str(name) if good else place
    for i, message in enumerate(chat["messages"]):
        need(isinstance(message, dict) and isinstance(message.get("role"), str))
        need(isinstance(message.get("content"), str))
        role, text = message["role"], message["content"]
        if role in ("system", "developer"):
            continue
        need(role.strip())
        text = text.strip().removeprefix(INSTRUCTION).strip() if role == "user" else spoken(text).strip()
        need(not MARKUP.search(text))
        if text and len(text) <= 100_000:
            shown, rating = message.get("reaction"), message.get("turn_rating")
            need(rating is None or number(rating))
            times.append(None if message.get("time") is None else seconds_of(message["time"]))
            turns.append((str(i), role.strip(), text, None if shown is None else reaction_of(shown), rating))
    starts = times
    if None in times:
        starts = [0.0]
        for turn in turns:
            starts.append(starts[-1] + count_words(turn[2]) / 2.5 + 0.5)
    need(all(a - starts[0] <= b - starts[0] for a, b in itertools.pairwise(starts[: len(turns)])))
    speakers = list(dict.fromkeys(turn[1] for turn in turns))
    for text in (name, *speakers, *(turn[2] for turn in turns)):
        need(not any("\ud800" <= c <= "\udfff" for c in text))
    need(all(text.isprintable() for text in (name, *speakers)) and len(speakers) == 2)
    need(points := points_of(chat, speakers))
    return name, speakers, [(*turn, start - starts[0]) for turn, start in zip(turns, starts, strict=False)], points


def leaves(tree):
    if isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
    else:
        yield tree


def bare(line: bytes) -> bytes:
    """The line without its strings."""
    found, inside, escaped = bytearray(), False, False
    for byte in line:
        if not inside:
            found.append(byte)
        if escaped:
            escaped = False
        elif inside and byte == ord("\\"):
            escaped = True
        elif byte == ord('"'):
            inside = not inside
    return bytes(found)


def points_of(chat: dict, speakers: list[str]) -> dict[tuple[str, str], float]:
    given = [chat.get(key) for key in ("rating", "ratings") if chat.get(key) is not None]
    need(len(given) == 1)
    named = isinstance(given[0], dict) and any(name in given[0] for name in speakers)
    found = {}
    for name, of_name in (given[0] if named else {"user": given[0]}).items():
        if name not in speakers or of_name is None:
            continue
        of_name = of_name if isinstance(of_name, dict) else {"overall_affect": of_name}
        need(not of_name or any(question in QUESTIONS for question in of_name))
        for question, values in of_name.items():
            values = values if isinstance(values, list) else [] if values is None else [values]
            if question in QUESTIONS and values:
                need(all(number(value) and LOW <= value <= HIGH for value in values))
                found[name, question] = 100 * (sum(values) / len(values) - LOW) / (HIGH - LOW)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Mutations of a line: function(rng, line, another line) -> bytes

VALUES = [
    None, True, False, 0, 1, -1, 3, 5, 6, 4.5, -0.0, 10**400, 1e-320, 1e308, -1e308, "", " ", "4", "x", "1e3",
    "user", "assistant", "system", "ana", "\ud800", "\ufeff", "a\nb", "\u200b", "x" * 100_001, "[INST] x",
    "<think>a</think>b", "</think>", [], [4], [4, "5"], [[4]], {}, {"user": 4}, {"assistant": 2}, {"overall_affect": 4},
    {"user": {"i_like_you": [2, 3]}}, {"ana": 4, "user": None}, {"helpful": 2}, "👍🏽", "☹️", "🤷",
    "2026-01-31T12:00:00Z", "20260131", "0001-01-01", "9999-12-31T23:59:59-01:00",
]  # fmt: skip
KEYS = "id messages rating ratings role content time reaction turn_rating format rating_range".split()


def places(tree, found):
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            places(value, found)
    return found


def of_tree(change):
    """A change of (rng, containers and keys) as one of a line."""

    def mutate(rng, line, other):
        tree = copy.deepcopy(json.loads(line))
        for _ in range(rng.choice((1, 1, 2, 5))):
            if found := places(tree, []):
                change(rng, found)
        return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")

    return mutate


def replace(rng, found):
    holder, key = rng.choice(found)
    holder[key] = rng.choice(VALUES)


def replace_known(rng, found):
    holder, _ = rng.choice([place for place in found if isinstance(place[0], dict)] or [({}, "")])
    holder[rng.choice(KEYS)] = rng.choice(VALUES)


def remove(rng, found):
    holder, key = rng.choice(found)
    if key in (holder if isinstance(holder, dict) else range(len(holder))):
        del holder[key]


def double(rng, found):
    holder, key = rng.choice(found)
    if isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))


def swap(rng, found):
    (a, i), (b, j) = rng.choice(found), rng.choice(found)
    a[i], b[j] = copy.deepcopy(b[j]), copy.deepcopy(a[i])


def cut(rng, line):
    a, b = sorted(rng.randrange(len(line) + 1) for _ in range(2))
    return line[:a], line[a:b], line[b:]


def flip(rng, line, other):
    place = rng.randrange(len(line))
    return line[:place] + bytes([line[place] ^ 1 << rng.randrange(8)]) + line[place + 1 :]


def insert(rng, line, other):
    before, between, after = cut(rng, line)
    return before + between + bytes(rng.choices(NASTY, k=rng.choice((1, 1, 3)))) + after


def constant(rng, line, other):
    return line[: line.rindex(b'"rating": ')] + b'"rating": ' + rng.choice(CONSTANTS) + b"}"


NASTY = b'"{}[],:\\\n\r\t\0\xff\xef\xbb\xbf-+.eE019ntf'
CONSTANTS = [*b"NaN Infinity -Infinity 1e400 1_0 0x1 01 'a' tru".split(), b"9" * 5000, b"[" * 9000]
ENCODINGS = "utf-16-le utf-32 utf-7 cp037".split()
MUTATIONS = {
    "bytes: flip": flip,
    "bytes: insert": insert,
    "bytes: delete": lambda rng, x, y: b"".join(cut(rng, x)[::2]),
    "bytes: double": lambda rng, x, y: (lambda a, b, c: a + b + b + c)(*cut(rng, x)),
    "bytes: splice": lambda rng, x, y: cut(rng, y)[1].join(cut(rng, x)[::2]),
    "bytes: truncate": lambda rng, x, y: cut(rng, x)[0],
    "bytes: another encoding": lambda rng, x, y: x.decode().encode(rng.choice(ENCODINGS)),
    "bytes: constants": constant,
    "values: any": of_tree(replace),
    "values: of known keys": of_tree(replace_known),
    "values: removed": of_tree(remove),
    "values: doubled": of_tree(double),
    "values: swapped": of_tree(swap),
    "neutral: spaces": lambda rng, x, y: b" " * rng.randrange(3) + x.replace(b'": ', b'" :  ') + b"\r",
    "neutral: byte order mark": lambda rng, x, y: b"\xef\xbb\xbf" + x,
    "neutral: escapes": lambda rng, x, y: json.dumps(json.loads(x), sort_keys=True).encode(),
}


class TimedOut(BaseException):
    """Reading took longer than `LIMIT`."""


def ours(path: Path) -> list:
    """What the reader makes of a file: (place, as `plain`, or None where it is dropped); raises what it raises."""

    def stop(*_):
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        return [(place, None if isinstance(chat, str) else shown(chat)) for place, chat in ChatFiles([path]).chats()]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shown(c) -> tuple:
    turns = [(t.turn_id, t.speaker, t.utterance, t.reaction, t.rating, t.start) for t in c.turns]
    kinds = [str, str, float, float, str, int, int, float]  # a cache gives these back, too
    assert all(t.stop >= t.start >= 0 and math.isfinite(t.stop) for t in c.turns)
    assert all([type(value) for value in t[:8]] == kinds for t in c.turns)
    points = {(user, q): QUESTIONS[q].points * v for user, given in c.answers.items() for q, v in given.items()}
    return c.id, list(c.speakers), turns, points


def theirs(content: bytes, name: str) -> list:
    """The same by the second reader."""
    found, ids = [], set()
    for n, line in enumerate(content.split(b"\n"), start=1):
        line, place = line.removeprefix(b"\xef\xbb\xbf").strip(), f"{name}:{n}"
        if not line or line == HEADER:
            continue
        try:
            chat = plain(line, place)
            need(chat[0] not in ids)
            ids.add(chat[0])
        except Refused:
            chat = None
        found.append((place, chat))
    return found


def same(a, b) -> bool:
    """Whether two results are, but for rounding."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6)
    return a == b


HEADER, *LINES = (json.dumps(line).encode() for line in chats(40, turns=8, thumbs=0.3, seed=1))


def one_input(i: int, seed: int, folder: Path) -> tuple[str, str, str]:
    """(mutation, what came of it, what is wrong) of an input."""
    rng = random.Random(f"{seed} {i}")
    name = list(MUTATIONS)[i % len(MUTATIONS)]
    before, line, other, after = rng.sample(LINES, 4)
    mutated = MUTATIONS[name](rng, line, other)
    content, path = b"\n".join((HEADER, before, mutated, after)), folder / "chats.jsonl"
    path.write_bytes(content)
    expected = theirs(content, path.name)
    try:
        found = ours(path)
    except UserError as error:  # a line that says that it is a header
        return name, "refused", "" if "rating_range" in str(error) and b"rated-chats" in mutated else str(error)
    except TimedOut:
        return name, "hang", "a hang"
    except Exception as error:
        return name, "crash", f"{type(error).__name__}: {error}"
    wrong = [(a, b) for a, b in itertools.zip_longest(found, expected) if not same(a, b)]
    unchanged = same(found[1:2], theirs(b"\n".join((HEADER, before, line)), path.name)[1:2])
    if name.startswith("neutral") and not unchanged:
        wrong.append(("changed", name))
    outcome = "unchanged" if unchanged else "changed" if len(found) > 1 and found[1][1] else "dropped"
    return name, outcome, str(wrong[0])[:600] if wrong else ""


def fuzz(inputs, seed: int) -> tuple[Counter, list[str]]:
    """(mutation kind, outcome) -> how often; and what was wrong."""
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for i in inputs:
            name, outcome, wrong = one_input(i, seed, Path(folder))
            counts[name.split(":")[0], "wrong" if wrong else outcome] += 1
            failures += [f"input {i} ({name}): {wrong}"] if wrong else []
    return counts, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts, failures = fuzz(range(args.inputs), args.seed)
    for (kind, outcome), n in sorted(counts.items()):
        print(f"{kind:>10} {outcome:>10} {n:6,}")
    print("\n".join(failures[:20]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
