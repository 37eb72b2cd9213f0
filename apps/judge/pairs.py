"""What is judged: pairs of responses to the same prompt, and the eight questions about them."""

import csv
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from geli.run.errors import UserError, first_line

# criteria of the paper (Lee et al., EMNLP 2024, human evaluation) -> the question that is asked
CRITERIA = {
    "emotional connection": "Which response connects better with the user's feelings?",
    "positivity": "Which response is more positive?",
    "social understanding": "Which response understands the user and the situation better?",
    "overall quality": "Which response is better overall?",
    "interestingness": "Which response is more interesting?",
    "talk again": "After which response would you rather talk again?",
    "specific and sensible": "Which response fits this conversation more specifically and makes more sense?",
    "fluent": "Which response is more fluent, and repeats itself less?",
}
ANSWERS = {"A": 1, "tie": 0, "B": -1}  # -> vote for response A
TURN = re.compile(r"(?:^|\s)(User|AI):(?=\s|$)")  # the beginning of a turn in a prompt


class Pair(NamedTuple):
    """Two responses to one prompt.

    Attributes:
        row: of the file with responses, from 0. conversation: the turns before, a line each.
        first, second: the responses of the two columns that are compared.
    """

    row: int
    conversation: str
    first: str
    second: str

    def sides(self, first_is: str) -> tuple[str, str, str]:
        """(conversation, response A, response B), with the first response as `first_is`."""
        both = (self.first, self.second) if first_is == "A" else (self.second, self.first)
        return (self.conversation, *both)


def conversation_of(prompt: str) -> str:
    """The turns of a prompt, a line each: without the instruction before them and the ` AI:` after them. A prompt in
    which no turn is marked stays as it is."""
    _, *parts = TURN.split(prompt)
    said = zip(parts[::2], (" ".join(text.split()) for text in parts[1::2]), strict=True)
    return "\n".join(f"{who}: {text}" for who, text in said if text) if parts else prompt.strip()


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        UserError: if it is not one, or lacks one of the `columns`.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, found = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file in UTF-8, found another ({first_line(error)})") from None
    if missing := [name for name in columns if name not in found]:
        raise UserError(f"{path}: expected columns separated by commas, among them {missing[0]!r}, found {found}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} has not as many cells as there are columns ({len(found)})")
    return rows


def read_pairs(path: Path, compare: Sequence[str], number: int, seed: int) -> list[Pair]:
    """`number` pairs of a file that `--generate` wrote, drawn by `seed`, in the order of the file.

    Args:
        compare: the columns of the first and the second response.
    """
    if len({*compare, "prompt"}) < 3:
        raise UserError(f"--compare {' '.join(compare)}: two different columns of responses are expected")
    rows = read_table(path, ["prompt", *compare])
    if len(rows) < number:
        raise UserError(f"{path}: expected at least {number} prompts, found {len(rows)}; give --prompts {len(rows)}")
    pairs = []
    for place in sorted(random.Random(seed).sample(range(len(rows)), number)):
        first, second = (rows[place][name].strip() for name in compare)
        pairs.append(Pair(place, conversation_of(rows[place]["prompt"]), first, second))
    return pairs
