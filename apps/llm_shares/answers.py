"""From a model's replies to shares of the score: reading numbers, merging windows, and repairing what is wrong."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apps.llm_shares.prompt import HIGHEST

STATUSES = ("answered", "clipped", "filled")  # of turns: as the model said; cut to the range; the mean of the others
FEWEST_ANSWERED = 0.5  # share of a trajectory's turns; with fewer numbers it gets no shares
SUM_TOLERANCE = 0.05  # points out of `HIGHEST`; numbers whose mean is closer to the score are said to sum to it
# such as `3: 7`, `Turn 3, B: 7.5`, `**3.** 7/10 (friendly)`, not `3: A said 7`
LINE = re.compile(
    r"^[^\w\n]*(?:turn[^\w\n]*)?(\d{1,6})(?:[^\w\n]*B\b)?"  # the turn
    r"(?:[ \t:=)|*]|\.(?=[ *]))+"
    r"([+-]?\d{1,6}(?:\.\d+)?)(?![\w%]|\.\d)",  # its number
    re.IGNORECASE | re.MULTILINE,
)


class Reading(NamedTuple):
    """What a reply says.

    Attributes:
        numbers: (n,) of the turns that were asked about; NaN where there is none.
        problems: what is wrong with it, of `no numbers`, `missing turns`, `extra turns` and `out of range`.
    """

    numbers: np.ndarray
    problems: tuple[str, ...]


def read_reply(reply: str, n: int) -> Reading:
    """The numbers for turns 1 to n in a reply: from lines such as `3: 7`, or a JSON object, whichever has more of them.

    Numbers of other turns are ignored, and what a model thinks (`<think>`) is not read. If a turn has several numbers,
    the last counts.
    """
    text = reply.rpartition("</think>")[2]
    candidates = [LINE.findall(text), *_json_items(text)]
    found = [dict(pair for item in candidate if (pair := _turn_and_number(*item))) for candidate in candidates]
    best = max(found, key=lambda candidate: sum(1 <= turn <= n for turn in candidate))
    numbers = np.array([best.get(turn, np.nan) for turn in range(1, n + 1)], dtype=np.float64)
    missing = np.isnan(numbers)
    problems = {
        "no numbers": missing.all(),
        "missing turns": missing.any() and not missing.all(),
        "extra turns": any(not 1 <= turn <= n for turn in best),
        "out of range": bool(((numbers < 0) | (numbers > HIGHEST)).any()),
    }
    return Reading(numbers, tuple(name for name, is_so in problems.items() if is_so))


def _json_items(text: str) -> list[list[tuple]]:
    """(key, value) of each JSON object in a text."""
    decoder, found = json.JSONDecoder(), []
    for start in re.finditer(r"\{", text):
        try:
            found.append(list(decoder.raw_decode(text, start.start())[0].items()))
        except (ValueError, RecursionError):
            continue
    return found


def _turn_and_number(key: str, value) -> tuple[int, float] | None:
    """A turn and its number; None if these are none."""
    turn = re.fullmatch(r"(?:turn\W*)?(\d{1,6})", key.strip(), re.IGNORECASE)
    number = re.fullmatch(r"[+-]?\d{1,6}(?:\.\d+)?", str(value).strip())
    return (int(turn[1]), float(number[0])) if turn and number else None


# ---------------------------------------------------------------------------------------------------------------------
# Numbers -> shares


class Shares(NamedTuple):
    """The shares of a trajectory.

    Attributes:
        shares: (T,) in points, which sum to its score. statuses: (T,) of `STATUSES`.
        shift: what was added to all numbers so that their mean is the score, in points out of `HIGHEST`.
    """

    shares: np.ndarray
    statuses: list[str]
    shift: float


def merge_windows(n_turns: int, parts: Sequence[tuple[range, np.ndarray]]) -> np.ndarray:
    """(n_turns,) numbers of a trajectory from those of its windows: a turn in several windows gets the mean of its
    numbers; NaN if it has none."""
    sums, counts = np.zeros(n_turns), np.zeros(n_turns)
    for turns, numbers in parts:
        known = ~np.isnan(numbers)
        sums[turns.start : turns.stop] += np.where(known, numbers, 0.0)
        counts[turns.start : turns.stop] += known
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def shares_of_numbers(numbers: np.ndarray, score: float) -> Shares | None:
    """The shares of a trajectory's turns; None if fewer than `FEWEST_ANSWERED` of them have numbers.

    1. Numbers are cut to 0 ... `HIGHEST`. 2. Turns without a number get the mean of the others. 3. All are moved by the
    same amount, so that their mean is the score. Of all numbers with that mean these are the closest, in squared
    distance; and unlike a factor it keeps the differences between turns, and is defined where the numbers are 0.
    4. A turn's share is its number of points, divided by the number of turns.

    Args:
        numbers: (T,) out of `HIGHEST`, NaN where there is none. score: R in points.
    """
    known = ~np.isnan(numbers)
    if known.mean() < FEWEST_ANSWERED:
        return None
    clipped = np.clip(numbers, 0, HIGHEST)
    filled = np.where(known, clipped, clipped[known].mean())
    shift = score / HIGHEST - filled.mean()
    of_range = np.where(clipped == numbers, "answered", "clipped")
    statuses = np.where(known, of_range, "filled").tolist()
    return Shares((filled + shift) * HIGHEST / len(numbers), statuses, float(shift))


def summary(shares: Sequence[Shares]) -> dict[str, float]:
    """Counts of turns by status, and how many trajectories were moved to their score, and how far."""
    statuses = Counter(status for found in shares for status in found.statuses)
    shifts = np.abs([found.shift for found in shares])
    return {
        **{f"turns_{status}": statuses[status] for status in STATUSES},
        "trajectories_moved": int((shifts > SUM_TOLERANCE).sum()),
        "mean_move": float(shifts.mean()) if len(shifts) else 0.0,
    }
