"""Files as `train_rl_GELI.py --generate` writes them, and raters whose preferences are planted."""

import csv
from collections.abc import Callable
from pathlib import Path

from apps.judge.pairs import ANSWERS, CRITERIA
from apps.judge.sheets import Key

INSTRUCTION = "You are AI, in a casual social conversation with a User. Be polite."


def write_responses(path: Path, prompts: int, **columns: str) -> Path:
    """A file of responses that say which prompt and column they are of; `columns` are other texts."""
    texts = {"human": "person of {}", "base": "before, {}", "tuned": "after, {}", **columns}
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", *texts])
        for i in range(prompts):
            prompt = f"{INSTRUCTION} User: I saw <b>{i}</b> ducks, “really”.  AI: Oh!  User: Yes, {i}. AI:"
            writer.writerow([prompt, *(text.format(i) for text in texts.values())])
    return path


def fill(rows: list[dict[str, str]], key: Key, vote: Callable[[int, str], int | None]) -> list[dict[str, str]]:
    """A sheet filled in by a rater whose vote (1: for the first column) on a prompt and criterion is known; None leaves
    it out."""
    letters = {value: letter for letter, value in ANSWERS.items()}
    filled = []
    for row in rows:
        item = key.sheets[row["sheet"]]["items"][row["item"]]
        votes = {name: vote(item["row"], name) for name in CRITERIA}
        sign = 1 if item["first_is"] == "A" else -1
        filled.append(row | {name: letters[sign * v] for name, v in votes.items() if v is not None})
    return filled
