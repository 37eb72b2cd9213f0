"""Blinded sheets for human raters: making them, the key that unblinds them, and reading those that come back.

A sheet is a table with a row for each pair of responses, in an order and with sides of its own. It holds nothing from
which the sides could be told: which response is whose stands in the key alone.
"""

import csv
import hashlib
import hmac
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apps.judge.page import render_page
from apps.judge.pairs import ANSWERS, CRITERIA, Pair, read_table
from geli.run.errors import UserError
from geli.run.files import atomic_path, private_folder, read_json_or_empty, require_empty_folder

TEXTS = ("conversation", "A", "B")
COLUMNS = ("sheet", "item", *TEXTS, *CRITERIA)
LEAST_ANSWERED = 0.5  # of a sheet that counts

# ---------------------------------------------------------------------------------------------------------------------
# Making sheets


@dataclass(frozen=True)
class Key:
    """What unblinds the sheets. Raters must not see it.

    Attributes:
        compare: what the first and the second response are. secret: hex, the secret of `seal`.
        rows: of the responses' file, sorted; the prompts that all sheets have.
        sheets: id of a sheet -> {"rater": name, "items": {id of an item: {"row", "first_is": "A" or "B", "seal"}}}.
    """

    compare: list[str]
    secret: str
    rows: list[int]
    sheets: dict[str, dict]

    @classmethod
    def read(cls, path: Path) -> "Key":
        """The key in a file that `write_sheets` wrote."""
        try:
            return cls(**read_json_or_empty(path))
        except TypeError:
            raise UserError(f"{path}: expected the key.json that `make` wrote, found no key") from None


def seal(secret: str, row: dict[str, str]) -> str:
    """A keyed hash of a sheet's row without its answers, in which spaces and line ends, which spreadsheet programs
    change, count alike."""
    texts = [" ".join(row[name].split()) for name in ("sheet", "item", *TEXTS)]
    return hmac.new(bytes.fromhex(secret), json.dumps(texts).encode(), hashlib.sha256).hexdigest()


def make_sheets(
    pairs: Sequence[Pair], raters: int, compare: Sequence[str], rng: random.Random | None = None
) -> tuple[dict[str, list[dict[str, str]]], Key]:
    """The empty sheets (rater -> rows), and their key.

    Args:
        rng: draws orders, sides, ids and the secret. It must not be one that a rater could repeat, so the default is
            the operating system's.
    """
    rng = rng or random.SystemRandom()
    key = Key(list(compare), rng.randbytes(16).hex(), [pair.row for pair in pairs], {})
    sheets = {}
    for rater in (f"rater_{number}" for number in range(1, raters + 1)):
        sheet, rows, items = rng.randbytes(8).hex(), [], {}
        for pair in rng.sample(pairs, len(pairs)):
            item, first_is = rng.randbytes(8).hex(), rng.choice("AB")
            texts = dict(zip(TEXTS, pair.sides(first_is), strict=True))
            rows.append({"sheet": sheet, "item": item, **texts, **dict.fromkeys(CRITERIA, "")})
            items[item] = {"row": pair.row, "first_is": first_is, "seal": seal(key.secret, rows[-1])}
        sheets[rater], key.sheets[sheet] = rows, {"rater": rater, "items": items}
    return sheets, key


def sheet_csv(rows: Sequence[dict[str, str]]) -> str:
    """A sheet as CSV, with every cell in quotes; the page exports the same. The first character tells spreadsheet
    programs that it is UTF-8."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return "\ufeff" + text.getvalue()


def write_sheets(out: Path, sheets: dict[str, list[dict[str, str]]], key: Key) -> list[Path]:
    """Writes `key.json`, and for each rater a CSV and an HTML file in `sheets/`, into a new folder. All hold
    conversations or unblind them, so only their owner can read them."""
    require_empty_folder(out)  # a key that is overwritten takes its sheets' answers with it
    private_folder(out)
    files = {out / "key.json": json.dumps(asdict(key), indent=1)}
    for rater, rows in sheets.items():
        files[out / "sheets" / f"{rater}.csv"] = sheet_csv(rows)
        files[out / "sheets" / f"{rater}.html"] = render_page(rater, COLUMNS, rows)
    for path, content in files.items():
        with atomic_path(path, private=True) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="")
    return list(files)


# ---------------------------------------------------------------------------------------------------------------------
# Reading filled sheets


class FilledSheet(NamedTuple):
    """A sheet that came back.

    Attributes:
        votes: (prompts, criteria), 1 for the first response, 0 for no difference, -1 for the second, NaN without an
            answer. missing: answers that are empty. unreadable: answers that are none of `ANSWERS`.
    """

    path: Path
    rater: str
    votes: np.ndarray
    missing: int
    unreadable: int

    @property
    def answered(self) -> float:
        """The share of questions with an answer."""
        return 1 - (self.missing + self.unreadable) / self.votes.size


def read_sheet(path: Path, key: Key) -> FilledSheet:
    """A filled sheet, unblinded.

    Raises:
        UserError: if anything but the answers is not as it was written.
    """
    rows = read_table(path, COLUMNS)
    ids = sorted({row["sheet"] for row in rows})
    if len(ids) != 1 or ids[0] not in key.sheets:
        raise UserError(f"{path}: expected a sheet of this key, found the sheet ids {ids}")
    items = key.sheets[ids[0]]["items"]
    counts = Counter(row["item"] for row in rows)
    for what, found in {
        "unknown": counts.keys() - items.keys(),
        "missing": items.keys() - counts.keys(),
        "repeated": {item for item, count in counts.items() if count > 1},
        "changed": {row["item"] for row in rows if seal(key.secret, row) != items.get(row["item"], {}).get("seal")},
    }.items():
        if found:
            raise UserError(f"{path}: {len(found)} items are {what}, such as {min(found)}")
    votes = np.full((len(key.rows), len(CRITERIA)), np.nan)
    missing = unreadable = 0
    answers = {answer.casefold(): vote for answer, vote in ANSWERS.items()}
    for row in rows:
        item = items[row["item"]]
        for place, name in enumerate(CRITERIA):
            answer = row[name].strip().casefold()
            if answer in answers:
                votes[key.rows.index(item["row"]), place] = answers[answer] * (1 if item["first_is"] == "A" else -1)
            missing, unreadable = missing + (not answer), unreadable + (answer not in ("", *answers))
    return FilledSheet(path, key.sheets[ids[0]]["rater"], votes, missing, unreadable)


def read_sheets(paths: Sequence[Path], key: Key) -> tuple[list[FilledSheet], list[str]]:
    """The sheets that count, one a rater, and for each other what is wrong with it.

    Left out are sheets that `read_sheet` refuses, those with fewer than `LEAST_ANSWERED` of their answers, all but one
    of a rater's sheets with the same answers, and all of a rater's sheets with different answers.
    """
    of_rater: dict[str, list[FilledSheet]] = {}
    left_out = []
    for path in paths:
        try:
            sheet = read_sheet(path, key)
        except UserError as error:
            left_out.append(str(error))
            continue
        if sheet.answered < LEAST_ANSWERED:
            left_out.append(f"{path}: {sheet.answered:.0%} of its questions have an answer, less than half")
        else:
            of_rater.setdefault(sheet.rater, []).append(sheet)
    counted = []
    for rater, (sheet, *others) in of_rater.items():
        if all(np.array_equal(sheet.votes, other.votes, equal_nan=True) for other in others):
            counted.append(sheet)
            left_out += [f"{other.path}: the same answers of {rater} as in {sheet.path}" for other in others]
        else:
            names = ", ".join(str(one.path) for one in (sheet, *others))
            left_out.append(f"{names}: different answers of {rater}; give the one that counts")
    return counted, left_out
