"""Asks a model about all conversations, keeps every reply, and writes the shares."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apps.llm_shares.answers import Shares, merge_windows, read_reply, shares_of_numbers, summary
from apps.llm_shares.backends import CHARACTERS_PER_TOKEN, Backend, Reply
from apps.llm_shares.prompt import Window, make_windows, reminder
from apps.openai_server import ReplyFile, RequestFailed, ask_all
from data_utils import Trajectory, fingerprint
from geli.data.shares import COLUMNS
from geli.run.errors import UserError
from geli.run.files import atomic_path, private_folder, write_json

LINE_TOKENS = 6  # of a line `12: 7` in a reply


@dataclass(frozen=True)
class ShareOptions:
    """What is asked.

    Attributes:
        reward_class: the question of the survey that is the score.
        window, overlap: agent turns in a request, and those that two requests share.
        li_text: whether the model reads how the listener looks. tries: requests about a window at most.
    """

    reward_class: str = "overall_affect"
    window: int = 40
    overlap: int = 8
    li_text: bool = False
    tries: int = 2


class WindowAnswer(NamedTuple):
    """What was found out about a window.

    Attributes:
        numbers: (n,) out of `HIGHEST`; NaN where no reply had one.
        problems: of the first reply (see `Reading`). replies: how many there were.
        tokens_in, tokens_out, seconds: that they took.
    """

    numbers: np.ndarray
    problems: tuple[str, ...]
    replies: int
    tokens_in: int
    tokens_out: int
    seconds: float


class ShareRow(NamedTuple):
    """The share of a turn.

    Attributes:
        conversation_id, flip, turn_id: which turn, of which trajectory.
        share: of the score, in points. Those of a trajectory sum to its score.
        status: how it was found (`apps.llm_shares.answers.STATUSES`).
        tokens, seconds: that the trajectory's requests took, divided by its turns.
        data: fingerprint of the trajectory that the model read, by which a changed one is noticed.
    """

    conversation_id: str
    flip: int
    turn_id: str
    share: float
    status: str
    tokens: float
    seconds: float
    data: str


def request_key(identity: Sequence, text: str, n: int) -> str:
    """A hash of a request and of what its reply depends on."""
    return hashlib.sha256(json.dumps([*identity, text, n]).encode()).hexdigest()


def answer_window(window: Window, tries: int, reply_to: Callable[[str, int], Reply | None]) -> WindowAnswer | None:
    """Asks about a window until every turn has a number, at most `tries` times, each time naming the turns without one.
    Later replies fill only those.

    Args:
        reply_to: (text, number of turns) -> the model's reply; None if it is not known, which ends this with None.
    """
    n = len(window.turns)
    numbers, problems, replies, text = np.full(n, np.nan), (), [], window.text
    while len(replies) < tries:
        reply = reply_to(text, n)
        if reply is None:
            return None
        reading = read_reply(reply.text, n)
        problems = problems if replies else reading.problems
        replies.append(reply)
        numbers = np.where(np.isnan(numbers), reading.numbers, numbers)
        again = f"{window.text}\n\n{reminder(np.flatnonzero(np.isnan(numbers)) + 1)}"
        if not np.isnan(numbers).any() or again == text:  # the same words would give the same reply
            break
        text = again
    sums = (sum(getattr(reply, name) for reply in replies) for name in ("tokens_in", "tokens_out", "seconds"))
    return WindowAnswer(numbers, problems, len(replies), *sums)


class Asker:
    """Asks a model, and keeps its replies in a file, so that nothing is asked twice.

    Args:
        backend: the model. tries: requests about a window at most. path: of the file of replies.
    """

    def __init__(self, backend: Backend, tries: int, path: Path):
        self.backend, self.tries, self.file = backend, tries, ReplyFile(path)

    def known(self, window: Window) -> WindowAnswer | None:
        """The answer that the replies on disk give; None if something must be asked."""
        return answer_window(window, self.tries, self._recall)

    def ask(self, window: Window) -> None:
        """Asks what is not known about a window.

        Raises:
            RequestFailed: if there is no reply.
        """
        answer_window(window, self.tries, lambda text, n: self._recall(text, n) or self._ask(text, n))

    def unknown(self, windows: Sequence[Window]) -> list[Window]:
        """The windows about which something must be asked, one of each text."""
        return [window for window in {w.text: w for w in windows}.values() if self.known(window) is None]

    def seconds_a_request(self) -> float | None:
        """The mean of the replies on disk from this model; None if there is none."""
        seconds = [r["seconds"] for r in self.file.records.values() if r["identity"] == self.backend.identity]
        return float(np.mean(seconds)) if seconds else None

    def _recall(self, text: str, n: int) -> Reply | None:
        record = self.file.records.get(request_key(self.backend.identity, text, n))
        return record and Reply(*(record[name] for name in Reply._fields))

    def _ask(self, text: str, n: int) -> Reply:
        reply = self.backend.ask(text, n)
        identity = self.backend.identity
        self.file.append({"key": request_key(identity, text, n), "identity": identity, **reply._asdict()})
        return reply


# ---------------------------------------------------------------------------------------------------------------------
# Before it starts


def estimate(
    windows: Sequence[Window],
    tries: int,
    max_tokens: int | None,
    price: Sequence[float] | None = None,
    seconds: float | None = None,
) -> str:
    """How many requests, tokens, dollars and minutes it takes to ask about some windows: with one reply for each, of a
    line a turn, and at most.

    Args:
        tries: requests about a window at most. max_tokens: of a reply; None if each is one of a line a turn.
        price: dollars for a million tokens that the model reads, and for a million that it writes.
        seconds: of a request, divided by how many there are at a time; None if not known.
    """
    n, read = len(windows), sum(len(window.text) for window in windows) // CHARACTERS_PER_TOKEN
    lines = LINE_TOKENS * sum(len(window.turns) for window in windows)
    most = (tries * n, tries * read, tries * n * max_tokens) if max_tokens else (n, read, lines)
    described = []
    for requests, tokens_in, tokens_out in dict.fromkeys([(n, read, lines), most]):
        parts = [f"{requests:,} requests", f"{tokens_in:,} tokens in", f"{tokens_out:,} out"]
        if price:
            parts.append(f"${(price[0] * tokens_in + price[1] * tokens_out) / 1e6:,.2f}")
        if seconds is not None:
            parts.append(duration(seconds * requests))
        described.append(", ".join(parts))
    return f"about {'; at most '.join(described)}"


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---------------------------------------------------------------------------------------------------------------------
# The run


def share_out(
    trajectories: Sequence[Trajectory],
    backend: Backend,
    out: Path,
    options: ShareOptions,
    *,
    price: Sequence[float] | None = None,
    only_estimate: bool = False,
    arguments: dict | None = None,
) -> list[dict] | None:
    """Says what it takes, asks what is not in `out` yet, and writes `shares.csv` and `shares.json` there.

    Args:
        price: as in `estimate`. only_estimate: ask nothing. arguments: what is recorded of the options.

    Returns:
        The table of results; None with `only_estimate`.

    Raises:
        UserError: if the model cannot be asked, or no trajectory has shares.
    """
    private_folder(out)
    asker = Asker(backend, options.tries, out / "replies.jsonl")
    windows = make_windows(
        trajectories, options.reward_class, options.window, options.overlap, options.li_text, backend.form
    )
    new = asker.unknown(windows)
    if new:
        longest = max(new, key=lambda window: len(window.text))
        backend.check(longest.text, len(longest.turns))
    _announce(asker, windows, new, price)
    if only_estimate:
        return None
    failures = _ask_new(asker, new, price)
    answers = [asker.known(window) for window in windows]
    rows, shares, dropped = _rows(windows, answers)
    results = _results(windows, answers, shares, dropped, failures)
    write_json(out / "shares.json", {"arguments": arguments or {}, "results": results, "dropped_trajectories": dropped})
    if not rows:
        raise UserError(f"{backend.where}: no trajectory has shares: {dict(Counter(dropped.values()))}")
    write_shares(out / "shares.csv", rows)
    return results


def _announce(asker: Asker, windows: Sequence[Window], new: Sequence[Window], price) -> None:
    """Says how much goes where, and what it takes."""
    backend = asker.backend
    conversations, size = len({w.trajectory.conversation.id for w in new}), sum(len(w.text) for w in new)
    verb, where = ("Sends", f"to {backend.where}") if backend.sends_text else ("Reads", f"with {backend.where}, here")
    print(f"{verb} {conversations:,} conversations in {len(new):,} requests ({size:,} characters) {where}")
    if len(new) < len(windows):
        print(f"{len(windows) - len(new):,} of {len(windows):,} are answered in {asker.file.path}, or twice there")
    if new:
        seconds = asker.seconds_a_request()
        seconds = None if seconds is None else seconds / backend.concurrency
        print(f"Estimate: {estimate(new, asker.tries, backend.max_tokens, price, seconds)}", flush=True)


def _ask_new(asker: Asker, new: list[Window], price) -> Counter:
    """Asks about windows; where the time was not known, says it after the first. Returns the failures by kind."""
    backend = asker.backend
    if new and asker.seconds_a_request() is None:
        try:
            asker.ask(new[0])
        except RequestFailed:
            pass  # asked again below
        else:
            new = new[1:]
            seconds = asker.seconds_a_request() / backend.concurrency
            print(f"After one: {estimate(new, asker.tries, backend.max_tokens, price, seconds)}", flush=True)
    return ask_all(
        new, asker.ask, concurrency=backend.concurrency, where=backend.where, kept=asker.file.path, desc="sharing out"
    )


def _rows(
    windows: Sequence[Window], answers: Sequence[WindowAnswer | None]
) -> tuple[list[ShareRow], list[Shares], dict[str, str]]:
    """The rows of the file and the shares of each trajectory, and key -> reason of those without any."""
    groups: dict[str, list[tuple[Window, WindowAnswer | None]]] = {}
    for window, answer in zip(windows, answers, strict=True):
        groups.setdefault(window.trajectory.key, []).append((window, answer))
    rows, every, dropped = [], [], {}
    for key, group in groups.items():
        trajectory = group[0][0].trajectory
        if any(answer is None for _, answer in group):
            dropped[key] = "requests about it failed"
            continue
        n = len(trajectory.agent_turns)
        found = shares_of_numbers(merge_windows(n, [(w.turns, a.numbers) for w, a in group]), trajectory.score)
        if found is None:
            dropped[key] = "fewer than half of its turns have a number"
            continue
        every.append(found)
        tokens = sum(answer.tokens_in + answer.tokens_out for _, answer in group) / n
        seconds, data = sum(answer.seconds for _, answer in group) / n, fingerprint([trajectory])
        for i, share, status in zip(trajectory.agent_turns, found.shares, found.statuses, strict=True):
            conversation = trajectory.conversation
            turn = (conversation.id, int(trajectory.flip), conversation.turns[i].turn_id)
            rows.append(ShareRow(*turn, float(share), status, tokens, seconds, data))
    return rows, every, dropped


def write_shares(path: Path, rows: Iterable[ShareRow]) -> None:
    """Writes the file, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {"share": f"{row.share:.6g}", "tokens": f"{row.tokens:.1f}", "seconds": f"{row.seconds:.3f}"}
            writer.writerow({**row._asdict(), **numbers})


def _results(
    windows: Sequence[Window],
    answers: Sequence[WindowAnswer | None],
    shares: Sequence[Shares],
    dropped: dict[str, str],
    failures: Counter,
) -> list[dict]:
    """The table of results: what was counted, how often, and of how many."""
    given = [answer for answer in answers if answer]
    problems = Counter(problem for answer in given for problem in answer.problems)
    trajectories = len({window.trajectory.key for window in windows})
    turns, found = sum(len(of.statuses) for of in shares), summary(shares)
    counts = [
        ("replies with a number from 0 to 10 for each turn", sum(not a.problems for a in given), len(windows)),
        *((f"replies with {name}", count, len(windows)) for name, count in sorted(problems.items())),
        *((f"requests that failed: {name}", count, len(windows)) for name, count in sorted(failures.items())),
        ("requests repeated for missing turns", sum(answer.replies - 1 for answer in given), None),
        *((f"turns {name.removeprefix('turns_')}", found[name], turns) for name in found if name.startswith("turns_")),
        ("trajectories moved to their score", found["trajectories_moved"], trajectories),
        ("mean move, points of 10", found["mean_move"], None),
        ("trajectories without shares", len(dropped), trajectories),
        ("tokens read", sum(answer.tokens_in for answer in given), None),
        ("tokens written", sum(answer.tokens_out for answer in given), None),
        ("seconds of requests", sum(answer.seconds for answer in given), None),
    ]
    return [{"what": what, "number": number, "of": of} for what, number, of in counts]
